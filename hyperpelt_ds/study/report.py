"""The page of results, from the records alone: every figure on it is computed here, none is written by hand.

What has not been run yet is said so. This file must not know how a cell is run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hyperpelt_ds.study import costs, plan, references
from hyperpelt_ds.study.cells import Record, unpack
from hyperpelt_ds.study.costs import markdown
from hyperpelt_ds.study.plan import METHODS, Cell, core_name
from hyperpelt_ds.study.statistics import Bootstrap, Figure, Scores, point, verdict

Records = Mapping[str, Record]
VISION_TASKS = ("easy_vqa", "shape_caption")
_SHORT = {
    "movie_sentiment": "sentiment",
    "movie_rating": "rating",
    "wikipedia_topic": "topic",
    "easy_vqa": "easy-VQA",
    "shape_caption": "caption",
}


def write(records: Records, measured: Sequence[costs.Line] = ()) -> str:
    """The page as Markdown. `measured` are the lines of launch/bench_step.py and bench_adapters.py, case `study`."""
    if "" not in records:
        raise ValueError("there are no records yet; launch/study.py without --report_only makes them")
    boot = Bootstrap({task: records[""]["items"][task] for task in plan.TASKS}, plan.DRAWS, plan.CONFIDENCE)
    known = plan.small(validation(records))
    parts = [
        _head(records, known, "small"),
        _rates(records),
        _core(records, boot),
        _identity(records),
        _variants(records, boot, "image", "Weights or tokens?", ["weights", *plan.IMAGE_WAYS]),
        costs.image_table(image_scores(records), measured),
        _variants(records, boot, "ablation", "Ablations", [plan.OWN, *plan.ABLATIONS]),
        _transfer(records),
        _described(records),
        costs.table(measured),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_extended(records: Records) -> str:
    """The page of the extended suite: its methods in their natural forms, and what data gives away without a model."""
    if "" not in records:
        raise ValueError("there are no records yet; launch/study.py without --report_only makes them")
    tasks = plan.EXTENDED
    boot = Bootstrap({task: records[""]["items"][task] for task in tasks}, plan.DRAWS, plan.CONFIDENCE)
    known = plan.extended({})
    cells = {name: [cell.name for cell in known if cell.name.split("/")[1] == name] for name in plan.EXTENDED_RATES}
    own = scores_of(records, cells[plan.OWN], tasks)
    rows = []
    for name, names in cells.items():
        found = recorded(records, names)
        scores = scores_of(records, found, tasks)
        if scores is None:
            continue
        whole = own is not None and name != plan.OWN and len(found) == len(names)
        difference = boot.difference(own, scores) if whole and own is not None else None
        rows.append(
            [
                METHODS[name].title,
                f"{records[found[0]]['trainable'] / 1e6:.2f} M",
                f"{len(found)} of {len(names)}",
                *(_score(float(scores[task].mean())) for task in tasks),
                _interval(boot.mean(scores)),
                _interval(difference, signed=True) if difference else "",
                verdict(difference, plan.MARGIN) if difference else "",
            ]
        )
    rows += _reference_rows(records, boot, tasks)
    header = ["method", "trained", "seeds", *tasks, "mean [95 %]", "the method minus it", "the method is"]
    said = (
        "Data that no choice was made on, built by `data_prep/extended.py` through the builder of users' own tables; "
        f"rates as the small suite found them. Exact match, for names token F1. The method: {METHODS[plan.OWN].title}."
    )
    return "\n\n".join([_head(records, known, "extended"), said, markdown(header, rows)]) + "\n"


def validation(records: Records) -> dict[str, float]:
    """Validation scores of the recorded cells."""
    return {name: record["validation"] for name, record in records.items() if "validation" in record}


def scores_of(records: Records, names: Iterable[str], tasks: Sequence[str] = plan.TASKS) -> Scores | None:
    """task -> (seeds, N) of the named cells; None if one of them is missing."""
    found = [records.get(name) for name in names]
    if not found or any(record is None for record in found):
        return None
    return {task: np.stack([unpack(record["scores"][task]) for record in found if record]) for task in tasks}


def recorded(records: Records, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in records]


def seeds_of(method: str, named: bool) -> list[str]:
    """The cells of a method in one form."""
    own = METHODS[method]
    natural = named != own.knows_task
    return [core_name(method, named, seed) for seed in range(own.seeds if natural else plan.OTHER_SEEDS)]


def judged_form(records: Records, method: str) -> bool | None:
    """Whether the method is judged with its task named: the form with the higher mean validation score of those that
    were run; None if neither was run whole."""
    means = {}
    for named in (False, True):
        names = seeds_of(method, named)
        if all(name in records for name in names):
            means[named] = statistics.mean(records[name]["validation"] for name in names)
    return max(means, key=lambda named: means[named]) if means else None


def _head(records: Records, known: Sequence[Cell], suite: str) -> str:
    done = [cell for cell in known if cell.name in records]
    hours = sum(records[cell.name]["cpu_seconds"] for cell in done) / 3600
    groups = {group: [cell for cell in known if cell.name.split("/")[0] == group] for group in plan.GROUPS}
    progress = [
        f"{group} {sum(cell.name in records for cell in own)} of {len(own)}" for group, own in groups.items() if own
    ]
    head = records[""]
    packages = ", ".join(f"{name} {version}" for name, version in head["packages"].items())
    lines = [
        "# Results of the study" + (f": the {suite} suite" if suite != "small" else ""),
        f"Generated by `python launch/study.py --suite {suite} --report_only` from `docs/results/{suite}.jsonl`, "
        "which has a line for every run; [study.md](study.md) is the plan, written before. Do not edit.",
        f"{len(done)} of {len(known)} runs are recorded ({'; '.join(progress)}). They took {hours:.1f} hours of one "
        f"core ({hours / 2:.1f} hours on two). Hardware: {head['hardware']}; {packages}.",
    ]
    if len(done) < len(known):
        lines.append("**The study is not finished.** Rows that are not there were not run yet.")
    return "\n\n".join(lines)


def _rates(records: Records) -> str:
    scores = validation(records)
    parts = ["## Learning rates"]
    for stage, steps, choose in (("grid", plan.GRID_STEPS, plan.rates), ("search", plan.STEPS, plan.searched)):
        rows = []
        for name, method in METHODS.items():
            tried, best = choose(name, scores)
            found = {rate: _score(scores.get(plan.rate_name(stage, name, rate))) for rate in tried}
            marked = {rate: f"**{cell}**" if rate == best else cell for rate, cell in found.items()}
            rows.append([method.title, *(marked.get(rate, "") for rate in plan.LADDER)])
        then = "the best and the one below it were then run for longer" if stage == "grid" else "bold is what was used"
        parts.append(f"Mean validation score after {steps} steps; {then}.")
        parts.append(markdown(["method", *(f"{rate:g}" for rate in plan.LADDER)], rows))
    return "\n\n".join(parts)


def _core(records: Records, boot: Bootstrap) -> str:
    own_names = recorded(records, seeds_of(plan.OWN, False))
    own = scores_of(records, own_names)
    lines = ["## The comparison"]
    if own is None:
        return "\n\n".join([*lines, "Not run yet."])
    rows, judged = [], []
    for name, method in METHODS.items():
        form = judged_form(records, name)
        for named in (False, True):
            names = recorded(records, seeds_of(name, named))
            scores = scores_of(records, names)
            if scores is None:
                continue
            mean = boot.mean(scores)
            difference = None if scores_is(name, named) else boot.difference(own, scores)
            whole = len(names) == len(seeds_of(name, named)) and len(own_names) == len(seeds_of(plan.OWN, False))
            decided = verdict(difference, plan.MARGIN) if difference and whole else ""
            chosen = form is not None and form == named
            if chosen and decided and difference:
                judged.append((method.title, difference, decided))
            title = f"{method.title}, task {'named' if named else 'not named'}"
            rows.append(
                [
                    f"**{title}**" if chosen else title,
                    f"{records[names[0]]['trainable'] / 1e6:.2f} M",
                    f"{len(names)} of {len(seeds_of(name, named))}",
                    *(_score(float(scores[task].mean())) for task in plan.TASKS),
                    _interval(mean),
                    _interval(difference, signed=True) if difference else "",
                    decided,
                ]
            )
    rows += _reference_rows(records, boot)
    header = ["method", "trained", "seeds", *(_SHORT[task] for task in plan.TASKS), "mean [95 %]"]
    header += ["the method minus it", "the method is"]
    lines.append(
        "Exact match on the test split. Bold: the form that a method is judged by (the higher validation score, of "
        f"those run). The last columns compare the method ({METHODS[plan.OWN].title}, task not named) with the row: "
        f"difference and what it counts as, at a margin of {plan.MARGIN:g}, once all seeds of both were run. An "
        "interval of one seed knows nothing of how seeds differ."
    )
    lines.append(markdown(header, rows))
    lines += [*_against_full(records, own), *_by_group(records), _oracle(records), _with_prefixes(records, boot)]
    worse = [f"{title} ({_interval(d, signed=True)})" for title, d, decided in judged if decided == "worse"]
    undecided = [title for title, _, decided in judged if decided == "undecided"]
    if judged:
        lines.append(f"The method is worse than: {'; '.join(worse) or 'none of the judged rows'}.")
        lines.append(f"Undecided at this margin: {'; '.join(undecided) or 'none'}.")
    return "\n\n".join(line for line in lines if line)


def scores_is(method: str, named: bool) -> bool:
    """Whether this is the row that the others are compared with."""
    return method == plan.OWN and not named


def _against_full(records: Records, own: Scores) -> list[str]:
    form = judged_form(records, "full")
    full = scores_of(records, seeds_of("full", form)) if form is not None else None
    if full is None or len(next(iter(own.values()))) < len(seeds_of(plan.OWN, False)):
        return []
    share = point(own) / point(full)
    return [f"The method reaches {100 * share:.1f} % of full fine-tuning's mean (to reach: 97 %)."]


def _with_prefixes(records: Records, boot: Bootstrap) -> str:
    """HyperPELT as the paper has it, with prefixes, against the judged form of every baseline; once all were run."""
    own = scores_of(records, seeds_of("hyperpelt", False))
    if own is None:
        return ""
    found = []
    for name, method in METHODS.items():
        form = judged_form(records, name)
        other = scores_of(records, seeds_of(name, form)) if form is not None and name != "hyperpelt" else None
        if other is not None:
            difference = boot.difference(own, other)
            found.append(f"{method.title} {_interval(difference, signed=True)}: {verdict(difference, plan.MARGIN)}")
    return f"{METHODS['hyperpelt'].title} with prefixes minus each other row that is judged: {'; '.join(found)}."


def _by_group(records: Records) -> list[str]:
    """easy-VQA's kinds of question."""
    groups = records[""].get("groups", {}).get("easy_vqa")
    names = recorded(records, seeds_of(plan.OWN, False))
    if not groups or not names:
        return []
    kinds = np.array(groups)
    scores = np.stack([unpack(records[name]["scores"]["easy_vqa"]) for name in names]).mean(0)
    figures = [
        f"{kind} {scores[kinds == kind].mean():.3f} (n = {(kinds == kind).sum()})" for kind in sorted(set(groups))
    ]
    return [
        f"The method on easy-VQA by kind of question: {', '.join(figures)}; to reach: 0.92 in all, shape above 0.80."
    ]


def _reference_rows(records: Records, boot: Bootstrap, tasks: Sequence[str] = plan.TASKS) -> list[list[str]]:
    if references.NAME not in records:
        return []
    rows = []
    for name, title in references.TITLES.items():
        packed = records[references.NAME]["scores"][name]
        scores = {task: unpack(packed[task])[None] for task in tasks}
        each = [_score(float(scores[task].mean())) for task in tasks]
        rows.append([f"*{title}*", "", "", *each, _interval(boot.mean(scores)), "", ""])
    return rows


def _oracle(records: Records) -> str:
    if references.NAME not in records:
        return ""
    told = records[references.NAME]["scores"]["oracle"]
    figures = [f"{name} {_score(float(unpack(told[name]).mean()))}" for name in references.TOLD]
    return f"easy-VQA, most frequent answer given: {'; '.join(figures)}."


def _identity(records: Records) -> str:
    rows = []
    for name, method in METHODS.items():
        for named in (False, True):
            names = [n for n in recorded(records, seeds_of(name, named)) if any(records[n]["controls"].values())]
            if names:
                form = "named" if named else "not named"
                rows.append([f"{method.title}, task {form}", str(len(names)), *_control_cells(records, names)])
    if not rows:
        return "## Task identity and image\n\nNot run yet."
    tasks = [_SHORT[task] for task in plan.TASKS]
    vision = [_SHORT[task] for task in VISION_TASKS]
    header = [
        "method",
        "seeds",
        *(f"{name}, other task" for name in tasks),
        *(f"{name}, other image" for name in vision),
    ]
    said = (
        f"Scores of at most {plan.CONTROL_SAMPLES} samples a task under another task (and its name, where tasks are "
        "named), and under another image. Near the true score would mean that it is not used."
    )
    return f"## Task identity and image\n\n{said}\n\n{markdown(header, rows)}"


def _control_cells(records: Records, names: Sequence[str]) -> list[str]:
    cells = []
    for control, tasks in (("task", plan.TASKS), ("image", VISION_TASKS)):
        for task in tasks:
            found = [records[name]["controls"].get(task, {}).get(control) for name in names]
            cells.append(_score(float(np.mean([unpack(text).mean() for text in found if text]))) if any(found) else "")
    return cells


def _variants(records: Records, boot: Bootstrap, group: str, title: str, names: Iterable[str]) -> str:
    base = [core_name(plan.OWN, False, seed) for seed in range(plan.SEEDS)]
    own = scores_of(records, base)
    rows = []
    for name in names:
        is_base = name in ("weights", plan.OWN)
        cells = base if is_base else [f"{group}/{name}/seed{seed}" for seed in range(plan.SEEDS)]
        found = recorded(records, cells)
        scores = scores_of(records, found)
        if scores is None:
            rows.append([name, "", "not run yet", *[""] * (len(plan.TASKS) + 3)])
            continue
        whole = own is not None and not is_base and len(found) == plan.SEEDS
        difference = boot.difference(scores, own) if whole and own is not None else None
        rows.append(
            [
                f"{name} (the method)" if is_base else name,
                f"{records[found[0]]['trainable'] / 1e6:.2f} M",
                f"{len(found)} of {plan.SEEDS}",
                *(_score(float(scores[task].mean())) for task in plan.TASKS),
                _interval(boot.mean(scores)),
                _interval(difference, signed=True) if difference else "",
                verdict(difference, plan.MARGIN) if difference else "",
            ]
        )
    header = ["variant", "trained", "seeds", *(_SHORT[task] for task in plan.TASKS), "mean [95 %]"]
    header += ["minus the method", "it is"]
    return f"## {title}\n\n{markdown(header, rows)}"


def image_scores(records: Records) -> dict[str, float]:
    """How the image enters -> the mean score of the tasks with images, for the ways that were run."""
    ways = {"weights": [core_name(plan.OWN, False, seed) for seed in range(plan.SEEDS)]}
    ways |= {way: [f"image/{way}/seed{seed}" for seed in range(plan.SEEDS)] for way in plan.IMAGE_WAYS}
    found = {way: scores_of(records, recorded(records, names), VISION_TASKS) for way, names in ways.items()}
    return {way: point(scores) for way, scores in found.items() if scores}


def _transfer(records: Records) -> str:
    titles = {
        "embeddings": "new embedding alone",
        "all": "all trainables",
        "scratch": "HyperPELT from nothing",
        "shared": "from the shared adapter",
    }
    parts = ["## Few-shot transfer"]
    for task in plan.TRANSFER_TASKS:
        rows = []
        for way, title in titles.items():
            cells = []
            for shots in plan.SHOTS:
                names = [f"transfer/{way}/{task}/{shots}/seed{seed}" for seed in range(plan.TRANSFER_SEEDS)]
                cells.append(
                    _mean_and_error([float(unpack(records[n]["scores"][task]).mean()) for n in names if n in records])
                )
            rows.append([title, *cells])
        if any(cell for row in rows for cell in row[1:]):
            parts.append(f"{task}, mean and standard error over seeds:")
            parts.append(markdown(["way", *(f"{shots} samples" for shots in plan.SHOTS)], rows))
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "Not run yet."])


def _described(records: Records) -> str:
    names = recorded(records, [f"description/seed{seed}" for seed in range(plan.SEEDS)])
    if not names:
        return "## Zero-shot by description\n\nNot run yet."
    rows = []
    for task in plan.TRANSFER_TASKS:
        scores = _mean_and_error([float(unpack(records[name]["scores"][task]).mean()) for name in names])
        controls = []
        for control in ("description", "paraphrase", "unrelated"):
            found = [records[name]["controls"].get(task, {}).get(control) for name in names]
            controls.append(_mean_and_error([float(unpack(text).mean()) for text in found if text]))
        rows.append([task, scores, *controls])
    header = ["task, never trained", "its description", "another task's", "a paraphrase", "about no task"]
    return f"## Zero-shot by description\n\n{len(names)} of {plan.SEEDS} seeds.\n\n{markdown(header, rows)}"


def _mean_and_error(values: Sequence[float]) -> str:
    if not values:
        return ""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f} ({len(values)})"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(figure: Figure, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"
