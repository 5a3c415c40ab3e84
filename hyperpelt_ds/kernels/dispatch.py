"""Which backend runs a call: by the call's device, or the one that is asked for, and never another one quietly.

    reference   plain torch as the formula reads, weights copied for every sample; any device and type, twice
                differentiable
    torch       slices of weights and samples; needs the batch's grouping on the host
    triton      fused kernels for CUDA

`auto` is triton for tensors on CUDA and torch elsewhere; what the backend of the device does not do at all (a norm, odd
sizes, float64) is the reference's, by the rules below and not by what happens to fail.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from torch import Tensor

from hyperpelt_ds.kernels.errors import KernelUnavailableError

_HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "reference", "torch", "triton")

Check = Callable[[], Exception | None]
"""What keeps a backend from running a call, or None."""


def choose(asked: str, x: Tensor, torch_check: Check, triton_check: Check) -> str:
    """The backend for a call on `x`; raises what keeps the one that is asked for from running it."""
    if asked not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {asked!r}")
    if asked == "reference":
        return asked
    if asked == "auto":
        if x.is_cuda:
            problem = triton_missing()
            if problem is not None:
                raise problem
            return "reference" if triton_check() else "triton"
        return "reference" if torch_check() else "torch"
    problem = torch_check() if asked == "torch" else triton_unusable(x) or triton_check()
    if problem is not None:
        raise problem
    return asked


def triton_unusable(x: Tensor) -> Exception | None:
    """Why Triton kernels cannot run on `x`, or None. Its interpreter runs them on the CPU."""
    problem = triton_missing()
    if problem is None and not x.is_cuda and not interpreted():
        return KernelUnavailableError(
            f'backend="triton": x is on {x.device}, expected CUDA (or TRITON_INTERPRET=1 set before Triton is imported)'
        )
    return problem


def triton_missing() -> Exception | None:
    if not _HAS_TRITON:
        return KernelUnavailableError('backend="triton": the package triton is not installed; backend="reference" runs')
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
