"""What it costs a run to look at its model at log steps: steps with look and writing, in turn with plain ones."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from command import run
from turns import take_turns


def bench_looks(
    *overrides: str,
    recipe: str = "demo",
    ds_config: str = "ds_configs/zero2_cpu.json",
    rounds: int = 10,
    local_rank: int = 0,
) -> None:
    """Time optimizer steps of a recipe with and without a look, and print what looks take of a run's time.

    Examples:
        python launch/bench_looks.py --recipe demo
        deepspeed --num_accelerators 2 launch/bench_looks.py --recipe demo --rounds 20 train.log_every=50

    Args:
        overrides: any number of section.key=value that replace values of the recipe
        recipe: name of a recipe in hyperpelt_ds/recipes/
        ds_config: DeepSpeed JSON
        rounds: how often each kind of step is taken; another one of each warms up
        local_rank: set by the DeepSpeed launcher
    """
    from hyperpelt_ds import dist, recipes
    from hyperpelt_ds.data.manifest import Manifest
    from hyperpelt_ds.data.plain import train_stream
    from hyperpelt_ds.model import build
    from hyperpelt_ds.train import display, engine, loop
    from hyperpelt_ds.train.metrics import OBSERVATIONS, Writer
    from hyperpelt_ds.train.observation import Observation, look
    from hyperpelt_ds.train.watch import Watch

    config = recipes.get(recipe).override(overrides)
    manifest = Manifest.of(config.data)
    config = loop.resolve(config, manifest)
    engine.start_distributed()
    model = build(config, config.data.tasks).to_device(dist.device())
    wrapped = engine.start(model, config, ds_config)
    ranks = dist.rank(), dist.world_size()
    stream = train_stream(manifest, config, config.data.tasks, model.backbone.tokenizer, *ranks, None)
    batches = [batch.to(dist.device()) for batch in next(iter(stream))]
    drawn = {task: sum(lanes) for task, lanes in stream.state().counts.items()}
    found: list[Observation | None] = []

    def plain() -> None:
        for number, batch in enumerate(batches, 1):
            wrapped.backward(wrapped.forward(batch, last=number == len(batches)).loss)
        wrapped.step()

    def watched() -> None:
        watch = Watch(model)
        for number, batch in enumerate(batches, 1):
            with watch.listening(batch):
                output = wrapped.forward(batch, last=number == len(batches))
            wrapped.backward(output.loss)
        watch.note_gradients(wrapped.gradient, wrapped.loss_scale())
        wrapped.step()
        mixture = stream.order.probabilities, drawn
        found.append(look(model, config, len(found) + 1, watch, wrapped.gradient_norm(), *mixture))
        if found[-1] is not None:
            writer.write(len(found), found[-1].scalars)
            writer.append(OBSERVATIONS, [{"step": len(found), **found[-1].record}])

    def drawing() -> None:
        if found[-1] is not None:
            display.show_look(writer, found[-1])

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), 0)
        kind = dist.device().type
        times = take_turns({"plain": plain, "watched": watched, "drawing": drawing}, rounds, kind)
        writer.close()
    if dist.rank() == 0:
        ratios = [one / two for one, two in zip(times["watched"], times["plain"], strict=True)]
        every = config.train.log_every
        for name, of in times.items():
            print(f"{name:<10} median {statistics.median(of):8.4f} s   min {min(of):8.4f}   max {max(of):8.4f}")
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"watched / plain: median {middle:.3f}, min {low:.3f}, max {high:.3f}, {rounds} rounds")
        print(f"of the time of {every} steps, of which one is watched: median {(middle - 1) / every:.2%}")
        print("next: compare with ours in docs/monitoring.md, which says how they are taken")


if __name__ == "__main__":
    run(bench_looks)
