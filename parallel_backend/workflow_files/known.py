"""Node classes that a parallel MODEL is known to run with: of ComfyUI's core, of this pack, and the most shared of others."""

from __future__ import annotations

LOADERS = frozenset(
    [
        "CheckpointLoaderSimple",
        "CheckpointLoader",
        "unCLIPCheckpointLoader",
        "UNETLoader",
        "DiffusersLoader",
        "ImageOnlyCheckpointLoader",
    ]
)
OURS = frozenset(["LoadParallelMMDiT", "LoadParallelUNet", "LoadParallelCheckpoint"])
PARALLELIZE = "ParallelizeModel"

_SAMPLERS = (
    "KSampler KSamplerAdvanced SamplerCustom SamplerCustomAdvanced ParallelSampler CFGGuider BasicGuider DualCFGGuider "
    "DualModelGuider PerpNegGuider BasicScheduler BetaSamplingScheduler SDTurboScheduler SamplingPercentToSigma AddNoise SamplerSASolver "
    "CheckpointSave ModelSave LoraSave"
)
_ON_A_MODEL = (
    "LoraLoader LoraLoaderModelOnly LoraModelLoader ModelMergeSimple ModelMergeBlocks ModelMergeSubtract ModelMergeAdd ModelMergeSDXL "
    "ModelMergeSD3_2B ModelMergeSD35_Large ModelSamplingDiscrete ModelSamplingContinuousEDM ModelSamplingContinuousV ModelSamplingSD3 "
    "ModelSamplingAuraFlow ModelSamplingFlux RescaleCFG PerpNeg DifferentialDiffusion Mahiro CFGZeroStar CFGNorm FreSca APG TCFG "
    "EasyCache LazyCache FrequencyDecoupledGuidance MomentumGuidance SlidingModeControlCFG CFGLimiterGuider RescaleCFGPost DynamicThresholdingSimplePost "
    "DynamicThresholdingPost RenormCFGPost TCFGAdvanced SkipFirstStepCFG CADSPPM EpsilonScalingPPM CFGOverride RenormCFG TemporalScoreRescaling ContextWindowsManual LatentApplyOperationCFG ComfySwitchNode LazySwitchKJ"
)
# Inside the model: extras of the ranks stand for them, see nodes/hung.
_INSIDE = (
    "FreeU FreeU_V2 PatchModelAddDownscale HyperTile SelfAttentionGuidance PerturbedAttentionGuidance NAGuidance SkipLayerGuidanceSD3 "
    "SkipLayerGuidanceDiT SkipLayerGuidanceDiTSimple UNetSelfAttentionMultiply UNetCrossAttentionMultiply UNetTemporalAttentionMultiply "
    "PerturbedAttention SmoothedEnergyGuidanceAdvanced SlidingWindowGuidanceAdvanced AttentionCouplePPM CLIPNegPip ParallelStepCache "
    "IPAdapter IPAdapterAdvanced IPAdapterBatch IPAdapterFaceID IPAAdapterFaceIDBatch IPAdapterTiled IPAdapterTiledBatch IPAdapterEmbeds "
    "IPAdapterEmbedsBatch IPAdapterStyleComposition IPAdapterStyleCompositionBatch IPAdapterMS IPAdapterClipVisionEnhancer "
    "IPAdapterClipVisionEnhancerBatch IPAdapterFromParams IPAdapterPreciseStyleTransfer IPAdapterPreciseStyleTransferBatch "
    "IPAdapterPreciseComposition IPAdapterPreciseCompositionBatch IPAdapterUnifiedLoader IPAdapterUnifiedLoaderFaceID "
    "IPAdapterUnifiedLoaderCommunity ApplyInstantID ApplyInstantIDAdvanced InstantIDAttentionPatch InstantIdAdapterApply ApplyPulid "
    "ApplyPulidAdvanced ApplyIPAdapterSD3 TomePatchModel TGateApplySimple TGateApplyAdvanced ReferenceOnlySimple "
    "StyleAlignedBatchAlign StyleAlignedReferenceSampler StyleAlignedSampleReferenceLatents ApplyRAUNet ApplyRAUNetSimple "
    "ApplyMSWMSAAttention ApplyMSWMSAAttentionSimple PLADIS TokenPerturbationGuidance NormalizedAttentionGuidance FreeU2PPM NAGGuider "
    "NAGCFGGuider KSamplerWithNAG SamplerCustomWithNAG"
)
_ON_CONDITIONING = (
    "CLIPTextEncode CLIPTextEncodeSDXL CLIPTextEncodeSDXLRefiner CLIPTextEncodeSD3 CLIPTextEncodeControlnet ConditioningAverage "
    "ConditioningCombine ConditioningConcat ConditioningMultiply ConditioningSetArea ConditioningSetAreaPercentage "
    "ConditioningSetAreaStrength ConditioningSetMask ConditioningZeroOut ConditioningSetTimestepRange unCLIPConditioning "
    "InpaintModelConditioning InstructPixToPixConditioning ReferenceLatent PhotoMakerEncode ConditioningSetProperties ConditioningSetPropertiesAndCombine "
    "PairConditioningSetProperties PairConditioningSetPropertiesAndCombine ConditioningSetDefaultCombine PairConditioningSetDefaultCombine "
    "PairConditioningCombine LoadConditioning DemoCaption SaveConditioning"
)
# Their residuals go to the ranks, or the ranks compute them; of packs too.
_CONTROLNETS = (
    "ControlNetApply ControlNetApplyAdvanced ControlNetApplySD3 ControlNetInpaintingAliMamaApply SetUnionControlNetType ControlNetLoader "
    "DiffControlNetLoader LoadParallelControlNet ACN_AdvancedControlNetApply ACN_AdvancedControlNetApply_v2 ACN_AdvancedControlNetApplySingle "
    "ACN_AdvancedControlNetApplySingle_v2 ControlNetLoaderAdvanced ACN_ControlNetLoaderAdvanced ACN_ControlNet++LoaderSingle "
    "ACN_ControlNet++LoaderAdvanced DiffControlNetLoaderAdvanced ACN_DiffControlNetLoaderAdvanced ApplyInstantIDControlNet"
)
# Of packs: they call core's samplers, hang LoRA, or only hand on what they are given.
_OF_PACKS = (
    "FaceDetailer FaceDetailerPipe DetailerForEach DetailerForEachPipe UltimateSDUpscale UltimateSDUpscaleNoUpscale ToBasicPipe "
    "FromBasicPipe FromBasicPipe_v2 ToDetailerPipe ToDetailerPipeSDXL KSamplerAdvancedProvider KSamplerProvider LayeredDiffusionApply "
    "BNK_CLIPTextEncodeAdvanced SDXLPromptStyler smZ_CLIPTextEncode"
)
_WITH_SPACES = (
    "KSampler (Efficient); KSampler Adv. (Efficient); KSampler SDXL (Eff.); KSampler //Inspire; KSamplerAdvanced //Inspire; "
    "Efficient Loader; Eff. Loader SDXL; Power Lora Loader (rgthree); Lora Loader Stack (rgthree); Lora Loader (pysssss); "
    "LoraLoader|pysssss; CR Apply LoRA Stack; CR LoRA Stack; LoRA Stacker; Context (rgthree); Context Big (rgthree); "
    "Context Switch (rgthree); Any Switch (rgthree); Checkpoint Loader with Name (Image Saver); ConditioningAverage ; "
    "AttentionCouple|cgem156; easy a1111Loader; easy comfyLoader; easy fullLoader; easy pipeIn; easy pipeOut; easy pipeEdit; easy preSampling; "
    "easy preSamplingAdvanced; easy preSamplingNoiseIn; easy preSamplingCustom; easy kSampler; easy fullkSampler; easy hiresFix; "
    "easy preDetailerFix; easy detailerFix; ttN pipeLoader; ttN pipeLoader_v2; ttN pipeLoaderSDXL; ttN pipeKSampler; ttN pipeKSampler_v2; "
    "ttN pipeKSamplerAdvanced; ttN pipeKSamplerSDXL; ttN pipeLoraStack; ttN pipeIN; ttN pipeOUT; ttN pipeEDIT; "
    "Control Net Stacker; Apply ControlNet Stack; CR Apply ControlNet; CR Multi-ControlNet Stack; CR Apply Multi-ControlNet; "
    "easy controlnetLoader; easy controlnetLoaderADV; easy controlnetLoader++; easy controlnetStack; easy controlnetStackApply; "
    "KSamplerWithNAG (Advanced); Guidance Limiter"
)
RUN = (
    LOADERS
    | OURS
    | {PARALLELIZE}.union(
        _WITH_SPACES.split("; "),
        *(names.split() for names in (_SAMPLERS, _ON_A_MODEL, _INSIDE, _ON_CONDITIONING, _CONTROLNETS, _OF_PACKS)),
    )
)
