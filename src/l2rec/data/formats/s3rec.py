"""What lies beside sequences of numbers: S3-Rec's attributes of items, P5's maps to raw ids.

NAME_item2attributes.json    item -> list of numbers of attributes; item2attributes.json in P5
datamaps.json                id2user, id2item, id2attribute: raw ids and names by number (P5)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from l2rec.data.formats.fields import clean
from l2rec.data.formats.files import File, reading
from l2rec.data.formats.names import Names, names_of
from l2rec.data.formats.objects import id_lists, read_object
from l2rec.data.formats.source import CatalogReader, Context, catalog_batch
from l2rec.errors import DataError

ATTRIBUTES = "item2attributes.json"
MAPS = "datamaps.json"
FIELD = "attributes"


@dataclass(frozen=True)
class DataMaps:
    """Raw ids of users and items, and names of attributes, by their numbers in the log."""

    users: Names
    items: Names
    attributes: Names | None


def data_maps(file: File, encoding: str) -> DataMaps:
    """Read P5's datamaps.json."""
    found = read_object(file, encoding)
    maps = {name: _map(file, name, found[name]) for name in ("id2user", "id2item") if name in found}
    if len(maps) < 2:
        raise DataError(
            f"{file} has {', '.join(list(found)[:5])}, not id2user and id2item, as P5's has; fetch "
            f"the file again, or take it away to keep the numbers"
        )
    name = "id2attribute"
    names = {str(i): str(n) for i, n in found[name].items()} if name in found else None
    return DataMaps(
        maps["id2user"], maps["id2item"], Names(file, names) if names is not None else None
    )


def _map(file: File, name: str, pairs: Any) -> Names:
    if not isinstance(pairs, dict):
        raise DataError(f"{file}: {name} is no object of numbers and raw ids; fetch the file again")
    return names_of(file, ((one, str(raw)) for one, raw in pairs.items()))


def attribute_catalog(file: File, context: Context, maps: DataMaps | None = None) -> CatalogReader:
    """Open attributes as texts: their names where ``maps`` has them, else their numbers."""
    encoding = context.columns.encoding
    names = maps.attributes if maps else None
    if names is None:
        context.notes.append(
            f"{file.name} has numbers of attributes and no names, so the items' texts are numbers; "
            f"give better texts by --items"
        )

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        found = id_lists(file, encoding)
        ids = list(found)
        lists = [list(map(str, dict.fromkeys(found[one]))) for one in ids]
        with reading(file, encoding):
            texts = pl.Series([", ".join(names.of(some) if names else some) for some in lists])
            yield catalog_batch(
                pa.array(maps.items.of(ids) if maps else ids, pa.string()),
                {name: clean(texts, name) for name in fields},
                lambda row: f"{file}, item {ids[row]!r}",
            )

    return CatalogReader(catalog, (FIELD,))
