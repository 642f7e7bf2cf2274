"""l2rec: a frozen language model, adapted twice for each user, as a recommender.

    import l2rec
    model = l2rec.load("runs/demo")
    model.recommend(["50", "172", "181"], k=10).items
    l2rec.L2Rec("sasrec").fit(l2rec.open_dataset("data/mine")).recommend()

Names are imported when they are first used, so that ``import l2rec`` stays quick.
"""

from __future__ import annotations

__all__ = [
    "Dataset",
    "L2Rec",
    "L2RecConfig",
    "L2RecError",
    "Predictor",
    "PrepareConfig",
    "__version__",
    "evaluate",
    "leave_one_out",
    "load",
    "load_backbone",
    "load_dataset",
    "open_dataset",
    "prepare",
]

import importlib
from typing import TYPE_CHECKING, Any

from l2rec._version import __version__

if TYPE_CHECKING:
    from l2rec.data.dataset import Dataset, open_dataset
    from l2rec.data.dataset import open_dataset as load_dataset
    from l2rec.data.prepare import PrepareConfig, prepare
    from l2rec.data.splits import leave_one_out
    from l2rec.errors import L2RecError
    from l2rec.estimator import L2Rec
    from l2rec.evaluation.ranking import evaluate
    from l2rec.methods.l2rec import L2RecConfig
    from l2rec.modules.backbone import load_backbone
    from l2rec.runs.predictor import Predictor, load

# The module of each name, and its name there if it is another one.
_HOME = {
    "Dataset": "l2rec.data.dataset",
    "L2Rec": "l2rec.estimator",
    "L2RecConfig": "l2rec.methods.l2rec",
    "L2RecError": "l2rec.errors",
    "Predictor": "l2rec.runs.predictor",
    "PrepareConfig": "l2rec.data.prepare",
    "evaluate": "l2rec.evaluation.ranking",
    "leave_one_out": "l2rec.data.splits",
    "load": "l2rec.runs.predictor",
    "load_backbone": "l2rec.modules.backbone",
    "load_dataset": "l2rec.data.dataset:open_dataset",
    "open_dataset": "l2rec.data.dataset",
    "prepare": "l2rec.data.prepare",
}


if not TYPE_CHECKING:  # to whom any name would do then

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'l2rec' has no attribute {name!r}")
        module, _, attribute = _HOME[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
