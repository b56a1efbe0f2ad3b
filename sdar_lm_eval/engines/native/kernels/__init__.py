"""Triton kernels; needs triton.

layers.py            products of few rows, norms, activation, RoPE
attention.py         paged attention
drawing.py           tokens from logits
experts.py           mixtures of experts
hopper.py            products for Hopper GPUs
hopper_attention.py  paged attention for Hopper GPUs
gluon.py             both of these, if Triton can compile them
gpu.py               properties of a GPU that kernels are sized by
"""

import os

# Fuses a product and a sum into one instruction. Triton 3.9 warns that 3.10 does so only if this is set.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
