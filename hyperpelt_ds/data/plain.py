"""Training on shards that cannot be seeked, such as the output of a command, through webdataset's own pipeline.

Every process draws whole shards at random, again and again: so none waits for another at an end, and none is left
without where there are fewer shards than processes. The price: a sample may come twice before another comes once, and
nobody can say where a run stood. This file must not know the model, the engine or the loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import TRAIN, Batch, Hole, Sample, StreamState
from hyperpelt_ds.data import batching
from hyperpelt_ds.data.collate import collator_for
from hyperpelt_ds.data.holes import Place
from hyperpelt_ds.data.loader import Packed, Steps, TrainStream, check_vision, read_ahead
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.order import Order, lane_count, mixture
from hyperpelt_ds.data.reader import DamagedSample, Reader, schema_fault

SHUFFLED = 1000
"""Samples of a task that each process holds to draw the next one from."""
_LOOK = 4  # samples of a task of which one must be usable for a run to start

log = logging.getLogger(__name__)


def train_stream(
    manifest: Manifest,
    config: Config,
    tasks: Sequence[str],
    tokenizer: Any,
    rank: int,
    world_size: int,
    state: StreamState | None = None,
) -> TrainStream | PlainStream:
    """The stream that the configuration asks for, with the errors of both."""
    kind = PlainStream if config.data.plain else TrainStream
    return kind(manifest, config, tasks, tokenizer, rank, world_size, state)


class PlainStream:
    """Iterating gives, for each optimizer step, this rank's list of micro-batches, without end, as TrainStream does.

    The tasks of a global batch are those that TrainStream would draw (equally often if there are neither
    data.task_weights nor training samples of all tasks in the manifest); which of their samples, each process decides
    for itself. A shard that ends in an error or holds nothing is drawn as a hole of its own, so that it is counted.
    A hole's `index` is -1: no one knows a sample's number.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: Config,
        tasks: Sequence[str],
        tokenizer: Any,
        rank: int,
        world_size: int,
        state: StreamState | None = None,
    ) -> None:
        """Raises ValueError for batch sizes, features or weights that do not fit, for a task of which nothing usable
        can be read, and for any state."""
        if state is not None:
            raise ValueError(
                f"a run that reads data.plain cannot be resumed: where its sources stood after {state.samples} samples "
                "is not known. Start another run_dir, with --init_from to begin with the weights of this one"
            )
        data, train = config.data, config.train
        self.manifest, self.config = manifest, config
        lanes = lane_count(train.global_batch, data.lanes)
        self.accumulation = batching.accumulation(train.global_batch, train.micro_batch, lanes, world_size)
        check_vision(manifest, config)
        trained = data.train_tasks or tasks
        self.shards = {task: expand_urls(data.plain[task]) for task in trained}
        counts = {task: manifest.count(task, TRAIN) for task in trained}
        if not all(counts.values()):
            counts = dict.fromkeys(counts, 1)
        probabilities = mixture(counts, data.temperature, data.task_weights)
        self.order = Order({task: [1] for task in trained}, train.seed, probabilities, lanes)  # for its tasks only
        self.own = batching.share(train.global_batch, lanes, rank, world_size)
        self.collator = collator_for(config, tasks, tokenizer)
        self.name = f"{train.seed}/{rank}"  # of this rank's random draws
        self.truncated = 0
        self._committed = 0
        self._given: deque[list[Hole]] = deque()  # steps that are not yet committed
        for task, shards in self.shards.items():
            _look(task, shards)
        if rank == 0:
            log.warning(
                "data.plain: webdataset's own pipeline draws the samples of %s: a sample may come twice or not at all, "
                "and this run cannot be resumed; a manifest of indexed shards has neither fault",
                ", ".join(trained),
            )

    def __iter__(self) -> Generator[list[Batch], None, None]:
        self._given.clear()
        for batches, holes, truncated in read_ahead(_Draws(self, self._committed), self.config.data.workers):
            self.truncated += truncated
            self._given.append(holes)
            yield batches

    def samples(self, task: str, limit: int) -> list[Sample]:
        """At most `limit` of the samples that are drawn of a task, without damaged ones."""
        found = []
        for record in itertools.islice(_records(self.shards[task], f"{self.name}/{task}"), limit):
            try:
                found.append(_sample(task, record))
            except DamagedSample:
                continue
        return found

    def commit(self) -> list[Hole]:
        """Counts the oldest step not yet committed as done; returns what this rank could not use of it."""
        assert self._given, "commit() without a step given out before"
        self._committed += 1
        return self._given.popleft()

    def state(self) -> StreamState:
        """How many samples were committed; no stream can be continued from it."""
        train = self.config.train
        samples = self._committed * train.global_batch
        return StreamState(train.seed, {}, self.order.lanes, train.global_batch, samples, {})


class _Draws(IterableDataset[Packed]):
    """This rank's part of step `first` and of those that follow; of several workers each reads one in turn."""

    def __init__(self, stream: PlainStream, first: int) -> None:
        self.stream, self.first = stream, first

    def __iter__(self) -> Iterator[Packed]:
        stream, batch, info = self.stream, self.stream.config.train.global_batch, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        name = f"{stream.name}/{self.first}/{worker}"
        records = {task: _records(shards, f"{name}/{task}") for task, shards in stream.shards.items()}
        reader = _Drawn(stream.manifest)
        steps = Steps(reader, stream.collator, stream.config)
        for step in itertools.count(self.first + worker, workers):
            tasks = stream.order.tasks_at(step * batch, batch)
            reader.drawn = [next(records[tasks[place]]) for place in stream.own]
            places = [Place(step * batch + place, tasks[place], number) for number, place in enumerate(stream.own)]
            batches, holes, truncated, slot = steps.read(places, stream.accumulation)
            yield batches, [dataclasses.replace(hole, index=-1) for hole in holes], truncated, slot


class _Record(NamedTuple):
    """One sample as it came, or what is wrong with it, or with its shard (and then it has no key)."""

    shard: str
    key: str
    content: bytes = b""
    fault: str = ""


class _Drawn(Reader):
    """Has the samples drawn for one step under the numbers 0, 1, ...; the images are the manifest's."""

    drawn: Sequence[_Record] = ()

    def sample(self, task: str, split: str, index: int) -> Sample:
        return _sample(task, self.drawn[index])

    def place(self, task: str, split: str, index: int) -> tuple[str, str]:
        return self.drawn[index].shard, self.drawn[index].key


def _sample(task: str, record: _Record) -> Sample:
    """Raises DamagedSample, with the reasons of Reader."""
    fault: str | None = record.fault
    if not fault:
        try:
            fields: Any = webdataset.Decoder([]).decode1("json", record.content)
            fault = schema_fault(task, fields)
        except (ValueError, RecursionError) as error:
            fault = f"not JSON: {error}"
    if fault:
        raise DamagedSample(record.shard, record.key, fault)
    return Sample(record.key, **{**fields, "references": tuple(fields.get("references", ()))})


def _records(shards: Sequence[str], name: str, shuffled: int = SHUFFLED) -> Iterator[_Record]:
    """The samples of shards drawn at random, as named by `name`, without end.

    Not webdataset.WebDataset: its splitting of shards leaves processes without any, its default refuses several nodes,
    and where no shard can be read it looks for one forever.
    """
    generator = random.Random(name)
    return iter(
        webdataset.DataPipeline(
            webdataset.ResampledShards(list(shards), seed=generator.getrandbits(60), deterministic=True),
            _read,
            webdataset.shuffle(shuffled, rng=generator),
        )
    )


def _read(shards: Iterator[Mapping[str, Any]]) -> Iterator[_Record]:
    for shard in shards:
        yield from _read_shard(shard["url"])


def _read_shard(url: str) -> Iterator[_Record]:
    """The samples of one shard and, last, what webdataset stumbled over in it, once however often it did.

    To its end, because only then is it known whether a command failed: tarfile takes many a cut for the end of a tar.
    """
    faults: list[str] = []

    def note(error: Exception) -> bool:
        texts = [part for part in error.args if isinstance(part, str)]  # webdataset adds an open file and the like
        faults.append(texts[0].partition(" @ ")[0] if texts else repr(error))
        return True  # go on with what there is

    found = False
    try:
        stream = webdataset.gopen(url)
        for record in group_by_keys(tar_file_expander([{"url": url, "stream": stream}], handler=note), handler=note):
            found = True
            missing = "" if "json" in record else "has no .json member"
            yield _Record(url, record["__key__"], record.get("json", b""), missing)
        while stream.read(1 << 20):
            pass
        stream.close()
    except (OSError, ValueError) as error:
        note(error)
    if faults or not found:
        reasons = dict.fromkeys([faults[0], faults[-1]] if faults else ["holds no samples"])
        yield _Record(url, "", fault="; ".join(reasons))


def _look(task: str, shards: Sequence[str]) -> None:
    """A source that gives nothing usable at all is an error before the first step, not a run of holes."""
    fault = None
    for record in itertools.islice(_records(shards, task, shuffled=1), _LOOK):
        try:
            _sample(task, record)
            return
        except DamagedSample as error:
            fault = error
    raise ValueError(f"data.plain: none of the first {_LOOK} samples of task {task!r} can be used: {fault}")
