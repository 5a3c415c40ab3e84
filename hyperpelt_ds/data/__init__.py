"""From stored samples to the batches of a run. Each group imports from itself and from those above it.

bytes       folder (this machine), source, cache, remote (behind a URL)
format      index (what lies where in a tar), lookup (in which shard an image lies), manifest (what there is),
            shards (writes all that)
samples     reader (by position, checked), verify (all damage there is), choice (which samples there are to draw)
batches     order (which sample comes n-th), batching (who computes it, with which others), collate (token ids,
            padding), holes (what cannot be used)
streams     loader (training: endless, exact, resumable), plain (training on what cannot be seeked), evaluation
            (finite), check (a look before the first step)
"""
