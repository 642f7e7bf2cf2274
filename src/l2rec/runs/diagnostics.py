"""What a trained model does inside: expert load, gate, for a sample of users."""

from __future__ import annotations

__all__ = ["expert_load", "gate_histogram"]

from typing import Any

import numpy as np
import torch

from l2rec.data.ragged import Ragged

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
