"""Any finished run together with what was met near the user's newest items, weighed on validation.

    s = z + w m [i not in history] + rho [i in history]

with z the method's scores, centred and scaled for each user, m the counts of
`l2rec.modules.cooccurrence` (for a method that reads texts, with text neighbours), and w,
rho chosen by NDCG@10 on validation (rho not at all where histories are masked anyway). It costs no
training, so every method can have it: what a method is worth shows in what it adds to the counts.
"""

from __future__ import annotations

__all__ = ["blend_run"]

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from l2rec.config import RunConfig
from l2rec.data.ragged import IntArray, Ragged
from l2rec.data.text import tokenize
from l2rec.disk import read_json, write_json
from l2rec.errors import CheckpointError
from l2rec.evaluation.ranking import Evaluation, evaluate_each
from l2rec.evaluation.ranks import write_ranks
from l2rec.modules.cooccurrence import (
    CHOSEN_ON,
    NEAR,
    CoOccurrence,
    Sparse,
    Weights,
    choose,
    text_neighbors,
)
from l2rec.modules.item_text import text_vectors
from l2rec.protocols import Progress, Scorer
from l2rec.runs.folder import load_run_config, open_run_dataset
from l2rec.runs.predictor import backbone_of, load
from l2rec.runs.train import training_split

TRIED = [Weights(near, repeat) for repeat in (-8.0, 0.0, 2.0) for near in NEAR]
"""The scores have deviation 1 for each user; a repeat of -8 is never recommended."""
TEXT_TOKENS = 128


def blend_run(
    run: Path, out: Path, *, progress: Progress, data: Path | None = None
) -> dict[str, Any]:
    """Choose a blend on validation, score it on test, and write OUT as a run to compare.

    OUT holds the report and the ranks, not a model. Returns its report.

    Raises:
        CheckpointError: ``out`` is not empty, or the data set is not the run's.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another --out")
    dataset = open_run_dataset(run, data)
    report = read_json(run / "report.json")
    predictor, (config, _) = load(run), load_run_config(run)
    model: Any = predictor.model
    split = training_split(config, dataset)
    together = CoOccurrence(dataset.n_items)
    together.count(split.train, _alike(config, predictor.texts))
    started = time.monotonic()
    parts = _parts(model.scorer(), together)
    best = choose(
        parts,
        together.n_items,
        split.valid_histories,
        split.valid_targets,
        TRIED,
        progress.validating,
    )
    progress.line(f"chosen on {min(CHOSEN_ON, len(split.users)):,} validation users: {best}")
    chosen = time.monotonic() - started

    def blended(histories: Ragged) -> Tensor:
        own, met, seen = parts(histories)
        return own + best.added(met, seen)

    def ranked(histories: Ragged, targets: IntArray) -> Evaluation:
        found = evaluate_each(
            together.n_items,
            {"blend": lambda: blended},
            histories,
            targets,
            users=split.users,
            progress=lambda done: progress.validating(done, len(targets)),
        )
        return found["blend"]

    valid = ranked(split.valid_histories, split.valid_targets)
    evaluation = ranked(split.test_histories, split.test_targets)
    out.mkdir(parents=True, exist_ok=True)
    ids = dataset.user_ids.to_pylist()
    write_ranks(out / "ranks.parquet", evaluation, ids, fingerprint=dataset.fingerprint)
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copyfile(run / name, out / name)
    method = f"{report['method']} + nearby items"
    own = {k: v for k, v in report["scores"].items() if k != report["method"]}
    alone = report["scores"][report["method"]]
    report |= {
        "method": method,
        "recipe": f"{report['recipe']} + nearby items",
        "blend": asdict(best),
        "blend_seconds": round(chosen, 1),
        "valid": valid.metrics(),
        "scores": {method: evaluation.metrics(), report["method"]: alone, **own},
        "significance": {},
    }
    write_json(out / "report.json", report)
    return report


def _alike(config: RunConfig, texts: Sequence[str]) -> Sparse | None:
    """K of `text_neighbors`, read by the run's backbone; None for a method without one."""
    backbone = backbone_of(config)
    if backbone is None:
        return None
    tokens = tokenize(texts, backbone.tokenizer, TEXT_TOKENS)
    vectors = text_vectors(backbone, tokens, TEXT_TOKENS)
    return text_neighbors(F.normalize(vectors - vectors.mean(0), dim=-1))


def _parts(
    scorer: Scorer, together: CoOccurrence
) -> Callable[[Ragged], tuple[Tensor, Tensor, Tensor]]:
    """Histories -> [B, N] each: scores with mean 0 and deviation 1 for each user, m, and what is
    in the history.
    """

    def parts(histories: Ragged) -> tuple[Tensor, Tensor, Tensor]:
        scores = scorer(histories).float()
        spread = scores.std(1, keepdim=True).clamp(min=1e-12)
        own = (scores - scores.mean(1, keepdim=True)) / spread
        met, seen = together.dense(histories, together.n_items)
        return own, met.to(own), seen.to(own.device)

    return parts
