"""Files, folders and zip archives, read in blocks; errors that name the file and the line."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa

from l2rec.errors import DataError

Where = Callable[[int], str]  # row of a batch -> "ratings.csv, line 12"
CATALOG_NAMES = ("items", "catalog", "movies")
"""Names, without endings, that a catalog beside the events may have."""


@dataclass(frozen=True)
class File:
    """A file on disk, perhaps gzipped, or a member of a zip archive."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """Base name, without ``.gz``."""
        name = PurePosixPath(self.member).name if self.member else self.path.name
        return name[:-3] if name.lower().endswith(".gz") else name

    @property
    def folder(self) -> str:
        """Base name of the folder that holds it."""
        return PurePosixPath(self.member or self.path.absolute().as_posix()).parent.name

    def ends(self, *suffixes: str) -> bool:
        """Tell whether the name ends in one of the suffixes, in small letters or capitals."""
        return self.name.lower().endswith(suffixes)

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def open(self) -> BinaryIO:
        """Open the content for reading, decompressed on the way."""
        if self.member is not None:
            if self.member.lower().endswith(".gz"):
                return cast(BinaryIO, gzip.open(zipfile.ZipFile(self.path).open(self.member)))
            return cast(BinaryIO, zipfile.ZipFile(self.path).open(self.member))
        if self.path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        return self.path.open("rb")


def listing(path: Path) -> dict[str, File]:
    """Map base names to files: the file itself, a folder's files (or those of its only subfolder,
    if it holds nothing else), or the members of a zip (with their folder, where a name is taken).

    Raises:
        DataError: the path does not exist, or the zip is torn.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path of the source")
    if path.is_dir():
        inside = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=_in_order)
        if len(inside) == 1 and inside[0].is_dir():
            return listing(inside[0])
        files = [File(p) for p in inside if p.is_file()]
    elif path.suffix.lower() == ".zip":
        files = _members(path)
    else:
        files = [File(path)]
    found: dict[str, File] = {}
    for file in files:
        taken = file.name in found and file.member is not None
        found[str(file.member) if taken else file.name] = file
    return found


def _in_order(path: Path) -> list[tuple[int, str]]:
    """Return the key by which part-2 comes before part-10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if n % 2 else (-1, part) for n, part in enumerate(parts)]


def is_folder(path: Path) -> bool:
    """Tell whether a path holds files: a folder or a zip."""
    return path.is_dir() or path.suffix.lower() == ".zip"


def beside(path: Path, files: dict[str, File]) -> dict[str, File]:
    """Return the files of a folder or zip; of a single file, also those that lie beside it."""
    return files if is_folder(path) else listing(path.parent)


def catalog_beside(files: dict[str, File], suffixes: tuple[str, ...] = ("",)) -> File | None:
    """Return the first file that has the name of a catalog and one of the suffixes, if any."""
    named = (f for name, f in files.items() if name.lower().split(".")[0] in CATALOG_NAMES)
    return next((f for f in named if f.ends(*suffixes)), None)


def _members(path: Path) -> list[File]:
    """Return the files in a zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not a whole zip file ({error}); fetch it again") from error
    return [File(path, n) for n in names if not n.startswith("__MACOSX")]


def folders(path: Path) -> dict[str, dict[str, File]]:
    """Map names of subfolders of a folder (or of its only subfolder, if it holds nothing else), or
    of folders in a zip, to their files by base name.
    """
    found: dict[str, dict[str, File]] = {}
    if path.is_dir():
        inside = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
        if len(inside) == 1 and (deeper := folders(inside[0])):
            return deeper
        for folder in inside:
            files = (File(p) for p in sorted(folder.iterdir()) if p.is_file())
            found[folder.name] = {f.name: f for f in files if not f.name.startswith(".")}
    elif path.suffix.lower() == ".zip":
        for file in _members(path):
            name = PurePosixPath(cast(str, file.member)).parent.name
            found.setdefault(name, {})[file.name] = file
    return found


def only_file(path: Path, files: dict[str, File], suffixes: tuple[str, ...], what: str) -> File:
    """Return the one file with one of the suffixes; DataError if there is none or several."""
    named = {name: f for name, f in files.items() if f.ends(*suffixes)}
    found = list(named.values())
    if len(found) != 1:
        names = ", ".join(list(named)[:5]) or "none"
        packed = "unpack it and " if path.suffix.lower() == ".zip" else ""
        advice = f"{packed}give the path of the file" + ("" if found else ", or another --format")
        if sum(split_of(f) is not None for f in found) > 1:
            advice = (
                "these look like the splits of one log, and each alone is a part of it: give the "
                "log that they were made from, or put the rows of all into one file"
            )
            if found[0].ends(*SPLIT_SUFFIXES):
                advice += ", or give a folder with the train, valid and test files of one log alone"
        raise DataError(f"{path} has {len(found)} {what} files ({names}), not one; {advice}")
    return found[0]


_SPLIT = re.compile(r"(?<![^._-])(train|training|valid|validation|val|dev|test)(?![^._-])", re.I)
_NUMBERS = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2}
SPLIT_SUFFIXES = (".inter", ".csv", ".tsv", ".parquet")
"""Ends of files of events that are read as one log where all three splits are there."""


def split_of(file: File) -> tuple[int, str] | None:
    """Return the split that a file's name says, as a number, and the name without that word."""
    words = _SPLIT.findall(file.name)
    return (_NUMBERS[words[0].lower()], _SPLIT.sub("", file.name)) if len(words) == 1 else None


def stem(file: File) -> str:
    """Return the name of a file up to the word that says its split, or to its ending."""
    return _SPLIT.split(file.name)[0].rstrip("._-") if split_of(file) else file.name.split(".")[0]


def split_logs(files: Iterable[File]) -> list[tuple[File, ...]]:
    """Return the train, valid and test file of each log that has all three, by their names."""
    found: dict[str, list[tuple[int, File]]] = {}
    for file in files:
        if (told := split_of(file)) is not None:
            found.setdefault(told[1], []).append((told[0], file))
    logs = [sorted(parts, key=lambda part: part[0]) for parts in found.values()]
    return [
        tuple(file for _, file in parts) for parts in logs if [n for n, _ in parts] == [0, 1, 2]
    ]


def given_splits(files: Iterable[File], suffixes: tuple[str, ...]) -> tuple[File, ...] | None:
    """Return the train, valid and test file of a log, where only these end in the suffixes."""
    logs = [file for file in files if file.ends(*suffixes)]
    found = split_logs(logs)
    return found[0] if found and len(logs) == 3 else None


def splits_note(files: Iterable[File]) -> str:
    """Say that files were read as the splits of one log."""
    files = list(files)
    alike = len({file.name for file in files}) < len(files)  # then their folders tell them apart
    names = ", ".join(f"{file.folder}/{file.name}" if alike else file.name for file in files)
    return f"read as one log whose splits are given: {names} (train, valid, test)"


def other_splits(file: File) -> list[str]:
    """Return what the files of the two other splits of a log would be named."""
    told = split_of(file)
    words = ("train", "valid", "test")
    return [_SPLIT.sub(w, file.name) for n, w in enumerate(words) if told and n != told[0]]


def split_note(file: File) -> list[str]:
    """Name the splits that lie beside a file that is itself one split, such as x.train.csv."""
    match = _SPLIT.search(file.name)
    if match is None or file.member is not None:
        return []
    start, end = match.span()
    beside = sorted(
        other.name
        for other in file.path.parent.iterdir()
        if other.name != file.path.name
        and _SPLIT.sub("", other.name) == _SPLIT.sub("", file.path.name)
    )
    if not beside:
        return []
    advice = ""
    if len(beside) == 2 and file.ends(*SPLIT_SUFFIXES):
        advice = "; give a folder with these files alone to read them all, with their splits"
    return [
        f"{file.name} is one split ({file.name[start:end]}); {', '.join(beside)} beside it "
        f"{'is' if len(beside) == 1 else 'are'} not read, so events may be missing{advice}"
    ]


def needed_file(path: Path, files: dict[str, File], name: str) -> File:
    """Return a file by its name; DataError if it is not there."""
    if name not in files:
        raise DataError(
            f"{path} has no {name}, it has {', '.join(list(files)[:5]) or 'nothing'}; "
            f"unpack the whole archive, or choose another --format"
        )
    return files[name]


@contextlib.contextmanager
def reading(file: File, encoding: str = "utf-8") -> Iterator[None]:
    """Turn errors of reading a file into one DataError that names the file and the remedy."""
    try:
        yield
    except DataError:
        raise
    except EOFError as error:
        raise DataError(
            f"{file} is incomplete: its compressed data ends early; fetch the file again"
        ) from error
    except (NotImplementedError, RuntimeError) as error:  # of zipfile
        raise DataError(
            f"{file} cannot be unpacked: {error}; pack it again, without a password and by deflate"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} is damaged ({error}); fetch the file again, or rename it if it is not gzip"
        ) from error
    except UnicodeDecodeError as error:
        raise _bad_encoding(file, encoding) from error
    except LookupError as error:
        raise DataError(
            f"encoding={encoding!r} is not known ({error}); choose utf-8, cp1252, latin-1 or utf-16"
        ) from error
    except UnicodeError as error:
        raise DataError(f"{file} cannot be read as {encoding}: {error}") from error
    except csv.Error as error:
        raise DataError(f"{file} cannot be read: {error}; repair the file") from error
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        if "UTF8" in reason.upper().replace("-", ""):
            raise _bad_encoding(file, encoding) from error
        raise DataError(f"{file} cannot be read: {reason}; repair or remove that row") from error
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist; check the path") from error


def _bad_encoding(file: File, encoding: str) -> DataError:
    """Find the first byte that is not text; return the error that names its place."""
    with file.open() as stream:
        encoding = _marked(stream.read(4), encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    position = line = 0
    with file.open() as stream:
        more = True
        while more:
            block = stream.read(1 << 20)
            more = bool(block)
            waiting = len(decoder.getstate()[0])
            try:
                line += decoder.decode(block, final=not more).count("\n")
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(error.encoding, errors="replace")
                return DataError(
                    f"{file}, line {line + before.count(chr(10)) + 1}: byte "
                    f"{error.object[error.start]:#04x} at position "
                    f"{position + error.start - waiting:,} is not {encoding} ({error.reason}); "
                    f"pass the file's encoding, for example --encoding cp1252 (Windows) or latin-1"
                )
            position += len(block)
    return DataError(f"{file} is not {encoding}; pass the file's encoding with --encoding")


# -- text ----------------------------------------------------------------------------------------

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before utf-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def _marked(head: bytes, encoding: str) -> str:
    """Return the encoding that a byte order mark says, where the given one is the default."""
    if codecs.lookup(encoding).name != "utf-8":
        return encoding
    return next((name for mark, name in _MARKS if head.startswith(mark)), encoding)


def open_text(file: File, encoding: str) -> BinaryIO:
    """Open a text file as UTF-8 without a byte order mark, whatever its encoding.

    A file whose lines end in a carriage return alone (old Macs) gets line feeds. A file that is
    UTF-8 with line feeds already is passed through.

    Raises:
        LookupError: there is no such text encoding.
        UnicodeDecodeError: (when read) the content is not in that encoding.
    """
    b"".decode(encoding)  # codecs that turn no bytes into text, such as rot13, end here
    with file.open() as stream:
        head = stream.read(1 << 16)
    encoding = _marked(head, encoding)
    wide = codecs.lookup(encoding).name != "utf-8"
    text = head.decode(encoding, errors="ignore") if wide else head.decode("latin-1")
    first = re.search("[\r\n]", text)
    returns = (
        first is not None and re.match("\r(?!\n)(?=.)", text[first.start() :], re.S) is not None
    )
    if not wide and not returns:
        return file.open()
    return cast(BinaryIO, io.BufferedReader(_AsUtf8(file.open(), encoding, returns), 1 << 20))


class Rewritten(io.RawIOBase):
    """A stream whose blocks are rewritten as they are read: ``rewrite`` gets each, at the end b"",
    and keeps to itself what it cannot tell yet.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._ready = memoryview(b"")

    def rewrite(self, block: bytes) -> bytes:
        """Return what stands in place of the next block."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._stream.read(1 << 20)
            self._ready = memoryview(self.rewrite(block))
            if not block:
                break
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


class _AsUtf8(Rewritten):
    """A stream of text in any encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str, returns: bool) -> None:
        super().__init__(stream)
        decoder = codecs.getincrementaldecoder(encoding)()
        self._decoder = io.IncrementalNewlineDecoder(decoder, True) if returns else decoder

    def rewrite(self, block: bytes) -> bytes:
        text: str = self._decoder.decode(block, final=not block)
        return text.encode()


def line_blocks(
    file: File, block_bytes: int, encoding: str | None = None
) -> Iterator[tuple[bytes, int]]:
    """Yield whole lines of about ``block_bytes``, each block with the number of its first line.

    ``encoding``: of a text to read as UTF-8; by default the bytes are passed on as they are.
    """
    line = 1
    with file.open() if encoding is None else open_text(file, encoding) as stream:
        rest = b""
        while block := stream.read(block_bytes):
            end = block.rfind(b"\n") + 1
            if not end:
                rest += block
                continue
            whole = rest + block[:end]
            yield whole, line
            line += whole.count(b"\n")
            rest = block[end:]
        if rest:
            yield rest, line


def line_in_block(file: File, block: bytes, first: int) -> Where:
    """Return a function that names the file and line of a row of a block."""

    def where(row: int) -> str:
        lines = [n for n, line in enumerate(block.split(b"\n"), first) if line.strip()]
        return f"{file}, line {lines[row]}"

    return where
