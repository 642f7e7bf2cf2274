"""Co-occurrence and repeats beside any finished run: `l2rec.modules.cooccurrence.Blend`.

The weights are chosen by NDCG@10 on validation; nothing is trained, so every method can have it:
what a method is worth shows in what it adds to the counts. The blended run is a run folder like any
other: recommended from, embedded, served, deployed, compared.
"""

from __future__ import annotations

__all__ = ["blend_run"]

import datetime
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from l2rec.config import RunConfig
from l2rec.data.text import tokenize
from l2rec.disk import replacing_folder, write_json
from l2rec.errors import CheckpointError
from l2rec.evaluation.ranking import Evaluation
from l2rec.evaluation.tied_day import beside_leave_one_out
from l2rec.modules.cooccurrence import CHOSEN_ON, Blend, Sparse, text_neighbors
from l2rec.modules.item_text import catalog_vectors
from l2rec.protocols import Progress
from l2rec.runs.diagnostics import diagnose
from l2rec.runs.folder import (
    MODEL,
    find_backbone,
    load_run_config,
    open_run_dataset,
    read_report,
    training_split,
    write_blend,
    write_item_vectors,
    write_sample,
)
from l2rec.runs.machine import device
from l2rec.runs.predictor import backbone_of, load
from l2rec.runs.remarks import of_report
from l2rec.runs.report import write_report
from l2rec.runs.scoring import rank, score, with_cold_items
from l2rec.runs.start import unseen_of

TEXT_TOKENS = 128
COPIED = ("catalog.parquet", MODEL, "metrics.jsonl")


def blend_run(
    run: Path,
    out: Path,
    *,
    progress: Progress,
    data: Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Choose a blend on validation, score it on test, and write OUT as a run. Return its report.

    ``command``: the command line, which the report names after that of the training.

    Raises:
        CheckpointError: ``out`` is not empty, ``run`` is not finished or is blended already, or the
            data set is not the run's, or the disk is full; ``out`` is then as it was.
    """
    _check_free(out)
    dataset = open_run_dataset(run, data)
    report = read_report(run)
    predictor, (config, identity) = load(run), load_run_config(run)
    if predictor.blend is not None:
        raise CheckpointError(f"{run} is blended already; blend the run it was made of")
    split = unseen_of(run, dataset, training_split(config, dataset), progress)
    started = time.monotonic()
    blend = Blend(dataset.n_warm).to(device())
    reader = find_backbone(run, config, identity)
    blend.calibrate(
        predictor.scorer(),
        split.train,
        *split.valid.pairs(),
        texts=_alike(reader, predictor.texts, dataset.path / "cache", progress),
        progress=progress.validating,
    )
    weights = blend.weights
    progress.line(
        f"weights chosen on {min(CHOSEN_ON, len(split.valid)):,} validation users: co-occurrence "
        f"{weights.near:.3g}, repeats {weights.repeat:.3g}"
    )
    chosen = time.monotonic() - started

    blended = predictor.blended(blend, predictor.version)

    valid = rank(blended, split.valid, progress)
    diagnostics = diagnose(blended, split, dataset)
    vectors = predictor.vectors
    everything = with_cold_items(blended, dataset)
    test = score(everything, split, beside_leave_one_out(dataset, split), progress)
    name = report["method"]
    method = f"{name} + co-occurrence"
    report |= {
        "method": method,
        "recipe": f"{report['recipe']} + co-occurrence",
        "command": " && ".join(filter(None, [report.get("command"), command])),
        "date": datetime.date.today().isoformat(),
        **of_report([config]),
        "blend": asdict(weights),
        "blend_seconds": round(chosen, 1),
        "valid": valid.metrics(),
        "scores": _led_by(method, test.own, name, report["scores"]),
        "significance": {},
    }
    if test.tied is not None and "tied_day" in report:
        report["tied_day"] |= {
            "scores": _led_by(method, test.tied, name, report["tied_day"]["scores"]),
            "significance": {},
        }
    for part, evaluation in test.parts.items():
        of_part = report["parts"][part]
        of_part["scores"] = _led_by(method, evaluation, name, of_part["scores"])
    # Half of these files would read as the run that was not blended.
    with replacing_folder(out, remedy="free some space and blend again") as folder:
        for file in COPIED:
            if (run / file).is_file():
                shutil.copyfile(run / file, folder / file)
        if (run / "cache").is_dir():
            shutil.copytree(run / "cache", folder / "cache")
        write_blend(folder, blend.state_dict(), identity)
        if vectors is not None:
            write_item_vectors(folder, vectors)
        if predictor.sample is not None:
            write_sample(folder, predictor.sample)
        test.write(folder, dataset, split)
        write_json(folder / "diagnostics.json", diagnostics)
        write_json(folder / "report.json", report)
        write_report(folder)
        _check_free(out)  # another blend may have ended since
    return report


def _led_by(
    method: str, of_blend: Evaluation, name: str, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the scores of the blend, of the run that it was made of, and of the floors."""
    return {method: of_blend.metrics(), name: scores[name], **scores}


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty; choose another --out")


def _alike(
    config: RunConfig, texts: Sequence[str], cache: Path, progress: Progress
) -> Sparse | None:
    """Return K of `text_neighbors`, read by the run's backbone; None for a method without one."""
    backbone = backbone_of(config)
    if backbone is None:
        return None
    progress.line(f"comparing {len(texts):,} texts")
    tokens = tokenize(texts, backbone.tokenizer, TEXT_TOKENS, cache)
    vectors, _ = catalog_vectors(backbone, tokens, TEXT_TOKENS, cache)
    return text_neighbors(F.normalize(vectors - vectors.mean(0), dim=-1))
