"""What a trained run answers to new inputs, written to files.

This file must not know whether an answer is right, nor what a leaderboard wants (train/submissions.py does).
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperpelt_ds import dist
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.index import replace
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.model import Predictor, load
from hyperpelt_ds.tasks import needs_image
from hyperpelt_ds.tasks.task import check_text
from hyperpelt_ds.train import engine
from hyperpelt_ds.train.answering import Ask, answers, asker, known_tasks, load_manifest, split_samples
from hyperpelt_ds.train.submissions import FORMATS
from hyperpelt_ds.vision.images import UnreadableImage

log = dist.logger(__name__)


def predict(
    run_dir: str | Path, source: str | Path, out: str | Path, form: str, task: str | None = None, split: str = "test"
) -> None:
    """Answers every line of a JSONL file, or every sample of a manifest's `split`, and writes the answers into folder
    `out` in one of FORMATS. `task` is that of lines that name none, and the only one taken from a manifest.

    Works in one process and under a launcher, where rank 0 writes; the files are the same for any number of processes.
    What cannot be read, text or image, is answered "" and named in the log; damaged texts come last in the files.
    Raises ValueError, before anything is answered, for a bad line (naming file and line), an unknown task, split or
    format, and samples that the format has no place for.
    """
    source, out = Path(source), Path(out)
    if form not in FORMATS:
        raise ValueError(f"--format {form}: unknown; there are {', '.join(FORMATS)}")
    if source.suffix not in (".jsonl", ".json") or not source.is_file():
        raise ValueError(f"--input {source}: expected an existing file, NAME.jsonl or a manifest.json")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected a folder")
    if dist.world_size() > 1:
        engine.start_distributed()
    run = load(run_dir, dist.device())
    names = known_tasks([task] if task else None, run.config.data.tasks, run_dir)
    damaged: list[Sample] = []
    if source.suffix == ".jsonl":
        samples, ask = read_lines(source, run, task), _ask_with_images(run)
    else:
        manifest = load_manifest(source, run, run_dir)
        samples, damaged = _stored(manifest, names, split)
        ask = asker(run, Reader(manifest))
    FORMATS[form].check([*samples, *damaged])
    try:  # answering may take hours
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {out}: no folder that can be written to: {error.strerror}") from None
    before = run.collator.truncated
    answered = answers(samples, ask, run.config.eval.batch_size, run.model.backbone.own_pace())
    found = [*answered, *[None] * len(damaged)]
    samples, texts = [*samples, *damaged], [text or "" for text in found]
    truncated = sum(dist.gather(run.collator.truncated - before))
    if dist.rank() == 0:
        for name, content in FORMATS[form].files(samples, texts, split).items():
            replace(out / name, content.encode())
            log.info("wrote %s", out / name)
        blind = [f"{s.task}/{s.key}" for s, text in zip(samples, found, strict=True) if text is None]
        if blind:
            print(f"{len(blind)} of {len(samples)} samples cannot be read, their predictions are empty", flush=True)
            log.warning("%d samples cannot be read, their predictions are empty: %s", len(blind), ", ".join(blind))
        log.info("%d answers; sources cut at %d tokens: %d", len(texts), run.config.data.max_source_length, truncated)
        if form != "jsonl":
            log.info("next: hand in the files in %s", out)


def read_lines(path: Path, run: Predictor, task: str | None) -> list[Sample]:
    """The samples of a JSONL file; `image` is the path of a picture.

    A line is an object with `source` (or `text`), `task` unless `task` is given here, `image` where the task needs one
    (relative paths start at the file's folder), and optionally `key`; other fields are left alone. A line without a key
    is named by its place among the lines of its task, from 0; null is as good as nothing. Raises ValueError naming file
    and line.
    """
    samples: list[Sample] = []
    lines: dict[tuple[str, str], int] = {}
    places: Counter[str] = Counter()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            sample = _sample(_fields(line), run, task, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not sample.key:
            sample = sample._replace(key=str(places[sample.task]))
        places[sample.task] += 1
        first = lines.setdefault((sample.task, sample.key), number)
        if first != number:
            raise ValueError(f"{path}, line {number}: key {sample.key!r} of task {sample.task!r} is line {first}'s")
        samples.append(sample)
    if not samples:
        raise ValueError(
            f'{path}: holds no lines; expected some such as {{"task": "movie_sentiment", "source": "a good film"}}'
        )
    return samples


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError('expected an object, for example {"task": "movie_sentiment", "source": "a good film"}')
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in ("task", "source", "text", "image"):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"field {name!r} must be a text, got {fields[name]!r}")
    key = fields.get("key", "")
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise ValueError(f"field 'key' must be a text or a whole number, got {key!r}")
    for name in ("source", "text", "key"):
        check_text(f"field {name!r}", str(fields.get(name, "")))
    return fields


def _sample(fields: dict[str, Any], run: Predictor, task: str | None, folder: Path) -> Sample:
    given = [name for name in ("source", "text") if name in fields]
    if len(given) != 1:
        raise ValueError(f"expected one of the fields 'source' and 'text', got {' and '.join(given) or 'neither'}")
    name = fields.get("task", task)
    if name is None:
        raise ValueError("no field 'task', and no --task for lines without one")
    known_tasks([name], run.config.data.tasks, "the run")
    image = str(folder / fields["image"]) if "image" in fields else None
    if image is None and needs_image(name):
        raise ValueError(f"task {name!r} needs a field 'image'")
    if image is not None and run.config.vision.encoder is None:
        raise ValueError("has an image, but the run was trained without images (vision.encoder is not set)")
    if image is not None and not Path(image).is_file():
        raise ValueError(f"image {image} does not exist; a relative path starts at the file's folder")
    return Sample(str(fields.get("key", "")), name, fields[given[0]], "", image=image)


def _ask_with_images(run: Predictor) -> Ask:
    """Asks with pictures, which are encoded now."""

    def ask(samples: Sequence[Sample]) -> list[str | None]:
        names, texts = [sample.task for sample in samples], [sample.source for sample in samples]
        images, beams = [sample.image for sample in samples], run.config.eval.num_beams
        try:
            return [*run.generate(names, texts, images, num_beams=beams)]
        except UnreadableImage as error:
            if len(samples) > 1:
                return [answer for sample in samples for answer in ask([sample])]
            log.warning("no answer for %s/%s: %s", names[0], samples[0].key, error)
            return [None]

    return ask


def _stored(manifest: Manifest, names: Sequence[str], split: str) -> tuple[list[Sample], list[Sample]]:
    """The split's samples of those of `names` that have any, and, empty but for task and key, those not readable.

    A sample whose very key cannot be read has no place in any file, and is only warned of.
    """
    here = [name for name in names if name in manifest.tasks]
    if not here:
        raise ValueError(f"{manifest.path} holds {', '.join(manifest.tasks)}, but not {' or '.join(names)}")
    chosen = [name for name in here if manifest.count(name, split)] or here[:1]  # the first, to say what it lacks
    found = {name: split_samples(manifest, name, split) for name in chosen}
    damaged = [Sample(error.key, name, "", "") for name, (_, errors) in found.items() for error in errors if error.key]
    return [sample for samples, _ in found.values() for sample in samples], damaged
