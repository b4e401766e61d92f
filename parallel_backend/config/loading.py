"""How a model is held and computed, by name."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16")
# How a rank holds weights of half-precision files, where not in the dtype that it computes in: e4m3 with a scale for each row; or
# every tensor cast to that type, as ComfyUI's weight_dtype casts it.
FP8, CAST_TO = "fp8", ("float8_e4m3fn", "float8_e5m2")
WEIGHTS = (FP8, *CAST_TO)
CELL = 8  # pixels of a latent's cell, each way
# Of a dtype: what suits the file on the cards of all ranks.
AUTO = "auto"
KERNELS = ("auto", "native", "flash", "flash3", "sage", "cudnn", "efficient")
