"""An index on disk: a folder with a manifest, and the collections of Milvus that belong to it.

The manifest has rows, size, kind, the version of the vectors, and the hash of every file. Renaming
it exchanges the index: after a kill at any moment the folder holds the old one or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.disk import locked, replacing_folder, write_text
from l2rec.errors import CheckpointError, DataError, L2RecError
from l2rec.index.exact import Exact
from l2rec.index.faiss import Faiss, import_faiss
from l2rec.index.milvus import Milvus
from l2rec.index.protocol import Index

FORMAT = 2
MANIFEST = "index.json"
FILES = {
    "exact": {"ids": "parquet", "vectors": "npy"},
    "flat": {"ids": "parquet", "index": "faiss"},
    "hnsw": {"ids": "parquet", "index": "faiss"},
    "ivf": {"ids": "parquet", "index": "faiss"},
    "int8": {"ids": "parquet", "index": "faiss"},
    "binary": {"ids": "parquet", "index": "faiss"},
    "milvus": {"ids": "parquet"},
}
"""Files of each kind, by role, with their suffix; a file is named ``ROLE-HASH.SUFFIX``."""


def save(
    index: Index, folder: str | Path, *, ids: Sequence[str], version: str, alias: str | None = None
) -> None:
    """Write an index with the ids of its rows, whole or not at all.

    A collection of Milvus then takes over from those that the folder had before: aliases of theirs,
    and ``alias``, name it, and they are deleted. The manifest names them until that is done; if it
    fails, saving again goes on with it.

    A new folder is renamed as one. Into a folder that is an index already, the files are moved one
    by one under names of their content, the manifest last.

    Raises:
        CheckpointError: ``folder`` is something else, or cannot be written.
        DataError: ids that do not fit, or one of them twice.
    """
    folder = Path(folder)
    if len(ids) != len(index):
        raise DataError(f"{len(ids)} ids for an index of {len(index)} rows")
    if len(set(ids)) != len(ids):
        raise DataError("an id twice; every row of an index needs its own")
    may_hold(folder)
    before = _collections_of(folder)
    if isinstance(index, Milvus):
        before.discard((index.uri, index.collection))
    with replacing_folder(
        folder, manifest=MANIFEST, belongs=_belongs, remedy="free some space"
    ) as staged:
        _write(index, staged, ids, version, before)
    if isinstance(index, Milvus):
        earlier = {collection for uri, collection in before if uri == index.uri}
        index.take_over(earlier, alias, collection_prefix(folder))
    for uri, collection in before:
        if not isinstance(index, Milvus) or uri != index.uri:
            with contextlib.suppress(L2RecError):
                Milvus(uri, collection, 0, 0).drop()
    if before:
        _forget(folder, before)


def may_hold(folder: Path) -> None:
    """Refuse a folder that holds something else than an index."""
    if (folder / MANIFEST).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not an index; choose another folder")


def _forget(folder: Path, replaced: set[tuple[str, str]]) -> None:
    """Take collections that were replaced out of the manifest of an index."""
    with locked(folder.parent):  # as an exchange of the folder by another writer
        manifest = read_manifest(folder)
        waiting = {(uri, name) for uri, name in manifest.pop("replaces", [])}
        if waiting & replaced:
            if waiting - replaced:
                manifest["replaces"] = sorted(waiting - replaced)
            _write_manifest(folder / MANIFEST, manifest)


def _write(
    index: Index, folder: Path, ids: Sequence[str], version: str, before: set[tuple[str, str]]
) -> None:
    """Write the files of an index and its manifest into an empty folder. ``before``: (uri, name) of
    the collections that it replaces.
    """
    written = {}

    def write(role: str, to: Callable[[Any], object]) -> None:
        suffix = FILES[index.kind][role]
        # All writing goes through Python: FAISS and NumPy have their own buffers and do not report
        # a disk that is full when the last bytes are written.
        with (folder / role).open("wb") as file:
            to(file)
        digest = _sha256(folder / role)
        name = f"{role}-{digest[:16]}.{suffix}"
        (folder / role).rename(folder / name)
        written[role] = {"name": name, "bytes": (folder / name).stat().st_size, "sha256": digest}

    table = pa.table({"id": pa.array(ids, pa.string())})
    write("ids", lambda file: pq.write_table(table, file))
    options: dict[str, Any] = {}
    if isinstance(index, Exact):
        vectors = index.vectors.numpy()
        write(
            "vectors",
            lambda file: np.save(SimpleNamespace(write=file.write), vectors, allow_pickle=False),
        )
    elif isinstance(index, Faiss):
        faiss = import_faiss()
        write(
            "index",
            lambda file: faiss.write_index(
                index.index, faiss.PyCallbackIOWriter(file.write, 1 << 20)
            ),
        )
    else:
        assert isinstance(index, Milvus)
        options = {"uri": index.uri, "collection": index.collection, "ef": index.ef}
        if index.attribute is not None:
            options["attribute"] = index.attribute
    manifest = {
        "format": FORMAT,
        "kind": index.kind,
        "rows": len(index),
        "dim": index.dim,
        "version": version,
        "options": options,
        "files": written,
    }
    if before:
        manifest["replaces"] = sorted(before)
    _write_manifest(folder / MANIFEST, manifest)


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1) + "\n"
    write_text(path, text, remedy="free some space")


def _belongs(file: Path) -> bool:
    """Tell whether a file is of an index, by its name."""
    known = {(role, f".{suffix}") for kind in FILES.values() for role, suffix in kind.items()}
    return (file.name.partition("-")[0], file.suffix) in known


def _seal(manifest: Mapping[str, Any]) -> str:
    """Hash everything in a manifest but the hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _collections_of(folder: Path) -> set[tuple[str, str]]:
    """Return (uri, name) of the Milvus collections that were filled for the index in a folder: its
    own, and those that it was to replace when a save was killed.
    """
    with contextlib.suppress(L2RecError):
        manifest = read_manifest(folder)
        found = {(uri, collection) for uri, collection in manifest.get("replaces", [])}
        if manifest["kind"] == "milvus":
            found.add((manifest["options"]["uri"], manifest["options"]["collection"]))
        prefix = collection_prefix(folder)  # a copy has the manifest of another folder
        return {(uri, collection) for uri, collection in found if collection.startswith(prefix)}
    return set()


def load(folder: str | Path) -> tuple[Index, list[str], str]:
    """Read an index that `save` wrote: (index, ids of its rows, version of its vectors).

    Raises:
        CheckpointError: no index, torn, edited, or of another format.
        StorageError: its Milvus is away.
    """
    folder = Path(folder)
    while True:
        manifest = read_manifest(folder)
        try:
            return _read(folder, manifest)
        except CheckpointError:
            # If the index was exchanged between manifest and files, read the new one.
            if read_manifest(folder) == manifest:
                raise


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an index.

    Raises:
        CheckpointError: there is none, or it is torn, edited, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} is no index: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {' '.join(str(error).split())}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: not a manifest; build the index again")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: index of format {manifest.get('format')}, this l2rec reads {FORMAT}; "
            "build it again"
        )
    if manifest.get("sha256") != _seal(manifest):
        raise CheckpointError(f"{path} was edited; build the index again")
    return manifest


def _read(folder: Path, manifest: Mapping[str, Any]) -> tuple[Index, list[str], str]:
    kind, rows, dim = manifest["kind"], manifest["rows"], manifest["dim"]
    if kind not in FILES:
        raise CheckpointError(f"{folder}: index kind {kind!r} is not known here")
    paths = {role: folder / file["name"] for role, file in manifest["files"].items()}
    for path in paths.values():
        if path.parent != folder:  # whoever wrote the manifest may have sealed any name
            raise CheckpointError(f"{folder}: {path} is outside of it; build the index again")
    for role, path in paths.items():
        try:
            whole = _sha256(path) == manifest["files"][role]["sha256"]
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; build the index again") from error
        if not whole:
            raise CheckpointError(f"{path} is torn or was edited; build the index again")
    try:
        ids: list[str] = pq.ParquetFile(paths["ids"]).read()["id"].to_pylist()
        index: Exact | Faiss | Milvus
        if kind == "exact":
            index = Exact(np.load(paths["vectors"], allow_pickle=False))
        elif kind == "milvus":
            options = manifest["options"]
            if "://" not in options["uri"] and not Path(options["uri"]).exists():
                raise CheckpointError(f"{folder}: its Milvus file {options['uri']} is missing")
            index = Milvus(rows=rows, dim=dim, **options)
            index.check()
        else:
            index = Faiss(kind, import_faiss().read_index(str(paths["index"])))
    except (OSError, KeyError, RuntimeError, pa.ArrowException) as error:
        # The hash is right, so other versions of these libraries wrote the file.
        raise CheckpointError(
            f"{folder} cannot be read, build it again: {' '.join(str(error).split())[:200]}"
        ) from error
    if (len(index), index.dim, len(ids)) != (rows, dim, rows):
        raise CheckpointError(
            f"{folder}: {len(ids)} ids and an index of {len(index)} rows of {index.dim}, its "
            f"manifest says {rows} of {dim}; build it again"
        )
    return index, ids, manifest["version"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def collection_prefix(folder: Path) -> str:
    """Return the prefix of the names of collections that belong to the index in a folder.

    A hash of the folder's path, so that a copy owns nothing, and of its token.
    """
    text = str(folder.resolve())
    with contextlib.suppress(FileNotFoundError):
        text = f"{_token_of(folder).read_text(encoding='utf-8').strip()} {text}"
    return f"l2rec_{hashlib.sha256(text.encode()).hexdigest()[:16]}_"


def _token_of(folder: Path) -> Path:
    """Return the file that has the random token of an index: a folder of the same path on another
    machine has another one, so that neither deletes the collections of the other.

    It lies beside the folder: a copy of that does not take it along, and a build that fails leaves
    no folder without an index.
    """
    place = folder.resolve()
    return place.parent / f".{place.name}.owner"


def own_collections(folder: Path) -> None:
    """Write the token of an index before its first collection.

    One that an l2rec without tokens has filled a collection for keeps it, and goes without.
    """
    if not _token_of(folder).exists() and not _collections_of(folder):
        write_text(_token_of(folder), secrets.token_hex(16) + "\n", remedy="free some space")
