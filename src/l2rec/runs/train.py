"""A run from recipe to report.

train_run(config, data, out)      train, score on test beside the floors, write the run folder
validate_run(config, data, out)   train and validate alone, for a search
evaluate_run(out, split)          score a finished run again
"""

from __future__ import annotations

__all__ = ["evaluate_run", "train_run", "validate_run"]

import datetime
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2rec.config import RunConfig
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import LEAVE_ONE_OUT, Cases, Split
from l2rec.data.text import share_read
from l2rec.disk import working_on, write_json
from l2rec.errors import ConfigError
from l2rec.evaluation.ranks import protocol_of
from l2rec.evaluation.tied_day import PROTOCOL as TIED_DAY
from l2rec.evaluation.tied_day import beside_leave_one_out
from l2rec.methods.floors import floors_of
from l2rec.modules import processes
from l2rec.modules.backbone import Backbone
from l2rec.protocols import Cached, Progress, ReadsTexts
from l2rec.runs import launch
from l2rec.runs.checkpoint import load_tensors, load_trained, save_tensors, trained_tensors
from l2rec.runs.diagnostics import diagnose
from l2rec.runs.folder import (
    Sample,
    check_backbone,
    claim,
    clear_partial,
    finished_report,
    load_run_config,
    open_run_dataset,
    read_run,
    resumed_from,
    split_of,
    training_split,
    unfinished,
    version_of,
    write_identity,
    write_item_vectors,
    write_sample,
)
from l2rec.runs.loop import Hopeless, TrainingResult, never_hopeless, train
from l2rec.runs.machine import hardware, peak_memory_mb, versions
from l2rec.runs.numbers import PRETRAINED, UNTRAINED
from l2rec.runs.predictor import (
    Predictor,
    backbone_of,
    build_model,
    catalog_vectors,
    load,
    load_folder,
)
from l2rec.runs.remarks import of_report, remarks_of
from l2rec.runs.report import write_report
from l2rec.runs.scoring import Scores, compared, rank, score, with_cold_items
from l2rec.runs.start import check_start, start_from, unseen, unseen_of

UNTRAINED_BACKBONE = "untrained backbone"
START = "state/start.safetensors"
SAMPLED, SAMPLED_ITEMS = 4, 20
"""Users, and their newest items, whose vectors a run keeps so that it can be verified."""
WITHIN, ROUNDED_WITHIN = 0.001, 0.02
"""Share of their length by which user vectors may differ on another machine: of a backbone in
float32, and of one that is rounded or quantised."""


def train_run(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    progress: Progress,
    resume: bool = False,
    init: Path | None = None,
    update: bool = False,
    init_data: Path | None = None,
    recipe: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Train, evaluate on the test split beside the floors, and write the whole run folder.

    Args:
        resume: go on from the last state of ``out``; without one, start. A finished run is left
            as it is.
        init: a finished run whose trained tensors are the start (fine-tuning after pre-training
            on other data); tensors that belong to its items are left out, unless the catalog is
            the same. A resumed run keeps the start it had.
        update: the data are those of ``init`` with newer events and items (`l2rec.data.extend`):
            the rows of its items are kept, and what it was trained on does not validate.
        init_data: the data set of ``init``, if it was moved; of an update.

    Launched as several processes (`l2rec.runs.launch`), they train together; the first writes.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        CheckpointError: another process works on ``out``, or it holds something else; or its files
            cannot be read or written.
    """
    started = time.monotonic()
    dataset = open_dataset(data)
    with launch.joined() as world, ExitStack() as stack:
        progress = progress if world.main else launch.Silent()

        def claimed() -> dict[str, Any] | None:
            stack.enter_context(working_on(out))
            return claim(out, config, dataset, resume)

        def already() -> dict[str, Any] | None:
            return finished_report(out) if load_run_config(out)[0] == config else None

        identity = world.from_main(claimed)
        if identity is not None:
            report = world.from_main(already)
            if report is not None:
                progress.line(f"{out} is finished: these are its scores")
                return report
            init = None if identity.get("init") is None else Path(identity["init"])
        fitted = _fit(
            config,
            dataset,
            out,
            progress,
            identity,
            init,
            resume,
            update=update,
            init_data=init_data,
        )
        split, backbone, model = fitted.split, fitted.backbone, fitted.model
        sets = beside_leave_one_out(dataset, split)
        # Cold items are added to another model, so that this one goes on without them.
        ranked = with_cold_items(load_folder(read_run(out)), dataset) if dataset.n_cold else model
        scores = score(ranked, split, sets, progress)

        def kept() -> dict[str, Any]:
            scores.write(out, dataset, split)
            vectors = catalog_vectors(model)
            if vectors is not None:
                write_item_vectors(out, vectors)
            for entry in model.cached if isinstance(model, Cached) else ():
                (out / "cache").mkdir(exist_ok=True)
                shutil.copy2(entry, out / "cache" / entry.name)
            known = Catalog(dataset.warm_catalog)
            ids = known.table["item_id"].to_pylist()
            predictor = Predictor(model, ids, known.texts, vectors, version_of(out))
            if vectors is not None:
                write_sample(out, _sample(predictor, dataset, backbone))
            return diagnose(predictor, split, dataset)

        diagnostics = world.from_main(kept)
        start = (
            PRETRAINED
            if init is not None
            else UNTRAINED
            if backbone is None
            else UNTRAINED_BACKBONE
        )
        floors = _floor_scores(config, fitted, dataset, sets, out, start, progress)

        def reported() -> dict[str, Any]:
            report = _report(config, dataset, fitted, scores, floors)
            report |= {
                "processes": world.size,
                "recipe": recipe,
                "command": command,
                "wall_seconds": round(time.monotonic() - started, 1),
            }
            write_json(out / "diagnostics.json", diagnostics)
            write_json(out / "report.json", report)
            write_report(out)
            return report

        return world.from_main(reported)


def _sample(predictor: Predictor, dataset: Dataset, backbone: Backbone | None) -> Sample:
    """Encode the newest items of a few users, spread over all; not cold ones, which a run does not
    have.
    """
    users = np.flatnonzero(dataset.sequences.lengths)
    users = users[np.unique(np.linspace(0, len(users) - 1, SAMPLED).astype(np.int64))]
    known = (dataset.warm_items(int(user)) for user in users)
    rows = Ragged.from_rows([sequence[-SAMPLED_ITEMS:] for sequence in known if len(sequence)])
    exact = backbone is None or (backbone.dtype, backbone.quantized) == (torch.float32, "none")
    vectors = predictor.encode(rows).vectors.float().cpu()
    return Sample(rows, vectors, WITHIN if exact else ROUNDED_WITHIN)


def validate_run(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    progress: Progress,
    resume: bool = False,
    hopeless: Hopeless = never_hopeless,
) -> TrainingResult:
    """Train as `train_run` does, and stop there: the test split is not looked at."""
    dataset = open_dataset(data)
    with working_on(out):
        identity = claim(out, config, dataset, resume)
        return _fit(config, dataset, out, progress, identity, None, resume, hopeless).result


@dataclass(frozen=True)
class _Fitted:
    """A trained model at its best step, and what it was trained on."""

    split: Split
    backbone: Backbone | None
    model: Any
    trained: int
    """Parameters that were trained."""
    texts: dict[str, Any]
    """What is read of the item texts."""
    result: TrainingResult


def _fit(
    config: RunConfig,
    dataset: Dataset,
    out: Path,
    progress: Progress,
    identity: Mapping[str, Any] | None,
    init: Path | None,
    resume: bool,
    hopeless: Hopeless = never_hopeless,
    *,
    update: bool = False,
    init_data: Path | None = None,
) -> _Fitted:
    """Build the model, write the identity of the run, train."""
    progress.line(
        f"data {dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
        f"{dataset.n_events:,} events, fingerprint {dataset.fingerprint}"
    )
    split = training_split(config, dataset)
    update = update or (init is not None and bool((identity or {}).get("update")))
    if update:
        assert init is not None
        split = unseen(init, dataset, split, progress, init_data)
    backbone = backbone_of(config)
    if backbone is not None:
        progress.line(f"backbone {backbone.name}: reading {dataset.n_warm:,} item texts")
    world = processes.current()
    if backbone is not None and backbone.before_pass is not None:
        from l2rec.modules.sharding import weights_here  # slow to import, and rarely asked for

        here, whole = weights_here(backbone), backbone.size
        progress.line(f"{here:,} of {whole:,} frozen weights are here, the rest in others")
    with launch.first_on_each_machine():  # it fills the cache for the others
        model = build_model(config, Catalog(dataset.warm_catalog), backbone, dataset.path / "cache")
    check_backbone(out, identity, backbone)
    if begun := world.from_main((out / START).is_file):
        load_trained(model, load_tensors(out / START)[0], str(out / START))
    elif init is not None:
        check_start(init, dataset, split, progress, update=update)
        progress.line(start_from(model, init, dataset, update=update))

    def written() -> None:
        earlier = resumed_from(identity or {})
        write_identity(out, config, dataset, backbone, init, update=update, earlier=earlier)
        clear_partial(out)
        if not begun:
            save_tensors(out / START, trained_tensors(model))

    world.from_main(written)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if backbone is None else "; the backbone is frozen"
    texts = _texts_read(model, backbone, dataset)
    if texts:
        cut = f"; {texts['items_cut']:.1%} of the items are cut at {texts['limit']} tokens"
        progress.line(
            f"item texts: {texts['tokens_read']:.1%} of their tokens are read"
            + cut * (texts["items_cut"] > 0)
        )
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
        start=UNTRAINED if init is None else PRETRAINED,
    )
    progress.line(
        f"stopped ({result.stopped}) after {result.steps} steps; best step {result.best_step}"
    )
    return _Fitted(split, backbone, model, trained, texts, result)


def _texts_read(model: Any, backbone: Backbone | None, dataset: Dataset) -> dict[str, Any]:
    """Return the limit of a method that reads texts and what of these it lets through; empty for
    others.
    """
    if not isinstance(model, ReadsTexts) or backbone is None or backbone.tokenizer is None:
        return {}
    texts = dataset.texts()[: dataset.n_warm]
    read, cut = share_read(texts, backbone.tokenizer, model.text_tokens)
    return {"limit": model.text_tokens, "tokens_read": round(read, 4), "items_cut": round(cut, 4)}


def _floor_scores(
    config: RunConfig,
    fitted: _Fitted,
    dataset: Dataset,
    sets: Cases | None,
    out: Path,
    start: str,
    progress: Progress,
) -> dict[str, Scores]:
    """Rank the test split by the floors, and by the model before any training (``start``)."""
    split, model = fitted.split, fitted.model
    progress.line(f"scoring the floors: popularity, last item neighbour, co-occurrence, {start}")
    floors = floors_of(split.train, dataset.n_warm)
    scores = {
        name: score(with_cold_items(floor, dataset), split, sets, progress)
        for name, floor in floors.items()
    }
    tensors = load_tensors(out / START)[0]
    if dataset.n_cold:
        catalog, cache = Catalog(dataset.warm_catalog), dataset.path / "cache"
        other = build_model(config, catalog, backbone_of(config), cache)
        load_trained(other, tensors, str(out / START))
        scores[start] = score(with_cold_items(other, dataset), split, sets, progress)
        return scores
    best = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    load_trained(model, tensors, str(out / START))
    scores[start] = score(model, split, sets, progress)
    load_trained(model, best, str(out))
    return scores


def _report(
    config: RunConfig,
    dataset: Dataset,
    fitted: _Fitted,
    scores: Scores,
    floors: Mapping[str, Scores],
) -> dict[str, Any]:
    name, backbone, result = config.method.rpartition(":")[2], fitted.backbone, fitted.result
    return {
        "method": name,
        "seed": config.seed,
        "dataset": dataset.identity,
        "backbone": {
            "name": "none" if backbone is None else backbone.name,
            "parameters": 0 if backbone is None else backbone.size,
            "trained_parameters": fitted.trained,
            "dtype": str(torch.float32 if backbone is None else backbone.dtype)[len("torch.") :],
        },
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "split": "test",
        "protocol": protocol_of(fitted.split.protocol),
        **of_report([config]),
        "steps": result.steps,
        "best_step": result.best_step,
        "selected_by": result.selected_by,
        "texts": fitted.texts,
        "stopped": result.stopped,
        "training_seconds": round(result.seconds, 1),
        "validation_seconds": round(result.eval_seconds, 1),
        "tokens_seen": result.tokens,
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "valid": result.valid,
        **compared(name, scores, floors),
    }


def evaluate_run(
    run: Path,
    split_name: str,
    progress: Progress,
    data: Path | None = None,
    *,
    tied_day: bool = False,
) -> dict[str, Any]:
    """Score a run on ``valid`` or ``test``; return metrics with their fingerprint.

    The ranks of a finished run on ``test`` are written into it. ``tied_day``: by the tied-day
    protocol, of a run that was trained leave-one-out.

    Raises:
        CheckpointError: the data set is not the one the run was made on.
        ConfigError: the tied-day protocol of a run, or of data, that does not have it.
    """
    if split_name not in ("valid", "test"):
        raise ConfigError(f"split={split_name!r}: choose valid or test")
    dataset = open_run_dataset(run, data)
    predictor = load(run)
    config, identity = load_run_config(run)
    for remark in remarks_of([config]):
        progress.line(f"{config.method.rpartition(':')[2]}: {remark}")
    split = split_of(config, dataset)
    sets = beside_leave_one_out(dataset, split) if split_name == "test" else None
    if tied_day and sets is None:
        raise ConfigError(f"{run}: {_why_no_tied_day(split_name, split)}")
    of_parts: dict[str, Any] = {}
    if split_name == "valid":
        split = unseen_of(run, dataset, split, progress)
        evaluation, protocol = rank(predictor, split.valid, progress), split.protocol
    else:
        scores = score(with_cold_items(predictor, dataset), split, sets, progress)
        evaluation, protocol = scores.own, split.protocol
        if tied_day and scores.tied is not None:
            evaluation, protocol = scores.tied, TIED_DAY
        of_parts = {part: each.metrics() for part, each in scores.parts.items()}
        # Ranks of an unfinished run would look like its final ones; a read-only run can be scored;
        # a published one holds no ids of users.
        if not unfinished(run) and not identity.get("published") and os.access(run, os.W_OK):
            scores.write(run, dataset, split)
    return {
        **evaluation.metrics(),
        **of_parts,
        "users": len(evaluation),
        "split": split_name,
        "protocol": protocol,
        "fingerprint": dataset.fingerprint,
        "version": predictor.version,
    }


def _why_no_tied_day(split_name: str, split: Split) -> str:
    if split_name != "test":
        return "the tied-day protocol is of the test split; leave --split out"
    if split.kind != LEAVE_ONE_OUT:
        return f"trained with another split ({split.protocol}), which is its only protocol"
    return "no user ends on two events of one time, so tied-day is leave-one-out"
