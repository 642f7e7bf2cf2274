"""Raw ids behind the numbers of a log: files that map the one to the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from l2rec.data.formats.files import File, open_text, reading
from l2rec.errors import DataError


@dataclass(frozen=True)
class Names:
    """Raw ids by the ids that a log has. ``file``: where they stand."""

    file: File
    raw: Mapping[str, str]

    def of(self, ids: Sequence[str]) -> list[str]:
        """Return the raw ids. Raises DataError for an id that has none."""
        try:
            return [self.raw[one] for one in ids]
        except KeyError as error:
            raise DataError(
                f"{self.file} has no raw id for {error.args[0]!r}; fetch the files of one data set "
                f"together, or take {self.file.name} away to keep the numbers"
            ) from error


def names_of(file: File, pairs: Iterable[tuple[str, str]]) -> Names:
    """Collect pairs of id and raw id.

    Raises:
        DataError: an id has two raw ids, or two ids have one, which would make them one.
    """
    raw: dict[str, str] = {}
    ids: dict[str, str] = {}
    for one, name in pairs:
        if raw.setdefault(one, name) != name or ids.setdefault(name, one) != one:
            raise DataError(
                f"{file} gives {name!r} and {one!r} to each other, and one of them to another "
                f"already; fetch or write the file again"
            )
    return Names(file, raw)


def tab_names(file: File, encoding: str) -> Names:
    """Read lines of RAW, a tab and the id, as LC-Rec's .item2id has them."""
    pairs = []
    with reading(file, encoding), open_text(file, encoding) as stream:
        for number, line in enumerate(stream, 1):
            text = line.decode().rstrip("\r\n")
            name, tab, one = text.rpartition("\t")
            if tab:
                pairs.append((one, name))
            elif text.strip():
                raise DataError(
                    f"{file}, line {number} is {text[:60]!r}; expected a raw id, a tab and a number"
                )
    return names_of(file, pairs)
