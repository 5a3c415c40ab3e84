"""What can be answered without the backbone: the bars that a trained model must pass.

Each takes training sources and targets and the sources to answer, all plain strings, and returns one answer a source:
metrics.score judges them like any other answer. None of them sees an image.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def majority(sources: Sequence[str], targets: Sequence[str], queries: Sequence[str]) -> list[str]:
    """The most frequent target, whatever is asked."""
    return [_most_common(targets)] * len(queries)


def source_prior(sources: Sequence[str], targets: Sequence[str], queries: Sequence[str]) -> list[str]:
    """The most frequent target of the same source text, or of all for a new text: the question-only prior."""
    seen: defaultdict[str, list[str]] = defaultdict(list)
    for source, target in zip(sources, targets, strict=True):
        seen[source].append(target)
    answers, otherwise = {source: _most_common(own) for source, own in seen.items()}, _most_common(targets)
    return [answers.get(query, otherwise) for query in queries]


def bag_of_words(sources: Sequence[str], targets: Sequence[str], queries: Sequence[str], steps: int = 100) -> list[str]:
    """Softmax regression on which words are present; for tasks whose targets are a fixed set of labels.

    A text is the sum of its words' rows over the square root of their number. Full batches, Adam, one weight decay
    for all tasks. The same inputs give the same answers.
    """
    labels = {label: row for row, label in enumerate(sorted(set(targets)))}
    words = {word for source in sources for word in _words(source)}
    vocabulary = {word: row for row, word in enumerate(sorted(words))}
    wanted = torch.tensor([labels[target] for target in targets])
    weight = nn.Parameter(torch.zeros(len(vocabulary), len(labels)))
    bias = nn.Parameter(torch.zeros(len(labels)))
    optimizer = torch.optim.Adam([weight, bias], lr=0.1)
    inputs = _bags(sources, vocabulary)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(inputs, weight, bias), wanted) + 1e-5 * weight.square().sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        answers = _logits(_bags(queries, vocabulary), weight, bias).argmax(1)
    names = list(labels)
    return [names[answer] for answer in answers.tolist()]


def _most_common(targets: Sequence[str]) -> str:
    if not targets:
        raise ValueError("a baseline needs at least one training target")
    return min(Counter(targets).items(), key=lambda pair: (-pair[1], pair[0]))[0]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


class _Bags(NamedTuple):
    words: Tensor  # (words of all texts,) rows of the vocabulary
    starts: Tensor  # (texts,) where each text begins in `words`
    weights: Tensor  # (words of all texts,)


def _bags(texts: Sequence[str], vocabulary: dict[str, int]) -> _Bags:
    """Words that training never saw are left out; a text may have none."""
    known = [sorted(vocabulary[word] for word in _words(text) if word in vocabulary) for text in texts]
    sizes = torch.tensor([len(rows) for rows in known])
    weights = torch.repeat_interleave(sizes.clamp(min=1).float().rsqrt(), sizes)
    words = torch.tensor([row for rows in known for row in rows], dtype=torch.long)
    return _Bags(words, sizes.cumsum(0) - sizes, weights)


def _logits(bags: _Bags, weight: Tensor, bias: Tensor) -> Tensor:
    return F.embedding_bag(bags.words, weight, bags.starts, mode="sum", per_sample_weights=bags.weights) + bias
