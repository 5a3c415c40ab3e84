"""Builds a task of a user's own from a table: a column of texts, one of targets, and if there is one, one of images.

The task's record (what it is scored by, its labels) is stored in the data set, since this package has none for it.
"""

from __future__ import annotations

from pathlib import Path

from parts.building import build
from parts.command_line import at_least, run

from hyperpelt_ds import tasks
from hyperpelt_ds.tasks import table as own_task

UNCHECKED = (
    "build it again with some to validate on, a --validation file or --data in place of --train: training chooses the "
    "best weights by them, and does not begin on data without any"
)


def table(
    *,
    out: str,
    task: str,
    data: str = "",
    train: str = "",
    validation: str = "",
    test: str = "",
    source: str = "source",
    target: str = "target",
    image: str = "",
    group: str = "",
    references: str = "",
    item: str = "",
    split_by: str = "",
    image_root: str = "",
    metrics: str = "",
    labels: str = "",
    compare: str = "",
    description: str = "",
    limit: int = 0,
    shard_size: int = 4096,
) -> None:
    """Write a task of your own, from JSONL, CSV, TSV or Parquet files, into a data set; its other tasks stay.

    Examples:
        python data_prep/table.py --out data/mine --task tickets --data tickets.csv --source text --target team
            --labels auto --metrics accuracy
        python data_prep/table.py --out data/mine --task replies --train train.jsonl --validation dev.jsonl
        python data_prep/table.py --out data/mine --task parts --data parts.parquet --source question --target answer
            --image photo --image_root ~/photos --validation 0.1 --test 0.1

    Killed at any moment, it leaves a data set of whole shards, in which a task that was being replaced may be missing:
    give the command again.

    Args:
        out: folder of the data set
        task: the task's name: letters, digits, _ and -
        data: a file that is to be split (NAME.jsonl, .csv, .tsv or .parquet), or a pattern with * for several
        train: in place of --data, a file (or pattern) to train on; --validation and --test are then files too
        validation: share of the items of --data to validate with, 0.05 if left out; or a file beside --train
        test: share of the items of --data to test on, 0.1 if left out; or a file beside --train
        source: column with what is asked; --source= for none (of an image that is only to be described)
        target: column with what is to be answered
        image: column with paths of images, which start at --image_root, or else at the folder of their table
        group: column with the name of a slice that is also scored alone
        references: column with a list of all answers that count, where a metric compares with several
        item: column by which splits are made: equal values never fall into two splits. The source text, if left out,
            or the image where there are images
        split_by: column that names each row's split (train, validation, test, ...), in place of shares
        image_root: where relative paths of images start
        metrics: separated by commas: accuracy, f1, mcc (these need --labels), exact_match, token_f1, pearson,
            spearman, bleu4, cider, vqa_accuracy, gqa_accuracy; accuracy if left out, or exact_match without --labels
        labels: all targets there are, separated by commas (of two, the second is the positive one), or "auto" for those
            that occur; a target that is none of them is an error
        compare: words (case, punctuation and other signs do not count: "-5" is "5") or exact; words if left out, but
            exact for numbers, and where a target has no letter or digit or labels would else be the same
        description: one sentence that says what to do, for runs that are conditioned on descriptions
        limit: the first samples of each split only, 0 for all
        shard_size: samples in a shard
    """
    from parts.table_entries import Table, files_and_shares  # these take seconds to import; --help should not

    from hyperpelt_ds.contracts import TRAIN, VALIDATION
    from hyperpelt_ds.data.shards import check_names
    from hyperpelt_ds.tasks.task import normalise

    check_names(task, TRAIN)
    at_least(0, limit=limit)
    at_least(1, shard_size=shard_size)
    tasks.adopt({task: {}})  # raises for the name of a task of this package, before anything is read
    if not source and not image:
        raise ValueError("--source= needs --image: there would be nothing to answer to")
    columns = {"source": source, "target": target, "image": image, "group": group, "references": references}
    columns |= {"item": item, "split": split_by}
    files, shares = files_and_shares(data, train, validation, test, split_by)
    measures = [name.strip() for name in metrics.split(",") if name.strip()]
    closed = [label.strip() for label in labels.split(",") if label.strip()]
    own = Table(files, shares, columns, Path(image_root) if image_root else None)
    auto = labels == "auto"
    measures = measures or ["accuracy" if closed or auto else "exact_match"]
    record = None if auto else own_task.task(task, measures, closed, description, bool(image), compare)
    seen = own.survey(task, record, measures)
    if record is None or (seen.wordless and not compare):
        closed, compare = (seen.targets if auto else closed), compare or (own_task.EXACT if seen.wordless else "")
        record = own_task.task(task, measures, closed, description, bool(image), compare)
    if seen.same and not closed and record.parse is normalise:
        print(
            f"note: {seen.same[0]!r} and {seen.same[1]!r} are the same words, and so the same answer; "
            "--compare exact tells them apart"
        )
    tasks.adopt({task: own_task.fields(record)})
    about = {"command": "table", "files": files, "shares": shares, "columns": columns, "limit": limit}
    following = _training(task, Path(out) / "manifest.json", bool(image)) if VALIDATION in seen.splits else UNCHECKED
    build(out, {task: {split: own.entries(split) for split in seen.splits}}, about, shard_size, limit, following)


def _training(task: str, manifest: Path, image: bool) -> str:
    """The commands that train on the task alone, for either kind of machine."""
    given = f"--run_dir runs/{task} data.manifest={manifest} data.tasks={task}"
    vision = " VISION" if image else ""
    lines = [
        "train on GPUs, with T5-base from the hub:",
        f"  deepspeed launch/train.py --recipe {'vl_t5_base' if image else 'glue_t5_base'} "
        f"--ds_config ds_configs/zero2.json {given} train.steps=2000 train.warmup_steps=200{vision}",
        "or on CPUs, with the small backbone that data_prep/demo.py builds in data/demo:",
        "  deepspeed --num_accelerators 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json "
        f"{given} train.steps=200{vision or ' vision.encoder=null'}",
    ]
    if image:
        lines.append("where VISION are the settings vision.... that data_prep/features.py prints at its end")
    return "\n".join(lines)


if __name__ == "__main__":
    run(table)
