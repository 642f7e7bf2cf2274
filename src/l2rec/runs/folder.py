"""The run folder as others find it: its recipe, data set, catalog and identity."""

from __future__ import annotations

__all__ = ["load_run_config", "open_run_dataset", "read_catalog"]

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from l2rec.config import RunConfig, resolve
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.disk import read_json, replacing, write_text
from l2rec.errors import CheckpointError
from l2rec.modules.backbone import Backbone

RUN_VERSION = 1


def finished_report(out: Path) -> dict[str, Any] | None:
    """The report of a run that came to its end, or None."""
    if (out / "report.json").is_file() and (out / "report.html").is_file():
        return read_json(out / "report.json")
    return None


def claim(out: Path, config: RunConfig, dataset: Dataset, resume: bool) -> dict[str, Any] | None:
    """Refuse a folder that holds something else; refuse to mix two runs. Returns the identity of
    the run to go on with, or None for a new one.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose a folder for --out")
    if not out.exists() or all(p.name.endswith(".part") for p in out.iterdir()):
        return None
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is not empty and not a run folder; choose another --out")
    if not resume:
        raise CheckpointError(
            f"{out} holds a run already; add --resume to go on, or choose another --out"
        )
    saved, identity = load_run_config(out)  # resolved: options added since have their defaults
    changed = _differences(saved.model_dump(mode="json"), config.model_dump(mode="json"))
    if changed:
        raise CheckpointError(
            f"{out} was started with another recipe ({changed[0]}); resume it with its own, only "
            "training.* may change"
        )
    if identity["dataset"]["fingerprint"] != dataset.fingerprint:
        raise CheckpointError(
            f"{out} was started on data {identity['dataset']['fingerprint']}, this is "
            f"{dataset.fingerprint}; resume it with the data it was started on"
        )
    return identity


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key was x, is y`` for every key that differs, those of ``training`` excepted."""
    found: list[str] = []
    for key in dict.fromkeys((*saved, *now)):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if key != "training":
                found += _differences(a, b, f"{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return found


def check_backbone(
    run: Path, identity: Mapping[str, Any] | None, backbone: Backbone | None
) -> None:
    """Refuse weights other than those a run was trained on (unless the precision differs)."""
    if identity is None or backbone is None:
        return
    saved = identity["backbone"]
    same_dtype = str(backbone.dtype).removeprefix("torch.") == saved["dtype"]
    if same_dtype and backbone.weight_hash() != saved["weight_hash"]:
        raise CheckpointError(
            f"{run} was trained on other weights of {backbone.name!r} than are installed here; "
            "install the version it was trained on (config.yaml names it)"
        )


def clear_partial(out: Path) -> None:
    """What a kill left half written, and the results that this training will replace."""
    for partial in (*out.glob(".*.part"), *out.glob("state/.*.part")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for name in ("report.json", "report.html", "diagnostics.json", "ranks.parquet"):
        (out / name).unlink(missing_ok=True)


def write_identity(
    out: Path, config: RunConfig, dataset: Dataset, backbone: Backbone | None, init: Path | None
) -> None:
    identity = {
        "run_version": RUN_VERSION,
        "init": None if init is None else str(init),
        "config": config.model_dump(mode="json"),
        "dataset": {
            "path": str(dataset.path.resolve()),
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
        },
        "backbone": None
        if backbone is None
        else {
            "name": backbone.name,
            "revision": backbone.revision,
            "weight_hash": backbone.weight_hash(),
            "dtype": str(backbone.dtype).removeprefix("torch."),
        },
    }
    write_text(out / "config.yaml", yaml.safe_dump(identity, sort_keys=False, allow_unicode=True))
    with replacing(out / "catalog.parquet") as partial:
        pq.write_table(dataset.catalog, partial)


class UserIds(Sequence[str]):
    """External user ids by dense int, without a Python list of all of them."""

    def __init__(self, dataset: Dataset) -> None:
        self._ids = dataset.user_ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return self._ids[index].as_py()


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load_run_config(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The recipe of a run folder and its identity (data set, backbone).

    Raises:
        CheckpointError: not a run folder, or torn.
    """
    path = run / "config.yaml"
    try:
        identity = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(identity, dict) or identity.get("run_version") != RUN_VERSION:
            raise CheckpointError(f"{path}: not a run of this version of l2rec")
        absent = {"config", "dataset", "backbone"} - identity.keys()
        if absent:
            raise CheckpointError(f"{path}: torn or edited: it has no {min(absent)!r}")
        return resolve(identity["config"], where=str(path)), identity
    except FileNotFoundError:
        raise CheckpointError(f"{run} is not a run folder: it has no config.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: torn or edited: {reason}") from error


def read_catalog(run: Path) -> Catalog:
    """The items of a run folder, with their raw fields.

    Raises:
        CheckpointError: missing or torn.
    """
    try:
        return Catalog(pq.ParquetFile(run / "catalog.parquet").read())
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{run}/catalog.parquet: missing or torn: {error}") from error


def open_run_dataset(run: Path, data: Path | None) -> Dataset:
    """The data set a run was made on, at ``data`` or where it was then."""
    _, identity = load_run_config(run)
    path, fingerprint = Path(identity["dataset"]["path"]), identity["dataset"]["fingerprint"]
    if data is None and not path.is_dir():
        raise CheckpointError(
            f"the data set of {run} is no longer at {path}; give its folder with --data"
        )
    dataset = open_dataset(data or path)
    if dataset.fingerprint != fingerprint:
        raise CheckpointError(
            f"{run} was made on data {fingerprint}, {dataset.path} is {dataset.fingerprint}; "
            "give the folder it was made on with --data"
        )
    return dataset


def user_history(run: Path, user: str, data: Path | None = None) -> list[str]:
    """Item ids of a user of the run's data set, oldest first."""
    dataset = open_run_dataset(run, data)
    rows = dataset.sequences[dataset.user_index(user)]
    return [dataset.item_ids[int(i)].as_py() for i in rows]
