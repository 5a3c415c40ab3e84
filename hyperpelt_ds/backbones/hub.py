"""What to say when a published model cannot be had. Knows the hub's cache; nothing of what the model is for.

Ranks of one node that start together fetch a model once: huggingface_hub locks each file of its cache while it loads
it, and who waited finds it there (tests/test_hub.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants


def cannot_load(field: str, where: str, error: Exception) -> ValueError:
    """The error for the configuration's `field` that names a local folder or hub id `where` that cannot be loaded."""
    known = f"{field}: cannot load {where!r}: "
    if Path(where).exists() or not constants.is_offline_mode():
        return ValueError(known + str(error).splitlines()[0])
    return ValueError(
        f"{known}HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not have all of it; run "
        f"`HF_HUB_OFFLINE=0 hf download {where}` where there is a network, once for each cache (HF_HOME says where it "
        f"is), or give a local folder"
    )


def check_whole(field: str, where: str, missing: Iterable[str]) -> None:
    """Raises ValueError for weights that a folder or hub id lacks: transformers would draw them at random, others in
    every process."""
    lacking = sorted(missing)
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"{field}: {where} lacks the weights {', '.join(lacking[:3])}{more}, which are never made up; is it "
            "another kind of model (an encoder alone, one without its output layer)?"
        )
