"""hyperpelt_ds: one small trainable hypernetwork adapts one large frozen sequence-to-sequence model to many tasks."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when a model is really wanted, so that `--help` stays quick."""
    if name == "load":
        from hyperpelt_ds.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
