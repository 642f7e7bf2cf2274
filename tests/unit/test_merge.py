from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l2rec.data.merge import merge
from l2rec.data.synthetic import chain_dataset
from l2rec.errors import DataError


def test_merge_keeps_every_sequence_and_text(tmp_path: Path) -> None:
    a = chain_dataset(tmp_path / "a", n_users=7, n_items=5, length=4, seed=0)
    b = chain_dataset(tmp_path / "b", n_users=3, n_items=6, length=5, seed=1)
    both = merge([a.path, b.path], tmp_path / "both", progress=False)
    assert (both.n_users, both.n_items) == (10, 11)
    assert both.n_events == a.n_events + b.n_events
    for part in (a, b):
        ids, texts = part.item_ids.to_pylist(), part.texts()
        merged_ids, merged_texts = both.item_ids.to_pylist(), both.texts()
        for user in range(part.n_users):
            number = both.user_index(f"{part.name}/{part.user_ids[user].as_py()}")
            row = both.sequences[number]
            assert [merged_ids[i] for i in row] == [
                f"{part.name}/{ids[i]}" for i in part.sequences[user]
            ]
            assert [merged_texts[i] for i in row] == [texts[i] for i in part.sequences[user]]
            start, stop = part.offsets[user], part.offsets[user + 1]
            first = both.offsets[number]
            np.testing.assert_array_equal(
                both.timestamps[first : first + stop - start], part.timestamps[start:stop]
            )


def test_merge_refuses_one_part_and_equal_names(tmp_path: Path) -> None:
    a = chain_dataset(tmp_path / "a", n_users=4, n_items=5, length=4, seed=0)
    with pytest.raises(DataError, match="at least two"):
        merge([a.path], tmp_path / "out")
    with pytest.raises(DataError, match="of one name"):
        merge([a.path, a.path], tmp_path / "out")
