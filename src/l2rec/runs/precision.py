"""What vectors of fewer bits lose: items found, and NDCG on the test users, beside what they save.

Users are float32 where items are int8. Binary compares signs with signs; *rescored*, the best
`RESCORED` times as many items as are asked for are scored once more, in int8.
"""

from __future__ import annotations

__all__ = ["precision_losses"]

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases
from l2rec.data.vectors import bytes_of, rounded
from l2rec.evaluation.ranking import evaluate_each
from l2rec.protocols import Progress, Scorer
from l2rec.runs.predictor import Predictor

K, RESCORED = 10, 10
BEYOND = 1e4
"""What lies between the scores of items that are rescored and those of all others."""


def precision_losses(
    predictor: Predictor, cases: Cases, progress: Progress
) -> dict[str, dict[str, float]]:
    """Rank the cases by item vectors of each precision; for each: bytes of a vector, the share
    saved, recall of float32's best 10, NDCG@10 with the history masked and not.
    """
    assert predictor.vectors is not None
    items = predictor.vectors.float().cpu()
    dim, flat = items.shape[1], items.numpy()
    int8, signs = (torch.from_numpy(rounded(flat, p)) for p in ("int8", "binary"))
    read: list[tuple[Ragged, Tensor]] = []

    def users(histories: Ragged) -> Tensor:
        if not read or read[0][0] is not histories:  # all precisions score a block in turn
            vectors = predictor.model.encode_users(histories).float().cpu()
            read[:] = [(histories, vectors)]
        return read[0][1]

    def binary(histories: Ragged) -> Tensor:
        return torch.from_numpy(rounded(users(histories).numpy(), "binary")) @ signs.T

    def rescored(histories: Ragged) -> Tensor:
        coarse = binary(histories)
        best = coarse.topk(min(K * RESCORED, len(items)), dim=1).indices
        fine = torch.einsum("bd,bnd->bn", users(histories), int8[best])
        return (coarse - BEYOND).scatter(1, best, fine)

    scorers: dict[str, tuple[int, Scorer]] = {
        "float32": (bytes_of(dim, "float32"), lambda h: users(h) @ items.T),
        "int8": (bytes_of(dim, "int8"), lambda h: users(h) @ int8.T),
        "binary": (bytes_of(dim, "binary"), binary),
        "binary, rescored": (bytes_of(dim, "binary") + bytes_of(dim, "int8"), rescored),
    }

    def ready(scorer: Scorer) -> Callable[[], Scorer]:
        return lambda: scorer

    found = evaluate_each(
        len(items),
        {name: ready(scorer) for name, (_, scorer) in scorers.items()},
        cases.histories,
        cases.targets,
        users=cases.users,
        progress=lambda done: progress.validating(done, len(cases)),
    )
    exact = found["float32"].top[:, :K]
    rows = {}
    for name, (size, _) in scorers.items():
        top, metrics = found[name].top[:, :K], found[name].metrics()
        shared = (top[:, :, None] == exact[:, None, :]).any(1)
        rows[name] = {
            "bytes": size,
            "saving": 1 - size / bytes_of(dim, "float32"),
            f"recall@{K}": float(np.mean(shared)),
            f"ndcg@{K}": metrics[f"ndcg@{K}"],
            f"ndcg@{K}_masked": metrics[f"ndcg@{K}_masked"],
        }
    return rows
