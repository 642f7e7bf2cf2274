"""LC-Rec's and LETTER's folders: users and their items as one JSON object, the catalog as another.

NAME.inter.json        user -> list of items, oldest first
NAME.item.json         item -> title, description, brand, categories, as far as they are known
NAME.user2id, .item2id raw ids of both, if they are there
NAME.index.json        semantic ids, which several items may share: not read
NAME.train.inter ...   the same events as samples: not read
"""

from __future__ import annotations

from pathlib import Path

from l2rec.data.formats.files import File, beside, is_folder, only_file
from l2rec.data.formats.names import tab_names
from l2rec.data.formats.objects import kind, list_events, object_catalog, one_value
from l2rec.data.formats.source import Context, OpenCatalog, Reader, Source, as_source

LOG, CATALOG = ".inter.json", ".item.json"


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the end of a file's name."""
    return "lc-rec" if any(f.ends(LOG) and f != items for f in files.values()) else None


def lc_rec(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open users and their items, and the catalog that is given or lies beside them."""
    encoding = context.columns.encoding
    file, near = _log(path, files, encoding), beside(path, files)
    name = file.name[: -len(LOG)] if file.ends(LOG) else file.name.removesuffix(".json")
    maps = [near.get(f"{name}.user2id"), near.get(f"{name}.item2id")]
    users, names = (tab_names(f, encoding) if f else None for f in maps)
    items = items or near.get(name + CATALOG)
    if items is None:
        catalog = None
    elif items.ends(CATALOG):
        catalog = object_catalog(items, context, names)
    else:
        catalog = open_catalog(items, context)
    used = [file, *(f for f in (*maps, items) if f)]
    left = [
        other
        for other, f in near.items()
        if f.ends(".inter", ".index.json") and other.startswith(f"{name}.")
    ]
    # MiniOneRec's first step writes the same files, split by time.
    inters = any(other.endswith(".inter") for other in left)
    splits = "; --format unisrec reads the splits of the .inter files" if inters else ""
    if left:
        context.notes.append(
            f"{file.name} is the log; not read: {', '.join(left)} (semantic ids, and other forms "
            f"of the log{splits})"
        )
    return as_source("lc-rec", used, list_events([(file, None)], users, names, context), catalog)


def _log(path: Path, files: dict[str, File], encoding: str) -> File:
    """Return the file of users and their items, whose name need not tell it."""
    if not is_folder(path):
        if kind(File(path), encoding) != "lists" and (told := one_value(File(path), encoding)):
            raise told
        return File(path)
    named = {name: f for name, f in files.items() if f.ends(LOG)}
    lists = {n: f for n, f in files.items() if f.ends(".json") and kind(f, encoding) == "lists"}
    return only_file(path, named or lists, (".json",), LOG)


READER = Reader(
    {"lc-rec": "NAME.inter.json, an object USER: [ITEM, ...], NAME.item.json (LC-Rec, LETTER)"},
    detect,
    lc_rec,
)
