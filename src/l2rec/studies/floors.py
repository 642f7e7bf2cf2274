"""What a data set gives without training: the scores of the floors, by any split."""

from __future__ import annotations

__all__ = ["NO_BACKBONE", "score_floors"]

import datetime
from pathlib import Path
from typing import Any

from l2rec.config import BackboneConfig, SplitConfig
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.splits import split_events
from l2rec.data.text import tokenize
from l2rec.evaluation.ranks import protocol_of
from l2rec.evaluation.tied_day import beside_leave_one_out
from l2rec.methods.floors import TextNeighbour, floors_of
from l2rec.modules.backbone import load_backbone
from l2rec.modules.item_text import catalog_vectors
from l2rec.protocols import Progress
from l2rec.runs.machine import device, hardware, versions
from l2rec.runs.scoring import score, summed_up, with_cold_items

NO_BACKBONE = "none"
TEXT_TOKENS = 128
UNTRAINED = "text neighbour"


def score_floors(
    data: Path,
    split: SplitConfig,
    *,
    backbone: str = "minilm",
    progress: Progress,
    command: str = "",
) -> dict[str, Any]:
    """Score popularity, the last item's followers, co-occurrence, and an untrained backbone.

    The backbone ranks items by the cosine of their texts with that of the user's last item; it is
    left out by the name ``none``, and where no item has a text.

    Returns:
        A report: data set, protocol, scores by floor, under ``tied_day`` the same by that protocol
        where there is one, the machine and the date.

    Raises:
        DataError: as `split_events`. BackboneError: the backbone cannot be loaded.
    """
    dataset = open_dataset(data)
    found = split_events(dataset, **dict(split))
    sets = beside_leave_one_out(dataset, found)
    counted = floors_of(found.train, dataset.n_warm)
    floors = {name: with_cold_items(floor, dataset) for name, floor in counted.items()}
    if backbone != NO_BACKBONE and any(dataset.texts()):
        floors[UNTRAINED] = _untrained(dataset, backbone)
    scores = {}
    for name, floor in floors.items():
        progress.line(f"scoring {name}")
        scores[name] = score(floor, found, sets, progress)
    return {
        "dataset": {
            **dataset.identity,
            "ties": dataset.order.ties,
        },
        "split": found.kind,
        "protocol": protocol_of(found.protocol),
        **summed_up(scores),
        "backbone": backbone if UNTRAINED in floors else NO_BACKBONE,
        "hardware": hardware(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def _untrained(dataset: Dataset, name: str) -> TextNeighbour:
    backbone = load_backbone(BackboneConfig(name=name), device())
    cache = dataset.path / "cache"
    tokens = tokenize(dataset.texts(), backbone.tokenizer, TEXT_TOKENS, cache)
    return TextNeighbour(catalog_vectors(backbone, tokens, TEXT_TOKENS, cache)[0])
