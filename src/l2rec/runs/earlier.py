"""Runs of earlier versions, whose L2Rec had options that are none any more.

``repeat_bias``, ``cooccurrence`` and ``text_neighbors``, for what a blend puts beside every method
now, stood in config.yaml, their tensors in model.safetensors. Such a run is read as a model without
them and a `Blend` beside it that gives the same scores: cosine / tau + w m for items outside of the
history, + rho for those within it. ``behavioral_epochs`` changed the course of a training alone.
"""

from __future__ import annotations

__all__ = [
    "EARLIER",
    "completed",
    "counts_in_scores",
    "of_model",
    "split_tensors",
    "without_options",
]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EARLIER = "earlier"
"""Key of a run's identity, as it was read: its options that are none any more, by name."""
METHOD = "l2rec.methods.l2rec:L2Rec"
OF_SCORES = ("repeat_bias", "cooccurrence", "text_neighbors")
OPTIONS = (*OF_SCORES, "behavioral_epochs")


def without_options(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Move the options that were set from the config of an identity to its key `EARLIER`."""
    config = identity["config"]
    given = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(given, Mapping) or config.get("method") != METHOD:
        return dict(identity)
    options = {name: given[name] for name in OPTIONS if given.get(name)}
    if not options:
        return dict(identity)
    kept = {name: value for name, value in given.items() if name not in OPTIONS}
    return {**identity, "config": {**config, "model": kept}, EARLIER: options}


def counts_in_scores(identity: Mapping[str, Any]) -> bool:
    """Return whether a run had co-occurrence or repeats of its own."""
    return any(option in identity.get(EARLIER, {}) for option in OF_SCORES)


def _is_of_options(name: str) -> bool:
    return name in ("near", "repeat") or name.startswith("together.")


def of_model(tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a run's trained tensors without those of its options that are none any more."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (counts_in_scores(identity) and _is_of_options(name))
    }


def split_tensors(
    tensors: Mapping[str, Tensor], identity: Mapping[str, Any], n_items: int
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the tensors of the model, and those of the blend that stands for the options; None
    without any. n_items: N, items of the run's catalog.
    """
    kept = of_model(tensors, identity)
    if not counts_in_scores(identity):
        return kept, None
    nothing = {  # where the options were the repeats alone, or the counts alone
        "together.offsets": torch.zeros(n_items + 1, dtype=torch.int64),
        "together.items": torch.zeros(0, dtype=torch.int32),
        "together.weights": torch.zeros(0),
        "near": torch.tensor(0.0),
        "repeat": torch.tensor(0.0),
    }
    own = {name: tensor for name, tensor in tensors.items() if _is_of_options(name)}
    return kept, {**nothing, **own, "spread": tensors["log_temperature"].exp()}


def completed(blend: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a blend with the buffer that earlier versions did not write."""
    return {"spread": torch.tensor(0.0), **blend}
