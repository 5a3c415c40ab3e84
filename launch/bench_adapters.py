"""The `adapters` package on the study's model, against the frozen floor measured in the same run.

Needs an environment of its own, since the package pins an older transformers than this project needs:

    python -m venv .venv-adapters
    .venv-adapters/bin/pip install adapters torch fire
    .venv-adapters/bin/python launch/bench_adapters.py --out docs/results/cost_adapters.jsonl

Systems, with the sizes that the study gives its own: `floor` as in bench_step.py; `bottleneck`, parallel adapters of
240 shared by all samples; `mam`, prefixes of 8 and parallel adapters of 144; `batch_split`, five sets of bottleneck 48,
each for its part of the batch. A train step is forward and backward, no update.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from typing import Any

from bench_step import DECODE_TOKENS, MODELS, STUDY
from command import run
from turns import keep, take_turns

PARTS = 5


def bench_adapters(
    *, out: str | None = None, rounds: int = 9, batch: int = 16, source: int = 24, target: int = 4
) -> None:
    """Time one train step and one 16-token decode of every system and write JSON lines as bench_step.py does.

    Examples:
        .venv-adapters/bin/python launch/bench_adapters.py --out docs/results/cost_adapters.jsonl

    Args:
        out: file for the JSON lines
        rounds: counted rounds after one warm-up round
        batch: samples in a batch
        source: source tokens of a sample
        target: target tokens of a sample
    """
    import adapters
    import torch
    import transformers

    hardware = f"{platform.machine()} CPU"
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print(f"{hardware}, {torch.get_num_threads()} threads, {versions}, {rounds} rounds")
    case, lines = f"{STUDY} B{batch} S{source} T{target} float32", []
    for metric in ("train_step_s", f"decode_{DECODE_TOKENS}_s"):
        train = metric == "train_step_s"
        systems = {name: _system(name, batch, source, target, train) for name in SYSTEMS}
        times = take_turns(systems, rounds, "cpu")
        for name, seconds in times.items():
            ratios = [own / floor for own, floor in zip(seconds, times["floor"], strict=True)]
            line: dict[str, Any] = {
                "case": case,
                "system": f"adapters: {name}",
                "metric": metric,
                "median": statistics.median(seconds),
            }
            line |= {"min": min(seconds), "max": max(seconds), "ratio": statistics.median(ratios), **versions}
            lines.append(line | {"hardware": hardware, "threads": torch.get_num_threads()})
            figures = f"{line['median']:.3f} s  x{line['ratio']:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            print(f"{metric:14} {name:14} {figures}")
    keep(lines, out, "docs/study.md")


def _bottleneck(model: Any, batch: int) -> Any:
    model.add_adapter("one", config=_parallel(240))
    return "one"


def _mam(model: Any, batch: int) -> Any:
    import adapters

    prefix = adapters.PrefixTuningConfig(prefix_length=8, bottleneck_size=64)
    model.add_adapter("one", config=adapters.ConfigUnion(prefix, _parallel(144)))
    return "one"


def _batch_split(model: Any, batch: int) -> Any:
    from adapters.composition import BatchSplit

    names = [f"task{i}" for i in range(PARTS)]
    for name in names:
        model.add_adapter(name, config=_parallel(48))
    return BatchSplit(*names, batch_sizes=[batch * (i + 1) // PARTS - batch * i // PARTS for i in range(PARTS)])


SYSTEMS: dict[str, Callable[[Any, int], Any]] = {
    "floor": lambda model, batch: None,
    "bottleneck": _bottleneck,
    "mam": _mam,
    "batch_split": _batch_split,
}
"""Each adds its adapters to a model and says which are to be active."""


def _parallel(size: int) -> Any:
    """An adapter beside every feed-forward block, with so wide a bottleneck."""
    import adapters

    return adapters.ParBnConfig(reduction_factor=MODELS[STUDY]["d_model"] / size, scaling=1.0)


def _system(name: str, batch: int, source: int, target: int, train: bool) -> Callable[[], None]:
    import adapters
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    shape = dict(MODELS[STUDY])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, decoder_start_token_id=0, forced_eos_token_id=None)
    model = AutoModelForSeq2SeqLM.from_config(config).requires_grad_(False)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    if name != "floor":
        adapters.init(model)
        active = SYSTEMS[name](model, batch)
        model.train_adapter(active)
        model.set_active_adapters(active)
    model.train(train)
    ids, labels = (torch.randint(3, config.vocab_size, (batch, length)) for length in (source, target))
    mask = torch.ones_like(ids)

    def decode() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=DECODE_TOKENS,
            min_new_tokens=DECODE_TOKENS,
            do_sample=False,
        )

    def step() -> None:
        embed = model.get_input_embeddings()
        inputs = {"input_ids": ids}
        if name == "floor":
            inputs = {"inputs_embeds": embed(ids).requires_grad_()}
        model(**inputs, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        idle = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, f"{name}: no gradient reached {idle[:3]}"
        model.zero_grad()

    return step if train else decode


if __name__ == "__main__":
    run(bench_adapters)
