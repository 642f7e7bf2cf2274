"""Files, folders and zip archives, read in blocks; errors that name the file and the line."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import pyarrow as pa

from l2rec.errors import DataError

Where = Callable[[int], str]  # row of a batch -> "ratings.csv, line 12"


@dataclass(frozen=True)
class File:
    """A file on disk, perhaps gzipped, or a member of a zip archive."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """Base name, without ``.gz``."""
        name = PurePosixPath(self.member).name if self.member else self.path.name
        return name.removesuffix(".gz")

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def open(self) -> BinaryIO:
        """Open the content for reading, decompressed on the way."""
        if self.member is not None:
            return cast(BinaryIO, zipfile.ZipFile(self.path).open(self.member))
        if self.path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        return self.path.open("rb")


def listing(path: Path) -> dict[str, File]:
    """Map base names to files: the file itself, a folder's files (or those of its only subfolder,
    if it holds nothing else), or the members of a zip.

    Raises:
        DataError: the path does not exist, or the zip is torn.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path of the source")
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if len(inside) == 1 and inside[0].is_dir():
            return listing(inside[0])
        files = [File(p) for p in inside if p.is_file()]
    elif path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/")]
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is not a whole zip file ({error}); fetch it again") from error
        files = [File(path, n) for n in names if not n.startswith("__MACOSX")]
    else:
        files = [File(path)]
    return {f.name: f for f in files}


def only_file(path: Path, files: dict[str, File], suffixes: tuple[str, ...], what: str) -> File:
    """Return the one file with one of the suffixes; DataError if there is none or several."""
    found = [f for name, f in files.items() if name.endswith(suffixes)]
    if len(found) != 1:
        names = ", ".join(f.name for f in found[:5]) or "none"
        raise DataError(
            f"{path} has {len(found)} {what} files ({names}), not one; give the path of the file"
        )
    return found[0]


def needed_file(path: Path, files: dict[str, File], name: str) -> File:
    """Return a file by its name; DataError if it is not there."""
    if name not in files:
        raise DataError(
            f"{path} has no {name}, it has {', '.join(list(files)[:5]) or 'nothing'}; "
            f"unpack the whole archive, or choose another format="
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
    except (gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} is damaged ({error}); fetch the file again, or rename it if it is not gzip"
        ) from error
    except UnicodeDecodeError as error:
        raise _bad_encoding(file, encoding) from error
    except LookupError as error:
        raise DataError(
            f"encoding={encoding!r} is not known ({error}); choose utf-8 or latin-1"
        ) from error
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        if "UTF8" in reason.upper().replace("-", ""):
            raise _bad_encoding(file, encoding) from error
        raise DataError(f"{file} cannot be read: {reason}; repair or remove that row") from error
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist; check the path") from error


def _bad_encoding(file: File, encoding: str) -> DataError:
    """Find the first byte that is not text; return the error that names its place."""
    decoder = codecs.getincrementaldecoder(encoding)()
    position = line = 0
    with file.open() as stream:
        while block := stream.read(1 << 20):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                at = error.start - waiting
                line += block[: max(at, 0)].count(b"\n")
                return DataError(
                    f"{file}, line {line + 1}: byte {error.object[error.start]:#04x} at position "
                    f"{position + at:,} is not {encoding}; pass the file's encoding, "
                    f"for example --encoding latin-1"
                )
            position += len(block)
            line += block.count(b"\n")
    return DataError(f"{file} is not {encoding}; pass the file's encoding=")


def line_blocks(file: File, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield whole lines of about ``block_bytes``, each block with the number of its first line."""
    line = 1
    with file.open() as stream:
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
