"""What the data costs: reading against webdataset, whole batches, resuming, a slow store, and memory.

Suites, each on generated data in a temporary folder that is deleted at the end; local files are in the page cache:

    read     shuffled reading with checksum and decoding, against webdataset's own pipeline (shuffled, decoded) and a
             bare scan of the tars (the members' bytes, nothing decoded), on the same shards: in one process; with two
             that read, and say of a batch of 64 only its size; and with two that hand the batch over. In a round every
             system reads every sample once, timed from the first batch on; our time includes planning the order.
             We hand over as training does (data/handover.py): text samples as columns, from which the main process
             makes samples again; features copied into memory shared beforehand, of which the main process has a view
             until the next batch. webdataset does in the fastest of the ways tried: its decoded samples as columns, of
             which the main process makes dictionaries again; features stacked to a tensor in torch's shared memory. The
             scan hands over the bytes in a list. All put four batches of text in a message, one of features.
    stream   tokenised, collated micro-batches of six text tasks like the demo's, and the planner alone
    resume   from loading a manifest of millions of samples (two shards, hard-linked as often as it takes) to the first
             batch of a stream that stands at 0, 50 and 99.9 % of an epoch
    remote   samples with image features over throttled loopback HTTP: first batch, and the bytes fetched for an epoch
    memory   growth of a fresh process that draws a million samples of the large manifest, and its open files

Systems of a case take turns, round by round, in one process; a warm-up round comes first and does not count. `ratio` is
the median over rounds of a system's figure to webdataset's in the same round, null where nothing is compared. A target
is held against the median (or the median ratio).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from command import run
from turns import say_kept

if TYPE_CHECKING:
    from hyperpelt_ds.contracts import Batch, Sample, StreamState
    from hyperpelt_ds.data.folder import Folder
    from hyperpelt_ds.data.handover import Shelf
    from hyperpelt_ds.data.loader import TrainStream
    from hyperpelt_ds.data.manifest import Manifest, Shard
    from hyperpelt_ds.data.reader import Reader

SERVER = Path(__file__).resolve().parents[1] / "tests" / "shard_server.py"
BATCH, MICRO = 64, 16
GRID, SMALL_GRID = (49, 768), (4, 64)  # features of the images that are read, and of those of the large manifest
LARGE_SHARD = 4000  # samples of a shard of the large manifest
CACHE_BYTES = 10**11  # more than is ever fetched
SENTIMENTS, RATINGS = ("positive", "negative"), ("terrible", "bad", "mixed", "good", "excellent")
TOPICS, ANSWERS = ("Arts", "Geography", "History", "Mathematics", "Technology"), ("red", "blue", "circle", "yes", "no")
# As the demo's tasks: about how many characters a source has, and the targets (or about how many characters of text)
MIX: dict[str, tuple[int, tuple[str, ...] | int]] = {
    "movie_sentiment": (110, SENTIMENTS),
    "movie_rating": (110, RATINGS),
    "wikipedia_topic": (195, TOPICS),
    "wikipedia_description": (195, 30),
    "easy_vqa": (35, ANSWERS),
    "shape_caption": (35, 15),
}


def bench_data(
    *,
    out: str | None = None,
    suite: str = "all",
    rounds: int = 5,
    texts: int = 40_000,
    images: int = 4_000,
    shards: int = 2_500,
    drawn: int = 1_000_000,
    rate_mb: int = 20,
    folder: str | None = None,
) -> None:
    """Measure the reading of data and write JSON lines (case, system, metric, median, min, max, ratio) after a header.

    Examples:
        python launch/bench_data.py --out bench_data.jsonl
        python launch/bench_data.py --out bench_data.jsonl --suite read,stream --rounds 9
        python launch/bench_data.py --suite remote --images 640 --rate_mb 50

    Args:
        out: file for the JSON lines; a table is printed either way
        suite: all, or names separated by commas, of read, stream, resume, remote and memory
        rounds: counted rounds after one warm-up round
        texts: text samples that are read; half as many make a round of `stream`
        images: images that are read and fetched, with 75 KB of features each
        shards: shards of the large manifest, 4,000 samples each
        drawn: samples drawn while memory is watched
        rate_mb: megabytes a second of the remote store
        folder: where the temporary folder is made; needs 1.2 GB
    """
    names = list(SUITES) if suite == "all" else [name for name in suite.split(",") if name]
    for name in names:
        if name not in SUITES:
            raise ValueError(f"--suite: unknown suite {name!r}; allowed are all, {', '.join(SUITES)}")
    sizes = {"rounds": rounds, "texts": texts, "images": images, "shards": shards, "drawn": drawn, "rate_mb": rate_mb}
    least = {"rounds": 1, "texts": 10 * BATCH, "images": 4 * BATCH, "shards": 5, "drawn": 10 * BATCH, "rate_mb": 1}
    for flag, value in sizes.items():
        if value < least[flag]:
            raise ValueError(f"--{flag} must be at least {least[flag]}, got {value}")
    if "remote" in names and not SERVER.is_file():
        raise ValueError(f"--suite remote needs {SERVER}, which an installed package does not have; use the repository")
    for flag, path, parent in (
        ("out", out, Path(out or ".").resolve().parent),
        ("folder", folder, Path(folder or ".")),
    ):
        if not parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no folder {parent}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it would have more threads without workers than with them
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as root, contextlib.ExitStack() as stack:
        report = _Report(rounds, stack.enter_context(open(out, "w")) if out else None)
        report.head(sizes)
        data = _Data(Path(root), sizes)
        for name in names:
            print(f"{name} ...", flush=True)
            SUITES[name](data, report)
    say_kept(out, "docs/data.md")


class _Target(NamedTuple):
    """A bound that the median of a system's figures, or of its ratios, should keep."""

    of: Literal["median", "ratio"]
    sign: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.of} {self.sign} {self.bound:,g}"


class _Report:
    """Takes figures round by round, prints a table and writes JSON lines."""

    def __init__(self, rounds: int, file: IO[str] | None) -> None:
        self.rounds, self.file = rounds, file

    def head(self, sizes: dict[str, int]) -> None:
        """The line that says on what all of it was measured."""
        line: dict[str, Any] = {"hardware": f"{platform.machine()} CPU", "cores": os.cpu_count()}
        line |= {"load": round(os.getloadavg()[0], 2), "python": platform.python_version()}
        line |= {name: version(name) for name in ("torch", "numpy", "webdataset", "transformers", "tokenizers")}
        print(", ".join(f"{name} {value}" for name, value in line.items()), flush=True)
        self._write({**line, **sizes})

    def take(self, systems: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
        """A figure of every system in every round; they take turns, so that drift of the machine hits all alike."""
        figures: dict[str, list[float]] = {name: [] for name in systems}
        for turn in range(self.rounds + 1):
            for name, measure in systems.items():
                figure = measure()
                if turn:
                    figures[name].append(figure)
        return figures

    def add(
        self,
        case: str,
        metric: str,
        figures: Mapping[str, Sequence[float]],
        targets: Mapping[str, _Target] | None = None,
        base: str = "",
        **facts: float,
    ) -> None:
        """A line for each system, from its figures in every round; `base` is the system that ratios are to."""
        for system, own in figures.items():
            ratios = [mine / other for mine, other in zip(own, figures[base], strict=True)] if base else []
            median, ratio = statistics.median(own), statistics.median(ratios) if ratios else None
            line: dict[str, Any] = {"case": case, "system": system, "metric": metric, "median": median, "min": min(own)}
            line |= {"max": max(own), "ratio": ratio, "rounds": len(own), "load": round(os.getloadavg()[0], 2), **facts}
            text = f"{case:46} {metric:16} {system:18} {_shown(median):>8} [{_shown(min(own))}, {_shown(max(own))}]"
            text += f"  x{ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else ""
            if target := (targets or {}).get(system):
                value = line[target.of]
                met = value >= target.bound if target.sign == ">=" else value <= target.bound
                line |= {"target": str(target), "met": met}
                text += f"  target: {target}, {'met' if met else 'MISSED'}"
            print(text, flush=True)
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def _shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.4g}"


class _Data:
    """The data sets and the tokenizer, each made when it is first asked for."""

    def __init__(self, root: Path, sizes: dict[str, int]) -> None:
        import numpy as np

        self.root, self.sizes, self._random = root, sizes, np.random.default_rng(0)
        syllables = [c + v for c in ("b", "d", "k", "l", "m", "n", "r", "s", "st", "t", "th", "w", "") for v in "aeiou"]
        self._words = ["".join(self._random.choice(syllables, n)) for n in self._random.integers(1, 5, 20_000)]
        self._edges = np.cumsum(1 / (np.arange(20_000) + 3))  # Zipf's law

    @functools.cached_property
    def tokenizer(self) -> Any:
        """A fast byte-level BPE tokenizer of at most 8,000 tokens, trained on texts like those of the data."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        special = ["<pad>", "</s>"]
        trainer = trainers.BpeTrainer(
            vocab_size=8000,
            show_progress=False,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator((self.text(150) for _ in range(self.sizes["texts"] // 4)), trainer)
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            eos_token="</s>",
            model_input_names=["input_ids", "attention_mask"],
        )

    @functools.cached_property
    def texts(self) -> Manifest:
        """One task of texts, about 600 bytes of JSON a sample."""
        n = self.sizes["texts"]
        return self._save("texts", {"text": self._samples("text", n, 480, SENTIMENTS)}, n // 32)

    @functools.cached_property
    def pictures(self) -> Manifest:
        """Two questions about every image, in whole batches."""
        images = self.sizes["images"]
        questions = self._samples("vqa", 2 * images // BATCH * BATCH, 35, ANSWERS, images)
        return self._save("pictures", {"vqa": questions}, images // 16, images, GRID)

    @functools.cached_property
    def mix(self) -> Manifest:
        """Six text tasks of one size."""
        n = self.sizes["texts"] // 5
        return self._save("mix", {task: self._samples(task, n, *kind) for task, kind in MIX.items()}, 4096)

    @functools.cached_property
    def large(self) -> Manifest:
        """A text task and, with one shard in five, one with images; all shards of a task are the same file."""
        shards = self.sizes["shards"]
        images = 8 * shards
        samples = {"text": self._samples("text", LARGE_SHARD, 110, SENTIMENTS)}
        samples["vqa"] = self._samples("vqa", LARGE_SHARD, 35, ANSWERS, images)
        links = {"text": shards - shards // 5, "vqa": shards // 5}
        return self._save("large", samples, LARGE_SHARD, images, SMALL_GRID, links)

    def text(self, characters: int) -> str:
        """About so many characters of words without a meaning."""
        import numpy as np

        count = max(1, round(characters / 5.5 * self._random.uniform(0.6, 1.4)))
        places = np.searchsorted(self._edges, self._random.random(count) * self._edges[-1])
        return " ".join([self._words[place] for place in places])

    def _samples(
        self, task: str, n: int, source: int, targets: tuple[str, ...] | int, images: int = 0
    ) -> Iterator[Sample]:
        from hyperpelt_ds.contracts import Sample

        for i in range(n):
            target = self.text(targets) if isinstance(targets, int) else targets[i % len(targets)]
            image = _image(i * images // n) if images else None
            yield Sample(f"{task}-{i:07d}", task, self.text(source), target, f"item-{i:07d}", image)

    def _save(
        self,
        name: str,
        samples: dict[str, Iterator[Sample]],
        per_shard: int,
        images: int = 0,
        grid: tuple[int, int] = GRID,
        links: dict[str, int] | None = None,
    ) -> Manifest:
        """Writes a data set; with `links` a task is its first shard, so often."""
        import numpy as np

        from hyperpelt_ds.data.manifest import FeatureSet, Manifest, write_manifest
        from hyperpelt_ds.data.shards import write_features, write_task

        start, folder = time.perf_counter(), self.root / name
        tasks = {task: write_task(folder, task, "train", own, per_shard) for task, own in samples.items()}
        noise = self._random.standard_normal((64 if images else 0, *grid), np.float32)
        grids = ((_image(i), noise[i % 64]) for i in range(images))
        features = FeatureSet(*grid, {}, write_features(folder, grids, -(-images // 32))) if images else None
        size = sum(shard.bytes for own in (*tasks.values(), features.shards if features else []) for shard in own)
        tasks |= {task: _linked(folder, tasks[task][0], count) for task, count in (links or {}).items()}
        path = write_manifest(folder, {task: {"train": own} for task, own in tasks.items()}, features, {})
        print(f"made {name}: {size / 1e6:,.0f} MB in {time.perf_counter() - start:.0f} s", flush=True)
        return Manifest.load(path)


def _image(number: int) -> str:
    return f"image-{number:06d}"


def _linked(folder: Path, shard: Shard, count: int) -> list[Shard]:
    """`count` shards: the given one, and hard links to it and its index."""
    shards = [dataclasses.replace(shard, path=shard.path.replace("000000", f"{i:06d}")) for i in range(count)]
    for other in shards[1:]:
        os.link(folder / shard.path, folder / other.path)
        os.link(folder / shard.index_path, folder / other.index_path)
    return shards


class _Crossing(NamedTuple):
    """What of a batch a worker gives to the main process, what that makes of it, and how many batches at a time."""

    pack: Callable[[list[Any]], Any]
    unpack: Callable[[Any], Any]
    group: int


def _read(data: _Data, report: _Report) -> None:
    from hyperpelt_ds.data.handover import message_items, pack_samples, unpack_samples
    from hyperpelt_ds.data.reader import Reader

    assert data.pictures.features
    for name, manifest, shards, read in (
        ("text", data.texts, data.texts.shards("text", "train"), _text_of),
        ("features", data.pictures, data.pictures.features.shards, _features_of),
    ):
        reader = Reader(manifest)
        sizes, tars = [shard.samples for shard in shards], [f"{manifest.folder.root}/{shard.path}" for shard in shards]
        content, stored = float(reader.index(shards[0]).member_sizes.mean()), sum(s.bytes for s in shards) / sum(sizes)
        group = message_items(BATCH, images=name == "features")
        counted, whole = _Crossing(len, _same, group), _Crossing(list, _same, group)
        theirs = _Crossing(_columns, _records, group) if name == "text" else _Crossing(_stacked, _same, group)
        ours = _Crossing(pack_samples, unpack_samples, group) if name == "text" else None
        for where, workers, crossings in (
            ("one process", 0, (counted, counted, counted)),
            ("2 workers read", 2, (counted, counted, counted)),
            ("2 workers hand over", 2, (ours, theirs, whole)),
        ):
            indexed = functools.partial(_indexed, read(reader), sizes, workers, crossings[0])
            systems: dict[str, Callable[[], Iterable[Any]]] = {
                "hyperpelt_ds": indexed,
                "webdataset": functools.partial(_webdataset, tars, workers, crossings[1]),
                "raw tar scan": functools.partial(_scan, tars, workers, crossings[2]),
            }
            figures = report.take({key: functools.partial(_rate, own, sum(sizes)) for key, own in systems.items()})
            facts = {"sample_bytes": content, "stored_bytes": stored, "samples": sum(sizes)}
            targets = {"hyperpelt_ds": _Target("ratio", ">=", 3)}
            case = f"read {name}, {content:,.0f} B/sample, {where}"
            report.add(case, "samples/s", figures, targets, "webdataset", **facts)


def _rate(batches: Callable[[], Iterable[Any]], samples: int) -> float:
    """Samples a second of the batches after the first; starting processes and filling buffers is not counted."""
    sizes = (batch if isinstance(batch, int) else len(batch) for batch in batches())
    first, start = next(sizes), time.perf_counter()
    others = sum(sizes)
    seconds = time.perf_counter() - start
    assert first + others == samples, f"{first + others} samples came, expected {samples}"
    return others / seconds


def _text_of(reader: Reader) -> Callable[[int], Any]:
    return functools.partial(reader.sample, "text", "train")


def _features_of(reader: Reader) -> Callable[[int], Any]:
    return lambda number: reader.image(_image(number))


def _same(item: Any) -> Any:
    return item


def _stacked(batch: list[dict[str, Any]]) -> Any:
    """webdataset's features as one tensor, which torch moves to shared memory."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([record["npy"] for record in batch]))


def _columns(batch: list[dict[str, Any]]) -> tuple[Any, ...]:
    """webdataset's samples of text, field by field."""
    texts = [record["json"] for record in batch]
    names = list(texts[0])
    columns = [[text[name] for text in texts] for name in names]
    return [record["__key__"] for record in batch], [record["__url__"] for record in batch], names, columns


def _records(packed: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The samples that `_columns` was given."""
    keys, urls, names, columns = packed
    texts = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return [{"__key__": k, "__url__": u, "json": t} for k, u, t in zip(keys, urls, texts, strict=True)]


class _Batches:
    """Batches of what `read` reads, by their numbers; a map-style data set. Without `pack` they lie on the shelf."""

    def __init__(self, read: Callable[[int], Any], pack: Callable[[list[Any]], Any] | None, shelf: Shelf) -> None:
        self.read, self.pack, self.shelf = read, pack, shelf

    def __getitems__(self, batches: list[tuple[list[int], int | None]]) -> list[Any]:
        return [self._cross([self.read(number) for number in numbers], slot) for numbers, slot in batches]

    def _cross(self, batch: list[Any], slot: int | None) -> Any:
        return self.pack(batch) if self.pack else self.shelf.put(slot, 0, batch)


def _indexed(read: Callable[[int], Any], sizes: list[int], workers: int, crossing: _Crossing | None) -> Iterator[Any]:
    """An epoch in the planner's order; in so few lanes that it is made of windows, as that of a large task is."""
    from hyperpelt_ds.data.handover import Shelf, in_turn
    from hyperpelt_ds.data.order import Order

    def plan() -> Iterator[list[int]]:
        order = Order({"": sizes}, 0, {"": 1.0}, 4)
        drawn, samples = order.start(), sum(sizes)
        for first in range(0, samples, BATCH):
            draws, drawn = order.draw(drawn, min(BATCH, samples - first))
            yield [order.locate(*draw) for draw in draws]

    if not workers:
        for numbers in plan():
            yield [read(number) for number in numbers]
        return
    shelf = Shelf(workers, 0 if crossing else BATCH, GRID)
    dataset: Any = _Batches(read, crossing and crossing.pack, shelf)
    if crossing:
        items = ((numbers, None) for numbers in plan())
        yield from map(crossing.unpack, in_turn(dataset, workers, items, crossing.group))
        return
    for spot in in_turn(dataset, workers, ((numbers, shelf.take()) for numbers in plan())):
        yield shelf.get(spot)
        shelf.free(spot.slot)


def _webdataset(tars: list[str], workers: int, crossing: _Crossing) -> Iterable[Any]:
    """The pipeline of its documentation, with the shuffle buffer of 1,000 samples that it suggests."""
    from webdataset import WebDataset, WebLoader

    samples = WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode()
    if not workers:
        return samples.batched(BATCH, collation_fn=None)
    messages = samples.batched(BATCH * crossing.group, collation_fn=None)
    # told nothing, the loader would make a tensor of every array, which is far slower than to hand over the arrays
    pack = functools.partial(_packed, crossing.pack)
    return _unpacked(WebLoader(messages, batch_size=None, num_workers=workers, collate_fn=pack), crossing)


def _scan(tars: list[str], workers: int, crossing: _Crossing) -> Iterable[Any]:
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Scan(IterableDataset[list[bytes]]):
        def __iter__(self) -> Iterator[list[bytes]]:
            worker = get_worker_info()
            members = _members(tars[worker.id :: workers] if worker else tars)
            while batch := list(itertools.islice(members, BATCH * crossing.group if worker else BATCH)):
                yield batch

    if not workers:
        return Scan()
    pack = functools.partial(_packed, crossing.pack)
    return _unpacked(DataLoader(Scan(), batch_size=None, num_workers=workers, collate_fn=pack), crossing)


def _packed(pack: Callable[[list[Any]], Any], samples: list[Any]) -> list[Any]:
    """A message: its samples in batches."""
    return [pack(samples[first : first + BATCH]) for first in range(0, len(samples), BATCH)]


def _unpacked(messages: Iterable[list[Any]], crossing: _Crossing) -> Iterator[Any]:
    return map(crossing.unpack, itertools.chain.from_iterable(messages))


def _members(tars: list[str]) -> Iterator[bytes]:
    for tar in tars:
        with tarfile.open(tar, "r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None, f"{tar}: {member.name} is no file"
                yield content.read()
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all


def _stream(data: _Data, report: _Report) -> None:
    samples, manifest, tokenizer = data.sizes["texts"] // 2, data.mix, data.tokenizer
    shards = list(manifest.all_shards())
    stored = sum(shard.bytes for shard in shards) / sum(shard.samples for shard in shards)
    rates = {f"{n} workers": functools.partial(_batch_rate, manifest, tokenizer, n, samples) for n in (0, 1, 2)}
    targets = {"2 workers": _Target("median", ">=", 10_000)}
    case = f"stream of text, {BATCH} in micro-batches of {MICRO}"
    report.add(case, "samples/s", report.take(rates), targets, stored_bytes=stored)
    times = {"1 rank": functools.partial(_planning, 1), "a rank of 8": functools.partial(_planning, 8)}
    case, targets = f"planner, 10 M samples, {BATCH} lanes", {"1 rank": _Target("median", "<=", 25)}
    report.add(case, "us/sample", report.take(times), targets)


def _batch_rate(manifest: Manifest, tokenizer: Any, workers: int, samples: int) -> float:
    """Samples a second of a training stream that runs already."""
    stream = _training(manifest, tokenizer, workers)
    steps = _committed(stream)
    for _ in range(8):
        next(steps)
    start = time.perf_counter()
    taken = sum(len(batch.samples) for step in itertools.islice(steps, samples // BATCH) for batch in step)
    return taken / (time.perf_counter() - start)


def _planning(world: int) -> float:
    """Microseconds a sample of the global batch: all draws, and the places of those that rank 0 reads."""
    from hyperpelt_ds.data.batching import share
    from hyperpelt_ds.data.order import Order, mixture

    sizes = {"large": [4096] * 2000, "middle": [4096] * 400, "small": [4096] * 40, "tiny": [4096, 904]}
    order = Order(sizes, 0, mixture({task: sum(own) for task, own in sizes.items()}, 2.0, {}), BATCH)
    drawn, steps, start = order.start(), 1000, time.perf_counter()
    own = share(BATCH, BATCH, 0, world)
    for _ in range(steps):
        draws, drawn = order.draw(drawn, BATCH)
        for place in own:
            order.locate(*draws[place])
    return (time.perf_counter() - start) / (steps * BATCH) * 1e6


def _training(manifest: Manifest, tokenizer: Any, workers: int, state: StreamState | None = None) -> TrainStream:
    """The stream of a run with one process, over all tasks in proportion to their sizes."""
    from hyperpelt_ds.config import Config
    from hyperpelt_ds.data.loader import TrainStream

    settings = [f"train.global_batch={BATCH}", f"train.micro_batch={MICRO}", f"data.workers={workers}"]
    settings += ["data.temperature=1", "data.max_source_length=48"]
    if manifest.features:
        grid = f"vision.cells={manifest.features.cells}", f"vision.channels={manifest.features.channels}"
        settings += ["vision.encoder=any", *grid]
    return TrainStream(manifest, Config().override(settings), list(manifest.tasks), tokenizer, 0, 1, state)


def _committed(stream: TrainStream) -> Iterator[list[Batch]]:
    """The steps of a stream, each committed when it is given out; no sample may be damaged."""
    for step in stream:
        holes = stream.commit()
        assert not holes, f"a sample of sound data cannot be used: {holes[0]}"
        yield step


def _resume(data: _Data, report: _Report) -> None:
    manifest, tokenizer = data.large, data.tokenizer
    fresh = _training(manifest, tokenizer, 0).state()
    samples = {task: manifest.count(task, "train") for task in manifest.tasks}
    case = f"resume, {sum(samples.values()) / 1e6:g} M samples in {data.sizes['shards']:,} shards"
    systems, touched = {}, {}
    for part in (0, 0.5, 0.999):
        counts = {task: [int(samples[task] * part) // len(lanes)] * len(lanes) for task, lanes in fresh.counts.items()}
        state = dataclasses.replace(fresh, counts=counts, samples=sum(map(sum, counts.values())))
        for workers in (0, 2):
            name = f"{part:.1%}, {workers} workers"
            systems[name] = functools.partial(_first_batch, manifest.path, tokenizer, workers, state)
        folder = _Noting(manifest.folder)
        next(iter(_training(dataclasses.replace(manifest, folder=folder), tokenizer, 0, state)))
        touched[f"{part:.1%}"] = [float(len(folder.shards))]
    report.add(case, "first batch s", report.take(systems), dict.fromkeys(systems, _Target("median", "<=", 1)))
    report.add(case, "shards touched", touched)


def _first_batch(path: str, tokenizer: Any, workers: int, state: StreamState) -> float:
    """Seconds from the manifest's path to the first batch."""
    from hyperpelt_ds.data.manifest import Manifest

    start = time.perf_counter()
    steps = iter(_training(Manifest.load(path), tokenizer, workers, state))
    next(steps)
    return time.perf_counter() - start


class _Noting:
    """A folder that notes which shards are read."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.root = folder, folder.root
        self.shards: set[str] = set()

    def read(self, name: str, sha256: str | None = None) -> bytes:
        return self.folder.read(name, sha256)

    def part(self, shard: Shard, offset: int, size: int) -> bytes:
        self.shards.add(shard.path)
        return self.folder.part(shard, offset, size)

    def size(self, name: str) -> int | None:
        return self.folder.size(name)


class _Fetched(NamedTuple):
    """What became of some steps over HTTP."""

    first: float  # seconds to the first batch
    shards: int  # of which anything had been fetched by then
    last: float  # seconds to the last batch
    sent: int  # bytes, in all
    keys: Counter[str]


def _remote(data: _Data, report: _Report) -> None:
    shards, rate = list(data.pictures.all_shards()), data.sizes["rate_mb"]
    size, samples = sum(shard.bytes for shard in shards), data.pictures.count("vqa", "train")
    case = f"remote, {size / 1e6:,.0f} MB in {len(shards)} shards at {rate} MB/s"
    caches = {workers: data.root / f"cache{workers}" for workers in (0, 2)}

    def fetch(workers: int, steps: int, cold: bool) -> _Fetched:
        cache = caches[workers]
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        with _server(data.pictures.folder.root, rate * 1e6) as url:
            return _in_process("fork", _fetch, url, str(cache), data.tokenizer, workers, steps)

    for cold in (True, False):
        firsts: dict[int, list[_Fetched]] = {workers: [] for workers in caches}
        for _, workers in itertools.product(range(report.rounds + 1), caches):
            firsts[workers].append(fetch(workers, 1, cold))
        for workers, (_, *found) in firsts.items():
            system = f"{'cold' if cold else 'warm'}, {workers} workers"
            report.add(case, "first batch s", {system: [own.first for own in found]})
            report.add(case, "shards touched", {system: [own.shards for own in found]})
            epoch = fetch(workers, samples // BATCH, cold)  # after the last cold one the cache is warm
            lost, repeated = samples - len(epoch.keys), epoch.keys.total() - len(epoch.keys)
            report.add(case, "epoch s", {system: [epoch.last]})
            report.add(case, "fetched / data", {system: [epoch.sent / size]}, {system: _Target("median", "<=", 1.1)})
            report.add(case, "lost + repeated", {system: [lost + repeated]}, {system: _Target("median", "<=", 0)})


def _fetch(url: str, cache: str, tokenizer: Any, workers: int, steps: int) -> _Fetched:
    """The first steps of a run whose manifest is behind a URL."""
    from hyperpelt_ds.data.manifest import MANIFEST, Manifest

    start = time.perf_counter()
    manifest = Manifest.load(f"{url}/{MANIFEST}", cache, CACHE_BYTES)
    batches = _committed(_training(manifest, tokenizer, workers))
    taken = next(batches)
    first = time.perf_counter() - start
    shards = sum(path.endswith(".tar") for path in _sent(url))
    keys = Counter(sample.key for batch in taken for sample in batch.samples)
    for step in itertools.islice(batches, steps - 1):
        keys.update(sample.key for batch in step for sample in batch.samples)
    return _Fetched(first, shards, time.perf_counter() - start, sum(_sent(url).values()), keys)


@contextlib.contextmanager
def _server(root: str, rate: float) -> Iterator[str]:
    """The URL of a process that serves a folder."""
    command = [sys.executable, str(SERVER), "--root", root, "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def _sent(url: str) -> dict[str, int]:
    """Bytes that the server has sent of each file."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/_counts") as answer:
        return json.load(answer)["bytes"]


def _in_process(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose threads and workers end with it."""
    context: Any = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in its process; the reason is above") from None
    finally:
        process.join()


def _answer(send: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send.send(function(*arguments))
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)


def _memory(data: _Data, report: _Report) -> None:
    from hyperpelt_ds.data.folder import OPEN_FILES

    # forked, it would have this process's free memory to grow into
    drawn = data.sizes["drawn"]
    growth, files = _in_process("spawn", _grow, data.large.path, data.tokenizer, drawn)
    case = f"memory, {drawn:,} samples drawn"
    report.add(case, "growth MB", {"0 workers": [growth / 1e6]}, {"0 workers": _Target("median", "<=", 20)})
    report.add(case, "open files", {"0 workers": [files]}, {"0 workers": _Target("median", "<=", OPEN_FILES)})


def _grow(path: str, tokenizer: Any, drawn: int) -> tuple[int, int]:
    """Bytes by which resident memory grew at most after a warm-up, and most files open beyond those before it."""
    from hyperpelt_ds.data.manifest import Manifest

    before = len(os.listdir("/proc/self/fd"))
    steps = _committed(_training(Manifest.load(path), tokenizer, 0))
    resident, files = [], []
    for number in range(drawn // BATCH):
        next(steps)
        if number % 100 == 99 or number == drawn // BATCH - 1:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            files.append(len(os.listdir("/proc/self/fd")) - before)
    return max(resident) - resident[0], max(files)


SUITES: dict[str, Callable[[_Data, _Report], None]] = {
    "read": _read,
    "stream": _stream,
    "resume": _resume,
    "remote": _remote,
    "memory": _memory,
}

if __name__ == "__main__":
    run(bench_data)
