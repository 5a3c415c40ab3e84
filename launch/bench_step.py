"""What generated weights cost on top of the frozen model: one train step and one 16-token decode, side by side.

Every system of a case runs in the same process, in turn, round by round, on the same inputs:

    floor               the frozen model alone: forward, and backward to its input embeddings (no weight gradients)
    hyperpelt/one_task  HyperPELT with every sample of one task
    hyperpelt/mixed     HyperPELT with eight tasks in the batch
    hyperpelt/images    HyperPELT with eight tasks and a different image for every sample
    peft_lora           peft LoRA of rank 8 on the query and value projections

Models are random (speed does not depend on the values); a case's name gives its sizes. A train step is forward,
backward and one AdamW step on the trainables. `ratio` is the median over rounds of this system's time to the floor's
time in the same round.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import run

DECODE_TOKENS = 16
VISION = dict(cells=49, channels=512)
MODELS: dict[str, dict[str, Any]] = {
    "t5_small": dict(
        model_type="t5", d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128, dropout_rate=0.0
    ),
    "bart_6x6_d512": dict(
        model_type="bart",
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        vocab_size=32128,
        dropout=0.0,
    ),
}


def bench_step(
    *,
    out: str | None = None,
    cases: str = ",".join(MODELS),
    rounds: int = 5,
    batch: int = 16,
    source: int = 32,
    target: int = 8,
) -> None:
    """Time every system of every case and write JSON lines (case, system, metric, median, min, max, ratio).

    Examples:
        python launch/bench_step.py --out bench_step.jsonl
        python launch/bench_step.py --out bench_step.jsonl --rounds 9 --cases t5_small

    Args:
        out: file for the JSON lines; a table is printed either way
        cases: names separated by commas, of t5_small and bart_6x6_d512
        rounds: counted rounds after one warm-up round
        batch: samples in a batch
        source: source tokens of a sample
        target: target tokens of a sample
    """
    names = [name for name in cases.split(",") if name]
    for name in names:
        if name not in MODELS:
            raise ValueError(f"--cases: unknown case {name!r}; allowed are {', '.join(MODELS)}")
    for flag, value in {"rounds": rounds, "batch": batch, "source": source, "target": target}.items():
        if value < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}")
    if out and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    import torch

    from hyperpelt_ds import dist

    device = dist.device().type
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds")
    lines = []
    for name in names:
        case = f"{name} B{batch} S{source} T{target} float32"
        for metric in ("train_step_s", f"decode_{DECODE_TOKENS}_s"):
            times = _rounds(_systems(name, batch, source, target, metric == "train_step_s", device), rounds, device)
            for system, seconds in times.items():
                ratios = [own / floor for own, floor in zip(seconds, times["floor"], strict=True)]
                median, low, high = statistics.median(seconds), min(seconds), max(seconds)
                line = {"case": case, "system": system, "metric": metric, "median": median, "min": low, "max": high}
                lines.append({**line, "ratio": statistics.median(ratios), "hardware": hardware})
                ratio = f"x{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
                print(f"{case:36} {metric:14} {system:20} {median:8.3f} s [{low:.3f}, {high:.3f}]  {ratio}")
    if out:
        Path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"wrote {out}")


def _rounds(systems: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every system in every round; the systems take turns, so that drift of the machine hits all alike."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, action in systems.items():
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _systems(
    name: str, batch: int, source: int, target: int, train: bool, device: str
) -> dict[str, Callable[[], None]]:
    """What is run for a case: each entry does one train step or one decode."""
    import torch

    torch.manual_seed(0)
    vocabulary = MODELS[name]["vocab_size"]
    ids = torch.randint(3, vocabulary, (batch, source), device=device)
    labels = torch.randint(3, vocabulary, (batch, target), device=device)
    mask = torch.ones_like(ids)
    systems: dict[str, Callable[[], None]] = {"floor": _floor(name, ids, mask, labels, train, device)}
    for variant in ("one_task", "mixed", "images"):
        systems[f"hyperpelt/{variant}"] = _hyperpelt(name, variant, ids, mask, labels, train, device)
    systems["peft_lora"] = _peft_lora(name, ids, mask, labels, train, device)
    return systems


def _model(name: str, device: str) -> Any:
    import torch

    from hyperpelt_ds.backbones import random_model

    torch.manual_seed(0)
    model = random_model(**MODELS[name], decoder_start_token_id=0, forced_eos_token_id=None).to(device)
    model.generation_config.eos_token_id = None  # random weights must not stop early
    model.config.eos_token_id = None
    return model


def _decode(model: Any, ids: Any, mask: Any) -> None:
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=DECODE_TOKENS, min_new_tokens=DECODE_TOKENS, do_sample=False
    )


def _floor(name: str, ids: Any, mask: Any, labels: Any, train: bool, device: str) -> Callable[[], None]:
    model = _model(name, device).requires_grad_(False).train(train)
    if not train:
        return lambda: _decode(model, ids, mask)

    def step() -> None:
        embed = model.get_input_embeddings()
        inputs = embed(ids).requires_grad_()
        decoder_inputs = embed(model.prepare_decoder_input_ids_from_labels(labels=labels)).requires_grad_()
        model(
            inputs_embeds=inputs,
            attention_mask=mask,
            decoder_inputs_embeds=decoder_inputs,
            labels=labels,
            use_cache=False,
        ).loss.backward()

    return step


def _hyperpelt(
    name: str, variant: str, ids: Any, mask: Any, labels: Any, train: bool, device: str
) -> Callable[[], None]:
    import torch

    from hyperpelt_ds.backbones import Backbone
    from hyperpelt_ds.config import Config
    from hyperpelt_ds.contracts import Batch, Sample
    from hyperpelt_ds.model import HyperPELT

    tasks, images = (1 if variant == "one_task" else 8), variant == "images"
    vision = [f"vision.{key}={value}" for key, value in VISION.items()] + ["vision.encoder=resnet18"] if images else []
    config = Config().override(["modules.prefix_length=16", "modules.bottleneck=24", *vision])
    model = HyperPELT(config, Backbone(_model(name, device), None, config.modules), [f"task{i}" for i in range(tasks)])
    model.to_device(torch.device(device)).train(train)
    size = len(ids)
    batch = Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        targets=torch.arange(labels.numel()),
        tasks=torch.arange(tasks),
        task_rows=(torch.arange(size) * tasks // size),
        images=torch.randn(size, VISION["cells"], VISION["channels"]) if images else None,
        image_rows=torch.arange(size) if images else None,
        loss_weights=torch.full((size,), 1 / size),
        samples=tuple(Sample(str(i), "task0", "", "", image=str(i) if images else None) for i in range(size)),
    ).to(torch.device(device))
    if not train:
        return lambda: _drop(model.generate(batch, DECODE_TOKENS))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()

    return step


def _peft_lora(name: str, ids: Any, mask: Any, labels: Any, train: bool, device: str) -> Callable[[], None]:
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q", "v"] if MODELS[name]["model_type"] == "t5" else ["q_proj", "v_proj"]
    model = get_peft_model(_model(name, device), LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, target_modules=targets))
    model.train(train)
    if not train:
        return lambda: _decode(model, ids, mask)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()

    return step


def _drop(_: Any) -> None:
    return None


if __name__ == "__main__":
    run(bench_step)
