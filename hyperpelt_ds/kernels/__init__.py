"""The four products that applying generated weights comes down to, each behind one function.

    generate           hyper-embeddings of all sites and distinct conditions -> weights, one matrix product
    adapter            bottleneck adapters of a mixed batch, every sample with its own condition's weights
    low_rank           low-rank deltas of a mixed batch, likewise
    prefix_attention   attention with every sample's own prefix rows before its keys and values

`regenerate.py` makes weights chunk by chunk where they do not fit; `plan` says what all of it will cost.
Conditions come deduplicated, with a BatchIndex that says which sample uses which: no loop over tasks or samples, no
copy per token. This file set knows tensors and indices only: no model, no task, no site. An op with more than one
backend is a folder: the contract and its checks, the reference that is short enough to be believed, the torch path,
the Triton kernels; `dispatch.py` picks by call.
"""

from hyperpelt_ds.kernels.adapter import adapter
from hyperpelt_ds.kernels.generate import generate
from hyperpelt_ds.kernels.index import BatchIndex, index_batch
from hyperpelt_ds.kernels.low_rank import low_rank
from hyperpelt_ds.kernels.plan import Plan, plan
from hyperpelt_ds.kernels.prefix_attention import prefix_attention

__all__ = ["BatchIndex", "Plan", "adapter", "generate", "index_batch", "low_rank", "plan", "prefix_attention"]
