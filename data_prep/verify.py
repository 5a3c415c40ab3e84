"""Finds all damage of a data set. A thin command: what is looked at, and how, is hyperpelt_ds/data/verify.py's."""

from __future__ import annotations

import sys
import time
from collections import Counter

from parts.command_line import run

from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.verify import faults_by_shard
from hyperpelt_ds.tasks import adopt_all
from hyperpelt_ds.terminal import progress

SHOWN, SHARDS_SHOWN = 50, 30


def verify(*, manifest: str, all: bool = False, cache: str = "", cache_gb: float = 100.0) -> None:
    """Re-read a whole data set and list all that is damaged in it: shards, indexes, samples, image features.

    The exit code is 0 if there is no damage, 1 if there is some, and 2 if the command could not be understood.

    Examples:
        python data_prep/verify.py data/demo/manifest.json
        python data_prep/verify.py data/vqa/manifest.json --all > damage.txt
        python data_prep/verify.py https://example.org/vqa/manifest.json --cache ~/.cache/hyperpelt_ds

    Args:
        manifest: a manifest.json, by path or URL; the flag's name may be left out
        all: show every fault, and not only the first 50
        cache: for a URL: folder to keep shards in while they are read; "" reads each sample over the network
        cache_gb: size that this folder may grow to, in 10^9 bytes
    """
    start = time.monotonic()
    data = Manifest.load(manifest, cache or None, int(cache_gb * 1e9), check_files=False)
    adopt_all(data.tasks, data.about)
    shards = list(data.all_shards())
    counts: Counter[str] = Counter()
    for shard, found in progress(faults_by_shard(data), "files", len(shards) + bool(data.features)):
        for fault in found:
            if all or counts.total() < SHOWN:
                _say(f"shard {fault.shard}{f', key {fault.key!r}' if fault.key else ''}: {fault.reason}")
            counts[shard] += 1
    images = sum(shard.samples for shard in data.features.shards) if data.features else 0
    samples, size = sum(shard.samples for shard in shards) - images, sum(shard.bytes for shard in shards)
    print(
        f"\n{data.path}: {len(shards):,} shards, {samples:,} samples{f' and {images:,} images' if images else ''}, "
        f"{size / 1e6:,.1f} MB, read in {time.monotonic() - start:.0f} s"
    )
    if not counts:
        print(
            "no damage found\nnext: train on it: deepspeed launch/train.py --recipe NAME "
            f"--ds_config ds_configs/zero2.json (on CPUs zero2_cpu.json) --run_dir runs/NAME data.manifest={data.path}"
        )
        return
    print(f"{counts.total():,} faults in {len(counts):,} files")
    if counts.total() > SHOWN and not all:
        for shard, count in counts.most_common(SHARDS_SHOWN):
            print(f"  {count:>9,}  {shard}")
        if len(counts) > SHARDS_SHOWN:
            print(f"  and {len(counts) - SHARDS_SHOWN:,} more files; --all shows every fault")
    print(
        "next: build these shards again or copy them anew. Training would leave the damaged samples out, and stop once "
        "they are more than data.max_holes"
    )
    sys.exit(1)


def _say(text: str) -> None:
    """A line of its own, also where a terminal shows progress."""
    print(f"\r{text:<100}" if sys.stdout.isatty() else text, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--manifest")
    run(verify)
