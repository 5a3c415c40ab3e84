"""Builds the text data sets that a trained run is transferred to: CB, BoolQ, IMDB, PAWS, TREC, SciTail, Yelp polarity.

The development sets of CB and BoolQ and the test set of IMDB are halved into validation and test; PAWS and SciTail have
official splits; TREC and Yelp hold out training samples for validation and are tested on their test sets. All of the
training set is written. Few-shot runs draw their own samples of it (data.shots, by train.seed; see launch/transfer.py),
so that there is one rule for it; `--shots` writes down which ones these are.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from parts.building import build, locked
from parts.command_line import at_least, chosen, run
from parts.places import SHOTS
from parts.text_sets import TextSet, read

SETS = {
    "cb": TextSet("aps/super_glue", "cb", ("premise", "hypothesis"), item=("premise",), halved="validation"),
    "boolq": TextSet("aps/super_glue", "boolq", ("question", "passage"), item=("passage",), halved="validation"),
    "imdb": TextSet("stanfordnlp/imdb", "plain_text", ("text",), halved="test"),
    "paws": TextSet(
        "google-research-datasets/paws",
        "labeled_final",
        ("sentence1", "sentence2"),
        validation="validation",
        test={"test": "test"},
    ),
    "trec": TextSet(
        "CogComp/trec",
        "default",
        ("text",),
        label="coarse_label",
        test={"test": "test"},
        held_out=500,
        exported=True,
    ),
    "scitail": TextSet(
        "allenai/scitail",
        "snli_format",
        ("sentence1", "sentence2"),
        label="gold_label",
        validation="validation",
        test={"test": "test"},
    ),
    "yelp_polarity": TextSet("fancyzhx/yelp_polarity", "plain_text", ("text",), test={"test": "test"}, held_out=1000),
}


def transfer(
    *,
    out: str,
    source: str = "",
    revision: str = "",
    tasks: str = "",
    shots: str = "",
    seeds: str = "0,1,2,3,4",
    validation: int = 0,
    seed: int = 42,
    limit: int = 0,
    shard_size: int = 4096,
) -> None:
    """Write the transfer tasks (cb, boolq, imdb, paws, trec, scitail, yelp_polarity) into a data set.

    Other tasks in it stay as they are. Killed at any moment, it leaves a data set of whole shards, in which a task that
    was being replaced may be missing: give the command again.

    Examples:
        python data_prep/transfer.py --out data/transfer
        python data_prep/transfer.py --out data/transfer --tasks cb,boolq --shots 16,100 --seeds 0,1,2
        python data_prep/transfer.py --out data/transfer --tasks imdb --source ~/imdb

    Args:
        out: folder of the data set
        source: another data set of the hub (for one task), or a folder with TASK/SPLIT-*.parquet, TASK/CONFIG/... or,
            for one task, just the files
        revision: branch, tag or commit of the hub's data sets
        tasks: some of the tasks; all if left out
        shots: numbers of training samples, separated by commas: the keys of those that a run with data.shots=N and
            train.seed=SEED is trained on go to OUT/shots/TASK.json
        seeds: the seeds of these
        validation: training samples that TREC and Yelp are validated with; 500 and 1,000 if left out
        seed: draws these, and the halves of what is halved
        limit: the first samples of each split only, 0 for all; IMDB's begin with one class
        shard_size: samples in a shard
    """
    at_least(0, limit=limit, validation=validation)
    at_least(1, shard_size=shard_size)
    counts, numbers = _numbers("shots", shots), _numbers("seeds", seeds)
    names = chosen("tasks", tasks, list(SETS))
    splits = read({name: SETS[name] for name in names}, source, revision, validation, seed)
    about = {"command": "transfer", "revision": revision, "validation": validation, "seed": seed, "limit": limit}
    about = {"source": source or {name: SETS[name].repository for name in names}, **about}
    following = (
        f"python launch/transfer.py --run_dir runs/glue_t5_base --new_task {names[0]} --out runs/few/{names[0]} "
        f"--ds_config ds_configs/zero2.json --shots 16,100 data.manifest={Path(out) / 'manifest.json'} "
        "train.steps=200 train.warmup_steps=20 train.global_batch=16"
    )
    build(out, splits, about, shard_size, limit, following)
    if counts:
        _write_shots(Path(out), names, counts, numbers)


def _write_shots(folder: Path, names: list[str], counts: list[int], seeds: list[int]) -> None:
    """folder/shots/TASK.json, number of shots -> seed -> keys; and a line on the labels among them."""
    from hyperpelt_ds.contracts import TRAIN
    from hyperpelt_ds.data.choice import choose
    from hyperpelt_ds.data.manifest import MANIFEST, Manifest, replace
    from hyperpelt_ds.data.reader import Reader

    with locked(folder):
        manifest = Manifest.load(folder / MANIFEST)
        reader = Reader(manifest)
        (folder / SHOTS).mkdir(exist_ok=True)
        for name in names:
            size = manifest.count(name, TRAIN)
            keys: dict[int, dict[int, list[str]]] = {count: {} for count in counts}
            for count in counts:
                for seed in seeds:
                    samples = [
                        reader.sample(name, TRAIN, i) for i in choose(reader, name, TRAIN, size, count, str(seed))
                    ]
                    keys[count][seed] = [sample.key for sample in samples]
                    labels = sorted(Counter(sample.target for sample in samples).items())
                    said = ", ".join(f"{label}: {times}" for label, times in labels)
                    print(f"  {name}, {count} shots, seed {seed}: {len(samples)} samples, labels {said}")
            replace(folder / SHOTS / f"{name}.json", json.dumps(keys, indent=1).encode() + b"\n")


def _numbers(flag: str, value: str) -> list[int]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts) or (flag == "shots" and 0 in map(int, parts)):
        raise ValueError(f"--{flag}: expected whole numbers separated by commas, got {value!r}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run(transfer)
