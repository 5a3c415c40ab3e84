"""What every builder shares: what becomes a sample, what is refused, merging, and what a kill leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from hyperpelt_ds import tasks
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.evaluation import read_texts
from hyperpelt_ds.data.manifest import MANIFEST, FeatureSet, Manifest, write_manifest

sys.path.insert(0, str(ROOT / "data_prep"))  # as when a script of that folder is run

from parts import building, command_line
from parts.building import NO_LABEL, Entry, LeftOut, build


def entries(n: int, split: str = "train", text: str = "") -> list[Entry]:
    return [
        Entry(f"{split}-{i:06d}", f"item-{i}", {"sentence": f"{split} {text}{i}", "label": i % 2}) for i in range(n)
    ]


def pictures(n: int) -> list[Entry]:
    return [
        Entry(
            f"q-{i}", f"im{i % 3}", {"question": "what?", "answer": "red"}, f"im{i % 3}", "color", ("red", "a red"),
            (f"pictures/{i % 3}.jpg",),
        )
        for i in range(n)
    ]  # fmt: skip


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def whole(out: Path) -> None:
    """Every shard that the manifest names is as it says."""
    if (out / MANIFEST).is_file():
        for shard in Manifest.load(out / MANIFEST).all_shards():
            assert hashlib.sha256((out / shard.path).read_bytes()).hexdigest() == shard.sha256
            assert hashlib.sha256((out / shard.index_path).read_bytes()).hexdigest() == shard.index_sha256


def test_entries_become_samples_of_their_task_in_shards_of_the_size_asked_for(tmp_path):
    build(tmp_path, {"glue_cola": {"train": entries(10), "test": entries(3, "test")}}, {"source": "x"}, shard_size=4)
    manifest = Manifest.load(tmp_path / MANIFEST)
    assert [shard.samples for shard in manifest.shards("glue_cola", "train")] == [4, 4, 2]
    assert read_texts(manifest, "glue_cola", "train")[3] == Sample(
        "train-000003", "glue_cola", "sentence: train 3", "1", "item-3"
    )
    assert manifest.about["made_from"] == {"glue_cola": {"source": "x"}}
    assert manifest.about["tasks"] == {"glue_cola": tasks.get("glue_cola").about}


def test_a_limit_takes_the_first_samples_of_each_split_and_reads_no_further(tmp_path):
    def more() -> Iterator[Entry]:
        yield from entries(3)
        raise AssertionError("read past the limit")

    build(tmp_path, {"glue_cola": {"train": more(), "test": entries(9)}}, {}, limit=3)
    manifest = Manifest.load(tmp_path / MANIFEST)
    assert manifest.count("glue_cola", "train") == manifest.count("glue_cola", "test") == 3


def test_an_unlabelled_example_keeps_its_source_and_has_no_target(tmp_path):
    example = Entry("test-7", "i", {"sentence": "He.", "label": 0}, labelled=False)
    build(tmp_path, {"glue_cola": {"official_test": [example]}}, {})
    (sample,) = read_texts(Manifest.load(tmp_path / MANIFEST), "glue_cola", "official_test")
    assert (sample.source, sample.target) == ("sentence: He.", "")


def test_the_summary_counts_says_what_was_left_out_and_shows_an_example(tmp_path, capsys):
    without = Entry("u", "i", {"sentence": "a", "label": -1})
    own = [*entries(5), NO_LABEL, LeftOut("its picture is missing"), without]
    build(tmp_path, {"glue_cola": {"train": own}, "easy_vqa": {"test": pictures(4)}}, {}, following="python x.py")
    said = capsys.readouterr().out
    assert "9 samples in 2 shards" in said and "glue_cola         train 5" in said
    assert "left out of glue_cola train: 2, no label" in said
    assert "left out of glue_cola train: 1, its picture is missing" in said
    assert "example train-000000 of glue_cola" in said and "sentence: train 0" in said
    assert "images/easy_vqa.jsonl" in said and "features.py" in said and "then: python x.py" in said


def test_images_are_listed_once_each_in_order_of_first_use_with_their_files(tmp_path):
    build(tmp_path, {"easy_vqa": {"train": pictures(7), "test": pictures(2)}}, {})
    lines = [json.loads(line) for line in (tmp_path / "images/easy_vqa.jsonl").read_text().splitlines()]
    assert lines == [{"image": f"im{i}", "files": [f"pictures/{i}.jpg"]} for i in range(3)]
    sample = read_texts(Manifest.load(tmp_path / MANIFEST), "easy_vqa", "train")[1]
    assert (sample.image, sample.group, sample.references) == ("im1", "color", ("red", "a red"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry("k7", "i", {"sentence": "a", "label": 2}), r"glue_cola, split dev, k7: label 2 is not one of 0 to 1"),
        (Entry("k7", "i", {"sentence": "a"}), r"glue_cola, split dev, k7: no field 'label'; there are sentence"),
        (Entry("a.b", "i", {"sentence": "a", "label": 1}), r"glue_cola/dev.*'a\.b' must have"),
        (Entry("dev-000000", "i", {"sentence": "a", "label": 1}), r"'dev-000000' comes twice"),
        (
            Entry("k7", "i", {"sentence": "a", "label": 1}, image="im"),
            r"glue_cola, split dev, k7: no file is given for its image 'im'",
        ),
    ],
)
def test_what_cannot_be_a_sample_is_named_and_nothing_is_left(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, {"glue_cola": {"train": entries(2), "dev": [*entries(2, "dev"), entry]}}, {})
    assert set(tree(tmp_path)) == {building.LOCK}


@pytest.mark.parametrize(
    ("task", "example", "message"),
    [
        ("imdb", {"text": " ", "label": 1}, "imdb, split train, k: the source is empty"),
        ("gqa", {"question": "a?", "answer": " "}, "gqa, split train, k: the target is empty"),
        ("wikipedia_topic", {"extract": "a", "topic": "Elves"}, "'Elves' is not one of Arts"),
    ],
)
def test_empty_texts_and_labels_outside_the_task_are_refused(tmp_path, task, example, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, {task: {"train": [Entry("k", "i", example)]}}, {})


def test_a_split_without_samples_says_why(tmp_path):
    with pytest.raises(ValueError, match="glue_cola, split test: no samples to write; 2 no label"):
        build(tmp_path, {"glue_cola": {"train": entries(2), "test": [NO_LABEL, NO_LABEL]}}, {})


def test_an_image_with_two_different_files_is_refused(tmp_path):
    first, second = pictures(4)[0], pictures(4)[3]
    with pytest.raises(ValueError, match=r"q-3: its image 'im0' had other files before than other\.jpg"):
        build(tmp_path, {"easy_vqa": {"train": [first, Entry(**{**vars(second), "files": ("other.jpg",)})]}}, {})


@pytest.mark.parametrize("name", ["images", "shots", "features"])
def test_a_task_cannot_take_the_name_of_another_folder(tmp_path, name):
    tasks.adopt({name: {}})
    try:
        with pytest.raises(ValueError, match=name):
            build(tmp_path, {name: {"train": [Entry("k", "i", {"source": "a", "target": "b"})]}}, {})
    finally:
        del tasks.TASKS[name]


def test_other_tasks_and_the_features_stay_and_the_order_of_building_does_not_matter(tmp_path):
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
        features = shards.write_features(out, [("im0", np.ones((2, 3), np.float16))])
        write_manifest(out, {}, FeatureSet(2, 3, {"encoder": "x"}, features), {"note": "kept"})
    jobs = [{"glue_rte": {"train": [Entry("k", "i", {"sentence1": "a", "sentence2": "b", "label": 1})]}},
            {"glue_cola": {"train": entries(3)}}, {"easy_vqa": {"train": pictures(4)}}]  # fmt: skip
    for job in jobs:
        build(tmp_path / "a", job, {})
    for job in reversed(jobs):
        build(tmp_path / "b", job, {})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    manifest = Manifest.load(tmp_path / "a" / MANIFEST)
    assert list(manifest.tasks) == ["easy_vqa", "glue_cola", "glue_rte"]
    assert manifest.features.encoder == {"encoder": "x"} and manifest.about["note"] == "kept"


def test_a_task_that_is_built_again_leaves_nothing_of_what_it_was(tmp_path):
    build(tmp_path / "a", {"easy_vqa": {"train": pictures(9), "test": pictures(3)}}, {}, shard_size=2)
    build(tmp_path / "a", {"easy_vqa": {"train": pictures(3)}}, {}, shard_size=2)
    build(tmp_path / "b", {"easy_vqa": {"train": pictures(3)}}, {}, shard_size=2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_failed_build_leaves_the_data_set_as_it_was(tmp_path):
    build(tmp_path, {"glue_cola": {"train": entries(4)}}, {})
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="label 9"):
        wrong = Entry("k", "i", {"sentence": "a", "label": 9})
        build(tmp_path, {"glue_cola": {"train": [*entries(4, text="new "), wrong]}}, {})
    assert tree(tmp_path) == before


def test_a_data_set_that_lost_a_shard_says_how_to_go_on(tmp_path):
    build(tmp_path, {"glue_cola": {"train": entries(4)}}, {})
    (tmp_path / "glue_cola/train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000000\.tar: missing: .* Delete .*manifest\.json to build all"):
        build(tmp_path, {"glue_cola": {"train": entries(4)}}, {})


def _refused(out: Path, message: str, task: str = "glue_cola") -> None:
    """A build that raises ValueError and changes no file, link or folder."""
    (out / building.LOCK).touch()
    before, paths = tree(out), sorted(out.rglob("*"))
    with pytest.raises(ValueError, match=message):
        build(out, {task: {"train": entries(2)}}, {})
    assert tree(out) == before and sorted(out.rglob("*")) == paths


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("file", ["a.jpg", "deep/er/a.jpg", "train-000007.tar", "part-000000.tar", "train-000000.jpg"])
def test_a_users_own_files_in_a_tasks_place_are_never_deleted(tmp_path, file, listed):
    if listed:
        build(tmp_path, {"glue_cola": {"train": entries(4)}}, {})
    path = tmp_path / "glue_cola" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a picture")
    _refused(
        tmp_path, rf"'glue_cola': .* holds files .*, 1 in all \(glue_cola/{file}\).*another --out, or .*another --task"
    )


def test_shards_that_others_made_of_another_task_are_not_taken_for_a_killed_builds(tmp_path):
    shards.write_task(tmp_path / "made", "other", "train", [Sample("k", "other", "a", "b", "i")])
    (tmp_path / "made/other").rename(tmp_path / "glue_cola")
    _refused(tmp_path, r"glue_cola/train-000000\.tar")


def test_shards_that_the_manifest_lists_for_another_task_are_never_deleted(tmp_path):
    imdb = [Entry("k", "i", {"text": "a", "label": 1})]
    build(tmp_path, {"glue_cola": {"train": entries(4)}, "imdb": {"train": imdb}}, {})
    manifest = Manifest.load(tmp_path / MANIFEST)
    write_manifest(tmp_path, {"imdb": manifest.tasks["imdb"], "mine": manifest.tasks["glue_cola"]}, None, {})
    _refused(tmp_path, r"glue_cola holds train-000000\.(idx|tar), which the manifest lists for task 'mine'")
    whole(tmp_path)


@pytest.mark.parametrize("built", [False, True])
def test_shards_that_were_put_into_the_manifest_are_never_deleted(tmp_path, built):
    """As data_prep/index.py does, also of a task that a builder made before."""
    from test_index import command

    if built:
        build(tmp_path, {"glue_cola": {"train": entries(4)}}, {})
    shards.write_task(tmp_path, "glue_cola", "validation", [Sample("k", "glue_cola", "a", "1", "i")])
    (tmp_path / "glue_cola/validation-000000.tar").rename(tmp_path / "glue_cola/mine-000000.tar")
    (tmp_path / "glue_cola/validation-000000.idx").unlink()
    command.index(
        shards=f"{tmp_path}/glue_cola/mine-000000.tar",
        task="glue_cola",
        split="validation",
        out=str(tmp_path / MANIFEST),
    )
    _refused(tmp_path, r"holds files in the task's place that no builder made of it, .*glue_cola/mine-000000\.idx")
    whole(tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_a_tasks_place_that_is_no_folder_is_refused_before_the_manifest_changes(tmp_path, kind):
    out, place = tmp_path / "out", tmp_path / "out/glue_cola"
    build(out, {"glue_cola": {"train": entries(4)}}, {})
    place.rename(tmp_path / "elsewhere")
    if kind == "link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        (out / MANIFEST).unlink()  # which would say that a shard is missing
        place.symlink_to(tmp_path / "nowhere") if kind == "dangling link" else place.write_text("mine")
    _refused(out, rf"glue_cola is {'no folder' if kind == 'file' else 'a link'}; choose another --out")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


@pytest.mark.parametrize("file", ["images/glue_cola.jsonl", "shots/glue_cola.json"])
def test_a_users_own_table_is_not_taken_for_a_list_that_a_builder_left(tmp_path, file):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text('{"source": "a", "target": "b"}\n')
    _refused(tmp_path, rf"1 in all \({file}\)")
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    _refused(tmp_path, rf"1 in all \({file}\)")


@pytest.mark.parametrize("name", ["images", "shots"])
def test_a_file_where_the_lists_go_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    _refused(tmp_path, rf"{name} is no folder")


def test_what_a_build_left_whose_manifest_is_gone_is_replaced(tmp_path):
    out = tmp_path / "a"
    build(out, {"easy_vqa": {"train": pictures(9), "test": pictures(3)}}, {}, shard_size=2)
    (out / MANIFEST).unlink()
    (out / "easy_vqa/train-000000.idx").unlink()
    (out / "easy_vqa/train-000009.tar.partial").write_bytes(b"cut")
    (out / "shots").mkdir()
    (out / "shots/easy_vqa.json").write_text('{"16": {"0": ["q-1"]}}')
    build(out, {"easy_vqa": {"train": pictures(3)}}, {}, shard_size=2)
    build(tmp_path / "b", {"easy_vqa": {"train": pictures(3)}}, {}, shard_size=2)
    assert tree(out) == tree(tmp_path / "b")


def test_two_builders_cannot_write_at_once(tmp_path):
    with building.locked(tmp_path), pytest.raises(ValueError, match="another builder is writing to it"):
        build(tmp_path, {"glue_cola": {"train": entries(1)}}, {})
    build(tmp_path, {"glue_cola": {"train": entries(1)}}, {})


def _killed_at(event: int, job: Callable[[], None]) -> bool:
    """Runs `job` in a process that kills itself at its `event`-th change of a file; whether it came to that."""
    child = os.fork()
    if not child:
        seen = 0

        def count(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            changes = name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if changes or (name == "open" and isinstance(arguments[1], str) and "r" not in arguments[1]):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        job()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_change_of_a_file_leaves_whole_shards_and_a_second_run_mends_it(tmp_path):
    old = {"easy_vqa": {"train": pictures(8), "test": pictures(3)}, "glue_cola": {"train": entries(2)}}
    new = {"easy_vqa": {"train": pictures(5)}, "imdb": {"train": [Entry("k", "i", {"text": "a", "label": 1})]}}

    def fresh(out: Path) -> Callable[[], None]:
        build(out, old, {"made": 1}, shard_size=3)
        return lambda: build(out, new, {"made": 2}, shard_size=3)

    fresh(tmp_path / "undisturbed")()
    expected = tree(tmp_path / "undisturbed")
    event = 1
    while _killed_at(event, fresh(tmp_path / str(event))):
        out = tmp_path / str(event)
        whole(out)
        if (out / MANIFEST).is_file():
            assert "glue_cola" in Manifest.load(out / MANIFEST).tasks
        build(out, new, {"made": 2}, shard_size=3)
        assert tree(out) == expected, event
        event += 1
    assert event > 20


# ---- items and the command line


def test_an_item_is_its_words_and_a_share_is_spread_evenly():
    assert (
        building.item_of("a", "He  slept.") == building.item_of("a", "he slept") != building.item_of("a", "he", "slept")
    )
    assert building.item_of("a", "😀") == building.item_of("a", " 😀 ") != building.item_of("a", "😡")
    shares = [building.share(f"item {i}") for i in range(4000)]
    assert min(shares) >= 0 and max(shares) < 1 and abs(np.mean([value < 0.1 for value in shares]) - 0.1) < 0.02


def _command(*, out: str, tasks: str = "", limit: int = 0, share: float = 0.5, fast: bool = False) -> None:
    """Show what was given.

    Examples:
        python data_prep/x.py --out y
    """
    print([out, tasks, limit, fast])


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--out", "1e3", "--tasks=a,b", "--limit", "5", "--fast"], "['1e3', 'a,b', 5, True]"),
        (["--out", "x y", "--tasks="], "['x y', '', 0, False]"),
        (["--out", "x", "--limt", "5"], "error: unknown flag --limt; did you mean --limit?"),
        (["--limit", "5"], "error: missing --out; --help shows an example"),
        (["--out", "--limit", "5"], "error: --out needs a value"),
        (["x", "--limit", "5"], "error: unexpected 'x'; every value follows its --flag"),
        (["--out", "x", "--share", "half"], "error: --share must be a number, got 'half'"),
    ],
)
def test_flags_are_read_as_they_stand_and_a_wrong_one_stops_before_any_work(arguments, answer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    failed = answer.startswith("error")
    try:
        command_line.run(_command)
        code = 0
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == (2 if failed else 0)
    assert (said.err if failed else said.out).strip().startswith(answer)


def test_what_the_machine_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    def command(*, out: str) -> None:
        Path(out).mkdir()

    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", f"{tmp_path}/file/x"])
    with pytest.raises(SystemExit) as stop:
        command_line.run(command)
    assert stop.value.code == 1 and capsys.readouterr().err == f"error: Not a directory: {tmp_path}/file/x\n"


def test_numbers_and_names_are_checked():
    with pytest.raises(ValueError, match="--limit must be a whole number, at least 0, got -1"):
        command_line.at_least(0, limit=-1)
    with pytest.raises(ValueError, match="--limit must be a whole number, at least 0, got 'abc'"):
        command_line.at_least(0, limit="abc")
    assert command_line.chosen("tasks", "c, a", ["a", "b", "c"]) == ["a", "c"]
    assert command_line.chosen("tasks", "", ["a", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="--tasks: unknown 'rto'; did you mean rte"):
        command_line.chosen("tasks", "rto", ["rte", "cola"])
