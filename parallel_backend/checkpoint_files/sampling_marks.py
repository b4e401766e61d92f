"""What single files of UNets hold beside the weights: it says what the model's output means."""

from __future__ import annotations

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# Of models that know any sigma of a range: Playground 2.5, and CosXL.
EDM_PLAIN, EDM_V = ("edm_mean", "edm_std"), ("edm_vpred.sigma_max", "edm_vpred.sigma_min")
