"""Frozen image encoders and the pictures they are given: stored features and new images go through the same code."""

from hyperpelt_ds.vision.encoders import VisionEncoder, fingerprint, load_encoder
from hyperpelt_ds.vision.images import Picture, UnreadableImage
from hyperpelt_ds.vision.lite import EfficientNetLite0

__all__ = ["EfficientNetLite0", "Picture", "UnreadableImage", "VisionEncoder", "fingerprint", "load_encoder"]
