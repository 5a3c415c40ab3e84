"""A finished run, loaded and asked: what `hyperpelt_ds.load(run_dir).generate(...)` promises."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import hyperpelt_ds

TASKS = ["easy_vqa", "movie_rating", "shape_caption", "movie_sentiment", "easy_vqa"]
TEXTS = ["what color is the shape", "a good film", "what does the image contain", "a dull story", "what shape"]


@pytest.fixture(scope="module")
def run(finished_run):
    """A trained run whose weights are then shaken: nine steps teach it to answer nothing, whatever it is asked."""
    run = hyperpelt_ds.load(finished_run(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Red as an image, blue as a file, for the samples that see one."""
    file = tmp_path_factory.mktemp("pictures") / "blue.png"
    Image.new("RGB", (9, 7), "blue").save(file)
    red = Image.new("RGB", (8, 8), "red")
    return [red, None, str(file), None, red]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_call_answers_as_each_text_alone_would_be_answered(run, pictures, beams):
    together = run.generate(TASKS, TEXTS, pictures, num_beams=beams)
    alone = [
        run.generate(task, [text], [picture], num_beams=beams)[0]
        for task, text, picture in zip(TASKS, TEXTS, pictures, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 1 and any(together), "answers differ by task, text and image"
    assert run.generate("movie_rating", [], num_beams=beams) == []


def test_weights_and_each_image_are_computed_once_for_a_call(run, pictures):
    run.generate("easy_vqa", TEXTS[:1], pictures[:1])  # loads the encoder
    calls, encoded = [], []
    hook = run.model.hypernet.register_forward_hook(lambda *_: calls.append(1))
    encode, run._encoder.encode = run._encoder.encode, lambda images: encoded.append(len(images)) or encode(images)
    try:
        run.generate(TASKS, TEXTS, pictures, num_beams=2)
    finally:
        hook.remove()
        run._encoder.encode = encode
    assert len(calls) == 1
    assert encoded == [2]  # two distinct images for three samples


def test_many_texts_are_answered_in_batches(run, monkeypatch):
    texts, sizes = [f"the film {'really ' * (number % 4)}{number}" for number in range(7)], []
    alone = [run.generate("movie_rating", [text])[0] for text in texts]
    small = run.config.override(["eval.batch_size=3"])
    monkeypatch.setattr(run, "config", small)
    hook = run.model.hypernet.register_forward_hook(lambda module, args, made: sizes.append(len(args[0].samples)))
    assert run.generate("movie_rating", texts) == alone
    hook.remove()
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"task": "movie_ratin", "texts": ["a"]},
            "unknown task 'movie_ratin'; this run was trained on movie_sentiment",
        ),
        ({"task": ["movie_rating"], "texts": ["a", "b"]}, "got 2 texts, 1 tasks and 2 images"),
        ({"task": "easy_vqa", "texts": ["a"], "images": ["nowhere.png"]}, "cannot read image 'nowhere.png'"),
        ({"task": "movie_rating", "texts": ["a"], "max_new_tokens": 9999}, "max_new_tokens 9999 are more than the"),
    ],
)
def test_a_call_that_cannot_be_answered_says_why(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run.generate(**arguments)


def test_a_folder_that_is_no_run_or_whose_weights_do_not_fit_is_refused(finished_run, tmp_path):
    with pytest.raises(ValueError, match=r"is no run: it has no config\.json"):
        hyperpelt_ds.load(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(finished_run(2), folder)
    weights = load_file(folder / "best/weights.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "norms" not in name}, folder / "best/weights.safetensors"
    )
    said = r"weights\.safetensors does not fit .*config\.json: hypernet\.norms\.values is missing there, \(.*\) here"
    with pytest.raises(ValueError, match=said):
        hyperpelt_ds.load(folder)


def test_a_run_is_refused_with_another_backbone_or_image_encoder_than_it_was_trained_with(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run(2), folder)
    identity = json.loads((folder / "identity.json").read_text())
    (folder / "identity.json").write_text(json.dumps({**identity, "backbone": "0" * 64}))
    with pytest.raises(ValueError, match="was trained on another backbone"):
        hyperpelt_ds.load(folder)
    (folder / "identity.json").write_text(json.dumps({**identity, "encoder": {"sha256": "of other weights"}}))
    with pytest.raises(ValueError, match=r"trained on features of .*of other weights"):
        hyperpelt_ds.load(folder).generate("easy_vqa", ["what"], [Image.new("RGB", (4, 4))])


def test_a_task_with_images_is_not_answered_without_one(run):
    with pytest.raises(ValueError, match="task 'easy_vqa' needs an image"):
        run.generate(["movie_rating", "easy_vqa"], ["good", "what color"])
