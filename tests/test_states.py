"""Training states from any ZeRO stage, precision and world size into any other, through real checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import free_port
from safetensors.torch import load_file
from train_states import CONFIG, Network, samples, sgd

from hyperpelt_ds.train import engine


def settings(stage: int, offload: bool = False, persistent: int = 0, **more: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"overlap_comm": False, "reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": persistent}
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu"}}
        more |= {"zero_force_ds_cpu_optimizer": False}
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **more}


AUTOCAST, HALF = (
    {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []} for dtype in ("bfloat16", "float16")
)
FP16 = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 4, "hysteresis": 1}  # the scale moves
KINDS = {
    "2": settings(2),
    "3": settings(3),
    "0": settings(0),
    "1": settings(1),
    "3, whole": settings(3, persistent=100_000),
    "2, offload": settings(2, offload=True),
    "3, offload": settings(3, offload=True),
    "1, bf16": settings(1, bf16={"enabled": True}),
    "2, bf16": settings(2, bf16={"enabled": True}),
    "3, bf16": settings(3, bf16={"enabled": True}),
    "1, fp16": settings(1, fp16=FP16),
    "2, fp16": settings(2, fp16=FP16),
    "3, fp16": settings(3, fp16=FP16),
    "0, autocast": settings(0, torch_autocast=AUTOCAST),
    "0, autocast to float16": settings(0, torch_autocast=HALF),
}
OPTIMIZERS = ("adamw", "sgd")
CASES = [(kind, optimizer) for kind in KINDS for optimizer in OPTIMIZERS]
STEP_3, STEP_5, STEP_7, STEP_23 = (f"step_{step:08d}" for step in (3, 5, 7, 23))


def job(
    kind: str,
    optimizer: str,
    load: Path | None,
    *saves: tuple[int, Path],
    dropout: float = 0.3,
    micro_batch: int = 2,
) -> dict[str, Any]:
    return {
        "settings": KINDS[kind],
        "optimizer": optimizer,
        "dropout": dropout,
        "micro_batch": micro_batch,
        "load": load and str(load),
        "saves": [(steps, str(run_dir)) for steps, run_dir in saves],
    }


@pytest.fixture(scope="module")
def do(run_python: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, list[Any]], None]:
    """Does jobs of train_states.py on so many ranks; those with autocast last, for DeepSpeed (seen in 0.19.8) keeps
    its type for later engines of the process."""

    def do(ranks: int, jobs: list[Any]) -> None:
        file = tmp_path_factory.mktemp("jobs") / "jobs.json"
        file.write_text(json.dumps(sorted(jobs, key=lambda job: "torch_autocast" in job["settings"])))
        launcher = ["deepspeed", "--master_port", free_port(), "--num_accelerators", ranks] if ranks > 1 else ["python"]
        done = run_python(*launcher, "tests/train_states.py", file, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    return do


def losses(run_dir: Path) -> list[float]:
    return json.loads((run_dir / "losses.json").read_text())


def same(run_dir: Path, other: Path, step: str) -> bool:
    files = [load_file(folder / step / name) for folder in (run_dir, other) for name in FILES]
    pairs = ((files[0], files[2]), (files[1], files[3]))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


FILES = ("weights.safetensors", "moments.safetensors")


def test_a_state_goes_from_stage_2_to_3_to_0_bitwise_and_on_as_if_never_saved(do, tmp_path):
    two, three, zero, again = (tmp_path / name for name in ("two", "three", "zero", "again"))
    do(
        2,
        [
            job("2", "adamw", None, (3, two), (20, two / "on")),
            job("2", "adamw", two / STEP_3, (20, again)),
            job("3", "adamw", two / STEP_3, (2, three)),
            job("0", "adamw", three / STEP_5, (2, zero)),
        ],
    )
    assert losses(again) == losses(two / "on") and same(again, two / "on", STEP_23)
    # the same dropout, since the ranks are as many; the sums are in another order
    assert losses(three) + losses(zero) == pytest.approx(losses(two / "on")[:4], rel=1e-5)


def plain_torch(optimizer: str) -> dict[str, torch.Tensor]:
    """Weights after twenty steps of a loop that knows neither ranks nor micro-batches."""
    torch.manual_seed(0)
    model, train = Network(0.0), CONFIG.train
    groups = engine.parameter_groups(model, train.weight_decay)
    chosen = torch.optim.AdamW(groups, lr=train.learning_rate) if optimizer == "adamw" else sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, engine.learning_rate_factor(train))
    for step in range(20):
        chosen.zero_grad()
        model(samples(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clipping)
        chosen.step()
        schedule.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("optimizer", "most"), [("adamw", 5e-6), pytest.param("sgd", 1e-6, marks=pytest.mark.slow)])
def test_twenty_steps_of_every_stage_are_those_of_plain_torch(do, tmp_path, optimizer, most):
    """On two ranks, with one micro-batch a step and with four: how far apart a tensor's weights are, by its norm."""
    cases = {(stage, size): tmp_path / f"{stage} {size}" for stage in "0123" for size in (4, 1)}
    do(2, [
        job(stage, optimizer, None, (20, place), dropout=0, micro_batch=size) for (stage, size), place in cases.items()
    ])  # fmt: skip
    plain = plain_torch(optimizer)
    for case, place in cases.items():
        for name, weight in load_file(place / "step_00000020" / "weights.safetensors").items():
            assert (weight - plain[name]).norm() <= most * plain[name].norm(), (case, name)


@pytest.fixture(scope="module")
def on_two(do: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every case: `first` at step 3, `on` 20 steps later, and `resumed`, the same from the files of `first`."""
    folder = tmp_path_factory.mktemp("two")
    jobs = []
    for kind, optimizer in CASES:
        place = folder / f"{kind} {optimizer}"
        jobs.append(job(kind, optimizer, None, (3, place / "first"), (20, place / "on")))
        jobs.append(job(kind, optimizer, place / "first" / STEP_3, (20, place / "resumed")))
    do(2, jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "optimizer"), CASES)
def test_twenty_steps_with_dropout_after_a_resume_are_bitwise_those_without(on_two, kind, optimizer):
    place = on_two / f"{kind} {optimizer}"
    assert losses(place / "resumed") == losses(place / "on") and len(set(losses(place / "on"))) == 20
    assert same(place / "resumed", place / "on", STEP_23)


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, 4])
def test_every_state_goes_from_two_ranks_to_one_to_four_and_to_other_stages_bitwise(on_two, do, tmp_path, turn):
    """`train_states.py` asserts it; `turn` says how far every state goes round the kinds at each change."""
    kinds = list(KINDS)
    to_one, to_four = [], []
    for kind, optimizer in CASES:
        place = tmp_path / f"{kind} {optimizer}"
        one, four = (kinds[(kinds.index(kind) + turn * times) % len(kinds)] for times in (1, 2))
        first = on_two / f"{kind} {optimizer}" / "first" / STEP_3
        to_one.append(job(one, optimizer, first, (2, place / "one")))
        to_four.append(job(four, optimizer, place / "one" / STEP_5, (2, place / "four")))
    do(1, to_one)
    do(4, to_four)
    assert all((tmp_path / f"{kind} {optimizer}" / "four" / STEP_7).is_dir() for kind, optimizer in CASES)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_dropout_other_world_sizes_and_stages_go_on_as_the_first_would(do, tmp_path, optimizer):
    whole, two, one, four = (tmp_path / name for name in ("whole", "two", "one", "four"))
    do(2, [job("2", optimizer, None, (3, two), (20, whole), dropout=0)])
    do(1, [job("3", optimizer, two / STEP_3, (4, one), dropout=0)])
    do(4, [job("0", optimizer, one / STEP_7, (16, four), dropout=0)])
    assert losses(one) + losses(four) == pytest.approx(losses(whole), rel=1e-5)
