"""Builds the eight GLUE tasks of the paper's table from the hub's `nyu-mll/glue`, or from a folder with its files.

Splits are the paper's (its section on data): CoLA, MRPC, STS-B and RTE, which are small, have their development set
halved into validation and test; the others hold out 1,000 training samples for validation and are tested on their
development set. MNLI is so validated on held-out training samples and tested on the matched development set; the
mismatched one is a further split, `test_mismatched`. Held-out samples are not trained on, and none of them shares its
item (MNLI's premise, QNLI's question, elsewhere the whole text) with one that is.
"""

from __future__ import annotations

from pathlib import Path

from parts.building import build
from parts.command_line import at_least, chosen, run
from parts.text_sets import TextSet, read

HUB = "nyu-mll/glue"
HELD_OUT = 1000


def _large(config: str, *texts: str, item: tuple[str, ...] = ()) -> TextSet:
    test, unlabelled = {"test": "validation"}, {"official_test": "test"}
    return TextSet(HUB, config, texts, item=item, test=test, held_out=HELD_OUT, unlabelled=unlabelled)


def _small(config: str, *texts: str, item: tuple[str, ...] = ()) -> TextSet:
    return TextSet(HUB, config, texts, item=item, halved="validation", unlabelled={"official_test": "test"})


SETS = {
    "cola": _small("cola", "sentence"),
    "sst2": _large("sst2", "sentence"),
    "mrpc": _small("mrpc", "sentence1", "sentence2"),
    "qqp": _large("qqp", "question1", "question2"),
    "stsb": _small("stsb", "sentence1", "sentence2"),
    "mnli": TextSet(
        HUB,
        "mnli",
        ("premise", "hypothesis"),
        item=("premise",),
        test={"test": "validation_matched", "test_mismatched": "validation_mismatched"},
        held_out=HELD_OUT,
        unlabelled={"official_test": "test_matched", "official_test_mismatched": "test_mismatched"},
    ),
    "qnli": _large("qnli", "question", "sentence", item=("question",)),
    "rte": _small("rte", "sentence1", "sentence2", item=("sentence1",)),
}


def glue(
    *,
    out: str,
    source: str = "",
    revision: str = "",
    tasks: str = "",
    official_test: bool = False,
    validation: int = HELD_OUT,
    seed: int = 42,
    limit: int = 0,
    shard_size: int = 4096,
) -> None:
    """Write GLUE's tasks (glue_cola, glue_sst2, ...) into a data set; other tasks in it stay as they are.

    Examples:
        python data_prep/glue.py --out data/glue
        python data_prep/glue.py --out data/glue --source ~/glue --tasks cola,rte
        python data_prep/glue.py --out data/glue --official_test

    Killed at any moment, it leaves a data set of whole shards, in which a task that was being replaced may be missing:
    give the command again.

    Args:
        out: folder of the data set
        source: another data set of the hub, or a folder with CONFIG/SPLIT-*.parquet; nyu-mll/glue if left out
        revision: branch, tag or commit of the hub's data set
        tasks: some of cola,sst2,mrpc,qqp,stsb,mnli,qnli,rte; all if left out
        official_test: also write the test sets without answers, as splits official_test and official_test_mismatched,
            for launch/predict.py --format glue
        validation: samples of SST-2's, QQP's, MNLI's and QNLI's training sets to validate with
        seed: draws those samples, and the halves of the development sets
        limit: the first samples of each split only, 0 for all
        shard_size: samples in a shard
    """
    at_least(0, limit=limit)
    at_least(1, validation=validation, shard_size=shard_size)
    names = chosen("tasks", tasks.replace("glue_", ""), list(SETS))
    splits = read({f"glue_{name}": SETS[name] for name in names}, source, revision, validation, seed, official_test)
    following = (
        "deepspeed launch/train.py --recipe glue_t5_base --ds_config ds_configs/zero2.json --run_dir runs/glue_t5_base "
        f"data.manifest={Path(out) / 'manifest.json'}"
    )
    about = {"command": "glue", "source": source or HUB, "revision": revision, "validation": validation, "seed": seed}
    build(out, splits, {**about, "limit": limit}, shard_size, limit, following)


if __name__ == "__main__":
    run(glue)
