"""The steps of a run, one after another, until the last one or until all ranks leave together.

The only place that knows when something is due. It must not know DeepSpeed, files inside a checkpoint, or what a task
asks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import VALIDATION, Batch
from hyperpelt_ds.data.folder import Unreachable
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import PICTURES, Manifest
from hyperpelt_ds.data.plain import PlainStream
from hyperpelt_ds.model import HyperPELT
from hyperpelt_ds.train import checkpoint, display, evaluate, outcome
from hyperpelt_ds.train.agreement import GradientWatch, check_weights
from hyperpelt_ds.train.checkpoint import Progress, Saver
from hyperpelt_ds.train.control import BadSteps, Control, RollBack
from hyperpelt_ds.train.engine import Engine, Monitor
from hyperpelt_ds.train.ledger import Ledger
from hyperpelt_ds.train.metrics import OBSERVATIONS, Window, Writer
from hyperpelt_ds.train.observation import Observation, look
from hyperpelt_ds.train.outcome import DataFault, Preempted, Stopped
from hyperpelt_ds.train.watch import Watch
from hyperpelt_ds.train.watchdog import EVALUATION, SAVE, Watchdog

log = dist.logger(__name__)


@dataclass(frozen=True)
class Run:
    """All that the steps need."""

    config: Config
    folder: Path
    manifest: Manifest
    model: HyperPELT
    engine: Engine
    stream: TrainStream | PlainStream
    saver: Saver
    watchdog: Watchdog
    monitor: Monitor | None = None
    sent: float | None = None
    """Bytes that a rank sends in a step, where a formula says it."""


def take(run: Run, progress: Progress, finish: Callable[[], None]) -> None:
    """Trains from `progress` to the run's end, does what is to be done then, and says in STATUS.json how it went.

    Raises, on every rank, Stopped if they leave before the end, after a checkpoint where that makes sense; and RollBack
    if the newest checkpoint is to be loaded first.
    """
    state, code = outcome.FAILED, 1
    with Control() as control, closing(iter(run.stream)) as batches:
        steps = _Steps(run, progress, control)
        try:
            steps.take_all(batches)
            run.watchdog.enter(SAVE)
            run.saver.close()
            finish()
            state, code = outcome.FINISHED, 0
        except Stopped as stop:
            if stop.saves:
                steps.save()
            run.watchdog.enter(SAVE)
            run.saver.close(needed=stop.saves)
            state, code = stop.state, stop.code
            raise
        except RollBack:
            run.saver.close(needed=False)
            state = outcome.RUNNING
            raise
        finally:
            steps.end(state, None if state == outcome.RUNNING else code)


def accumulate(
    engine: Engine, window: Window, micro_batches: Sequence[Batch], usable: int, watch: Watch | None = None
) -> None:
    """The gradient of the mean loss over the `usable` samples of a global batch, of which these are this rank's."""
    scale = engine.accumulation * dist.world_size() / usable  # DeepSpeed divides by the micro-batches and the ranks
    for number, micro_batch in enumerate(micro_batches, 1):
        batch = micro_batch.to(dist.device())
        batch = batch._replace(loss_weights=batch.loss_weights * scale)
        with watch.listening(batch) if watch else nullcontext():
            output = engine.forward(batch, last=number == len(micro_batches))
        engine.backward(output.loss)
        window.add(batch, output.sample_losses)


class _Steps:
    """`progress` is where the run stands after the last step that was taken, applied or not."""

    def __init__(self, run: Run, progress: Progress, control: Control):
        train, step = run.config.train, progress.step
        self.run, self.progress, self.control, self.train = run, progress, control, train
        self.writer = Writer(run.folder, step, run.monitor)
        self.watch: Watch | None = None
        """Of a step that is reported, while it is taken."""
        self.seen: Observation | None = None
        """The last look at the model, on rank 0."""
        self.ledger = Ledger(run.folder, step, run.config.data)
        self.bad = BadSteps(run.folder, step, train.max_consecutive_skips)
        self.window = Window(run.config.data.tasks, dist.device())
        self.clock = _Clock(step, train.steps, progress.seconds)
        self.saved = step if (run.folder / checkpoint.LATEST).is_file() else None
        # until it has seen one step
        self.gradients = GradientWatch(run.model) if dist.world_size() > 1 else None

    def take_all(self, batches: Iterator[list[Batch]]) -> None:
        run, train = self.run, self.train
        counts = run.model.parameter_counts()
        log.info(
            f"{run.folder}: {len(run.config.data.tasks)} tasks, {counts['trainable']:,} trainable of "
            f"{counts['total']:,} parameters, ZeRO {run.engine.stage} on {dist.world_size()} x {dist.device()}, "
            f"step {self.progress.step} of {train.steps}"
        )
        self._say(outcome.RUNNING)
        self._finish_validation()
        run.model.train()
        for step in range(self.progress.step + 1, train.steps + 1):
            if self._exhausted():
                break
            run.watchdog.step(step)
            learning_rate = run.engine.learning_rate()
            micro_batches, usable = self._next(batches)
            reports = step % train.log_every == 0 or step == train.steps
            self.watch = Watch(run.model) if reports else None
            applied = self._take(step, micro_batches, usable)
            if step % train.check_every == 0 or step == self.clock.done + 1:
                check_weights(run.engine, step)
            if reports:
                self._report(learning_rate, applied)
            with self.window.paused():
                if self._validates(step):
                    self._validate()
                # in a row of bad steps nothing is new, and the way back must lead to before it
                due = step % train.save_every == 0 and not self.bad.in_a_row
                if due or step == train.steps or self._exhausted():
                    self.save()
        best = self.progress.best_score
        log.info("%s: finished at step %d, best validation score %s", run.folder, self.progress.step, best)

    def save(self) -> None:
        """Writes a checkpoint of `progress`, unless that is what the newest one holds."""
        if self.saved != self.progress.step:
            run = self.run
            run.watchdog.enter(SAVE)
            run.saver.save(run.engine, self.progress)
            self.saved = self.progress.step
            self._say(outcome.RUNNING)

    def end(self, state: str, code: int | None) -> None:
        """Says how the run ended, which is nothing that ranks do together."""
        self.writer.close()
        self._say(state, code)
        if state == outcome.FINISHED and dist.rank() == 0:
            (self.run.folder / outcome.DONE).touch()

    def _say(self, state: str, code: int | None = None) -> None:
        if dist.rank() == 0:
            try:
                outcome.write_status(self.run.folder, state, self.progress.step, code)
            except OSError as error:  # of a full disk, for example: no reason to end
                log.warning("%s: %s could not be written: %s", self.run.folder, outcome.STATUS, error)

    def _next(self, batches: Iterator[list[Batch]]) -> tuple[list[Batch], int]:
        """The next step's micro-batches, and how many samples of its global batch can be used; or all ranks leave."""
        micro_batches, fault = [], None
        with self.window.waiting():
            try:
                micro_batches = next(batches)
            except (ValueError, Unreachable) as error:
                fault = str(error)
            own = sum(int((batch.loss_weights > 0).sum()) for batch in micro_batches)
            word = self.control.poll(own, fault is not None)
        if word.fault:
            raise DataFault(next(text for text in dist.gather(fault) if text is not None))
        if word.stop:
            raise Preempted(f"{self.run.folder}: stopped by a signal after step {self.progress.step}; --resume goes on")
        return micro_batches, word.usable

    def _take(self, step: int, micro_batches: Sequence[Batch], usable: int) -> bool:
        """Takes a step, and counts its samples as drawn whether or not it changed a weight; whether it did."""
        first = self.progress.stream.samples
        samples = first, first + self.train.global_batch
        reason, culprits = "", []
        if self.bad.leaves_out(first):
            reason = "left out since the run went back"
        elif not usable:
            reason = "no sample can be used"
        elif not self._train(micro_batches, usable):
            reason = "not finite"
            culprits = sorted({name for rank in dist.gather(self.window.drop()) for name in rank})
        self.ledger.write(step, self.run.stream.commit())
        self.progress = dataclasses.replace(
            self.progress, step=step, stream=self.run.stream.state(), seconds=self.clock.seconds()
        )
        if not reason:
            self.window.keep()
            self.bad.good()
            return True
        self.bad.add(step, samples, reason, culprits)
        if reason == "not finite" and (culprits or not self.run.engine.searches_scale):
            self.bad.judge(step, samples, self._can_go_back())
        return False

    def _can_go_back(self) -> bool:
        """Whether there is a checkpoint, once what was begun is written, or was not: then the one before will do."""
        self.run.watchdog.enter(SAVE)
        self.run.saver.wait()
        written = dist.gather((self.run.folder / checkpoint.LATEST).is_file())[0]
        return written and not self.run.config.data.plain

    def _train(self, micro_batches: Sequence[Batch], usable: int) -> bool:
        """One update from the gradient over the global batch; False if it was left out, on every rank."""
        engine = self.run.engine
        accumulate(engine, self.window, micro_batches, usable, self.watch)
        if self.gradients is not None:
            self.gradients.check(engine)
            self.gradients = None
        if self.watch is not None:
            self.watch.note_gradients(engine.gradient, engine.loss_scale())
        return engine.step()

    def _report(self, learning_rate: float, applied: bool) -> None:
        step = self.progress.step
        values = self.window.read()
        values["data/truncated"] = sum(dist.gather(self.run.stream.truncated))
        try:
            values["data/holes"] = self.ledger.count(self.progress.stream.samples)
        except ValueError as error:  # on every rank
            raise DataFault(str(error)) from None
        if self.run.sent is not None:
            values["perf/sent_mib_by_formula"] = self.run.sent / 2**20
        values["train/learning_rate"] = learning_rate
        values["train/skipped_steps"] = self.bad.count
        if applied:
            values["train/gradient_norm"] = self.run.engine.gradient_norm()
            values |= self._look(values["train/gradient_norm"])
        self.writer.write(step, values)
        log.info("%s", self.clock.line(step, values, self.run.folder))
        self._say(outcome.RUNNING)

    def _look(self, gradient_norm: float) -> dict[str, float]:
        """The scalars of a look at the model, on rank 0."""
        run, progress = self.run, self.progress
        assert self.watch is not None
        mixture = run.stream.order.probabilities, {task: sum(n) for task, n in progress.stream.counts.items()}
        self.seen = look(run.model, run.config, progress.step, self.watch, gradient_norm, *mixture)
        self.watch = None
        if self.seen is None:
            return {}
        self.writer.append(OBSERVATIONS, [{"step": progress.step, "time": time.time(), **self.seen.record}])
        return self.seen.scalars

    def _validates(self, step: int) -> bool:
        return step % self.train.eval_every == 0 or step == self.train.steps

    def _finish_validation(self) -> None:
        """Does the validation that a stop interrupted: the checkpoint was saved, and no result was written."""
        step = self.progress.step
        if step and self._validates(step) and dist.gather(self.writer.validated)[0] < step:
            self._validate()
            self.saved = None
            self.save()

    def _validate(self) -> None:
        """Scores the validation split; keeps the weights if the mean over tasks is the best so far."""
        run, step, best = self.run, self.progress.step, self.progress.best_score
        run.watchdog.enter(EVALUATION)
        run.model.eval()
        limit = run.config.eval.samples_per_task
        scores, answers = evaluate.validate(
            run.model, run.manifest, run.config, VALIDATION, limit, self._between_batches
        )
        run.model.train()
        run.watchdog.enter(SAVE)
        mean = evaluate.mean_score(scores)
        flat = {f"eval/{task}/{metric}": value for task, table in scores.items() for metric, value in table.items()}
        if any(run.manifest.count(name, VALIDATION) for name in run.config.trained_tasks if name not in scores):
            # The mean is over other tasks than the best's. Without a best, these weights are better than none.
            if best is None:
                run.saver.save_best(run.engine, step, mean, scores)
        elif best is not None and mean <= best:
            self.progress = dataclasses.replace(self.progress, stale=self.progress.stale + 1)
        elif run.saver.save_best(run.engine, step, mean, scores):
            self.progress = dataclasses.replace(self.progress, best_score=mean, stale=0)
        self.writer.write(step, {**flat, "eval/mean": mean})
        if dist.rank() == 0:
            pictures, turn = Path(run.manifest.path).parent / PICTURES, step // self.train.eval_every
            display.show_answers(self.writer, run.folder, pictures, step, turn, answers)
            if self.seen is not None:
                display.show_look(self.writer, self.seen)
        figures = "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in flat.items())
        log.info("validation at step %d: mean %.4f  %s", step, mean, figures)

    def _between_batches(self) -> None:
        self.run.watchdog.enter(EVALUATION)
        if self.control.poll().stop:
            raise Preempted(
                f"{self.run.folder}: stopped by a signal in the validation after step {self.progress.step}; "
                f"--resume goes on with it"
            )

    def _exhausted(self) -> bool:
        return bool(self.train.patience) and self.progress.stale >= self.train.patience


class _Clock:
    """Progress lines with an ETA from the pace since this process began, `before` seconds after the run did."""

    def __init__(self, done: int, steps: int, before: float):
        self.start, self.done, self.steps, self.before = time.monotonic(), done, steps, before

    def seconds(self) -> float:
        """What the run took so far, over all its processes."""
        return self.before + time.monotonic() - self.start

    def line(self, step: int, values: dict[str, float], folder: Path) -> str:
        seconds = (time.monotonic() - self.start) / (step - self.done) * (self.steps - step)
        loss = f"{values['train/loss']:.4f}" if "train/loss" in values else "none"
        return (
            f"step {step}/{self.steps}  loss {loss}  "
            f"{values['perf/samples_per_second']:.1f} samples/s  ETA {seconds // 60:.0f}:{seconds % 60:02.0f}  "
            f"lr {values['train/learning_rate']:.2e}  {folder}"
        )
