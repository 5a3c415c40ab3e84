"""Trainable embeddings in, weights of every site out. Knows no backbone, no tokenizer, no file."""

from hyperpelt_ds.hypernet.hypernetwork import HyperNetwork

__all__ = ["HyperNetwork"]
