"""What became of the claims of docs/study.md: each of the findings that would refute one, as the records have it.

The rules are the plan's; docs/study.md says how its words "near" and "little" are read, and since when. This file must
not know how a cell is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hyperpelt_ds.study import costs, plan, references
from hyperpelt_ds.study.cells import unpack
from hyperpelt_ds.study.costs import Line, markdown
from hyperpelt_ds.study.records import VISION_TASKS, Records, judged_form, scores_of, seeds_of
from hyperpelt_ds.study.statistics import Bootstrap, Scores, interval, point, verdict

SHARE = 0.97
"""Of full fine-tuning's mean, at least."""
OWN_FORMS = (plan.OWN, "hyperpelt", "hyperprefix")
"""The method itself, with what else it can generate: no baselines."""
ONE_FORM = " (its other form was not run yet)"


class Finding(NamedTuple):
    """What was found, in words, and whether it refutes its claim; None if runs are missing."""

    said: str
    refutes: bool | None


def table(records: Records, boot: Bootstrap, measured: Sequence[Line]) -> str:
    """Markdown: every claim, whether it was refuted, and why."""
    rows = []
    for number, (claim, find) in enumerate(CLAIMS.items(), 1):
        findings = list(find(records, boot, measured))
        refuted = [finding.refutes for finding in findings]
        state = "**refuted**" if True in refuted else "not decided yet" if None in refuted else "not refuted"
        rows.append([f"{number}. {claim}", state, "; ".join(said for said, _ in findings)])
    return "## The claims\n\n" + markdown(["claim", "it is", "found"], rows)


def _as_good(records: Records, boot: Bootstrap, _: Sequence[Line]) -> Iterator[Finding]:
    own = _own(records)
    for name, method in plan.METHODS.items():
        if name in (*OWN_FORMS, "full"):
            continue
        other, both = _judged(records, name)
        if own is None or other is None:
            yield Finding(f"{method.title}: not run yet", None)
            continue
        difference = boot.difference(own, other)
        counts_as = verdict(difference, plan.MARGIN)
        said = f"minus {method.title} {interval(difference, signed=True)}, {counts_as}"
        yield Finding(said, counts_as == "worse") if both else Finding(f"{said}{ONE_FORM}", None)
    full, both = _judged(records, "full")
    if own is None or full is None:
        yield Finding("full fine-tuning: not run yet", None)
        return
    share = point(own) / point(full)
    said = f"{share:.1%} of full fine-tuning's mean (at least {SHARE:.0%})"
    yield Finding(said, share < SHARE) if both else Finding(f"{said}{ONE_FORM}", None)


def _tells_tasks_apart(records: Records, boot: Bootstrap, _: Sequence[Line]) -> Iterator[Finding]:
    yield from _controlled(records, "task", [task for task in plan.TASKS if task != "wikipedia_topic"])


def _image_in_weights(records: Records, boot: Bootstrap, measured: Sequence[Line]) -> Iterator[Finding]:
    own = scores_of(records, seeds_of(plan.OWN, False)[: plan.SEEDS])
    tokens = scores_of(records, [f"image/tokens/seed{seed}" for seed in range(plan.SEEDS)])
    steps = {line["system"]: line["ratio"] for line in measured if line["metric"] == "train_step_s"}
    prices = [steps.get(costs.SYSTEMS[way]) for way in ("tokens", "weights")]
    if own is None or tokens is None or None in prices:
        yield Finding("as tokens: not run yet", None)
    else:
        difference = boot.difference(tokens, own)
        counts_as = verdict(difference, plan.MARGIN)
        dearer, cheaper = prices[0] > prices[1], prices[0] < prices[1]  # type: ignore[operator]
        yield Finding(
            f"as tokens {interval(difference, signed=True)}, {counts_as}, at {prices[0]:.2f}x instead of "
            f"{prices[1]:.2f}x of the frozen step",
            (counts_as == "better" and not dearer) or (counts_as in ("better", "not worse") and cheaper),
        )
    whole = _own(records)
    if whole is None or references.NAME not in records:
        yield Finding("easy-VQA: not run yet", None)
    else:
        found = float(whole["easy_vqa"].mean())
        blind = float(unpack(records[references.NAME]["scores"]["oracle"]["question"]).mean())
        yield Finding(f"easy-VQA {found:.3f}, from the question alone {blind:.3f}", found <= blind)
    yield from _controlled(records, "image", VISION_TASKS)


def _transfers(records: Records, boot: Bootstrap, _: Sequence[Line]) -> Iterator[Finding]:
    ways = {way: _few_shot(records, way) for way in plan.TRANSFER_RATES}
    for other, title in (("scratch", "from nothing"), ("shared", "from the shared adapter")):
        for way, trained in (("all", "all trainables"), ("embeddings", "the new embedding alone")):
            first, second = ways[way], ways[other]
            if first is None or second is None:
                yield Finding(f"{trained} minus {title}: not run yet", None)
                continue
            difference = boot.difference(first, second)
            counts_as = verdict(difference, plan.MARGIN)
            said = f"{trained} minus {title} {interval(difference, signed=True)}, {counts_as}"
            # the claim is about the trained hypernetwork, whatever is trained of it: judged by all trainables
            yield Finding(said, counts_as != "better" if way == "all" else False)


CLAIMS: dict[str, Callable[[Records, Bootstrap, Sequence[Line]], Iterator[Finding]]] = {
    "One hypernetwork is as good as its baselines at the same size": _as_good,
    "Its weights carry the task": _tells_tasks_apart,
    "The image belongs in the weights": _image_in_weights,
    "What was learned transfers": _transfers,
}


def _own(records: Records) -> Scores | None:
    return scores_of(records, seeds_of(plan.OWN, False))


def _judged(records: Records, method: str) -> tuple[Scores | None, bool]:
    """The form that the method is judged by, of those that were run whole, and whether both were."""
    both = all(scores_of(records, seeds_of(method, named)) is not None for named in (False, True))
    form = judged_form(records, method)
    return None if form is None else scores_of(records, seeds_of(method, form)), both


def _controlled(records: Records, control: str, tasks: Sequence[str]) -> Iterator[Finding]:
    """The score under another task or image beside the true one."""
    for task in tasks:
        names = [name for name in seeds_of(plan.OWN, False)[: plan.CONTROL_SEEDS] if name in records]
        if len(names) < plan.CONTROL_SEEDS:
            yield Finding(f"{task}: not run yet", None)
            continue
        true = float(np.mean([unpack(records[name]["scores"][task]).mean() for name in names]))
        other = float(np.mean([unpack(records[name]["controls"][task][control]).mean() for name in names]))
        yield Finding(f"{task} {true:.3f}, under another {control} {other:.3f}", true - other <= plan.MARGIN)


def _few_shot(records: Records, way: str) -> Scores | None:
    """task -> (seeds, N), the mean over numbers of shots."""
    found = {}
    for task in plan.TRANSFER_TASKS:
        cells = []
        for shots in plan.SHOTS:
            names = [f"transfer/{way}/{task}/{shots}/seed{seed}" for seed in range(plan.TRANSFER_SEEDS)]
            cells.append(scores_of(records, names, [task]))
        if any(cell is None for cell in cells):
            return None
        found[task] = np.mean([cell[task] for cell in cells if cell is not None], axis=0)
    return found
