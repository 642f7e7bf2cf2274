from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from l2rec.data.dataset import open_dataset
from l2rec.data.merge import _prefixed, merge
from l2rec.data.prepare import PrepareConfig, prepare
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


def test_merge_keeps_order_and_its_facts(tmp_path: Path) -> None:
    days = tmp_path / "days.csv"
    times = [86_400 * 15_000 + 86_400 * (n // 3) for n in range(9)]
    rows = "".join(f"u,{(n * 7) % 11},{t}\n" for n, t in enumerate(times))
    days.write_text("user_id,item_id,timestamp\n" + rows)
    config = PrepareConfig(ties="item")
    a = prepare(days, tmp_path / "a", config, progress=False)
    b = chain_dataset(tmp_path / "b", n_users=3, n_items=6, length=5, seed=1)
    both = merge([a.path, b.path], tmp_path / "both", progress=False)
    ids, merged_ids = a.item_ids.to_pylist(), both.item_ids.to_pylist()
    row = both.sequences[both.user_index("a/u")]
    assert [merged_ids[i] for i in row] == [f"a/{ids[i]}" for i in a.sequences[0]]
    # As strings a/10 is before a/7; the facts are those of the parts.
    assert (a.order.tied, a.order.ascending) == (6, 6)
    assert (both.order.tied, both.order.ascending, both.order.neighbours) == (6, 6, 8 + 12)
    assert (both.order.unit, both.order.resolution, both.order.ties) == ("mixed",) * 3
    assert both.describe()["order"] == both.order.to_json()


def test_ids_of_more_bytes_than_a_narrow_column_holds() -> None:
    """Which is 2^31; here the type is looked at alone."""
    ids = _prefixed("a", pa.array(["x", "y"]))
    assert ids.type == pa.large_string() and ids.to_pylist() == ["a/x", "a/y"]


def test_merge_refuses_one_part_and_equal_names(tmp_path: Path) -> None:
    a = chain_dataset(tmp_path / "a", n_users=4, n_items=5, length=4, seed=0)
    with pytest.raises(DataError, match="at least two"):
        merge([a.path], tmp_path / "out")
    with pytest.raises(DataError, match="of one name"):
        merge([a.path, a.path], tmp_path / "out")
    b = chain_dataset(tmp_path / "b", n_users=4, n_items=5, length=4, seed=1)
    with pytest.raises(DataError, match="is one of the data sets"):
        merge([a.path, b.path], b.path)
    assert open_dataset(b.path).fingerprint == b.fingerprint
