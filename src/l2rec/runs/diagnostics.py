"""What a trained model does inside: expert load, gate, for a sample of users."""

from __future__ import annotations

__all__ = ["expert_load", "gate_histogram"]

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Split
from l2rec.evaluation.ranking import top_k
from l2rec.runs.predictor import users_and_gates, with_prior

BINS = 20


def expert_load(model: Any, histories: Ragged) -> dict[str, Any]:
    """Share of tokens each expert of each view received, for every adapted matrix.

    ``{"matrices": [names], "experts": {view: [[share of expert 0, ...] per matrix]}}``; empty for
    a model without routers.
    """
    routed = getattr(model.config, "adapt", False) and model.linears
    if not len(histories) or not routed:
        return {}
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        routing = model(histories).routing
    model.train(was_training)
    views = model.config.views
    return {
        "matrices": list(model.experts.names),
        "experts": {
            views[view]: [[round(float(x), 4) for x in share] for share in loads]
            for view, loads in sorted(routing.load.items())
        },
    }


def gate_histogram(delta: torch.Tensor | None) -> dict[str, Any]:
    """Histogram over users of delta of Eq. 7, averaged over dimensions. Empty with one view.

    delta: [M, D] or [M, 1]; 1 is all behavioural, 0 all semantic.
    """
    if delta is None:
        return {}
    mean = delta.float().mean(-1).cpu().numpy()
    counts, edges = np.histogram(mean, bins=BINS, range=(0.0, 1.0))
    return {
        "bin_edges": [round(float(x), 4) for x in edges],
        "counts": [int(x) for x in counts],
        "mean": float(mean.mean()),
    }


EXAMPLES = 6


def diagnose(model: Any, split: Split, dataset: Dataset, vectors: Tensor | None) -> dict[str, Any]:
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
        users, gates = users_and_gates(model, histories)
        scores = with_prior(model, users @ vectors.T, histories)
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
