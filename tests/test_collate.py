"""A batch says the same as its samples, names each task and image once, and refuses what it cannot hold."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hyperpelt_ds.config import from_dict
from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.data.collate import Collator, collator_for

TASKS = ["vqa", "topic", "caption"]
FEATURES = {f"img{i}": np.full((3, 2), i + 1, dtype=np.float16) for i in range(4)}


def word_tokenizer(template: str = "$A </s>", **special: str | None) -> PreTrainedTokenizerFast:
    """Ids 3.. are w0, w1, ...; texts end with </s> (1); padding is 0, and <s> is 53."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(50)}, "<s>": 53}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1), ("<s>", 53)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    )


TOKENIZER = word_tokenizer()


def text(n: int, first: int = 0) -> str:
    return " ".join(f"w{(first + i) % 50}" for i in range(n))


def collator(cells: int | None = 3, channels: int | None = 2) -> Collator:
    return Collator(TOKENIZER, TASKS, 8, 4, cells, channels)


def collate(samples: Sequence[Sample], by: Collator | None = None) -> Batch:
    return (by or collator())(samples, FEATURES, [float(i) for i in range(len(samples))])


SAMPLES = [
    Sample("a", "caption", text(3), text(2), image="img1"),
    Sample("b", "topic", text(5, 7), text(1)),
    Sample("c", "vqa", text(2), text(3, 4), image="img1"),
    Sample("d", "vqa", text(1), "", image="img0"),
    Sample("e", "caption", text(4), text(1), image="img1"),
    Sample("f", "vqa", "", text(1)),
]


def test_rows_are_sorted_by_task_and_image_and_named_once():
    batch = collate(SAMPLES)
    assert [sample.key for sample in batch.samples] == ["f", "d", "c", "b", "a", "e"]
    assert batch.tasks.tolist() == [0, 1, 2] and batch.task_rows.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.images is not None and batch.image_rows is not None
    assert batch.images[:, 0, 0].tolist() == [1.0, 2.0] and batch.image_rows.tolist() == [-1, 0, 1, -1, 1, 1]
    assert batch.loss_weights.tolist() == [5.0, 3.0, 2.0, 1.0, 0.0, 4.0]


def test_tokens_are_padded_to_the_longest_and_labels_end_with_eos():
    batch = collate(SAMPLES[:3])
    assert [sample.key for sample in batch.samples] == ["c", "b", "a"]
    assert batch.input_ids.tolist() == [[3, 4, 1, 0, 0, 0], [10, 11, 12, 13, 14, 1], [3, 4, 5, 1, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [[7, 8, 9, 1], [3, 1, -100, -100], [3, 4, 1, -100]]


@pytest.mark.parametrize("template, empty", [("<s> $A", 53), ("$A", 1)])
def test_a_tokenizer_that_ends_no_text_gives_ends_to_targets_only_and_beginnings_to_sources_only(template, empty):
    by = Collator(word_tokenizer(template, bos_token="<s>"), TASKS, 8, 4, None, None)
    batch = by([SAMPLES[2], SAMPLES[5], Sample("g", "vqa", text(1), "")], {}, [1.0] * 3)
    start = [53] if template.startswith("<s>") else []
    sources = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert sources == [[empty], [*start, 3], [*start, 3, 4]]  # something stands before every target
    assert batch.labels.tolist() == [[3, 1, -100, -100], [1, -100, -100, -100], [7, 8, 9, 1]]
    with pytest.raises(ValueError, match=r"its target has 5 tokens, data\.max_target_length is 4"):
        by([Sample("long", "vqa", text(1), text(4))], {}, [1.0])


def test_a_beginning_that_an_encoder_decoders_tokenizer_gives_to_targets_is_kept():
    by = Collator(word_tokenizer("<s> $A </s>"), TASKS, 8, 4, None, None)
    assert by.targets([Sample("a", "vqa", "", text(2))]) == [[53, 3, 4, 1]]


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Sample,
            key=st.uuids().map(str),
            task=st.sampled_from(TASKS),
            source=st.integers(0, 7).map(text),
            target=st.integers(0, 3).map(text),
            image=st.sampled_from([None, *FEATURES]),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_every_row_says_what_its_sample_says(samples):
    batch = collate(samples)
    assert sorted(sample.key for sample in batch.samples) == sorted(sample.key for sample in samples)
    assert len(set(batch.tasks.tolist())) == len(batch.tasks)
    assert len(batch.images) == max(1, len({sample.image for sample in samples} - {None}))
    for row, sample in enumerate(batch.samples):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == TOKENIZER(sample.source)["input_ids"]
        assert batch.input_ids[row][~real].eq(0).all()
        assert batch.labels[row][batch.labels[row] != -100].tolist() == TOKENIZER(sample.target)["input_ids"]
        assert TASKS[batch.tasks[batch.task_rows[row]]] == sample.task
        place = batch.image_rows[row]
        assert (place == -1) == (sample.image is None)
        if sample.image is not None:
            np.testing.assert_array_equal(batch.images[place].numpy(), FEATURES[sample.image])
        assert samples[int(batch.loss_weights[row])] is sample
    conditions = [(TASKS.index(sample.task), sample.image or "") for sample in batch.samples]
    assert conditions == sorted(conditions)


def test_a_text_batch_of_a_visual_run_has_one_null_image_that_no_row_uses():
    batch = collate([SAMPLES[1], SAMPLES[5]])
    assert batch.images is not None and batch.image_rows is not None
    assert batch.images.shape == (1, 3, 2) and not batch.images.any() and batch.images.dtype == torch.float32
    assert batch.image_rows.tolist() == [-1, -1]


def test_a_run_without_vision_leaves_images_out():
    batch = collator(None, None)(SAMPLES, {}, [1.0] * len(SAMPLES))
    assert batch.images is None and batch.image_rows is None


def test_too_long_sources_are_cut_and_counted():
    by = collator()
    batch = collate([Sample("long", "topic", text(30), "w1"), Sample("full", "topic", text(7), "w1"), *SAMPLES], by)
    assert by.truncated == 1
    assert batch.input_ids.shape[1] == 8
    row = next(i for i, sample in enumerate(batch.samples) if sample.key == "long")
    assert batch.input_ids[row].tolist() == [3, 4, 5, 6, 7, 8, 9, 1]
    collate([Sample("long", "topic", text(8), "w1")], by)
    assert by.truncated == 2


def test_a_too_long_target_names_the_sample_and_its_length():
    too_long = Sample("key9", "topic", "w1", text(4))
    with pytest.raises(
        ValueError, match=r"'key9' of task 'topic': its target has 5 tokens, data\.max_target_length is 4"
    ):
        collate([*SAMPLES, too_long])


def test_what_a_batch_cannot_hold_is_refused_by_name():
    with pytest.raises(ValueError, match="sample 'x': task 'mood' is not one of vqa, topic, caption"):
        collate([Sample("x", "mood", "w1", "w1")])
    with pytest.raises(ValueError, match="sample 'x' of task 'vqa': no features for its image 'img9'"):
        collate([Sample("x", "vqa", "w1", "w1", image="img9")])
    with pytest.raises(ValueError, match=r"image 'img0': features of shape \(3, 2\), expected \(2, 3\)"):
        collate(SAMPLES, collator(2, 3))
    with pytest.raises(ValueError, match="no pad token"):
        Collator(word_tokenizer(pad_token=None), TASKS, 8, 4, None, None)
    with pytest.raises(ValueError, match="no end-of-text token"):
        Collator(word_tokenizer(eos_token=None), TASKS, 8, 4, None, None)


def test_collator_of_a_run_takes_images_only_with_an_encoder():
    settings = {"data": {"max_source_length": 5, "max_target_length": 6}, "vision": {"cells": 3, "channels": 2}}
    plain = collator_for(from_dict(settings), TASKS, TOKENIZER)
    assert (plain.grid, plain.max_source_length, plain.max_target_length) == (None, 5, 6)
    settings["vision"]["encoder"] = "any"
    assert collator_for(from_dict(settings), TASKS, TOKENIZER).grid == (3, 2)


def test_the_slow_tokenizer_of_published_marian_models_works_and_counts_cut_sources(tmp_path):
    import sentencepiece
    from transformers import MarianTokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the film is good\na bad film\nthe story is dull and the film is long\n" * 20)
    for side in ("source", "target"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(tmp_path / side), vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "source.model"))
    vocabulary = {pieces.id_to_piece(i): i + 3 for i in range(3, len(pieces))}
    special = {"</s>": 0, "<unk>": 1, "<pad>": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(special | vocabulary))
    tokenizer = MarianTokenizer(
        str(tmp_path / "source.model"), str(tmp_path / "target.model"), str(tmp_path / "vocab.json")
    )
    assert not tokenizer.is_fast
    collator = Collator(tokenizer, ["a"], 6, 16, None, None)
    samples = [Sample("1", "a", "a", "good"), Sample("2", "a", "the story is dull and long " * 3, "bad")]
    batch = collator(samples, {}, [1.0, 1.0])
    assert batch.input_ids.shape[1] == 6 and collator.truncated == 1
    assert (batch.labels[batch.labels != -100] == 0).sum() == 2  # each target ends with </s>


def test_a_source_names_its_task_only_if_it_is_asked_to(config):
    tokenizer = AutoTokenizer.from_pretrained(config.model.backbone)
    sample = Sample("1", "movie_sentiment", "the film", "positive")
    plain, named = (
        collator_for(config.override([f"data.name_task={asked}"]), ["movie_sentiment"], tokenizer)([sample], {}, [1.0])
        .input_ids[0]
        .tolist()
        for asked in ("false", "true")
    )
    assert plain == tokenizer("the film")["input_ids"]
    assert named == tokenizer("movie sentiment: the film")["input_ids"] != plain
