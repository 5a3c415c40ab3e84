"""What a data set holds: `manifest.json`, with the count, size and sha256 of every shard. Written last, read first.

    manifest.json                     tasks, features, about
    <task>/<split>-000000.tar         a plain webdataset shard: one `key.json` a sample
    <task>/<split>-000000.idx         where each sample lies, its crc32 and its lengths
    features/features-000000.tar      one `image.npy` (V, F) float16 an image, stored once however many samples use it
    features/lookup-<sha256>.idx      in which feature shard each image lies; a name of its own for each content

Not listed, and for people only:

    pictures/<image>.png (or .jpg)    what some of the images look like, to be shown beside answers

This file must not know what a sample means, nor in which order samples are trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperpelt_ds.config import DataConfig
from hyperpelt_ds.data.folder import Folder, LocalFolder, open_folder
from hyperpelt_ds.data.index import VERSION, index_path, read_index, replace
from hyperpelt_ds.data.lookup import Lookup
from hyperpelt_ds.tasks import adopt_all

MANIFEST = "manifest.json"
FEATURES, PICTURES = "features", "pictures"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One tar as the manifest lists it. `path` is relative to the manifest's folder, `bytes` is the tar's size.

    longest_target: UTF-8 bytes of the longest target in it.
    """

    path: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    longest_target: int = 0

    @property
    def index_path(self) -> str:
        return str(index_path(Path(self.path)))


@dataclass(frozen=True)
class FeatureSet:
    """The stored image features: V cells of F channels, and a description of the encoder that made them."""

    cells: int
    channels: int
    encoder: dict[str, Any]
    shards: list[Shard]
    lookup_sha256: str = ""  # write_manifest writes the lookup, and both of these
    lookup: str = f"{FEATURES}/lookup.idx"  # path of the lookup; this one in manifests that do not name it


@dataclass(frozen=True)
class Manifest:
    """A data set: its tasks (task -> split -> shards), its image features, and `digest`, which names its content.

    path: of the manifest, for messages; folder: where the files it names are read from.
    """

    path: str
    folder: Folder
    tasks: dict[str, dict[str, list[Shard]]]
    features: FeatureSet | None
    about: dict[str, Any]
    digest: str

    @classmethod
    def load(
        cls, path: str | Path, cache_dir: str | None = None, cache_bytes: int = 0, check_files: bool = True
    ) -> Manifest:
        """Reads a manifest; of a local one it also looks at every file's size, but reads no shard and no index.

        Raises ValueError naming the manifest, or the first shard that is missing. A tar of another size than it
        should have is only warned of: what is damaged in it is found when it is read, and is then a hole.
        check_files: False to look at no file but the manifest, for verify.py, which lists all that is missing.
        """
        path = str(path)
        root, name = os.path.split(path)
        folder = open_folder(root or ".", cache_dir, cache_bytes)
        try:
            content = folder.read(name)
        except FileNotFoundError:
            raise ValueError(f"manifest {path}: no such file") from None
        except OSError as error:
            raise ValueError(f"manifest {path}: cannot be read: {error}") from None
        try:
            tree = json.loads(content)
            if tree["version"] != VERSION:
                raise ValueError(
                    f"manifest {path}: version {tree['version']!r}, this program reads version {VERSION}; build the "
                    "data again with the command of data_prep that made it"
                )
            tasks = {
                t: {s: [Shard(**x) for x in xs] for s, xs in splits.items()} for t, splits in tree["tasks"].items()
            }
            features = tree["features"] and FeatureSet(
                **{**tree["features"], "shards": [Shard(**x) for x in tree["features"]["shards"]]}
            )
            about = tree["about"]
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"manifest {path}: not a manifest written by data_prep ({error!r})") from None
        canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        manifest = cls(path, folder, tasks, features, about, hashlib.sha256(canonical.encode()).hexdigest())
        if check_files and isinstance(folder, LocalFolder):
            manifest._check_sizes()
        return manifest

    @classmethod
    def of(cls, data: DataConfig, path: str | Path | None = None) -> Manifest:
        """The manifest of a run's configuration (or the one at `path`), with the run's cache for remote shards.

        The tasks that only this data set has become known to `tasks`.
        """
        cache = str(Path(data.cache).expanduser())
        manifest = cls.load(path or data.manifest, cache, int(data.cache_gb * 1e9))
        adopt_all(manifest.tasks, manifest.about)
        return manifest

    def count(self, task: str, split: str) -> int:
        """Samples of one split of one task; 0 if the task has no such split."""
        return sum(shard.samples for shard in self.shards(task, split))

    def digests(self, tasks: Iterable[str]) -> dict[str, str]:
        """Those of the tasks that are here, each with a name of its content: what a run on them depends on."""
        found = {}
        for task in tasks:
            if task in self.tasks:
                content = {split: [(s.path, s.samples, s.sha256) for s in of] for split, of in self.tasks[task].items()}
                found[task] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return found

    def shards(self, task: str, split: str) -> list[Shard]:
        """The shards of one split, [] if the task has no such split; ValueError for a task that is not there."""
        if task not in self.tasks:
            raise ValueError(f"task {task!r} is not in {self.path}; it holds {', '.join(self.tasks)}")
        return self.tasks[task].get(split, [])

    def all_shards(self) -> Iterator[Shard]:
        """The shards of every task and split, then those of the features."""
        for splits in self.tasks.values():
            for shards in splits.values():
                yield from shards
        yield from self.features.shards if self.features else []

    def _check_sizes(self) -> None:
        others = []
        for shard in self.all_shards():
            size = self.folder.size(shard.path)
            for name, found in ((shard.path, size), (shard.index_path, self.folder.size(shard.index_path))):
                if found is None:
                    raise ValueError(
                        f"shard {shard.path}: missing: {self.folder.root}/{name} does not exist; copy the data set "
                        f"whole, or build it again"
                    )
            if size != shard.bytes:
                others.append(f"shard {shard.path}: size differs from the manifest: {size} bytes, not {shard.bytes}")
        if self.features and self.folder.size(self.features.lookup) is None:
            raise ValueError(
                f"manifest {self.path}: missing: {self.folder.root}/{self.features.lookup} does not exist; copy the "
                f"data set whole, or make the features again (data_prep/features.py)"
            )
        if others:
            log.warning(
                "%s%s. What is damaged in them is left out as it is met; `python data_prep/verify.py %s` lists it",
                others[0],
                f", and {len(others) - 1} more shards" if others[1:] else "",
                self.path,
            )


def write_manifest(
    folder: Path, tasks: dict[str, dict[str, list[Shard]]], features: FeatureSet | None, about: dict[str, Any]
) -> Path:
    """Writes `manifest.json`, to be called last: with it the data set exists. `about` is any JSON-able note.

    With features it first writes their lookup, under a name of its own: a reader of the manifest that is replaced, and
    whoever comes after a kill between the two, still finds the one that fits. Raises ValueError naming an image whose
    features are stored twice.
    """
    if features:
        lookup = Lookup.build(read_index(folder / shard.path) for shard in features.shards)
        for (first, _), (second, position) in lookup.repeated():
            paths = features.shards[first].path, features.shards[second].path
            image = read_index(folder / paths[1]).key(position)
            raise ValueError(f"features of image {image!r} are stored twice, in {paths[0]} and {paths[1]}")
        content = lookup.encode()
        sha256 = hashlib.sha256(content).hexdigest()
        features = dataclasses.replace(features, lookup=f"{FEATURES}/lookup-{sha256[:12]}.idx", lookup_sha256=sha256)
        replace(folder / features.lookup, content)
    tree = {
        "version": VERSION,
        "tasks": {t: {s: [dataclasses.asdict(x) for x in shards] for s, shards in tasks[t].items()} for t in tasks},
        "features": features and dataclasses.asdict(features),
        "about": about,
    }
    path = folder / MANIFEST
    replace(path, json.dumps(tree, indent=1).encode() + b"\n")
    return path
