"""Which runs the study has, what they are compared for, and what counts as better.

All of this was decided, and committed, before any cell of it was run, but for the amendments that docs/study.md lists;
it says the same in words. Only the choice of learning rates depends on results: on validation scores, by the rules of
`rates` and `searched`. This file must not know how a cell is run, nor what its test scores are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hyperpelt_ds import recipes
from hyperpelt_ds.config import Config

GROUPS = ("grid", "search", "core", "image", "ablation", "transfer", "description")
"""What the names of cells begin with."""
_BASE = (
    "modules.kinds=prefix,adapter",
    "modules.prefix_length=8",
    "modules.bottleneck=32",
    "hypernet.hyper_size=64",
    "hypernet.hyper_scale=1.0",
)
"""What of the demo's modules and generator the plan was made with; its recipe has followed what was found since."""
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
LADDER = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Learning rates that can be tried."""
RATES = LADDER[2:5]
"""Every method is tried with these for GRID_STEPS; a method whose best is at an end is tried with one more beyond it.
The best and the one below it are then tried for STEPS, and one more below as long as the lowest is the best."""
SEARCH_SEED = 1000

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
_GENERATOR = ("hypernet.hyper_size=16", "hypernet.hyper_scale=0.25", "modules.prefix_length=8", "modules.bottleneck=64")
_ADAPTERS = (*_GENERATOR, "modules.kinds=adapter")


@dataclass(frozen=True)
class Method:
    """A row of the comparison. `settings` make it from the demo's recipe; `seeds` are for its natural form."""

    title: str
    settings: tuple[str, ...]
    knows_task: bool
    """Whether its weights can differ between tasks, so that it needs no task named in the source."""
    seeds: int


METHODS: dict[str, Method] = {
    "hyperadapter": Method("HyperPELT, adapters only", _ADAPTERS, True, 5),
    "hyperpelt": Method("HyperPELT", _GENERATOR, True, 5),
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
            "hypernet.hyper_scale=0.0625",
        ),
        True,
        3,
    ),
}
"""In the order in which the table has them. Sizes are chosen so that all but full fine-tuning train about as many
parameters as HyperPELT (within a tenth)."""
OWN = "hyperadapter"
"""The method that the claims are about, and that has variants: HyperPELT in the form that was found on validation."""

NAMED = "data.name_task=true"
OTHER_SEEDS = 1
"""Seeds of the form that is not a method's natural one."""
CONTROL_SEEDS = 2
"""Seeds of a form that are also scored under another task and another image."""

IMAGE_WAYS: dict[str, tuple[str, ...]] = {
    "tokens": (*_ADAPTERS, "hypernet.conditions=task", _TOKENS),
    "both": (*_ADAPTERS, _TOKENS),
    "neither": (*_ADAPTERS, "hypernet.conditions=task"),
}
"""How the image enters, beside `weights`, which is the method itself."""
IMAGE_CELLS = 16

ABLATIONS: dict[str, tuple[str, ...]] = {
    "bottleneck_16": (*_ADAPTERS, "modules.bottleneck=16"),
    "hyper_size_64_bottleneck_16": (
        *_ADAPTERS, "modules.bottleneck=16", "hypernet.hyper_size=64", "hypernet.hyper_scale=0.125"
    ),
    "hyper_scale_1": (*_ADAPTERS, "hypernet.hyper_scale=1.0"),
}  # fmt: skip
"""How much is generated, from how much, and how fast the generator learns. The modules themselves are rows of the main
table: adapters only, both, prefixes only."""

SEEDS = 3
"""Seeds of the ways of the image and of the ablations."""

TRANSFER_TASKS = ("wikipedia_topic", "movie_rating")
"""Left out of the runs that transfer starts from, one on the inputs of a trained task and one on its own."""
TRANSFER_BASE = ("movie_sentiment", "wikipedia_description", "easy_vqa", "shape_caption")
KEPT = (f"transfer/start/{OWN}", "transfer/start/shared_adapter")
"""Cells whose weights others start from; those of all others are deleted when they are recorded."""
SHOTS = (16, 64, 256)
TRANSFER_SEEDS = 5
TRANSFER_STEPS = 60
TRANSFER_RATES = {"embeddings": 1e-2, "all": 1e-3, "scratch": 1e-3, "shared": 1e-3}
"""By what is trained: the new embedding alone; all trainables; all of a new HyperPELT; all of the shared adapter. Fixed
beforehand: a task with 16 samples has no validation set to choose with."""
SENTENCE_ENCODER = "data/all-minilm-l6-v2"
"""For tasks that are only described: an unpacked all-MiniLM-L6-v2."""


EXTENDED = ("emoji_category", "emoji_name", "wordnet_kind")
"""Built by data_prep/extended.py through data_prep/table.py: other pictures, other texts, other labels. The first two
have the same inputs."""
EXTENDED_DATA = ("data.manifest=data/extended/manifest.json",)
EXTENDED_SEEDS = 2
EXTENDED_RATES = {OWN: 3e-3, "hyperpelt": 1e-3, "shared_adapter": 1e-3, "full": 3e-4, "task_adapters": 3e-3}


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


def base() -> Config:
    """What the settings of cells are put over."""
    return recipes.get("demo").override(_BASE)


def small(validation: Mapping[str, float]) -> list[Cell]:
    """All cells that are known, given the validation scores of the finished ones (cell name -> score), in the order in
    which they are to be run: the learning rates first, then the main table seed by seed, then the rest."""
    chosen: dict[str, float] = {}
    found: list[Cell] = []
    for name, method in METHODS.items():
        short, _ = rates(name, validation)
        found += [_rate_cell("grid", name, method, rate) for rate in short]
        whole, best = searched(name, validation)
        found += [_rate_cell("search", name, method, rate) for rate in whole]
        if best is not None:
            chosen[name] = best
    found.sort(key=lambda cell: cell.name.startswith("search/"))
    if len(chosen) < len(METHODS):
        return found
    for seed in range(max(method.seeds for method in METHODS.values())):
        for name, method in METHODS.items():
            for named in (False, True):
                natural = named != method.knows_task
                if seed < (method.seeds if natural else min(method.seeds, OTHER_SEEDS)):
                    found.append(_core_cell(name, method, chosen[name], named, seed))
    rate = chosen[OWN]
    for group, variants in (("image", IMAGE_WAYS), ("ablation", ABLATIONS)):
        controls = ("task", "image") if group == "image" else ()
        for seed in range(SEEDS):
            for name, settings in variants.items():
                found.append(Cell(f"{group}/{name}/seed{seed}", _run(settings, rate, seed), controls=controls))
    return sorted([*found, *_transfer(chosen)], key=_decides_no_claim)


def extended(validation: Mapping[str, float]) -> list[Cell]:
    """The extended suite: a few methods in their natural form on data that no choice was made on, with the rates that
    the small suite found. No score decides anything here."""
    found = []
    for seed in range(EXTENDED_SEEDS):
        for name, rate in EXTENDED_RATES.items():
            method = METHODS[name]
            settings = (*method.settings, *(() if method.knows_task else (NAMED,)), *EXTENDED_DATA)
            run = _run(settings, rate, seed, STEPS, EXTENDED)
            found.append(Cell(core_name(name, not method.knows_task, seed), run, scored=EXTENDED))
    return found


def rates(name: str, validation: Mapping[str, float]) -> tuple[list[float], float | None]:
    """The learning rates that a method is tried with for GRID_STEPS, and the best of them once all were: the highest
    validation score, of equals the lowest rate.

    If the best of RATES is its lowest or highest, one more beyond it is tried.
    """
    tried = list(RATES)
    first = _best("grid", name, tried, validation)
    if first == RATES[0]:
        tried = [LADDER[LADDER.index(first) - 1], *tried]
    elif first == RATES[-1]:
        tried = [*tried, LADDER[LADDER.index(first) + 1]]
    return tried, _best("grid", name, tried, validation)


def searched(name: str, validation: Mapping[str, float]) -> tuple[list[float], float | None]:
    """The learning rates that a method is tried with for STEPS, highest first, and the best once all were.

    The best of `rates` and the one below it; one more as long as the lowest of them is the best.
    """
    _, first = rates(name, validation)
    if first is None:
        return [], None
    place = LADDER.index(first)
    tried = [LADDER[place], *([LADDER[place - 1]] if place else [])]
    while (best := _best("search", name, tried, validation)) == tried[-1] and best != LADDER[0]:
        tried.append(LADDER[LADDER.index(best) - 1])
    return tried, best


def _best(stage: str, name: str, tried: Sequence[float], validation: Mapping[str, float]) -> float | None:
    """The rate with the highest score, of equals the lowest; None while one of them has none."""
    scores = [validation.get(rate_name(stage, name, rate)) for rate in tried]
    known = [(score, -rate) for score, rate in zip(scores, tried, strict=True) if score is not None]
    return -max(known)[1] if len(known) == len(tried) else None


def core_name(method: str, named: bool, seed: int) -> str:
    return f"core/{method}/{'named' if named else 'unnamed'}/seed{seed}"


def _decides_no_claim(cell: Cell) -> bool:
    """Whether it can wait: an ablation, or a form that is not its method's natural one."""
    group, name, form, *_ = (*cell.name.split("/"), "")
    return group == "ablation" or (group == "core" and METHODS[name].knows_task == (form == "named"))


def _run(
    settings: Sequence[str], rate: float, seed: int, steps: int = STEPS, tasks: Sequence[str] = TASKS
) -> tuple[str, ...]:
    """All settings of a run; without `tasks` these are left as they are."""
    named = (f"data.tasks={','.join(tasks)}",) if tasks else ()
    ends = (f"train.steps={steps}", f"train.save_every={steps}", f"train.eval_every={steps}")
    return (*_COMMON, *settings, *named, f"train.learning_rate={rate:g}", f"train.seed={seed}", *ends)


def rate_name(stage: str, method: str, rate: float) -> str:
    return f"{stage}/{method}/{rate:g}"


def _rate_cell(stage: str, name: str, method: Method, rate: float) -> Cell:
    """A run in the method's natural form, with a seed that no other cell has; its test split stays closed."""
    form = () if method.knows_task else (NAMED,)
    steps = GRID_STEPS if stage == "grid" else STEPS
    return Cell(rate_name(stage, name, rate), _run((*method.settings, *form), rate, SEARCH_SEED, steps), scored=())


def _core_cell(name: str, method: Method, rate: float, named: bool, seed: int) -> Cell:
    form = (NAMED,) if named else ()
    controls = ("task", "image") if seed < CONTROL_SEEDS else ()
    return Cell(core_name(name, named, seed), _run((*method.settings, *form), rate, seed), controls=controls)


def _transfer(chosen: Mapping[str, float]) -> list[Cell]:
    """Few-shot transfer: two runs to start from, then seed x task x shots x way; and tasks that are only described."""
    starts = {OWN: _ADAPTERS, "shared_adapter": (*METHODS["shared_adapter"].settings, NAMED)}
    found = [
        Cell(f"transfer/start/{name}", _run(settings, chosen[name], 0, STEPS, TRANSFER_BASE), scored=())
        for name, settings in starts.items()
    ]
    for seed in range(TRANSFER_SEEDS):
        for task in TRANSFER_TASKS:
            for shots in SHOTS:
                found += [_transfer_cell(way, task, shots, seed) for way in TRANSFER_RATES]
    described = (
        *_ADAPTERS, "hypernet.conditions=description,image", f"hypernet.sentence_encoder={SENTENCE_ENCODER}"
    )  # fmt: skip
    for seed in range(SEEDS):
        settings = _run(described, chosen[OWN], seed, STEPS, TRANSFER_BASE)
        told = ("description", "paraphrase", "unrelated")
        found.append(Cell(f"description/seed{seed}", settings, TRANSFER_TASKS, told, describes=True))
    return found


def _transfer_cell(way: str, task: str, shots: int, seed: int) -> Cell:
    own = (f"data.shots={shots}", "train.warmup_steps=6", "train.global_batch=16", "eval.samples_per_task=20")
    name = f"transfer/{way}/{task}/{shots}/seed{seed}"
    rate = TRANSFER_RATES[way]
    if way == "scratch":
        return Cell(name, _run((*_ADAPTERS, *own), rate, seed, TRANSFER_STEPS, (task,)), scored=(task,))
    start = "transfer/start/shared_adapter" if way == "shared" else f"transfer/start/{OWN}"
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


SUITES = {
    "small": Suite(small, tuple(dict.fromkeys([*TASKS, *TRANSFER_TASKS]))),
    "extended": Suite(extended, EXTENDED, EXTENDED_DATA),
}
