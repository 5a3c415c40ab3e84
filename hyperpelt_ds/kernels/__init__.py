"""The four products that applying generated weights comes down to, each behind one function.

    generate           hyper-embeddings of all sites and distinct conditions -> weights, one matrix product
    adapter            bottleneck adapters of a mixed batch, every sample with its own condition's weights
    low_rank           low-rank deltas of a mixed batch, likewise
    prefix_attention   attention with every sample's own prefix rows before its keys and values

This file set knows tensors and indices only: no model, no task, no site. It is plain torch; every function already
has the shape a fused kernel needs (deduplicated conditions plus an index, no loop over tasks or samples, no copy
per token), so that a kernel can be put behind the same call.
"""

from hyperpelt_ds.kernels.adapter import adapter
from hyperpelt_ds.kernels.generate import generate
from hyperpelt_ds.kernels.low_rank import low_rank
from hyperpelt_ds.kernels.prefix_attention import prefix_attention

__all__ = ["adapter", "generate", "low_rank", "prefix_attention"]
