"""Quotes and lines of separated text, against a character-by-character reference."""

from __future__ import annotations

import gzip
import io
import random
import re
import zipfile
from pathlib import Path

import pytest
from tests.support.errors import one_line

from l2rec.data.formats import quotes
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.formats.quotes import Doubled, Watched
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError


def reference(text: str) -> tuple[int, int, tuple[int, int] | None]:
    """Return the lines, the line feeds inside quotes, and where the first broken quote opened."""
    lines = text.count("\n") + (not text.endswith("\n"))
    inside, opened, at = 0, -1, 0
    fresh = True  # at the start of a cell
    while at < len(text):
        char = text[at]
        if opened >= 0:
            if char == "\n":
                inside += 1
            if char == '"':
                if text[at + 1 : at + 2] == '"':
                    at += 1
                elif text[at + 1 : at + 2] in ("", ",", "\n"):
                    opened = -1
                else:
                    return lines, inside, (opened, at)
            fresh = False
        elif char == '"' and fresh:
            opened = at
        else:
            fresh = char in ",\n"
        at += 1
    return lines, inside, (opened, len(text)) if opened >= 0 else None


def watch(text: str, sizes: list[int], cells: int = 99) -> Watched:
    watched = Watched(b"", io.BytesIO(text.encode()), ",", cells, quotes=True)
    at = 0
    while watched.read(sizes[at % len(sizes)]):
        at += 1
    watched.finish()
    return watched


def test_watched_agrees_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    broken = 0
    for _ in range(4000):
        pieces = ["a", '"', '""', ",", "\n", '"b"', ',"', '",', 'c"d']
        text = "x" + "".join(draw.choices(pieces, k=draw.randint(1, 14)))
        lines, inside, fault = reference(text)
        monkeypatch.setattr(quotes, "PIECE_BYTES", draw.choice([1, 3, 1 << 16]))
        found = watch(text, [draw.randint(1, 9) for _ in range(3)])
        if fault is None:
            assert found.broken is None, text
            assert (found.lines, found.inside) == (lines, inside), text
        else:
            broken += 1
            assert found.broken is not None, text
            assert found.broken.opened == fault[0], text
    assert 500 < broken < 3500


def events(path: Path, **columns: object) -> list[tuple[str, ...]]:
    source = open_source(path, columns=Columns(**columns))  # type: ignore[arg-type]
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    return [(r["user_id"], r["item_id"]) for r in rows]


HEAD = "user_id,item_id,timestamp,title\n"
OPEN = HEAD + 'u1,a,1,x\nu1,b,2,"Heroes\nu1,c,3,y\nu2,a,1,x\nu2,b,2,y\n'
AFTER = HEAD + 'u1,a,1,x\nu1,b,2,"Heroes" single\nu1,c,3,y\n'
NEXT = HEAD + 'u1,a,1,x\nu1,b,2,"Heroes\nu1,c,3,"x y" z\n'
EVENT = HEAD + 'u1,a,1,x\nu1,b,2,"Heroes\nu1,c,3,y\nu2,a,1,12"\nu2,c,3,y\n'


@pytest.mark.parametrize("separator", [",", ";", "|"])
@pytest.mark.parametrize("block_bytes", [60, 1 << 20])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (OPEN, 'line 3: the cell that opens with a quote (") is not closed by the end of the'),
        (AFTER, 'line 3: the cell that opens with a quote (") goes on after it closed, in line 3'),
        (NEXT, 'line 3: the cell that opens with a quote (") goes on after it closed, in line 4'),
        (EVENT, 'line 3: the quote (") that opens here closes only after line 4, which looks like'),
    ],
)
def test_a_stray_quote_is_an_error_with_its_line(
    tmp_path: Path, text: str, says: str, separator: str, block_bytes: int
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text.replace(",", separator))
    with pytest.raises(DataError) as error:
        list(open_source(path, block_bytes=block_bytes).events())
    message = one_line(error)
    assert f"log.csv, {says}" in message
    assert "--quotes none" in message


@pytest.mark.parametrize("text", [OPEN, AFTER, NEXT])
def test_without_quotes_every_line_is_an_event(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    assert len(events(path, quotes="none")) == text.count("\n") - 1


def test_a_backslash_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEAD.replace(",", ";") + 'u;a;1;"The \\"x\\" files"\n')
    with pytest.raises(DataError, match=r'\(\\" is a quote inside quotes only with --quotes back'):
        events(path)
    assert events(path, quotes="backslash") == [("u", "a")]


@pytest.mark.parametrize("block_bytes", [20, 1 << 20])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_backslashes_before_quotes(tmp_path: Path, separator: str, block_bytes: int) -> None:
    rows = [
        ("a", r'"The Real \"J. Peterman\""', 'The Real "J. Peterman"'),
        ("b", r'"\"x\";y"', '"x";y'),
        ("c", r'"C:\\"', "C:\\"),
        ("d", r'"a\b, ""c"" \\\"d"', 'a\\b, "c" \\"d'),
        ("e", r'"\"' + "\n" + r'\""', '"\n"'),
    ]
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text(
        HEAD.replace(",", separator).replace("title", "t")
        + "".join(separator.join(("u", item, "1", cell)) + "\n" for item, cell, _ in rows)
    )
    items.write_text(
        separator.join(("item_id", "title"))
        + "\n"
        + "".join(f"{item}{separator}{cell}\n" for item, cell, _ in rows)
    )
    source = open_source(
        log, items=items, columns=Columns(quotes="backslash"), block_bytes=block_bytes
    )
    found = [r["item_id"] for b in source.events() for r in b.to_pylist()]
    assert found == [item for item, _, _ in rows]
    assert source.catalog is not None
    texts = [r["title"] for b in source.catalog(("title",)) for r in b.to_pylist()]
    assert texts == [text for _, _, text in rows]


def test_an_open_quote_after_escaped_ones(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEAD + 'u,a,1,"\\"x\\""\nu,b,2,"\\"y\\"\n')
    with pytest.raises(DataError, match=r"log\.csv, line 3: the cell that opens .* not closed by"):
        events(path, quotes="backslash")


def test_a_stream_with_doubled_quotes_at_any_block() -> None:
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(["a", "\\", '"', "\n"], k=draw.randint(0, 12))).encode()
        expected = re.sub(rb'\\(["\\])', lambda m: b'""' if m[1] == b'"' else b"\\", text)
        assert Doubled(_Bits(text, draw.randint(1, 3))).readall() == expected  # type: ignore[arg-type]


class _Bits(io.BytesIO):
    """A stream that gives few bytes at a time."""

    def __init__(self, text: bytes, most: int) -> None:
        super().__init__(text)
        self.most = most

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.most)


@pytest.mark.parametrize("name", ["log.tsv", "log.csv"])
def test_tabs_without_a_quoting_convention(tmp_path: Path, name: str) -> None:
    rows = ["u1\ta\t1\tx", 'u1\tb\t2\t"Weird Al', "u1\tc\t3\ty", 'u2\ta\t1\tthe "best" of']
    rows += ['u2\tb\t2\ta 12"', 'u2\t"c"\t3\tz']
    path = tmp_path / name
    path.write_text("\n".join([HEAD.strip().replace(",", "\t"), *rows]))
    source = open_source(path)
    found = [(r["user_id"], r["item_id"]) for b in source.events() for r in b.to_pylist()]
    assert found == [(r.split("\t")[0], r.split("\t")[1]) for r in rows]
    assert source.notes == [
        f"{name}: quotes are part of the text, as the one that opens a cell in line 3 and does "
        "not close it"
    ]


def test_tabs_with_one(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text('"user_id"\t"item_id"\t"timestamp"\n"u"\t"a ""b"""\t1\n"u\nv"\t"c\td"\t2\n')
    assert events(path) == [("u", 'a "b"'), ("u\nv", "c\td")]


def test_texts_of_several_lines_are_read_and_noted(tmp_path: Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text("user_id,item_id,timestamp\nu,a,1\nu,b,2\n\nu,a,3\n")
    items.write_text('item_id,title\na,"one\n\ntwo, ""three"""\nb,four\n')
    dataset = prepare(log, tmp_path / "d", items=items, progress=False)
    assert dataset.texts() == ['one\n\ntwo, "three"', "four"]
    assert dataset.meta["notes"] == [
        "items.csv: 2 line breaks stand inside quoted cells (the first opens in line 2); if "
        "quotes are part of the text, pass --quotes none"
    ]
    items.write_text('item_id,title\na,"one\nb,four\n')
    with pytest.raises(DataError, match=r"items\.csv, line 2: the cell that opens with a quote"):
        prepare(log, tmp_path / "d", items=items, progress=False)
    config = PrepareConfig(quotes="none")
    dataset = prepare(log, tmp_path / "d", config, items=items, progress=False)
    assert dataset.texts() == ['"one', "four"]


def test_quotes_in_archives(tmp_path: Path) -> None:
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(OPEN.encode("utf-16")))
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.writestr("LOG.CSV", OPEN.replace("\n", "\r"))
    for name in ("log.csv.gz", "log.zip"):
        with pytest.raises(DataError, match=r"line 3: the cell that opens with a quote"):
            events(tmp_path / name)
        assert len(events(tmp_path / name, quotes="none")) == 5


def test_a_quote_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('user_id,item_id,timestamp,"ti\nu,a,1,x\n')
    with pytest.raises(DataError, match=r"log\.csv, line 1: the header has a quote"):
        events(path)
    assert events(path, quotes="none") == [("u", "a")]
    path.write_text('user_id\titem_id\ttimestamp\t"ti\nu\ta\t1\tx\n')
    assert events(path) == [("u", "a")]
    path.write_text('"user_id";"item_id";"timestamp"\n"u";"a";"1"\n')
    assert events(path) == [("u", "a")]


def test_an_item_inside_quotes_is_told_beside_unknown_items(tmp_path: Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text("user_id,item_id,timestamp\nu,a,1\nu,b,2\n")
    items.write_text('item_id,title\na,"Heroes\nb,12"\n')
    with pytest.raises(DataError) as error:
        prepare(log, tmp_path / "d", items=items, progress=False)
    message = one_line(error)
    assert "1 of 2 events are of items that the catalog items.csv does not have" in message
    assert (
        "items.csv: 1 line breaks stand inside quoted cells (the first opens in line 2)" in message
    )
