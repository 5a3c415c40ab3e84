"""Whether the ranks really are one run: the same packages and code, one folder, one gradient, the same weights.

What the ranks are told (data, configuration, initial weights) is compared where it is known. This file must not know
DeepSpeed, nor what a loss is made of.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

import hyperpelt_ds
from hyperpelt_ds import dist
from hyperpelt_ds.train.engine import Engine
from hyperpelt_ds.train.outcome import Diverged

PACKAGES = ("hyperpelt-ds", "torch", "deepspeed", "transformers", "webdataset", "numpy", "safetensors")

_TOLERANCE = 0.02
"""Of the sum of a gradient's magnitudes: bf16 reductions are off by less, a gradient of one rank alone by more."""


def check_versions() -> None:
    """Raises RuntimeError on every rank if packages or this package's own code differ."""
    dist.agree("the versions of packages", {name: metadata.version(name) for name in PACKAGES})
    digest, root = hashlib.sha256(), Path(hyperpelt_ds.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    dist.agree(f"the code in {root.name}", digest.hexdigest())


def check_shared(folder: Path, patience: float = 15.0) -> None:
    """Raises ValueError on every rank, with the host, if a rank sees another folder under this name than rank 0 does.

    A network's file system may take `patience` seconds to show a new file.
    """
    file, token = folder / ".shared", secrets.token_hex(16)
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(token)
    token = dist.gather(token)[0]
    end, seen = time.monotonic() + patience, _read(file)
    while seen != token and time.monotonic() < end:
        time.sleep(0.2)
        seen = _read(file)
    ranks = dist.gather((seen == token, socket.gethostname()))
    if dist.rank() == 0:
        file.unlink()
    for rank, (same, host) in enumerate(ranks):
        if not same:
            raise ValueError(
                f"run_dir {folder} of rank {rank} on {host} is not the folder that rank 0 on {ranks[0][1]} has under "
                f"this name; all nodes must see the same one"
            )


def _read(file: Path) -> str | None:
    return file.read_text() if file.is_file() else None


class GradientWatch:
    """Notes each rank's own gradients, to be compared with the one that all ranks get together.

    Of each parameter only sums are kept, so nothing large crosses. To be made before a step's first forward pass.
    """

    def __init__(self, model: nn.Module):
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._times = dict.fromkeys(self._parameters, 0)
        self._sums = {name: torch.zeros(2, dtype=torch.float64, device=dist.device()) for name in self._parameters}
        self._hooks = [p.register_hook(self._noting(name)) for name, p in self._parameters.items()]

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self._times[name] += 1
            self._sums[name] += _sums(gradient)

        return note

    def check(self, engine: Engine) -> None:
        """After the step's last backward pass, before its update. Every rank calls it.

        Raises Diverged on every rank if a parameter took part in more micro-batches on one than on another (ZeRO would
        reduce what does not belong together), or if the engine's gradient is not the mean of the ranks' own.
        """
        for hook in self._hooks:
            hook.remove()
        names = list(self._parameters)
        own = torch.stack([self._sums[name] for name in names]).tolist()
        ranks = dist.gather([(self._times[name], *sums) for name, sums in zip(names, own, strict=True)])
        for name, parts in zip(names, zip(*ranks, strict=True), strict=True):
            times, sums, sizes = zip(*parts, strict=True)
            if len(set(times)) > 1:
                raise Diverged(
                    f"{name} took part in {times} micro-batches on ranks 0, 1, ...: it must be as many on all"
                )
            whole = engine.gradient(self._parameters[name])
            if whole is None or not all(times):
                continue
            mean, size = sum(sums) / len(sums), sum(sizes) / len(sizes)
            found = float(_sums(whole)[0])
            if math.isfinite(mean) and math.isfinite(found) and abs(found - mean) > _TOLERANCE * size:
                raise Diverged(
                    f"gradients are not synchronised: that of {name} sums to {found:.4g}, the mean of the ranks' own "
                    f"to {mean:.4g} ({', '.join(f'{value:.4g}' for value in sums)})"
                )


def check_weights(engine: Engine, step: int) -> None:
    """Raises Diverged on every rank, with the parameters, if the ranks' weights differ in any bit."""
    ranks = dist.gather(engine.checksums())
    different = [name for name, number in ranks[0].items() if any(rank[name] != number for rank in ranks)]
    if different:
        some = ", ".join(different[:5])
        raise Diverged(f"after step {step} the ranks hold different weights of {len(different)} parameters: {some}")


def _sums(gradient: Tensor) -> Tensor:
    """The sum of a gradient and of its magnitudes, in float64."""
    gradient = gradient.detach()
    size = torch.linalg.vector_norm(gradient, 1, dtype=torch.float64)
    return torch.stack([gradient.sum(dtype=torch.float64), size])
