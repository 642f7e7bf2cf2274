"""RecFormer's folders: the splits of each user, ids and texts, each file one JSON object.

train.json, val.json, test.json    user -> list of items, oldest first; each goes on with the last
umap.json, smap.json               raw user -> user, raw item -> item
meta_data.json                     raw item -> title, brand, category; of many more items
"""

from __future__ import annotations

from pathlib import Path

from l2rec.data.formats.files import File, beside, is_folder, needed_file
from l2rec.data.formats.names import Names, names_of
from l2rec.data.formats.objects import kind, list_events, read_object
from l2rec.data.formats.source import Context, OpenCatalog, Reader, Source, as_source
from l2rec.data.parts import SPLITS

LOGS = ("train.json", "val.json", "test.json")
"""Files of events, in the order of `SPLITS`."""
MAPS = ("umap.json", "smap.json")
TEXTS = "meta_data.json"


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the names of the files, and by the shape of the first."""
    if not set(LOGS) & set(files):
        return None
    near = beside(path, files)
    first = near.get(LOGS[0])
    is_log = first is None or kind(first, context.columns.encoding) == "lists"
    return "recformer" if is_log and {*MAPS, TEXTS} & set(near) else None


def recformer(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open the three files of events as one log with its splits, and the texts."""
    near = beside(path, files)
    folder = path if is_folder(path) else path.parent
    logs = [needed_file(folder, near, name) for name in LOGS]
    maps = [needed_file(folder, near, name) for name in MAPS]
    users, names = (_names(file, context.columns.encoding) for file in maps)
    items = items or near.get(TEXTS)
    catalog = open_catalog(items, context) if items else None
    events = list_events(list(zip(logs, range(len(SPLITS)), strict=True)), users, names, context)
    used = [*logs, *maps, *([items] if items else [])]
    return as_source("recformer", used, events, catalog)


def _names(file: File, encoding: str) -> Names:
    """Read raw ids and their numbers."""
    return names_of(file, ((str(one), raw) for raw, one in read_object(file, encoding).items()))


READER = Reader(
    {"recformer": "train|val|test.json, umap.json, smap.json, meta_data.json (RecFormer)"},
    detect,
    recformer,
)
