"""The functions people call: each checks its arguments, picks the fused kernel or the plain-torch
reference, and is a custom op under torch.compile. Their code is in kernels/, a file each.

impl  "auto"       our kernel: Triton's on CUDA, the compiled extension's everywhere; the reference
                   where there is none, with a warning if it should be there; attention by a table
      "fused"      our kernel, or a RuntimeError with the command that mends it
      "reference"  plain torch
The environment variable DDPM_FAST_IMPL replaces "auto". With DDPM_FAST_CHECK=1 the values of
arguments on a CUDA device are checked as those on the CPU are, which makes the host wait (only
group_norm_silu never looks into its rng).
"""

from ddpm_fast.kernels.attention.op import attention
from ddpm_fast.kernels.dropout.op import dropout
from ddpm_fast.kernels.group_norm_silu.op import group_norm_silu
from ddpm_fast.kernels.philox.op import philox_normal, philox_uniform, philox_words
from ddpm_fast.kernels.posterior_step.op import posterior_step
from ddpm_fast.kernels.q_sample.op import q_sample

__all__ = [
    "attention",
    "dropout",
    "group_norm_silu",
    "philox_normal",
    "philox_uniform",
    "philox_words",
    "posterior_step",
    "q_sample",
]
