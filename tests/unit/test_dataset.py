"""Opening, looking up, describing; and every way a folder can be wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2rec.data.dataset import Dataset, content_fingerprint, open_dataset, user_blocks
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    source = tmp_path / "source"
    source.mkdir()
    (source / "x.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n"
        "ann\tb1\t1\nann\tb2\t2\nann\tb1\t3\nbob\tb3\t1\nann\tb3\t4\n"
    )
    (source / "x.item").write_text(
        "item_id:token\ttitle:token_seq\nb1\tred cup\nb2\tzwei drei vier\nb3\t\n"
    )
    return prepare(source, tmp_path / "data", PrepareConfig(), progress=False)


def test_shapes_and_dtypes(dataset: Dataset) -> None:
    assert (dataset.n_users, dataset.n_items, dataset.n_events) == (2, 3, 5)
    assert (dataset.name, dataset.path.name) == ("data", "data")
    assert dataset.offsets.dtype == np.int64
    assert dataset.items.dtype == np.int32
    assert dataset.timestamps.dtype == np.float64
    assert dataset.event_types is None
    assert isinstance(dataset.items, np.memmap)
    assert dataset.sequences[0].tolist() == [0, 1, 0, 2]
    assert dataset.user_ids.to_pylist() == ["ann", "bob"]
    assert dataset.item_ids.to_pylist() == ["b1", "b2", "b3"]
    assert dataset.texts() == ["red cup", "zwei drei vier", ""]
    assert len(dataset.fingerprint) == 16


def test_look_ups(dataset: Dataset) -> None:
    assert dataset.user_index("bob") == 1
    found = dataset.item_indices(["b3", "b1", "b3"])
    assert found.tolist() == [2, 0, 2]
    assert found.dtype == np.int32
    assert dataset.item_indices([]).tolist() == []


def test_unknown_user(dataset: Dataset) -> None:
    with pytest.raises(DataError) as error:
        dataset.user_index("anna")
    assert str(error.value) == (
        "user 'anna' is not among the 2 users of data set 'data'; did you mean 'ann'?"
    )


def test_unknown_items_are_all_named(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="item 'b9' is not among the 3 items") as error:
        dataset.item_indices(["b1", "b9", "b9"])
    assert "did you mean" in str(error.value)
    with pytest.raises(DataError, match="items 'x0', 'x1', 'x2', 'x3', 'x4' and 2 more are not"):
        dataset.item_indices([f"x{i}" for i in range(7)])


@pytest.mark.parametrize("given", ["b1", b"b1", 3, None])
def test_a_string_is_no_list_of_ids(dataset: Dataset, given: Any) -> None:
    with pytest.raises(DataError, match=rf"^items={given!r}: give a list of item ids$"):
        dataset.item_indices(given)
    with pytest.raises(DataError, match=rf"^users={given!r}: give a list of user ids$"):
        dataset.user_indices(given)


def test_describe(dataset: Dataset) -> None:
    found = dataset.describe()
    assert found["density"] == 5 / 6
    assert found["history_length"]["q100"] == 4
    assert found["text_characters"]["q100"] == len("zwei drei vier")
    assert found["text_words"] | {"mean": 0} == {
        "mean": 0, "q00": 0, "q25": 1, "q50": 2, "q75": 2.5, "q95": pytest.approx(2.9), "q100": 3,
    }  # fmt: skip
    assert found["items_without_text"] == 1
    assert found["users_evaluated"] == 1
    assert found["repeats_share"] == 1 / 5
    assert found["fingerprint"] == dataset.fingerprint
    assert json.loads(json.dumps(found)) == found


def test_pickle_maps_the_same_files(dataset: Dataset) -> None:
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    assert isinstance(copy.items, np.memmap)


def test_fingerprint_sees_everything_but_chunks() -> None:
    def of(items: list[int], *chunks: list[str], users: int = 2) -> str:
        column = pa.chunked_array([pa.array(c, pa.string()) for c in chunks])
        return content_fingerprint(users, 2, [np.array(items, np.int32)], [column])

    base = of([1, 2], ["ab", "c"])
    assert base == of([1, 2], ["ab"], ["c"]) == of([1, 2], [], ["ab", "c"])
    sliced = pa.chunked_array([pa.array(["x", "ab", "c"], pa.large_string()).slice(1)])
    assert base == content_fingerprint(2, 2, [np.array([1, 2], np.int32)], [sliced])
    others = [of([2, 1], ["ab", "c"]), of([1, 2], ["a", "bc"]), of([1, 2], ["ab", "c"], users=3)]
    assert len({base, *others}) == 4


def test_user_blocks_never_cut_a_user() -> None:
    offsets = np.array([0, 3, 3, 10, 11, 12])
    assert list(user_blocks(offsets, 4)) == [(0, 2), (2, 3), (3, 5)]
    assert list(user_blocks(offsets, 100)) == [(0, 5)]
    assert list(user_blocks(np.array([0]), 4)) == []


def cut(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) - 9])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def meta(**changes: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        found = json.loads((path / "dataset.json").read_text())
        (path / "dataset.json").write_text(json.dumps(found | changes))

    return damage


def text(content: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "dataset.json").write_text(content)

    return damage


def array(name: str, values: npt.NDArray[Any]) -> Callable[[Path], None]:
    return lambda path: np.save(path / name, values)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("dataset.json"), "has no dataset.json, so it is not a prepared data set"),
        (text("{"), "dataset.json cannot be read"),
        (text("[]"), "dataset.json cannot be read"),
        (text('{"format": "l2rec-dataset", "version": 1}'), "lacks name, users, items"),
        (meta(version=99), "version 99; this l2rec reads 'l2rec-dataset' version 1"),
        (meta(format="other"), "has format 'other' version 1"),
        (meta(events=6), "items.npy has 5 events, dataset.json says 6"),
        (meta(users=6), "offsets.npy has 2 users, dataset.json says 6"),
        (meta(items=6), "catalog.parquet has 3 items, dataset.json says 6"),
        (remove("items.npy"), "items.npy is missing"),
        (cut("items.npy"), "items.npy is torn"),
        (cut("timestamps.npy"), "timestamps.npy is torn"),
        (remove("users.parquet"), "users.parquet is missing"),
        (cut("catalog.parquet"), "catalog.parquet is torn"),
        (array("items.npy", np.zeros(5)), "items.npy holds float64 of shape"),
        (array("offsets.npy", np.array([0, 9, 5])), "does not cut the 5 events into users"),
    ],
)
def test_damaged_folders(dataset: Dataset, damage: Callable[[Path], None], says: str) -> None:
    path = dataset.path
    del dataset
    damage(path)
    with pytest.raises(DataError) as error:
        open_dataset(path)
    message = str(error.value)
    assert says in message
    assert "prepare" in message
    assert "\n" not in message


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist, so it is not a prepared"):
        open_dataset(tmp_path / "nowhere")


def test_catalog_without_text(dataset: Dataset) -> None:
    table = dataset.catalog.drop_columns(["text"])
    pq.write_table(table, dataset.path / "catalog.parquet")
    with pytest.raises(DataError, match=r"catalog\.parquet lacks the column 'text'"):
        open_dataset(dataset.path)
