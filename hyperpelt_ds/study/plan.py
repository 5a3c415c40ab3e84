"""Which runs the study has, what they are compared for, and what counts as better.

All of this was decided, and committed, before any cell of it was run; docs/study.md says it in words. Only the choice
of learning rates depends on results: on validation scores, by the rule of `rates`. This file must not know how a cell
is run, nor what its test scores are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

GROUPS = ("grid", "core", "image", "ablation", "transfer", "description")
"""What the names of cells begin with."""
RECIPE = "demo"
DS_CONFIG = "ds_configs/zero2_cpu.json"

MARGIN = 0.01
"""A difference in the mean score that counts: better by at least this, or not worse by more than this."""
CONFIDENCE = 0.95
DRAWS = 4000
"""Bootstrap resamples."""

TASKS = ("movie_sentiment", "movie_rating", "wikipedia_topic", "easy_vqa", "shape_caption")
"""Sentiment and rating have the same inputs; so have easy-VQA's questions and the captions."""
TEST_SAMPLES = 1000
"""Test samples of a task that are scored, or all if there are fewer; drawn once, the same for all cells."""
CONTROL_SAMPLES = 200
STEPS, GRID_STEPS = 512, 160
BATCH = 32
RATES = (3e-4, 1e-3, 3e-3)
"""Every method is tried with these; a method whose best is at an end is tried with one more beyond it."""
LOWER, HIGHER = 1e-4, 1e-2

_COMMON = (
    f"train.global_batch={BATCH}",
    "train.micro_batch=16",
    "train.warmup_steps=40",
    "train.log_every=32",
    "eval.samples_per_task=200",
    "eval.batch_size=64",
)
_TOKENS = "vision.tokens=true"
_SHARED = ("hypernet.conditions=", "hypernet.parameters=shared", _TOKENS)
_PER_TASK = ("hypernet.conditions=", "hypernet.parameters=task", _TOKENS)
_HYPERPELT = ("modules.prefix_length=8", "modules.bottleneck=16")


@dataclass(frozen=True)
class Method:
    """A row of the comparison. `settings` make it from the demo's recipe; `seeds` are for its natural form."""

    title: str
    settings: tuple[str, ...]
    knows_task: bool
    """Whether its weights can differ between tasks, so that it needs no task named in the source."""
    seeds: int


METHODS: dict[str, Method] = {
    "hyperpelt": Method("HyperPELT", _HYPERPELT, True, 5),
    "shared_adapter": Method(
        "adapter, shared by all tasks", (*_SHARED, "modules.kinds=adapter", "modules.bottleneck=240"), False, 5
    ),
    "full": Method(
        "full fine-tuning",
        ("model.train_backbone=true", "modules.kinds=", "hypernet.conditions=", _TOKENS),
        False,
        5,
    ),
    "task_adapters": Method(
        "adapters, one set a task", (*_PER_TASK, "modules.kinds=adapter", "modules.bottleneck=48"), True, 3
    ),
    "mam": Method(
        "MAM adapter, shared by all tasks",
        (
            *_SHARED,
            "modules.prefix_length=8",
            "hypernet.prefix_mlp=64",
            "modules.bottleneck=144",
            "modules.adapter_scale=fixed",
            "modules.adapter_scale_value=2.0",
        ),
        False,
        3,
    ),
    "hyperformer_pp": Method(
        "HyperFormer++",
        (
            "hypernet.conditions=task",
            "hypernet.copies=2",
            _TOKENS,
            "modules.kinds=adapter",
            "modules.prefix_length=1",
            "modules.bottleneck=12",
            "modules.adapter_blocks=encoder_self,encoder_ffn,decoder_self,decoder_ffn",
            "modules.adapter_placement=sequential",
            "modules.adapter_activation=gelu_new",
            "modules.adapter_scale=fixed",
            "modules.adapter_norm=true",
            "modules.adapter_start=normal",
        ),
        True,
        3,
    ),
    "hyperprefix": Method(
        "HyperPrefix",
        (
            "modules.kinds=prefix",
            "modules.prefix_length=8",
            "hypernet.embedding_size=256",
            "hypernet.hidden_size=256",
            "hypernet.hyper_size=256",
        ),
        True,
        3,
    ),
}
"""In the order in which the table has them. Sizes are chosen so that all but full fine-tuning train about as many
parameters as HyperPELT (within a tenth)."""

NAMED = "data.name_task=true"
OTHER_SEEDS = 3
"""Seeds of the form that is not a method's natural one."""

IMAGE_WAYS: dict[str, tuple[str, ...]] = {
    "tokens": (*_HYPERPELT, "hypernet.conditions=task", _TOKENS),
    "both": (*_HYPERPELT, _TOKENS),
    "neither": (*_HYPERPELT, "hypernet.conditions=task"),
}
"""How the image of HyperPELT enters, beside `weights`, which is the method itself."""
IMAGE_CELLS = 16

ABLATIONS: dict[str, tuple[str, ...]] = {
    "adapter_only": ("modules.kinds=adapter", "modules.bottleneck=16", "modules.prefix_length=8"),
    "prefix_length_2": ("modules.prefix_length=2", "modules.bottleneck=16"),
    "prefix_length_32": ("modules.prefix_length=32", "modules.bottleneck=16"),
    "bottleneck_64": ("modules.prefix_length=8", "modules.bottleneck=64"),
    "hyper_size_8": (*_HYPERPELT, "hypernet.hyper_size=8"),
}
"""One change each. Prefix only is HyperPrefix of the main table."""

SEEDS = 3
"""Seeds of the ways of the image and of the ablations."""

TRANSFER_TASKS = ("wikipedia_topic", "movie_rating")
"""Left out of the runs that transfer starts from, one on the inputs of a trained task and one on its own."""
TRANSFER_BASE = ("movie_sentiment", "wikipedia_description", "easy_vqa", "shape_caption")
KEPT = ("transfer/start/hyperpelt", "transfer/start/shared_adapter")
"""Cells whose weights others start from; those of all others are deleted when they are recorded."""
SHOTS = (16, 64, 256)
TRANSFER_SEEDS = 5
TRANSFER_STEPS = 60
TRANSFER_RATES = {"embeddings": 1e-2, "all": 1e-3, "scratch": 1e-3, "shared": 1e-3}
"""By what is trained: the new embedding alone; all trainables; all of a new HyperPELT; all of the shared adapter. Fixed
beforehand: a task with 16 samples has no validation set to choose with."""
SENTENCE_ENCODER = "data/all-minilm-l6-v2"
"""For tasks that are only described: an unpacked all-MiniLM-L6-v2."""


@dataclass(frozen=True)
class Cell:
    """One run. `name` says where it belongs; equal names have equal settings, or the records are of another plan."""

    name: str
    settings: tuple[str, ...]
    scored: tuple[str, ...] = TASKS
    """Tasks whose test split is answered; none where only the validation score is wanted."""
    controls: tuple[str, ...] = ()
    start: str = ""
    """The cell that this one starts from, with `new_task` added to its tasks."""
    new_task: str = ""
    train: str = "all"
    describes: bool = False
    """Whether `scored` are tasks that were never trained and are only described."""


def small(validation: Mapping[str, float]) -> list[Cell]:
    """All cells that are known, given the validation scores of the finished ones (cell name -> score), in the order in
    which they are to be run: the learning rates first, then the main table seed by seed, then the rest."""
    chosen: dict[str, float] = {}
    found: list[Cell] = []
    for name, method in METHODS.items():
        tried, best = rates(name, validation)
        found += [_grid_cell(name, method, rate) for rate in tried]
        if best is not None:
            chosen[name] = best
    if len(chosen) < len(METHODS):
        return found
    for seed in range(max(method.seeds for method in METHODS.values())):
        for name, method in METHODS.items():
            for named in (False, True):
                natural = named != method.knows_task
                if seed < (method.seeds if natural else min(method.seeds, OTHER_SEEDS)):
                    found.append(_core_cell(name, method, chosen[name], named, seed))
    found.sort(key=lambda cell: cell.name.startswith("core/") and _is_unnatural(cell))  # stable: natural forms first
    rate = chosen["hyperpelt"]
    for seed in range(SEEDS):
        for group, variants in (("image", IMAGE_WAYS), ("ablation", ABLATIONS)):
            for name, settings in variants.items():
                controls = ("task", "image") if group == "image" else ()
                found.append(Cell(f"{group}/{name}/seed{seed}", _run(settings, rate, seed), controls=controls))
    return [*found, *_transfer(chosen)]


def rates(name: str, validation: Mapping[str, float]) -> tuple[list[float], float | None]:
    """The learning rates to be tried for a method, and the best of them once all were: the highest validation score.

    If the best of RATES is its lowest or highest, one more beyond it is tried.
    """
    tried = list(RATES)

    def scores() -> list[float | None]:
        return [validation.get(_grid_name(name, rate)) for rate in tried]

    def best() -> float | None:
        known = [(score, -rate) for score, rate in zip(scores(), tried, strict=True) if score is not None]
        return -max(known)[1] if len(known) == len(tried) else None

    first = best()
    if first == RATES[0]:
        tried = [LOWER, *tried]
    elif first == RATES[-1]:
        tried = [*tried, HIGHER]
    return tried, best()


def core_name(method: str, named: bool, seed: int) -> str:
    return f"core/{method}/{'named' if named else 'unnamed'}/seed{seed}"


def _is_unnatural(cell: Cell) -> bool:
    _, name, form, _ = cell.name.split("/")
    return METHODS[name].knows_task == (form == "named")


def _run(
    settings: Sequence[str], rate: float, seed: int, steps: int = STEPS, tasks: Sequence[str] = TASKS
) -> tuple[str, ...]:
    """All settings of a run; without `tasks` these are left as they are."""
    named = (f"data.tasks={','.join(tasks)}",) if tasks else ()
    ends = (f"train.steps={steps}", f"train.save_every={steps}", f"train.eval_every={steps}")
    return (*_COMMON, *settings, *named, f"train.learning_rate={rate:g}", f"train.seed={seed}", *ends)


def _grid_name(method: str, rate: float) -> str:
    return f"grid/{method}/{rate:g}"


def _grid_cell(name: str, method: Method, rate: float) -> Cell:
    """A short run in the method's natural form, with a seed that no other cell has; its test split stays closed."""
    form = () if method.knows_task else (NAMED,)
    return Cell(_grid_name(name, rate), _run((*method.settings, *form), rate, 1000, GRID_STEPS), scored=())


def _core_cell(name: str, method: Method, rate: float, named: bool, seed: int) -> Cell:
    form = (NAMED,) if named else ()
    controls = ("task", "image") if seed < OTHER_SEEDS else ()
    return Cell(core_name(name, named, seed), _run((*method.settings, *form), rate, seed), controls=controls)


def _transfer(chosen: Mapping[str, float]) -> list[Cell]:
    """Few-shot transfer: two runs to start from, then seed x task x shots x way; and tasks that are only described."""
    starts = {"hyperpelt": _HYPERPELT, "shared_adapter": (*METHODS["shared_adapter"].settings, NAMED)}
    found = [
        Cell(f"transfer/start/{name}", _run(settings, chosen[name], 0, STEPS, TRANSFER_BASE), scored=())
        for name, settings in starts.items()
    ]
    for seed in range(TRANSFER_SEEDS):
        for task in TRANSFER_TASKS:
            for shots in SHOTS:
                found += [_transfer_cell(way, task, shots, seed) for way in TRANSFER_RATES]
    described = (
        *_HYPERPELT, "hypernet.conditions=description,image", f"hypernet.sentence_encoder={SENTENCE_ENCODER}"
    )  # fmt: skip
    for seed in range(SEEDS):
        settings = _run(described, chosen["hyperpelt"], seed, STEPS, TRANSFER_BASE)
        told = ("description", "paraphrase", "unrelated")
        found.append(Cell(f"description/seed{seed}", settings, TRANSFER_TASKS, told, describes=True))
    return found


def _transfer_cell(way: str, task: str, shots: int, seed: int) -> Cell:
    own = (f"data.shots={shots}", "train.warmup_steps=6", "train.global_batch=16", "eval.samples_per_task=20")
    name = f"transfer/{way}/{task}/{shots}/seed{seed}"
    rate = TRANSFER_RATES[way]
    if way == "scratch":
        return Cell(name, _run((*_HYPERPELT, *own), rate, seed, TRANSFER_STEPS, (task,)), scored=(task,))
    start = "transfer/start/shared_adapter" if way == "shared" else "transfer/start/hyperpelt"
    train = "embeddings" if way == "embeddings" else "all"
    settings = _run(own, rate, seed, TRANSFER_STEPS, ())
    return Cell(name, settings, scored=(task,), start=start, new_task=task, train=train)


@dataclass(frozen=True)
class Suite:
    """A plan as it is run. `cells` gives all that are known, given the validation scores of the recorded ones."""

    cells: Callable[[Mapping[str, float]], list[Cell]]
    tasks: tuple[str, ...]
    """All tasks that some cell is scored on."""
    data: tuple[str, ...] = ()
    """Settings that say where the data is, if not where the recipe has it."""


SUITES = {"small": Suite(small, tuple(dict.fromkeys([*TASKS, *TRANSFER_TASKS])))}
