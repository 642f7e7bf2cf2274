"""Files and folders that are replaced whole: modes, leftovers, failures, and who waits for whom."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.errors import one_line

from l2rec.disk import (
    LOCK,
    read_json,
    replacing,
    replacing_folder,
    working_on,
    write_json,
    write_text,
)
from l2rec.errors import CheckpointError, DataError

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes and locks of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(path: Path, content: str, **options: object) -> None:
    with replacing_folder(path, **options) as staged:  # type: ignore[arg-type]
        (staged / "file").write_text(content)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@posix
def test_modes_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    with replacing(tmp_path / "file") as partial:
        partial.write_text("x")
        partial.chmod(0o600)  # as some libraries do
    put(tmp_path / "folder", "x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_errors_are_of_the_callers_class_and_name_its_remedy(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for write in (replacing, replacing_folder):
        with (
            pytest.raises(DataError, match="x: the disk is full; nothing was replaced, buy one"),
            write(tmp_path / "x", error=DataError, remedy="buy one"),
        ):
            raise full
        with pytest.raises(CheckpointError, match="--resume"), write(tmp_path / "x"):
            raise full
        with pytest.raises(CheckpointError, match="cannot be written"), write(tmp_path / "x"):
            raise OSError(errno.EIO, "Input/output error")
    write_text(tmp_path / "file", "x")
    with (
        pytest.raises(DataError, match="cannot be written, what was there is as it was"),
        replacing_folder(tmp_path / "file" / "below", error=DataError),
    ):
        pass
    assert names(tmp_path) == ["file"]


def test_the_name_is_flushed_after_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert done[1:] == ["rename", str(tmp_path)]
    assert re.fullmatch(r"\.x\.json\.[0-9a-f]{8}\.part", Path(done[0]).name)


def test_a_file_system_that_flushes_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def of_files(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files)
    write_text(tmp_path / "x", "x")
    put(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder", "x"]


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    put(path, "one")
    (path / "more").write_text("")
    put(path, "two")
    assert names(path) == ["file"] and (path / "file").read_text() == "two"
    assert names(path.parent) == ["folder"]


def test_a_failure_leaves_the_old_folder_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    put(path, "one")
    with pytest.raises(ZeroDivisionError), replacing_folder(path) as staged:
        (staged / "file").write_text("half")
        raise ZeroDivisionError
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(CheckpointError, match="what was there is as it was"):
        put(path, "two")
    assert (path / "file").read_text() == "one" and names(tmp_path) == ["folder"]


def test_files_are_exchanged_and_what_is_not_of_the_folder_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for number in (1, 2):
        with replacing_folder(
            path, manifest="list", belongs=lambda file: file.name.startswith("part-")
        ) as staged:
            (staged / f"part-{number}").write_text("")
            (staged / "list").write_text(f"part-{number}")
        (path / "notes").write_text("mine")
        before = path.stat().st_ino
    assert names(path) == ["list", "notes", "part-2"] and path.stat().st_ino == before
    assert (path / "list").read_text() == "part-2" and names(tmp_path) == ["folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from l2rec.disk import replacing_folder

seen = 0
def kill(name, given):
    global seen
    if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        if str(given[0]).startswith(sys.argv[1]):
            seen += 1
            if seen == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
with replacing_folder(Path(sys.argv[1]) / "folder") as staged:
    (staged / "file").write_text("two")
    (staged / "more").write_text("two")
"""


@posix
def test_a_kill_at_any_step(tmp_path: Path) -> None:
    """The folder is the old one or the new one, or for one moment the old one under its name
    aside; the next writer removes whatever is left.
    """
    path = tmp_path / "folder"
    contents = []
    for step in range(1, 100):
        put(path, "one")
        assert names(tmp_path) == ["folder"]
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
        code = subprocess.run(command, check=False).returncode
        (shown,) = [path] if path.exists() else tmp_path.glob(".folder.*.old")
        contents.append((shown / "file").read_text() + ("" if shown == path else " aside"))
        if code == 0:
            break
    found = list(dict.fromkeys(contents))
    assert found == ["one", "one aside", "two"] and contents.count("one aside") == 1


@posix
def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with replacing_folder(path) as first:
        (first / "file").write_text("first")
        put(path, "second")
        assert (path / "file").read_text() == "second" and first.is_dir()
    assert (path / "file").read_text() == "first" and names(tmp_path) == ["folder"]


@posix
def test_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refused)
    (tmp_path / ".folder.0.part").mkdir()
    for content in ("one", "two"):
        put(tmp_path / "folder", content)
    # Its writer may be alive, so it is not deleted.
    assert names(tmp_path) == [".folder.0.part", "folder"]
    assert (tmp_path / "folder" / "file").read_text() == "two"


# -- a folder that is worked on ------------------------------------------------------------------


@posix
def test_a_folder_that_is_worked_on_keeps_others_out(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with working_on(folder):
        (folder / "file").write_text("mine")
        put(folder / "inside", "one")  # which locks the folder itself
        with pytest.raises(CheckpointError) as error, working_on(folder):
            pass
        assert one_line(error).startswith(f"{folder}: another process is working on it")
    assert names(folder) == ["file", "inside"]  # no lock is left, and what was written stays
    with working_on(folder):
        pass


@posix
def test_a_folder_left_empty_is_deleted(tmp_path: Path) -> None:
    with working_on(tmp_path / "new"):
        assert names(tmp_path / "new") == [LOCK]
    (tmp_path / "old").mkdir()
    with working_on(tmp_path / "old"):
        pass
    assert names(tmp_path) == ["old"]


@posix
def test_a_kill_frees_the_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from l2rec.disk import working_on\n"
        "with working_on(Path(sys.argv[1])):\n"
        "    print('working', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"working\n"
        with pytest.raises(CheckpointError, match="another process"), working_on(tmp_path):
            pass
        process.kill()
    assert names(tmp_path) == [LOCK]
    with working_on(tmp_path):
        pass
    assert names(tmp_path) == []


@posix
def test_of_many_at_once_one_works(tmp_path: Path) -> None:
    """Folders come and go under those who want them; never do two work on one."""
    inside, most, refused = 0, 0, 0
    count = threading.Lock()

    def work() -> None:
        nonlocal inside, most, refused
        for _ in range(200):
            try:
                with working_on(tmp_path / "run"):
                    with count:
                        inside += 1
                        most = max(most, inside)
                    with count:
                        inside -= 1
            except CheckpointError:
                with count:
                    refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and refused < 800
    assert not [*tmp_path.rglob(LOCK)]


@posix
@pytest.mark.parametrize("call", ["flock", "open"])
def test_where_files_cannot_be_locked(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refused(*_: object) -> None:
        code = errno.ENOLCK if call == "flock" else errno.EROFS
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl if call == "flock" else os, call, refused)
    with working_on(tmp_path), working_on(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_worked_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "file", "file is a file; choose a folder for --out"),
        (tmp_path / "file" / "run", "run cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=message) as error, working_on(path):
            pass
        one_line(error)


def test_importing_it_is_cheap() -> None:
    heavy = ("torch", "numpy", "pyarrow", "polars", "pydantic")
    code = f"import sys, l2rec.disk; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_below_a_folder_move_and_fail_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with replacing_folder(path) as staged:
        (staged / "cache").mkdir()
        (staged / "cache" / "file").write_text("x")
    assert (path / "cache" / "file").read_text() == "x"
    failed = pytest.raises(DataError, match="folder cannot be written")
    with failed as error, replacing_folder(path, error=DataError) as staged:
        (staged / "file").touch()
        write_text(staged / "file" / "below", "x")
    assert ".part" not in str(error.value).split(":")[0]
    assert (path / "cache" / "file").read_text() == "x"
