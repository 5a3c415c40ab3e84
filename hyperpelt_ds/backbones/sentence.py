"""A frozen BERT-like model as a source of sentence vectors; here because only backbones may import transformers.

It knows nothing of tasks: it is given sentences and returns a vector for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hyperpelt_ds.backbones.hub import cannot_load


@torch.no_grad()
def sentence_vectors(path: str, sentences: Sequence[str]) -> Tensor:
    """The mean of the last layer's states over each sentence's tokens, (sentences, F') float32 on the CPU.

    That is how all-MiniLM-L6-v2 and its kin are published to be used. `path` is a local folder or a hub id. Raises
    ValueError that names the field where nothing can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise cannot_load("hypernet.sentence_encoder", path, error) from error
    batch = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    states: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)
