"""Bytes on the wire and bytes held, measured on nodes with a network of their own, are those that are foretold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cluster import why_not
from measure_wire import JOBS, LARGER, SMALL, everything

pytestmark = [pytest.mark.multinode, pytest.mark.slow]

NAMES = [(ranks, job.name) for ranks, jobs in JOBS.items() for job in jobs]
Records = dict[tuple[int, str], dict[str, Any]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    yield {(line["world_size"], line["name"]): line for line in everything(tmp_path_factory.mktemp("wire") / "cluster")}


@pytest.mark.parametrize("ranks, name", NAMES)
def test_a_step_sends_what_the_formula_says(records: Records, ranks: int, name: str):
    line = records[ranks, name]
    if ranks == 1:
        assert line["formula"] == 0 and line["sent"] < 1000
    else:
        assert 0.8 <= line["sent"] / line["formula"] <= 1.2


@pytest.mark.parametrize(
    "ranks, name", [(ranks, job.name) for ranks, jobs in JOBS.items() for job in jobs if not job.split]
)
def test_a_rank_holds_between_steps_what_is_foretold(records: Records, ranks: int, name: str):
    line = records[ranks, name]  # but for a split backbone, of which a block is left gathered
    assert line["held"] == pytest.approx(line["held_formula"], rel=0.02)


@pytest.mark.parametrize("ranks", LARGER)
def test_nothing_of_the_backbone_is_sent(records: Records, ranks: int):
    """With ten times the backbone, which is then larger than all that is trained, a step sends as much as before.

    Not to the byte: headers and repeated packets are counted, more of them on a machine with other work. The backbone
    alone would be more than twice all that is trained.
    """
    large = LARGER[ranks]
    [before] = [job.name for job in JOBS[ranks] if job == large._replace(name=job.name, feed_forward=SMALL)]
    ours, others = records[ranks, large.name], records[ranks, before]
    assert ours["backbone"] > 10 * others["backbone"] and ours["backbone"] > 2 * ours["trainable"]
    assert ours["trainable"] == others["trainable"]
    assert ours["sent"] == pytest.approx(others["sent"], rel=0.1)
