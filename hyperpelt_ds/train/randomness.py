"""The random number generators of this process: seeded, written down as JSON, and set back. It knows no files."""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import torch

from hyperpelt_ds import dist


def seed(*parts: int) -> None:
    """Seeds every generator from numbers. Hashed, so that seeds 0 and 1 on ranks 1 and 0 are not the same stream."""
    own = int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def state() -> dict[str, Any]:
    """All generators as they are, JSON-able, about 13 KB."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, _encode(np.array(numbers, np.uint32)), gauss],
        "numpy": [kind, _encode(np.asarray(keys, np.uint32)), *rest],
        "torch": _encode(torch.get_rng_state().numpy()),
        "cuda": _encode(torch.cuda.get_rng_state().numpy()) if dist.has_gpu() else None,
    }


def restore(saved: dict[str, Any]) -> None:
    """Sets all generators back to a `state()`; that of the GPU stays as it is if one of the two had none."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(_decode(numbers, np.uint32).tolist()), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, _decode(keys, np.uint32), *rest))
    torch.set_rng_state(torch.from_numpy(_decode(saved["torch"], np.uint8)))
    if saved["cuda"] is not None and dist.has_gpu():
        torch.cuda.set_rng_state(torch.from_numpy(_decode(saved["cuda"], np.uint8)))


def _encode(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _decode(text: str, kind: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).copy()
