"""What a trained model does inside, for a sample of users: expert load, gate, examples."""

from __future__ import annotations

__all__ = ["diagnose", "gate_histogram"]

from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from l2rec.data.dataset import Dataset
from l2rec.data.splits import Cases, Split, warm_targets
from l2rec.evaluation.ranking import top_k
from l2rec.protocols import Coded, Inspectable
from l2rec.runs.predictor import Predictor

BINS = 20
EXAMPLES, SHOWN_HISTORY = 6, 10
"""Users whose recommendations are shown, and how many of their newest events."""
SAMPLE, ROUTED = 512, 128
"""Users whose gates, and whose tokens' experts, are looked at."""


def gate_histogram(gates: npt.NDArray[np.floating]) -> dict[str, Any]:
    """Count users by their gate [M], mean delta of Eq. 7 (1: all behavioural, 0: all semantic)."""
    counts, edges = np.histogram(gates, bins=BINS, range=(0.0, 1.0))
    return {
        "bin_edges": [round(float(x), 4) for x in edges],
        "counts": [int(x) for x in counts],
        "mean": float(gates.mean()),
    }


def diagnose(predictor: Predictor, split: Split, dataset: Dataset) -> dict[str, Any]:
    """Look into a model with test histories: what diagnostics.json holds.

    ``matrices``, ``experts``, ``user_share``: `ExpertLoad`, of a model with experts. ``gate``:
    `gate_histogram`, of a model with a gate. ``codes``: `CodeUsage`, of one whose items are codes.
    ``examples``: recommendations.
    """
    model = predictor.model
    cases = split.test if split.warm is None else warm_targets(split.test, split.warm)
    sample = np.linspace(0, len(cases) - 1, min(SAMPLE, len(cases))).astype(np.int64)
    result: dict[str, Any] = {}
    if isinstance(model, Inspectable):
        histories = cases.histories.take(np.unique(sample))
        load = model.expert_load(histories.take(np.arange(min(ROUTED, len(histories)))))
        if load is not None:
            result["matrices"] = load.matrices
            result["experts"] = {
                view: [[round(share, 4) for share in shares] for shares in by_matrix]
                for view, by_matrix in load.experts.items()
            }
            result["user_share"] = {
                view: [round(share, 4) for share in shares] for view, shares in load.user.items()
            }
        _, gates = model.users_and_gates(histories)
        if gates is not None:
            result["gate"] = gate_histogram(gates.cpu().numpy())
    if isinstance(model, Coded):
        result["codes"] = asdict(model.code_usage())
    some = sample[:: max(1, len(sample) // EXAMPLES)][:EXAMPLES]
    result["examples"] = _examples(predictor, cases, dataset, some)
    return result


def _examples(
    predictor: Predictor, cases: Cases, dataset: Dataset, rows: npt.NDArray[np.int64]
) -> list[dict[str, Any]]:
    histories = cases.histories.take(rows)
    encoded = predictor.encode(histories)
    scores = predictor.scores(encoded)
    best = top_k(lambda _: scores, histories, min(10, predictor.n_items), exclude=histories)
    ids, texts = predictor.ids, predictor.texts

    def item(number: int) -> dict[str, Any]:
        return {"id": ids[number], "text": texts[number]}

    def held_out(n: int, row: int) -> int:
        """Return the best in the list of the items held out: one, or those of a day."""
        targets = cases.targets[row]
        return int(next((i for i in best.items[n] if i in targets), targets[0]))

    return [
        {
            "user": dataset.user_ids[int(cases.users[row])].as_py(),
            "earlier": max(0, len(histories[n]) - SHOWN_HISTORY),
            "history": [item(int(i)) for i in histories[n][-SHOWN_HISTORY:]],
            "items": [
                {**item(int(i)), "score": float(s)}
                for i, s in zip(best.items[n], best.scores[n], strict=True)
                if i >= 0
            ],
            "held_out": item(held_out(n, int(row))),
            "gate": encoded.gates[n],
        }
        for n, row in enumerate(rows)
    ]
