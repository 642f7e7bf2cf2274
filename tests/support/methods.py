"""Every method of ``l2rec/methods``, found by itself, with options that fit sixteen items."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from tests.support import models, tiny

from l2rec import methods
from l2rec.data.catalog import Catalog

N = 16
TINY: dict[str, Any] = {
    "dim": 32,
    "hidden": 32,
    "inner": 48,
    "heads": 2,
    "max_items": 6,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "adaptor_dropout": 0.1,
    "text_tokens": 12,
    "item_tokens": 8,
    "max_tokens": 96,
    "rank": 4,
    "pretrain_epochs": 2,
    "embed_epochs": 2,
    "embed_batch": 8,
    "sasrec_epochs": 2,
    "levels": 2,
    "digits": 4,
    "id_tokens": 3,
    "codes": 8,
    "code_dim": 16,
    "code_hidden": (16,),
    "code_epochs": 2,
    "code_passes": 5,
    "head_dim": 16,
    "beams": 2 * N,
}
"""Of these, every method gets what it has."""
OPTIONS: dict[str, dict[str, Any]] = {
    "L2Rec": {
        "form": "catalog",
        "item_residual": True,
        "user_norm": True,
        "project_items": False,
        "table_lr": 1e-2,
        "semantic_items": 2,
        "view_experts": 4,
        "router_width": 4,
    },
    # One tower for both sides knows who walks near whom on the cycle, but hardly who walks ahead.
    "LEARN": {"item_tower": "b"},
    # Text-only batches move fewer tensors than the stage declares.
    "LLaRA": {"curriculum": 0},
    "ILoRA": {"curriculum": 0, "head": "items"},
}
"""What a method needs besides."""
FAMILIES = {"LLaRA": "tied"}
"""Backbone of what cannot do with a BERT, as it is configured here."""


def found() -> dict[str, Any]:
    """The class of every method file, by name. Floors have no options and are none."""
    classes = {}
    for info in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        for name, value in vars(importlib.import_module(info.name)).items():
            own = inspect.isclass(value) and value.__module__ == info.name
            if own and hasattr(value, "Config") and hasattr(value, "uses_backbone"):
                classes[name] = value
    return classes


METHODS = found()


def options(name: str) -> dict[str, Any]:
    known = METHODS[name].Config.model_fields
    return {k: v for k, v in TINY.items() if k in known} | OPTIONS.get(name, {})


def build(name: str, catalog: Catalog, seed: int = 0, family: str = "", **more: Any) -> Any:
    family = family or FAMILIES.get(name, "bert")
    backbone = tiny.random_backbone(family) if METHODS[name].uses_backbone else None
    return models.build(METHODS[name], options(name) | more, catalog, backbone, seed=seed)
