"""JSON files that are one object or array: told by their shape, since only JSON Lines are read."""

from __future__ import annotations

import re

from l2rec.data.formats.files import File, open_text
from l2rec.errors import DataError

HEAD_BYTES = 1 << 16
MAP_KEYS = 20
_FIRST = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(\[\s*"\s*<|\[|\{|-?\d)')
_EVENTS = "write one event in each row, such as a CSV with user_id,item_id,timestamp"
_SHAPES = {
    "[": (
        "one JSON object of users and the lists of their items (as LC-Rec's and LETTER's "
        f".inter.json and RecFormer's train.json are), not one event per line; {_EVENTS}, in the "
        "order of the lists, and prepare it with --timestamp none"
    ),
    "{": (
        "one JSON object of items and their fields (as LC-Rec's and LETTER's .item.json and "
        "RecFormer's meta_data.json are), not one item per line; write a CSV with a column "
        "item_id and the fields, and give it by --items"
    ),
    "<": (
        "the semantic ids of items (as LC-Rec's and LETTER's .index.json are), neither events nor "
        "texts; give the log, and the texts by --items"
    ),
    "1": (
        "a map of ids to numbers (as RecFormer's smap.json and umap.json are), neither events nor "
        "texts; give the log, and the texts by --items"
    ),
}


def one_value(file: File, encoding: str) -> DataError | None:
    """Return the error that says what a file of one JSON value is; None for JSON Lines."""
    with open_text(file, encoding) as stream:
        head = stream.read(HEAD_BYTES).decode(errors="replace").lstrip()
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    if head.startswith("["):
        return DataError(
            f"{file} is one JSON array, not one object per line; write each of its objects in a "
            f"line (jq -c '.[]' FILE)"
        )
    first = _FIRST.match(head)
    if first is None or (len(lines) > 1 and lines[0].endswith("}") and lines[1].startswith("{")):
        return None
    value = first[1]
    shape = "<" if value.endswith("<") else value if value in "[{" else "1"
    if shape == "1" and head.count('":') < MAP_KEYS:  # a single line of JSON Lines may be so too
        return None
    return DataError(f"{file} is {_SHAPES[shape]}")
