"""The run folder: how it is claimed, what it says of itself, and how it is read, each file once.

    RUN/config.yaml         the resolved recipe, data set, backbone and its weight hash, and the
                            hash of the blend
    RUN/catalog.parquet     item ids and texts, so that a run can be used without its data set
    RUN/model.safetensors   trained tensors of the best step, without the frozen backbone
    RUN/blend.safetensors   co-occurrence and repeats beside it, in a run that `l2rec blend` wrote
    RUN/items.safetensors   item vectors of that model
    RUN/users.safetensors   a few histories and the user vectors that it gave them, to compare with
    RUN/cache/              what was computed once for the catalog: token tables, text vectors
    RUN/metrics.jsonl       one line per log point and validation
    RUN/report.json         scores, seeds, fingerprints, hardware, time, tokens, memory
    RUN/report.html         the same as a page, with curves, expert load and examples
    RUN/diagnostics.json    expert load, gate and examples
    RUN/ranks.parquet       per-user ranks on the test split, for paired tests
    RUN/ranks-tied-day.parquet
                            the same by the tied-day protocol, where events of a user tie
    RUN/state/step-N/       a state to resume from
    RUN/tensorboard/        event files
    RUN/index/              what `l2rec index` built, if it was told to write here
    RUN/events.db           the event log of `l2rec serve RUN`
    RUN/tokenizer/          in a run that was published: how it reads texts (`l2rec.runs.hub`)
    RUN/.l2rec.lock         only while a process trains it, or after a kill

A version, the name of a run's weights, is a hash of model.safetensors and blend.safetensors.
"""

from __future__ import annotations

__all__ = [
    "RunFolder",
    "Sample",
    "UserIds",
    "check_backbone",
    "claim",
    "clear_partial",
    "cut_by_time",
    "find_backbone",
    "finished_report",
    "is_empty",
    "load_run_config",
    "load_shown_config",
    "open_run_dataset",
    "read_catalog",
    "read_report",
    "read_run",
    "require_finished",
    "resumed_from",
    "split_of",
    "training_split",
    "unfinished",
    "user_history",
    "version_of",
    "write_blend",
    "write_identity",
    "write_item_vectors",
    "write_sample",
]

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import yaml
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from l2rec.config import RunConfig, as_trained, resolve
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split, split_events, with_fewer_users
from l2rec.disk import LOCK, read_json, replacing, write_text
from l2rec.errors import BackboneError, CheckpointError, ConfigError, DataError
from l2rec.modules.backbone import Backbone
from l2rec.runs.checkpoint import load_tensors, save_tensors

RUN_VERSION = 1
EARLIER_NAME = ("nearby items", "co-occurrence")
"""Name of a floor, and of a blend with it, in earlier run folders and now."""
EARLIER_TRAINING = "earlier_training"
"""Key of config.yaml, see `resumed_from`."""
HELD = {"none": "unquantised weights", "8bit": "8-bit weights", "4bit": "4-bit weights"}
NEVER = "was this run ever checkpointed?"
MODEL, BLEND, ITEMS = "model.safetensors", "blend.safetensors", "items.safetensors"
USERS = "users.safetensors"
TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a published run."""
RANKS, TIED_RANKS = "ranks.parquet", "ranks-tied-day.parquet"


def finished_report(out: Path) -> dict[str, Any] | None:
    """Return the report of a run that came to its end, or None."""
    if (out / "report.json").is_file() and (out / "report.html").is_file():
        return read_report(out)
    return None


def unfinished(run: Path) -> bool:
    """Check for a run without a report: it is being trained, or was stopped before its end."""
    return (run / "config.yaml").is_file() and not (run / "report.json").is_file()


def require_finished(run: Path) -> None:
    """Refuse a run that has not come to its end.

    Raises:
        CheckpointError: it has no report.json.
    """
    if not unfinished(run):
        return
    if (run / BLEND).is_file():
        remedy = "delete it and call l2rec blend again"
    else:
        remedy = f"if it is not running any more, go on with l2rec train ... --out {run} --resume"
    raise CheckpointError(f"{run} is not finished: it has no report.json; {remedy}")


def read_report(run: Path) -> dict[str, Any]:
    """Read a run's report.json, what earlier versions called otherwise under today's names.

    Raises:
        CheckpointError: missing or torn.
    """
    require_finished(run)
    report: dict[str, Any] = _renamed(read_json(run / "report.json"))
    return report


def cut_by_time(report: Mapping[str, Any]) -> bool:
    """Say whether ``max_minutes`` ended the run of a report, and its last validation was its best:
    it might have got better.
    """
    ended = report.get("stopped") == "max_minutes"
    return ended and report.get("best_step") == report.get("steps")


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {_renamed(key): _renamed(part) for key, part in value.items()}
    return value.replace(*EARLIER_NAME) if isinstance(value, str) else value


def is_empty(out: Path) -> bool:
    """Check for a folder that holds nothing but what a killed process left behind."""
    return all(p.name.endswith(".part") or p.name == LOCK for p in out.iterdir())


def claim(out: Path, config: RunConfig, dataset: Dataset, resume: bool) -> dict[str, Any] | None:
    """Refuse a folder that holds something else, and to mix two runs. Return the identity of the
    run to go on with, or None for a new one. Call it inside `disk.working_on` the folder.

    Where options of ``training`` are others now, what they were is noted in it (`resumed_from`).
    """
    if is_empty(out):
        return None
    if not (out / "config.yaml").is_file():
        raise CheckpointError(f"{out} is not empty and not a run folder; choose another --out")
    if not resume:
        raise CheckpointError(
            f"{out} holds a run already; add --resume to go on, or choose another --out"
        )
    saved, identity = load_run_config(out)  # resolved: options added since have their defaults
    if "blend" in identity or (out / BLEND).exists():
        raise CheckpointError(
            f"{out} is blended: there is nothing to resume; train the run it was made of and blend "
            "that, or choose another --out"
        )
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
    now = config.training.model_dump(mode="json")
    was = saved.training.model_dump(mode="json")
    was = {key: value for key, value in was.items() if value != now[key]}
    if was:
        identity = {**identity, EARLIER_TRAINING: [*resumed_from(identity), was]}
    return identity


def resumed_from(identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a run's options of ``training`` were before each resume that changed some: it is
    not the run that its config says.
    """
    return list(identity.get(EARLIER_TRAINING) or ())


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List ``key was x, is y`` for every key that differs, those of ``training`` excepted."""
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
    held = saved.get("quantized", "none")
    if backbone.quantized != held:
        now = HELD[backbone.quantized]
        raise CheckpointError(
            f"{run} was trained on {HELD[held]} of {backbone.name!r}, and these are {now}; set "
            f"backbone.quantize={held}, and give the weights it was trained on"
        )
    same_dtype = str(backbone.dtype).removeprefix("torch.") == saved["dtype"]
    if same_dtype and backbone.weight_hash() != saved["weight_hash"]:
        raise CheckpointError(
            f"{run} was trained on other weights of {backbone.name!r} than are installed here; "
            "install the version it was trained on (config.yaml names it)"
        )


def _places(run: Path, backbone: Backbone | None) -> list[str]:
    """List where a backbone on disk lies: seen from the run, and from anywhere."""
    if backbone is None or backbone.source != backbone.name or not Path(backbone.name).exists():
        return []
    folder = Path(backbone.name).resolve()
    try:
        return [os.path.relpath(folder, run.resolve()), str(folder)]
    except ValueError:  # on another drive
        return [str(folder)]


def find_backbone(run: Path, config: RunConfig, identity: Mapping[str, Any]) -> RunConfig:
    """Return a run's config with the folder or file of its backbone where that lies now: beside the
    run as it did, where it lay, or what ``backbone.name`` says from here.

    Raises:
        BackboneError: it is in none of these places.
    """
    places, name = identity.get("backbone_folder") or [], config.backbone.name
    if not places or name != identity["backbone"]["name"]:  # a hub id, or edited since
        return config
    folders = [run.resolve() / places[0], *map(Path, places[1:]), Path(name)]
    for folder in folders:
        if folder.exists():
            backbone = config.backbone.model_copy(update={"name": os.path.normpath(folder)})
            return config.model_copy(update={"backbone": backbone})
    raise BackboneError(
        f"{run} was trained on the backbone in {places[-1]}, which is gone; put it back, or "
        f"give its new place as backbone.name in {run / 'config.yaml'}"
    )


def clear_partial(out: Path) -> None:
    """Delete partial files of a killed run and the results about to be replaced."""
    for partial in (*out.glob(".*.part"), *out.glob("state/.*.part")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for name in ("report.json", "report.html", "diagnostics.json", RANKS, TIED_RANKS):
        (out / name).unlink(missing_ok=True)


def write_identity(
    out: Path,
    config: RunConfig,
    dataset: Dataset,
    backbone: Backbone | None,
    init: Path | None,
    *,
    update: bool = False,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write config.yaml and catalog.parquet: what a run says of itself from its first moment.

    ``update``: its data are those of ``init``, and newer events. ``earlier``: `resumed_from`.
    """
    identity: dict[str, Any] = {
        "run_version": RUN_VERSION,
        "init": None if init is None else str(init.resolve()),
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
            "quantized": backbone.quantized,
        },
        "backbone_folder": _places(out, backbone),
    }
    if update:
        identity["update"] = True
    if earlier:
        identity[EARLIER_TRAINING] = list(earlier)
    write_text(out / "config.yaml", yaml.safe_dump(identity, sort_keys=False, allow_unicode=True))
    with replacing(out / "catalog.parquet") as partial:
        pq.write_table(dataset.warm_catalog, partial)


class UserIds(Sequence[str]):
    """External user ids by dense int, without a Python list of all of them."""

    def __init__(self, dataset: Dataset) -> None:
        self._ids = dataset.user_ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return self._ids[index].as_py()


def version_of(run: Path) -> str:
    """Return the short hash of a run's trained tensors, those of a blend included."""
    digest = hashlib.sha256((run / MODEL).read_bytes())
    if (run / BLEND).is_file():
        digest.update((run / BLEND).read_bytes())
    return digest.hexdigest()[:16]


def write_blend(run: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> None:
    """Write a blend beside a model, and its hash into config.yaml: without it, the folder would
    read as the run that it was made of.
    """
    save_tensors(run / BLEND, tensors)
    identity = {**identity, "blend": _short_hash((run / BLEND).read_bytes())}
    write_text(run / "config.yaml", yaml.safe_dump(identity, sort_keys=False, allow_unicode=True))


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def write_item_vectors(run: Path, vectors: Tensor) -> None:
    """Write the vectors [N, D] of a run's catalog, bound to the tensors they were made with."""
    save_tensors(run / ITEMS, {"vectors": vectors}, model=version_of(run))


@dataclass(frozen=True)
class Sample:
    """Histories [B] of item ints, and the user vectors [B, D] that the trained model gave them.

    within: share of their length by which these may differ on another machine.
    """

    histories: Ragged
    vectors: Tensor
    within: float


def write_sample(run: Path, sample: Sample) -> None:
    """Write a sample of users, bound to the tensors that their vectors were made with."""
    tensors = {
        "items": torch.from_numpy(sample.histories.values.astype(np.int32)),
        "offsets": torch.from_numpy(sample.histories.offsets),
        "vectors": sample.vectors.float().cpu(),
    }
    save_tensors(run / USERS, tensors, model=version_of(run), within=str(sample.within))


def _read_sample(run: Path, version: str) -> Sample | None:
    """Read a sample; None where there is none of these tensors: earlier versions wrote none."""
    if not (run / USERS).is_file():
        return None
    tensors, metadata = load_tensors(run / USERS)
    if metadata.get("model") != version or not {"items", "offsets", "vectors"} <= tensors.keys():
        return None
    histories = Ragged(tensors["items"].numpy(), tensors["offsets"].numpy())
    return Sample(histories, tensors["vectors"], float(metadata.get("within", 0)))


@dataclass(frozen=True)
class RunFolder:
    """A run, each of its files read once.

    config, identity: of config.yaml. tensors: of the model. blend: tensors of a `Blend`, None
    without. vectors: [N, D] of the catalog, None if there are none. vectors_version: of the tensors
    that these were made with. sample: of user vectors, None if there is none of these tensors.
    version: `version_of` the run.
    """

    path: Path
    config: RunConfig
    identity: Mapping[str, Any]
    catalog: Catalog
    tensors: Mapping[str, Tensor]
    blend: Mapping[str, Tensor] | None
    vectors: Tensor | None
    vectors_version: str | None
    sample: Sample | None
    version: str

    @property
    def current_vectors(self) -> Tensor | None:
        """The vectors, if they were made with these very tensors."""
        vectors = self.vectors
        if vectors is None or self.vectors_version != self.version:
            return None
        return vectors if len(vectors) == len(self.catalog) else None


def read_run(run: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        CheckpointError: not a run folder, or a file that is missing or torn.
    """
    config, identity = load_run_config(run)
    catalog = read_catalog(run)
    content, tensors = _read_tensors(run / MODEL)
    digest = hashlib.sha256(content)
    blend: dict[str, Tensor] | None = None
    if "blend" in identity or (run / BLEND).exists():
        content, blend = _read_tensors(run / BLEND)
        if identity.get("blend", _short_hash(content)) != _short_hash(content):
            raise CheckpointError(
                f"{run / BLEND}: not the one that this run was blended with; blend again the run "
                "it was made of"
            )
        digest.update(content)
    vectors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    if (run / ITEMS).is_file():
        vectors, metadata = load_tensors(run / ITEMS)
    version = digest.hexdigest()[:16]
    return RunFolder(
        path=run,
        config=config,
        identity=identity,
        catalog=catalog,
        tensors=tensors,
        blend=blend,
        vectors=vectors.get("vectors"),
        vectors_version=metadata.get("model"),
        sample=_read_sample(run, version),
        version=version,
    )


def _read_tensors(path: Path) -> tuple[bytes, dict[str, Tensor]]:
    """Return a safetensors file as bytes, to be hashed, and its tensors."""
    try:
        content = path.read_bytes()
        return content, safetensors.torch.load(content)
    except FileNotFoundError:
        remedy = "blend again the run it was made of" if path.name == BLEND else NEVER
        raise CheckpointError(f"{path}: no such file; {remedy}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not a safetensors file: {error}") from error


def load_run_config(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Read the recipe of a run folder and its identity (data set, backbone).

    Raises:
        CheckpointError: not a run folder, or torn.
        ConfigError: it has an option, or a value of one, that is gone.
    """
    identity = _identity(run)
    return resolve(as_trained(identity["config"]), where=str(run / "config.yaml")), identity


class EarlierOptions(BaseModel):
    """A method's options as they stand in a run folder that this version cannot load."""

    model_config = ConfigDict(extra="allow", frozen=True)


def load_shown_config(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Read as `load_run_config` does, for what shows a run and does not load its model: that may
    have options that are gone (`EarlierOptions`).

    Raises:
        CheckpointError: not a run folder, or torn.
        ConfigError: an unknown option or a bad value, but for those of the method.
    """
    try:
        return load_run_config(run)
    except ConfigError:
        identity = _identity(run)
        options = EarlierOptions(**identity["config"].get("model", {}))
        rest = resolve(identity["config"] | {"model": {}}, where=str(run / "config.yaml"))
        return rest.model_copy(update={"model": options}), identity


def _identity(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        identity = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(identity, dict) or identity.get("run_version") != RUN_VERSION:
            raise CheckpointError(f"{path}: not a run of this version of l2rec")
        absent = {"config", "dataset", "backbone"} - identity.keys()
        if absent:
            raise CheckpointError(f"{path}: torn or edited: it has no {min(absent)!r}")
        return identity
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{run} is not a run folder: it has no config.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: torn or edited: {reason}") from error


def read_catalog(run: Path) -> Catalog:
    """Read the items of a run with their raw fields, without the rest of it.

    Raises:
        CheckpointError: missing or torn.
    """
    try:
        return Catalog(pq.ParquetFile(run / "catalog.parquet").read())
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{run}/catalog.parquet: missing or torn: {error}") from error


def open_run_dataset(run: Path, data: Path | None) -> Dataset:
    """Open the data set a run was made on, at ``data`` or where it was then.

    Raises:
        CheckpointError: it is not there, or another one.
    """
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
    """Return the item ids of a user of the run's data set, oldest first, without cold ones.

    Raises:
        DataError: an unknown user, or one of cold items alone.
    """
    dataset = open_run_dataset(run, data)
    row = dataset.warm_items(dataset.user_index(user))
    if not len(row):
        raise DataError(f"user {user!r} has cold items alone, which {run} does not know")
    return [dataset.item_ids[int(i)].as_py() for i in row]


def split_of(config: RunConfig, dataset: Dataset) -> Split:
    """Split a data set as a run says.

    Raises:
        DataError: as `split_events`.
    """
    return split_events(dataset, **dict(config.split))


def training_split(config: RunConfig, dataset: Dataset) -> Split:
    """Split as a run says, with as many users to train on as it says."""
    split, share = split_of(config, dataset), config.training.user_share
    return split if share == 1 else with_fewer_users(split, share, config.seed)
