"""What workers read arrives as it was, in its order, whether or not there is room for it on the shelf."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.handover import AHEAD, Shelf, in_turn, message_items, pack_samples, unpack_samples

SAMPLES = (
    Sample("a", "vqa", "what número?", "red", "item", "img", "color", ("red", "blue")),
    Sample("b", "topic", "", "x"),
)


def test_samples_are_the_same_after_packing():
    assert unpack_samples(pickle.loads(pickle.dumps(pack_samples(SAMPLES)))) == SAMPLES


def arrays(count: int, first: int = 0) -> list[np.ndarray]:
    return [np.full((3, 2), first + i, np.float16) for i in range(count)]


def test_a_shelf_holds_arrays_until_their_slot_is_put_into_again():
    shelf = Shelf(2, 4, (3, 2))
    slots = [shelf.take() for _ in range(2 * AHEAD + 1)]
    assert len(set(slots)) == len(slots) and shelf.take() is None
    spots = [(shelf.put(slot, 0, arrays(3, slot)), shelf.put(slot, 3, arrays(1, 9))) for slot in slots]
    for slot, (first, second) in zip(slots, spots, strict=True):
        assert torch.equal(shelf.get(first), torch.from_numpy(np.stack(arrays(3, slot))))
        assert torch.equal(shelf.get(second), torch.full((1, 3, 2), 9, dtype=torch.float16))
    shelf.free(slots[1])
    assert shelf.take() == slots[1]


def test_what_has_no_room_is_not_put():
    shelf = Shelf(1, 2, (3, 2))
    assert shelf.put(None, 0, arrays(1)) is None
    assert shelf.put(0, 1, arrays(2)) is None
    assert pickle.loads(pickle.dumps(shelf)).put(0, 0, arrays(1)) is None  # in a worker that was not forked


class Squares(Dataset):
    def __getitems__(self, numbers: list[int]) -> list[tuple[int, int, int]]:
        return [(number**2, len(numbers), os.getpid()) for number in numbers]


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_plan_the_first_of_them_one_by_one(workers):
    found = list(in_turn(Squares(), workers, iter(range(23)), 4))
    assert [square for square, _, _ in found] == [number**2 for number in range(23)]
    assert [size for _, size, _ in found] == ([1] * 4 + [4] * 16 + [3] * 3 if workers else [1] * 23)
    assert len({process for _, _, process in found}) == max(1, workers)


def test_small_steps_of_text_share_a_message():
    assert [message_items(n, images=False) for n in (1, 64, 1024, 2000)] == [1024, 16, 1, 1]
    assert message_items(1, images=True) == 1
