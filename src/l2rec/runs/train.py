"""A run from recipe to report, and back from its folder to a model that recommends.

train_run(recipe, data, out)   train, score on test beside the floors, write the run folder
evaluate_run(out, split)       score a finished run again
load(out)                      a Predictor: histories of external ids in, ranked items out
"""

from __future__ import annotations

__all__ = [
    "Predictor",
    "Recommendation",
    "backbone_of",
    "evaluate_run",
    "load",
    "load_run_config",
    "open_run_dataset",
    "read_catalog",
    "train_run",
    "validate_run",
]

import datetime
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from l2rec import __version__
from l2rec.config import RunConfig, method_class, resolve
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split, leave_one_out, with_fewer_users
from l2rec.errors import CheckpointError, ConfigError, DataError, nearest
from l2rec.evaluation.ranking import Evaluation, evaluate, paired_test, top_k, write_ranks
from l2rec.index import vectors_table
from l2rec.methods.floors import LastItemNeighbour, NearbyItems, Popularity
from l2rec.modules.backbone import Backbone, load_backbone
from l2rec.protocols import Embedder, Scorer, TakesNewItems
from l2rec.runs.checkpoint import (
    load_tensors,
    load_trained,
    read_json,
    replacing,
    save_tensors,
    trained_tensors,
    write_json,
    write_text,
)
from l2rec.runs.diagnostics import expert_load, gate_histogram
from l2rec.runs.loop import Progress, TrainingResult, peak_memory_mb, train
from l2rec.runs.report import write_report

RUN_VERSION = 1
UNTRAINED = "untrained"
UNTRAINED_BACKBONE = "untrained backbone"
PRETRAINED = "before fine-tuning"
START = "state/start.safetensors"
EXAMPLES = 6
VERIFIED, VERIFIED_WITHIN = 16, 0.02
"""Items encoded anew to verify stored vectors; the precision of bfloat16 is allowed for."""


def device() -> str:
    """The accelerator if there is one, else the processor."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_model(
    config: RunConfig, catalog: Catalog, backbone: Backbone | None, cache: Path | None
) -> Any:
    """The method of a config over a catalog, freshly initialised from the config's seed."""
    torch.manual_seed(config.seed)
    model = method_class(config.method)(config.model, catalog, backbone, cache=cache)
    return model.to(device())


def backbone_of(config: RunConfig) -> Backbone | None:
    """The backbone of a config, or None for a method that has no use for one."""
    if not method_class(config.method).uses_backbone:
        return None
    return load_backbone(config.backbone, device())


# -- from recipe to report -----------------------------------------------------------------------


def train_run(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    progress: Progress,
    resume: bool = False,
    init: Path | None = None,
    recipe: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Train, evaluate on the test split beside the floors, and write the whole run folder.

    Args:
        resume: go on from the last state of ``out``; without one, start. A finished run is left
            as it is.
        init: a finished run whose trained tensors are the start (fine-tuning after pre-training
            on other data); tensors that belong to its items are left out. A resumed run keeps
            the start it had.

    Returns:
        The report, as written to ``report.json``.
    """
    started = time.monotonic()
    dataset = open_dataset(data)
    identity = _claim(out, config, dataset, resume)
    if identity is not None:
        report = finished_report(out)
        if report is not None and load_run_config(out)[0] == config:
            progress.line(f"{out} is finished: these are its scores")
            return report
        init = None if identity.get("init") is None else Path(identity["init"])
    fitted = _fit(config, dataset, out, progress, identity, init, resume)
    split, backbone, model, result = fitted.split, fitted.backbone, fitted.model, fitted.result
    evaluation = _score(model, split, progress)
    write_ranks(
        out / "ranks.parquet",
        evaluation,
        _Ids(dataset),
        fingerprint=dataset.fingerprint,
    )
    vectors = _all_vectors(model)
    if vectors is not None:
        save_tensors(
            out / "items.safetensors",
            {"vectors": vectors},
            model=_file_hash(out / "model.safetensors"),
        )
    for entry in getattr(model, "cached", ()):
        (out / "cache").mkdir(exist_ok=True)
        shutil.copy2(entry, out / "cache" / entry.name)
    diagnostics = _diagnose(model, split, dataset, vectors)
    start = (
        PRETRAINED if init is not None else UNTRAINED if backbone is None else UNTRAINED_BACKBONE
    )
    floors = _floor_scores(split, dataset, model, out, start, progress)
    report = _report(config, dataset, backbone, fitted.trained, result, evaluation, floors)
    report |= {
        "recipe": recipe,
        "command": command,
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "diagnostics.json", diagnostics)
    write_json(out / "report.json", report)
    write_report(out)
    return report


def validate_run(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    progress: Progress,
    resume: bool = False,
    hopeless: Callable[[float], bool] = lambda score: False,
) -> TrainingResult:
    """Train as `train_run` does, and stop there: the test split is not looked at."""
    dataset = open_dataset(data)
    identity = _claim(out, config, dataset, resume)
    return _fit(config, dataset, out, progress, identity, None, resume, hopeless).result


@dataclass(frozen=True)
class _Fitted:
    """A trained model, at its best step, and what it was trained on."""

    split: Split
    backbone: Backbone | None
    model: Any
    trained: int
    """Parameters that were trained."""
    result: TrainingResult


def _fit(
    config: RunConfig,
    dataset: Dataset,
    out: Path,
    progress: Progress,
    identity: Mapping[str, Any] | None,
    init: Path | None,
    resume: bool,
    hopeless: Callable[[float], bool] = lambda score: False,
) -> _Fitted:
    """Build the model, write the identity of the run, train."""
    progress.line(
        f"data {dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
        f"{dataset.n_events:,} events, fingerprint {dataset.fingerprint}"
    )
    split = training_split(config, dataset)
    if not len(split.users):
        raise DataError(
            f"{dataset.path}: no user has three events: one to learn from, two to be tested on"
        )
    backbone = backbone_of(config)
    if backbone is not None:
        progress.line(f"backbone {backbone.name}: reading {dataset.n_items:,} item texts")
    model = build_model(config, Catalog(dataset.catalog), backbone, dataset.path / "cache")
    _same_backbone(out, identity, backbone)
    if (out / START).is_file():
        load_trained(model, load_tensors(out / START)[0], str(out / START))
    elif init is not None:
        progress.line(_start_from(model, init))
    _write_identity(out, config, dataset, backbone, init)
    _clear(out)
    if not (out / START).is_file():
        save_tensors(out / START, trained_tensors(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if backbone is None else "; the backbone is frozen"
    progress.line(f"training {trained:,} parameters{frozen}")
    result = train(
        model,
        split,
        config.training,
        seed=config.seed,
        run=out,
        progress=progress,
        resume=resume,
        hopeless=hopeless,
    )
    progress.line(
        f"stopped ({result.stopped}) after {result.steps} steps; best step {result.best_step}"
    )
    return _Fitted(split, backbone, model, trained, result)


def training_split(config: RunConfig, dataset: Dataset) -> Split:
    """Leave-one-out, trained on as many users as the run says."""
    split, share = leave_one_out(dataset.sequences), config.training.user_share
    return split if share == 1 else with_fewer_users(split, share, config.seed)


def _all_vectors(model: Any) -> Tensor | None:
    """Vectors of the whole catalog [N, D], None for a method that only ranks."""
    if not isinstance(model, Embedder):
        return None
    return model.encode_items(np.arange(model.n_items, dtype=np.int32))


def finished_report(out: Path) -> dict[str, Any] | None:
    """The report of a run that came to its end, or None."""
    if (out / "report.json").is_file() and (out / "report.html").is_file():
        return read_json(out / "report.json")
    return None


def _claim(out: Path, config: RunConfig, dataset: Dataset, resume: bool) -> dict[str, Any] | None:
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


def _same_backbone(
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


def _clear(out: Path) -> None:
    """What a kill left half written, and the results that this training will replace."""
    for partial in (*out.glob(".*.part"), *out.glob("state/.*.part")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for name in ("report.json", "report.html", "diagnostics.json", "ranks.parquet"):
        (out / name).unlink(missing_ok=True)


def _write_identity(
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


def _start_from(model: Any, init: Path) -> str:
    """Load the trained tensors of another run that are not rows of its items."""
    load_run_config(init)
    tensors, _ = load_tensors(init / "model.safetensors")
    own = trained_tensors(model)
    of_items = getattr(model, "item_tensors", frozenset[str]())
    shared = {n: t for n, t in tensors.items() if n not in of_items}
    wrong = [n for n, t in shared.items() if n not in own or own[n].shape != t.shape]
    missing = sorted(own.keys() - shared.keys() - of_items)
    if wrong or missing:
        raise CheckpointError(
            f"--init {init}: {(wrong or missing)[0]} does not fit this recipe; pre-train with the "
            "same backbone and model options"
        )
    load_trained(model, {**own, **shared}, str(init))
    return f"starting from {init}: {len(shared)} tensors, the rows of its items left out"


def _floor_scores(
    split: Split, dataset: Dataset, model: Any, out: Path, start: str, progress: Progress
) -> dict[str, Evaluation]:
    """Test ranks of the floors, and of the model as it was before any training (``start``)."""
    progress.line(f"scoring the floors: popularity, last item neighbour, nearby items, {start}")
    floors = {
        "popularity": Popularity.from_sequences(split.train, dataset.n_items),
        "last item neighbour": LastItemNeighbour.from_sequences(split.train, dataset.n_items),
        "nearby items": NearbyItems.from_sequences(split.train, dataset.n_items),
    }
    scores = {name: _score(floor, split, progress) for name, floor in floors.items()}
    best = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    load_trained(model, load_tensors(out / START)[0], str(out / START))
    scores[start] = _score(model, split, progress)
    load_trained(model, best, str(out))
    return scores


def _score(
    recommender: Any, split: Split, progress: Progress, split_name: str = "test"
) -> Evaluation:
    """Full ranking of every user of ``test`` or ``valid``."""
    test = split_name == "test"
    return evaluate(
        recommender,
        split.test_histories if test else split.valid_histories,
        split.test_targets if test else split.valid_targets,
        users=split.users,
        progress=lambda done: progress.validating(done, len(split.users)),
    )


class _Ids(Sequence[str]):
    """External user ids by dense int, without a Python list of all of them."""

    def __init__(self, dataset: Dataset) -> None:
        self._ids = dataset.user_ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return self._ids[index].as_py()


def _report(
    config: RunConfig,
    dataset: Dataset,
    backbone: Backbone | None,
    trained: int,
    result: TrainingResult,
    evaluation: Evaluation,
    floors: Mapping[str, Evaluation],
) -> dict[str, Any]:
    name = config.method.rpartition(":")[2]
    tests = {f: paired_test(evaluation.ranks, e.ranks) for f, e in floors.items()}
    return {
        "method": name,
        "seed": config.seed,
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "users": dataset.n_users,
            "items": dataset.n_items,
            "events": dataset.n_events,
        },
        "backbone": {
            "name": "none" if backbone is None else backbone.name,
            "parameters": 0 if backbone is None else sum(p.numel() for p in backbone.parameters()),
            "trained_parameters": trained,
            "dtype": str(torch.float32 if backbone is None else backbone.dtype)[len("torch.") :],
        },
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "split": "test",
        "protocol": "leave-one-out by time, full ranking, expected rank on ties",
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "training_seconds": round(result.seconds, 1),
        "validation_seconds": round(result.eval_seconds, 1),
        "tokens_seen": result.tokens,
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "valid": result.valid,
        "scores": {name: evaluation.metrics(), **{f: e.metrics() for f, e in floors.items()}},
        "significance": {f: {"difference": t.difference, "p": t.p} for f, t in tests.items()},
    }


def hardware() -> str:
    """Processor or accelerator, and how many cores were used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    found = {"l2rec": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "polars"):
        found[package] = importlib.metadata.version(package)
    commit = _commit()
    return {**found, "commit": commit} if commit else found


def _commit() -> str:
    """The commit of this source tree, "-dirty" where it was changed; empty if it is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    tracked = Path(__file__).parents[3] / "pyproject.toml"
    return done.stdout.strip() if done.returncode == 0 and tracked.is_file() else ""


def _diagnose(model: Any, split: Split, dataset: Dataset, vectors: Tensor | None) -> dict[str, Any]:
    sample = np.linspace(0, len(split.users) - 1, min(512, len(split.users))).astype(np.int64)
    found: dict[str, Any] = {}
    if hasattr(model, "user_states"):
        histories = split.test_histories.take(np.unique(sample))
        found |= expert_load(model, histories.take(np.arange(min(128, len(histories)))))
        gate = gate_histogram(model.user_states(histories).delta)
        if gate:
            found["gate"] = gate
    some = sample[:: max(1, len(sample) // EXAMPLES)]
    found["examples"] = _examples(model, split, dataset, some, vectors)
    return found


def _examples(
    model: Any,
    split: Split,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    vectors: Tensor | None,
) -> list[dict[str, Any]]:
    rows = rows[:EXAMPLES]
    histories = split.test_histories.take(rows)
    if vectors is None:
        scores, gates = model.scorer()(histories), list[float | None]([None] * len(rows))
    else:
        users, gates = _users_and_gates(model, histories)
        scores = _with_prior(model, users @ vectors.T, histories)
    best = top_k(lambda _: scores, histories, min(10, dataset.n_items), exclude=histories)
    ids, texts = dataset.item_ids, dataset.texts()

    def item(number: int) -> dict[str, Any]:
        return {"id": ids[number].as_py(), "text": texts[number]}

    return [
        {
            "user": dataset.user_ids[int(split.users[row])].as_py(),
            "history": [item(int(i)) for i in histories[n][-8:]],
            "items": [
                {**item(int(i)), "score": float(s)}
                for i, s in zip(best.items[n], best.scores[n], strict=True)
                if i >= 0
            ],
            "held_out": item(int(split.test_targets[row])),
            "gate": gates[n],
        }
        for n, row in enumerate(rows)
    ]


def _users_and_gates(model: Any, histories: Ragged) -> tuple[Tensor, list[float | None]]:
    """User vectors [B, D], and the mean delta of Eq. 7 of each where the method has one."""
    if not hasattr(model, "user_states"):
        return model.encode_users(histories), [None] * len(histories)
    state = model.user_states(histories)
    users = torch.nn.functional.normalize(state.fused.float(), dim=-1)
    if state.delta is None:
        return users, [None] * len(histories)
    return users, [float(x) for x in state.delta.float().mean(-1)]


def _prior(model: Any, histories: Ragged) -> Tensor | None:
    """What a method adds to its inner products [B, N], if it adds anything."""
    prior: Tensor | None = model.prior(histories) if hasattr(model, "prior") else None
    return prior


def _with_prior(model: Any, scores: Tensor, histories: Ragged) -> Tensor:
    prior = _prior(model, histories)
    return scores if prior is None else scores + prior


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# -- and back ------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Recommendation:
    """items: best first. gate: mean delta of Eq. 7 (1: all behavioural), None with one view."""

    items: list[dict[str, Any]]
    gate: float | None


class Predictor:
    """A trained model with its catalog: everything by external ids.

    Attributes:
        model: the method. ids: external item ids by item int. texts: their texts.
        vectors: [N, D] item vectors, None for a method that only ranks. version: short hash of
        the trained tensors.
    """

    def __init__(
        self, model: Any, ids: list[str], texts: list[str], vectors: Tensor | None, version: str
    ) -> None:
        self.model = model
        self.ids, self.texts, self.vectors, self.version = ids, texts, vectors, version
        self._index = {item: n for n, item in enumerate(ids)}
        self._scorer: Scorer | None = None

    def text_of(self, item: str) -> str:
        """The text of an item id."""
        return self.texts[int(self._ints([item])[0])]

    def _ints(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        unknown = [i for i in ids if i not in self._index]
        if unknown:
            named = ", ".join(repr(i) for i in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise DataError(f"unknown item ids: {named}{more}{nearest(unknown[0], self._index)}")
        return np.asarray([self._index[i] for i in ids], dtype=np.int32)

    def recommend(
        self, history: Sequence[str], k: int = 10, *, exclude_seen: bool = True
    ) -> Recommendation:
        """The k best next items for a user who is this history, oldest first.

        Raises:
            DataError: an empty history, unknown ids (all are named), k outside 1..N.
        """
        if not history:
            raise DataError("an empty history: give at least one item id")
        rows = Ragged.from_rows([self._ints(history)])
        scores, gate = self._scores(rows)
        best = top_k(
            lambda _: scores, rows, self._check_k(k), exclude=rows if exclude_seen else None
        )
        items = [
            {"id": self.ids[i], "score": float(s), "text": self.texts[i]}
            for i, s in zip(best.items[0], best.scores[0], strict=True)
            if i >= 0
        ]
        return Recommendation(items, gate)

    def _scores(self, row: Ragged) -> tuple[Tensor, float | None]:
        """Scores [1, N] of one history, and its gate if the method has one."""
        if self.vectors is None:
            return self.model.scorer()(row), None
        users, gates = _users_and_gates(self.model, row)
        return _with_prior(self.model, users @ self.vectors.T, row), gates[0]

    def rows(self, histories: Sequence[Sequence[str]]) -> Ragged:
        """Histories of external ids as item ints.

        Raises:
            DataError: unknown ids, all of them named.
        """
        return Ragged.from_rows([self._ints(history) for history in histories])

    def row_of(self, item: str) -> int | None:
        """The item int of an id, or None."""
        return self._index.get(item)

    def costs(self, rows: Ragged) -> npt.NDArray[np.int64]:
        """[B] what it takes to encode each history: tokens for a method that reads texts, else
        items.
        """
        if hasattr(self.model, "costs"):
            found: npt.NDArray[np.int64] = self.model.costs(rows)
            return found
        return rows.lengths

    def users(self, rows: Ragged) -> tuple[Tensor, list[float | None]]:
        """What histories of item ints are scored by, and their gates (None where there is none).

        [B, D] float32 user vectors, scored by their inner products with ``vectors``; or, for a
        method that only ranks, the scores [B, N] themselves.
        """
        with torch.inference_mode():
            if self.vectors is not None:
                return _users_and_gates(self.model, rows)
            if self._scorer is None:
                self._scorer = self.model.scorer()
            return self._scorer(rows).float(), [None] * len(rows)

    def prior(self, rows: Ragged) -> Tensor | None:
        """What the method adds to the inner products of `users` and ``vectors`` [B, N], if it adds
        anything: co-occurrence counts, a bias for items of the history.
        """
        return _prior(self.model, rows)

    def with_items(self, items: Mapping[str, str]) -> Predictor:
        """Another predictor that also knows these items; this one stays as it is.

        Both share the model, whose catalog only ever grows: item ints stay what they were. An id
        that is known already gets a new row with the new text, and its old row remains in ``ids``.
        Of the two, and with whatever else runs the model, only one call may be made at a time.

        Raises:
            DataError: an empty text. ConfigError: the method cannot take new items.
        """
        self._require(TakesNewItems, "ranks the items it was trained on; train it again for others")
        with torch.inference_mode():
            added = self.model.add_items(list(items.values()))
            # Rows of a predictor that was given up may lie in between: they have no id.
            gap = int(added[0]) - len(self.ids) if len(added) else 0
            vectors = self.vectors
            if vectors is not None:
                last = int(added[-1]) + 1 if len(added) else len(vectors)
                fresh = np.arange(len(vectors), last, dtype=np.int32)
                vectors = torch.cat((vectors, self.model.encode_items(fresh)))
        ids = [*self.ids, *[""] * gap, *items]
        texts = [*self.texts, *[""] * gap, *items.values()]
        found = Predictor(self.model, ids, texts, vectors, self.version)
        found._index.pop("", None)
        return found

    def verify(self) -> None:
        """Item vectors are finite, and (a sample) what the model makes of its items.

        Raises:
            CheckpointError: they are not; the files of the run are torn or were exchanged.
        """
        if self.vectors is None:
            return
        if not bool(torch.isfinite(self.vectors).all()):
            raise CheckpointError("item vectors that are not finite numbers: torn or badly trained")
        sample = np.unique(np.linspace(0, len(self.ids) - 1, VERIFIED).astype(np.int32))
        with torch.inference_mode():
            again = self.model.encode_items(sample)
        stored = self.vectors[torch.from_numpy(sample.astype(np.int64)).to(self.vectors.device)]
        scale = float(stored.norm(dim=-1).mean()) + 1e-6
        worst = float((again - stored).norm(dim=-1).max()) / scale
        if not worst < VERIFIED_WITHIN:
            raise CheckpointError(
                f"stored item vectors differ from the model's by {worst:.2g} of their length: "
                "items.safetensors is torn or of another model; delete it to encode them anew"
            )

    def _require(self, protocol: Any, otherwise: str) -> None:
        if not isinstance(self.model, protocol):
            raise ConfigError(f"{type(self.model).__name__} {otherwise}")

    def _check_k(self, k: int) -> int:
        if not 1 <= k <= len(self.ids):
            raise DataError(
                f"k={k}: the catalog has {len(self.ids)} items; choose 1..{len(self.ids)}"
            )
        return k

    def encode_users(self, histories: Sequence[Sequence[str]]) -> Tensor:
        """[B, D] float32 unit vectors of histories of external ids."""
        self._require(Embedder, "has no user vectors: it only ranks")
        rows: Tensor = self.model.encode_users(Ragged.from_rows([self._ints(h) for h in histories]))
        return rows

    def encode_items(self, texts: Sequence[str]) -> Tensor:
        """[n, D] float32 unit vectors of raw texts; the catalog stays as it is."""
        self._require(Embedder, "has no item vectors: it only ranks")
        rows: Tensor = self.model.encode_items(list(texts))
        return rows

    def add_items(self, items: Mapping[str, str]) -> None:
        """New items by id and text alone: from now on ranked and allowed in histories.

        Raises:
            DataError: an id that is in the catalog already, or an empty text.
        """
        known = [i for i in items if i in self._index]
        if known:
            raise DataError(f"item {known[0]!r} is in the catalog already")
        self._require(TakesNewItems, "ranks the items it was trained on; train it again for others")
        added = self.model.add_items(list(items.values()))
        self._scorer = None
        if self.vectors is not None:
            self.vectors = torch.cat((self.vectors, self.model.encode_items(added)))
        for item, text in items.items():
            self._index[item] = len(self.ids)
            self.ids.append(item)
            self.texts.append(text)


def load(run: str | Path) -> Predictor:
    """The model of a run folder, ready to recommend; needs neither the data set nor a GPU.

    Raises:
        CheckpointError: missing or torn files, another backbone than the run was made on, or
            tensors that do not fit.
    """
    run = Path(run)
    config, identity = load_run_config(run)
    tensors, _ = load_tensors(run / "model.safetensors")
    catalog = read_catalog(run)
    backbone = backbone_of(config)
    _same_backbone(run, identity, backbone)
    # A run that lies on a read-only disk can be used; its texts are then read anew.
    model = build_model(
        config, catalog, backbone, run / "cache" if os.access(run, os.W_OK) else None
    )
    load_trained(model, tensors, str(run / "model.safetensors"))
    model.eval()
    if hasattr(model, "freeze"):
        model.freeze()
    version = _file_hash(run / "model.safetensors")
    vectors = _stored_vectors(run, version, len(catalog))
    if vectors is None:
        vectors = _all_vectors(model)
    if vectors is not None:
        vectors = vectors.to(device())
    ids = catalog.table["item_id"].to_pylist()
    return Predictor(model, ids, list(catalog.texts), vectors, version)


def read_catalog(run: Path) -> Catalog:
    """The items of a run folder, with their raw fields.

    Raises:
        CheckpointError: missing or torn.
    """
    try:
        return Catalog(pq.ParquetFile(run / "catalog.parquet").read())
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{run}/catalog.parquet: missing or torn: {error}") from error


def _stored_vectors(run: Path, version: str, items: int) -> Tensor | None:
    """Vectors written with this very model, or None."""
    path = run / "items.safetensors"
    if not path.is_file():
        return None
    tensors, metadata = load_tensors(path)
    vectors = tensors.get("vectors")
    if vectors is None or metadata.get("model") != version or len(vectors) != items:
        return None
    return vectors


def evaluate_run(
    run: Path, split_name: str, progress: Progress, data: Path | None = None
) -> dict[str, Any]:
    """Scores of a finished run on ``valid`` or ``test``, with the fingerprint they belong to.

    Raises:
        CheckpointError: the data set is not the one the run was made on.
    """
    if split_name not in ("valid", "test"):
        raise ConfigError(f"split={split_name!r}: choose valid or test")
    dataset = open_run_dataset(run, data)
    predictor = load(run)
    split = leave_one_out(dataset.sequences)
    evaluation = _score(predictor.model, split, progress, split_name)
    if split_name == "test":
        write_ranks(
            run / "ranks.parquet", evaluation, _Ids(dataset), fingerprint=dataset.fingerprint
        )
    return {
        **evaluation.metrics(),
        "users": len(evaluation),
        "split": split_name,
        "fingerprint": dataset.fingerprint,
        "version": predictor.version,
    }


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


def embed_run(
    run: Path, out: Path, progress: Progress, *, with_users: bool = True, data: Path | None = None
) -> list[tuple[Path, int, int]]:
    """Write OUT/items.parquet and OUT/users.parquet: id, vector [D] float32, version.

    Users are encoded from their whole history, the newest event included.

    Returns:
        (path, rows, D) of each file.
    """
    dataset = open_run_dataset(run, data) if with_users else None
    predictor = load(run)
    out.mkdir(parents=True, exist_ok=True)
    if predictor.vectors is None:
        raise ConfigError(f"{run}: {type(predictor.model).__name__} has no vectors: it only ranks")
    written = [_write_vectors(out / "items.parquet", predictor.ids, predictor.vectors, predictor)]
    if dataset is not None:
        sequences = dataset.sequences
        some = np.flatnonzero(sequences.lengths > 0)
        blocks = []
        for start in range(0, len(some), 1024):
            rows = some[start : start + 1024]
            blocks.append(predictor.model.encode_users(sequences.take(rows)).cpu())
            progress.validating(min(start + 1024, len(some)), len(some))
        ids = dataset.user_ids.take(pa.array(some)).to_pylist()
        written.append(_write_vectors(out / "users.parquet", ids, torch.cat(blocks), predictor))
    return written


def _write_vectors(
    path: Path, ids: Sequence[str], vectors: Tensor, predictor: Predictor
) -> tuple[Path, int, int]:
    flat = vectors.float().cpu().numpy()
    table = vectors_table(ids, flat, predictor.version)
    with replacing(path) as partial:
        pq.write_table(table, partial)
    return path, len(ids), flat.shape[1]
