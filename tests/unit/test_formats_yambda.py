"""Yambda: flat and sequential Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.errors import one_line
from tests.support.logs import events_of, write

from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError

KINDS = ("listen", "like", "dislike", "unlike", "undislike")
ROWS = [
    (100, 0, 7, "listen"),
    (100, 5, 7, "like"),
    (100, 5, 9, "listen"),
    (200, 0, 9, "listen"),
    (200, 10, 9, "dislike"),
    (200, 15, 9, "undislike"),
    (200, 20, 7, "unlike"),
]
EVENTS = [(str(user), str(item), float(time)) for user, time, item, _ in ROWS]


def table(kinds: tuple[str, ...], union: bool, sequential: bool) -> pa.Table:
    rows = [row for row in ROWS if row[3] in kinds]
    columns: dict[str, Any] = {
        "uid": [r[0] for r in rows],
        "timestamp": [r[1] for r in rows],
        "item_id": [r[2] for r in rows],
        "is_organic": [1 for _ in rows],
    }
    if "listen" in kinds:
        columns["played_ratio_pct"] = [60 if r[3] == "listen" else None for r in rows]
        columns["track_length_seconds"] = [200 if r[3] == "listen" else None for r in rows]
    if union:
        columns["event_type"] = [r[3] for r in rows]
    if sequential:
        users = list(dict.fromkeys(columns["uid"]))
        ids = columns.pop("uid")
        columns = {"uid": users} | {
            name: [[v for v, u in zip(values, ids, strict=True) if u == user] for user in users]
            for name, values in columns.items()
        }
    small = {"uid": pa.uint32(), "timestamp": pa.uint32(), "item_id": pa.uint32()}
    arrays = {
        name: pa.array(
            values, pa.list_(small[name]) if sequential and name != "uid" else small[name]
        )
        if name in small
        else pa.array(values)
        for name, values in columns.items()
    }
    return pa.table(arrays)


def yambda(folder: Path, *, union: bool = True, others: bool = True, sequential: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if union:
        pq.write_table(table(KINDS, True, sequential), folder / "multi_event.parquet")
    for kind in KINDS if others else ():
        pq.write_table(table((kind,), False, sequential), folder / f"{kind}s.parquet")
    return folder


def rows_of(source: Source) -> list[tuple[str, str, float, str]]:
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    return [(r["user_id"], r["item_id"], r["timestamp"], r["event_type"]) for r in rows]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        events_of(open_source(path, **options))
    return one_line(error)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("block_bytes", [32, 1 << 20])
def test_the_union_alone_is_read(tmp_path: Path, sequential: bool, block_bytes: int) -> None:
    folder = yambda(tmp_path / "50m", sequential=sequential)
    for path, format in (
        (folder, None),
        (folder / "multi_event.parquet", None),
        (folder, "yambda"),
    ):
        source = open_source(path, format=format, block_bytes=block_bytes)
        assert (source.format, source.catalog) == ("yambda", None)
        assert [f.name for f in source.files] == ["multi_event.parquet"]
        assert [row[:3] for row in rows_of(source)] == EVENTS
        assert [row[3] for row in rows_of(source)] == [row[3] for row in ROWS]
        assert "times are seconds from a start that Yambda does not say" in source.notes[-1]
    assert open_source(folder).notes[0] == (
        "multi_event.parquet has all events; the files of some of them were not read: "
        "dislikes.parquet, likes.parquet, listens.parquet, undislikes.parquet, unlikes.parquet"
    )


@pytest.mark.parametrize("sequential", [False, True])
def test_files_of_one_type_make_the_same_log(tmp_path: Path, sequential: bool) -> None:
    folder = yambda(tmp_path / "50m", union=False, sequential=sequential)
    rows = rows_of(open_source(folder))
    assert sorted(rows) == sorted((str(u), str(i), float(t), kind) for u, t, i, kind in ROWS)
    source = open_source(folder / "listens.parquet")
    assert {row[3] for row in rows_of(source)} == {"listen"} and len(rows_of(source)) == 3


def test_all_forms_have_one_fingerprint(tmp_path: Path) -> None:
    config, found = PrepareConfig(only=("listen",)), set()
    for name, options in (
        ("a", {"sequential": False}),
        ("b", {"sequential": True}),
        ("c", {"sequential": False, "union": False}),
        ("d", {"sequential": True, "others": False}),
    ):
        folder = yambda(tmp_path / name, **options)
        found.add(prepare(folder, tmp_path / "out", config, progress=False).fingerprint)
    assert len(found) == 1


def test_embeddings_and_mappings_are_no_events(tmp_path: Path) -> None:
    folder = yambda(tmp_path, union=False, sequential=False)
    pq.write_table(pa.table({"item_id": [7], "embed": [[0.1]]}), folder / "embeddings.parquet")
    assert open_source(folder).notes[0] == "not read, as they are no events: embeddings.parquet"


def test_several_sizes_or_forms(tmp_path: Path) -> None:
    yambda(tmp_path / "y" / "flat" / "50m", sequential=False)
    assert rows_of(open_source(tmp_path / "y" / "flat"))  # the only folder inside
    assert rows_of(open_source(tmp_path / "y"))
    yambda(tmp_path / "y" / "flat" / "500m", sequential=False)
    yambda(tmp_path / "y" / "sequential" / "50m", sequential=True)
    write(tmp_path / "y" / "README.md", "x")
    message = refusal(tmp_path / "y")
    assert "y has flat/500m, flat/50m, sequential/50m; give the folder of one size and" in message
    pq.write_table(pa.table({"item_id": [7], "embed": [[0.1]]}), tmp_path / "y" / "e.parquet")
    assert refusal(tmp_path / "y") == message
    folder = yambda(tmp_path / "z", sequential=False, union=False)
    pq.write_table(table(("like",), False, True), folder / "likes.parquet")
    assert "has files of the flat and of the sequential form" in refusal(folder)


def test_lists_of_other_lengths(tmp_path: Path) -> None:
    path = tmp_path / "listens.parquet"
    columns = {"uid": [1, 2], "item_id": [[1], [1, 2]], "timestamp": [[1], [5]]}
    pq.write_table(pa.table(columns | {"is_organic": [[1], [1, 1]]}), path)
    message = refusal(path)
    assert "listens.parquet, row 2: 2 values of item_id, but 1 of timestamp; fetch" in message


def test_missing_values_and_no_log(tmp_path: Path) -> None:
    path = tmp_path / "listens.parquet"
    columns: dict[str, Any] = {"uid": [1, 2], "item_id": [1, None], "timestamp": [1, 5]}
    pq.write_table(pa.table(columns | {"is_organic": [1, 1]}), path)
    assert "listens.parquet, row 2 has no item id" in refusal(path)
    columns = {"uid": [1, 2], "item_id": [[1], [1, None]], "timestamp": [[1], [5, 6]]}
    pq.write_table(pa.table(columns | {"is_organic": [[1], [1, 1]]}), path)
    assert "listens.parquet, row 2 has no item id" in refusal(path)
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [1]}), path)
    assert open_source(path).format == "parquet"
    assert "has no log; give the folder of one size and form" in refusal(path, format="yambda")
