"""Vision-and-language tasks: what a builder hands over, whatever files it reads.

The image itself, its features and which split it belongs to are the builder's business, and so are a sample's
`references`: the field named for it below, word for word, as often as each answer was given. Where no field is to be
had (test sets without answers), the example gives no sample.

    task                    fields of an example                          references of the sample
    vqa_v2, okvqa           question, answer                              the ten answers of the question
    gqa                     question, answer                              none
    coco_caption            caption                                       all captions of the image, in held-out splits
    snli_ve                 hypothesis, label (0 entailment, 1 neutral,   none
                            2 contradiction, -1 none)
    nlvr2                   sentence, label ("True", "False")             none

`answer` of vqa_v2 and okvqa is the training target: one of the answers, drawn by the builder with probability
proportional to its soft score. In held-out splits it is not scored (the references are) and may be the commonest one.
coco_caption has one sample a caption in training and one sample an image in held-out splits. An "image" of nlvr2 is a
pair of them, whose cells lie one after the other.
"""

from __future__ import annotations

from hyperpelt_ds.tasks.task import Example, Task, classify


def _answer(example: Example) -> tuple[str, str] | None:
    return (example["question"], example["answer"]) if example["answer"] else None


def _caption(example: Example) -> tuple[str, str] | None:
    """No words are asked with: the encoder is given the end-of-text token alone, and the image."""
    return ("", example["caption"]) if example["caption"] else None


def _judgement(example: Example) -> tuple[str, str]:
    """The sentence as it is; the label as a word that the model knows."""
    label = example["label"]
    if label not in ("True", "False"):
        raise ValueError(f"label {label!r} is not one of True, False")
    return example["sentence"].strip(), label.lower()


VL = (
    Task(
        "vqa_v2",
        "vision",
        ("vqa_accuracy",),
        "answers a question about a photo; VQA v2 (Goyal et al. 2017), CC BY 4.0, on COCO's photos",
        "Answer the question about the photo in a word or a few.",
        _answer,
    ),
    Task(
        "gqa",
        "vision",
        ("gqa_accuracy",),
        "answers a question about objects in a photo and how they relate; GQA (Hudson & Manning 2019), CC BY 4.0",
        "Answer the question about the objects in the photo and their relations in a word or a few.",
        _answer,
    ),
    Task(
        "coco_caption",
        "vision",
        ("bleu4", "cider"),
        "describes a photo; COCO captions (Chen et al. 2015), CC BY 4.0",
        "Describe in one sentence what the photo shows.",
        _caption,
    ),
    Task(
        "okvqa",
        "vision",
        ("vqa_accuracy",),
        "answers a question whose answer is not in the photo alone; OK-VQA (Marino et al. 2019), under its own terms",
        "Answer the question about the photo with what is generally known.",
        _answer,
    ),
    Task(
        "snli_ve",
        "vision",
        ("accuracy",),
        "does a photo entail the hypothesis; SNLI-VE (Xie et al. 2019), on Flickr30k's photos, under its own terms",
        "Decide whether the photo entails the hypothesis (0), leaves it open (1) or contradicts it (2).",
        classify("hypothesis", classes=3),
        labels=("0", "1", "2"),
    ),
    Task(
        "nlvr2",
        "vision",
        ("accuracy",),
        "is a sentence true of two photos; NLVR2 (Suhr et al. 2019), CC BY 4.0, on photos under their own terms",
        "Decide whether the sentence is true of the two photos, the left and the right one.",
        _judgement,
        labels=("false", "true"),
    ),
)
