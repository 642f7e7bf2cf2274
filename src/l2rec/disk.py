"""Files and folders that are written whole or not at all.

Both are written beside their place under a hidden name (``.NAME.*.part``), flushed to disk and
renamed; then the name is flushed too. Whatever fails, what was there before is still there. Modes
are those that the process's umask gives to any new file.
"""

from __future__ import annotations

__all__ = [
    "LOCK",
    "beside",
    "digest_of",
    "locked",
    "move_into_place",
    "read_json",
    "replacing",
    "replacing_folder",
    "working_on",
    "write_json",
    "write_text",
]

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from l2rec.errors import CheckpointError, L2RecError

RESUME = "free some space and --resume"
LOCK = ".l2rec.lock"
"""File in a folder that a process works on. A kill may leave it behind, but not its lock."""


# -- files ---------------------------------------------------------------------------------------


def digest_of(path: Path, kind: str = "sha256") -> str:
    """Hash a file, by default with SHA-256: hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


@contextmanager
def replacing(
    path: Path, *, error: type[L2RecError] = CheckpointError, remedy: str = RESUME
) -> Iterator[Path]:
    """Give a temporary sibling to write to; flush it and rename it to ``path`` at the end.

    Args:
        error: class of the error for a file that cannot be written.
        remedy: advice to a user whose disk is full.

    Raises:
        CheckpointError: (or ``error``) the disk is full, or ``path`` cannot be written; what was
            at ``path`` is still there.
    """
    # By chance and not by process: on a shared disk, another machine's has the same number.
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner reads
        move_into_place(partial, path)
    except (OSError, SafetensorError) as reason:
        raise _explained(path, reason, error, remedy) from reason
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def move_into_place(partial: Path, path: Path) -> None:
    """Flush a finished file to disk and rename it to ``path``, a sibling, replacing what is there.

    Raises:
        OSError: the disk is full or fails.
    """
    _flush_file(partial)
    os.replace(partial, path)
    _flush_folder(path.parent)


def write_text(
    path: Path, text: str, *, error: type[L2RecError] = CheckpointError, remedy: str = RESUME
) -> None:
    """Write a text file whole or not at all. Raises as `replacing`."""
    with replacing(path, error=error, remedy=remedy) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(
    path: Path,
    value: Mapping[str, Any],
    *,
    error: type[L2RecError] = CheckpointError,
    remedy: str = RESUME,
) -> None:
    """Write a JSON object whole or not at all. Raises as `replacing`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text, error=error, remedy=remedy)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or torn, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a run folder?") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


# -- folders -------------------------------------------------------------------------------------


def beside(folder: Path, suffix: str) -> Path:
    """Return the folder NAME-SUFFIX beside a folder, which may be "." and have no name."""
    named = folder if folder.name else folder.resolve()
    return named.with_name(f"{named.name}-{suffix}")


@contextmanager
def replacing_folder(
    path: Path,
    *,
    manifest: str | None = None,
    belongs: Callable[[Path], bool] | None = None,
    error: type[L2RecError] = CheckpointError,
    remedy: str = RESUME,
) -> Iterator[Path]:
    """Give an empty sibling folder to fill; flush it and put it in the place of ``path``.

    An existing folder is moved aside for the moment of the exchange and then deleted. A kill at
    that moment leaves it beside ``path`` as ``.NAME.*.old``.

    With ``manifest`` there is no such moment: the new files move into the existing folder one by
    one, the manifest last, and readers meet either the old content or the new. Each file but the
    manifest needs a name that no file of other content has, such as one with a hash in it.

    Args:
        manifest: name of the file that says which files of the folder count.
        belongs: with ``manifest``, tells whether a file of the folder belongs to its content; such
            files are deleted after the exchange unless they are new. Others stay.
        error: class of the error for a folder that cannot be written.
        remedy: advice to a user whose disk is full.

    Raises:
        CheckpointError: (or ``error``) the disk is full, or ``path`` cannot be written; what was
            at ``path`` is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with locked(path.parent):
                _delete_leftovers(path, "part")
                staged = _sibling(path, "part")
                staged.mkdir()
                stack.callback(shutil.rmtree, staged, ignore_errors=True)
                stack.enter_context(locked(staged))  # for as long as this writer lives
            try:
                yield staged
            except L2RecError as reason:  # of a file in it: name the folder that the user named
                cause = reason.__cause__
                if isinstance(cause, (OSError, SafetensorError)) and str(staged) in str(reason):
                    raise cause from None
                raise
            for inner in (*staged.rglob("*"), staged):
                _flush_folder(inner) if inner.is_dir() else _flush_file(inner)
            with locked(path.parent):
                if manifest is None or not path.exists():
                    _exchange(staged, path)
                else:
                    _exchange_files(staged, path, manifest, belongs or (lambda _: False))
    except (OSError, SafetensorError) as reason:
        raise _explained(path, reason, error, remedy) from reason


def _exchange(staged: Path, path: Path) -> None:
    """Rename a folder to ``path``, and delete the folder that was there."""
    aside = _sibling(path, "old")
    with suppress(FileNotFoundError):
        path.rename(aside)
    try:
        staged.rename(path)
    except OSError:
        with suppress(FileNotFoundError):
            aside.rename(path)
        raise
    _flush_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
    _delete_leftovers(path, "old")


def _exchange_files(
    staged: Path, path: Path, manifest: str, belongs: Callable[[Path], bool]
) -> None:
    """Move files into a folder, the manifest last, and delete those it replaced."""
    names = {file.name for file in staged.iterdir()}
    for name in sorted(names - {manifest}):
        os.replace(staged / name, path / name)
    _flush_folder(path)
    os.replace(staged / manifest, path / manifest)  # from here on, the content is the new one
    _flush_folder(path)
    for file in path.iterdir():
        if file.name not in names and belongs(file):
            file.unlink(missing_ok=True)


def _sibling(path: Path, suffix: str) -> Path:
    """Name a hidden sibling of a folder that no other writer uses."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{suffix}"


def _delete_leftovers(path: Path, suffix: str) -> None:
    """Delete the siblings of a folder that killed writers left."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.{suffix}"):
        with suppress(OSError), locked(folder, wait=False) as alone:
            if alone:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Keep out other processes of this machine that lock the same folder; a kill ends that too.

    Yields False, and keeps nobody out, where the folder is locked already and ``wait`` is off, or
    where folders cannot be locked (Windows, some network file systems).
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        held = False
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        yield held
    finally:
        os.close(handle)


# -- a folder that is worked on for long ---------------------------------------------------------


@contextmanager
def working_on(folder: Path) -> Iterator[None]:
    """Keep out other processes that work on the same folder, as long as this one does.

    The folder is created if it is missing, and deleted again if it is still empty at the end. A
    kill frees it. Nobody is kept out where files cannot be locked (Windows, some network file
    systems) or the folder is read-only.

    Raises:
        CheckpointError: another process works on the folder, or it cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder for --out")
    new = not folder.exists()
    try:
        handle = _lock_file(folder)
    except OSError as reason:
        raise _explained(folder, reason, CheckpointError, "free some space") from reason
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)  # first: nobody may lock a file that goes
            os.close(handle)
        if new:
            with suppress(OSError):
                folder.rmdir()


def _lock_file(folder: Path) -> int | None:
    """Lock a file in a folder, and return its handle; None where that is not possible.

    A file and not the folder itself: `replacing_folder` locks the folder for a moment, and network
    file systems lock files alone.

    Raises:
        CheckpointError: another process holds the lock.
        OSError: the folder cannot be created, or the disk is full.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            return None
        import fcntl

        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # another process has just deleted the folder, which it left empty
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise CheckpointError(
                f"{folder}: another process is working on it; wait for its end, or choose another "
                "--out"
            ) from None
        except OSError:  # a file system without locks
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), (folder / LOCK).stat()):
                return handle
        os.close(handle)  # locked, but deleted meanwhile by the process that had it


# -- the disk ------------------------------------------------------------------------------------


def _flush_file(path: Path) -> None:
    """Write a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Write the names in a folder to disk, where the file system can."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(handle)


def _explained(path: Path, reason: Exception, error: type[L2RecError], remedy: str) -> L2RecError:
    """Return the error for a file or folder that could not be written."""
    if getattr(reason, "errno", None) == errno.ENOSPC or "No space left" in str(reason):
        return error(f"{path}: the disk is full; nothing was replaced, {remedy}")
    return error(f"{path} cannot be written, what was there is as it was: {reason}")
