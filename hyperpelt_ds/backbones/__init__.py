"""Frozen transformers models that take generated weights: the only place that touches transformers' modules."""

from hyperpelt_ds.backbones.base import Backbone
from hyperpelt_ds.backbones.families import random_model
from hyperpelt_ds.backbones.loading import load_backbone
from hyperpelt_ds.backbones.sentence import sentence_vectors

__all__ = ["Backbone", "load_backbone", "random_model", "sentence_vectors"]
