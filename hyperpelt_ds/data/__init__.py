"""Shards on disk, the order samples are drawn in, and the batches of a run."""
