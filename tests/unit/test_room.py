"""Rows that are added to without a copy of all."""

from __future__ import annotations

import torch

from l2rec.modules.room import Room


def test_rows_are_copied_when_the_room_is_full() -> None:
    room, rows = Room(), torch.zeros(100, 3)
    given, places = rows, []
    for n in range(1, 201):
        earlier = rows
        rows = room.followed(rows, torch.full((1, 3), float(n)))
        assert len(rows) == 100 + n and torch.equal(rows[:-1], earlier)
        places.append(rows.data_ptr())
    assert rows[:, 0].tolist() == [0.0] * 100 + [float(n) for n in range(1, 201)]
    assert len({*places}) < 12 and not given.any()


def test_rows_that_are_cut_are_given_up() -> None:
    room = Room()
    rows = room.followed(torch.zeros(4), torch.ones(2))
    again = room.followed(rows[:4], torch.full((3,), 2.0))
    assert again.tolist() == [0.0] * 4 + [2.0] * 3 and again.data_ptr() == rows.data_ptr()
    other = torch.full((4,), 5.0)
    assert room.followed(other, torch.ones(1)).tolist() == [5.0] * 4 + [1.0]
    assert again.tolist() == [0.0] * 4 + [2.0] * 3, "others have a room of their own"


def test_a_room_of_inference_is_not_written_to_outside_of_it() -> None:
    room = Room()
    with torch.inference_mode():
        rows = room.followed(torch.zeros(4), torch.ones(2))
    more = room.followed(rows, torch.ones(1))
    assert rows.is_inference() and not more.is_inference() and more.sum() == 3
    with torch.inference_mode():
        assert room.followed(more, torch.ones(1)).data_ptr() == more.data_ptr()
