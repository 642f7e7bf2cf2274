"""What people see of an item: a title, labels, a picture and a link, from its text and attributes.

The columns are found by their names, whatever their case and wherever ``_`` stands in them; the
first name that an item has a value for counts.
"""

from __future__ import annotations

__all__ = ["Shown", "facets", "shown"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from l2rec.service.attributes import Attributes, Mask

TITLES = ("cleantitle", "title", "movietitle", "itemtitle", "producttitle", "name")
IMAGES = ("image", "imageurl", "imurl", "picture", "poster", "thumbnail")
LINKS = ("link", "url", "itemurl", "href")
LABEL = 40
"""Characters of a label; a longer value is a description, and no label."""
LABELS = 8
"""Labels of an item at most."""
ANYWHERE = "https:"
"""Instead of a host: pictures of every one that is reached by HTTPS."""


@dataclass(frozen=True)
class Shown:
    """Parts of an item. labels: (attribute, value). image, link: http or https; None for none."""

    title: str
    labels: Sequence[tuple[str, str]]
    image: str | None
    link: str | None


def shown(attributes: Attributes, row: int, text: str, images: Sequence[str]) -> Shown:
    """Return what is shown of an item; without a column for titles, its text is the title.

    Args:
        images: hosts that pictures may come from, as in `Settings.images`.
    """
    values = attributes.of(row)

    def first(names: Sequence[str], fits: Callable[[str], bool] = bool) -> str | None:
        known = {_plain(name): value for name, value in reversed(values.items())}
        return next((known[name] for name in names if name in known and fits(known[name])), None)

    labels = [
        (name, part)
        for name, value in values.items()
        if not _taken(name)
        for part in attributes.parts(name, value)
        if len(part) <= LABEL
    ]
    return Shown(
        title=first(TITLES) or text,
        labels=list(dict.fromkeys(labels))[:LABELS],
        image=first(IMAGES, lambda url: _from(url, images)),
        link=first(LINKS, lambda url: _origin(url) is not None),
    )


def facets(
    attributes: Attributes, served: Mask, most: int
) -> list[tuple[str, list[tuple[str, int]], int]]:
    """Return what items can be filtered by: (attribute, its commonest values with the number of
    items that have each, number of its values), without titles, pictures and links.

    served: [N] bool, the items that are counted.
    """
    found = []
    for name in attributes.names:
        if not _taken(name):
            values, total = attributes.values(name, served, most)
            found.append((name, [one for one in values if len(one[0]) <= LABEL], total))
    return found


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _taken(name: str) -> bool:
    """Say whether a column is a title, a picture or a link, and so neither label nor filter."""
    return _plain(name) in (*TITLES, *IMAGES, *LINKS)


def _origin(url: str) -> str | None:
    """Return the scheme and host of an address of the web; None of any other, which a browser
    might run as a program.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return None
    plain = url.isprintable() and url == url.strip()
    if parts.scheme not in ("http", "https") or not host or not plain:
        return None
    return f"{parts.scheme}://{parts.netloc.lower()}"


def _from(url: str, images: Sequence[str]) -> bool:
    origin = _origin(url)
    return origin is not None and (
        origin in images or (ANYWHERE in images and origin.startswith("https://"))
    )
