"""What a kernel refuses, by kind: every message names the argument and what was expected of it."""

from __future__ import annotations


class KernelShapeError(ValueError):
    """A shape, size or index that does not fit the other arguments, or that the asked backend cannot run."""


class KernelDtypeError(TypeError):
    """Types of numbers, or devices, that differ between arguments, or that the asked backend cannot run."""


class KernelUnavailableError(RuntimeError):
    """A backend was asked for that this machine or this call cannot run."""
