"""A chain with one right answer is learned to (nearly) rank one, from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import tiny

from l2rec.data.catalog import Catalog
from l2rec.data.splits import Cases, leave_one_out
from l2rec.data.synthetic import chain_dataset
from l2rec.evaluation.ranking import evaluate
from l2rec.methods.l2rec import L2Rec

CATALOG = {
    "form": "catalog",
    "item_residual": True,
    "table_lr": 1e-2,
    "project_items": False,
    "user_norm": True,
}
PAPER = {"matrices": ("q", "k", "v", "o"), "rank": 4, "negatives": 10}
SHORT = {"max_items": 2, "semantic_items": 2}


@pytest.mark.parametrize(
    ("family", "options", "lr", "epochs"),
    [
        ("bert", CATALOG, 3e-3, 30),
        ("bert", PAPER | SHORT, 1e-2, 50),
        ("qwen3", PAPER | SHORT, 1e-2, 50),
        ("bert", CATALOG | SHORT | {"views": ("behavioral",)}, 3e-3, 30),
        ("bert", CATALOG | SHORT | {"views": ("semantic",)}, 3e-3, 30),
    ],
    ids=["catalog", "paper", "paper-decoder", "behavioral", "semantic"],
)
def test_the_chain_is_learned(
    tmp_path: Path, family: str, options: dict[str, Any], lr: float, epochs: int
) -> None:
    dataset = chain_dataset(tmp_path / "chain", n_users=80, n_items=16, length=9, seed=0)
    split = leave_one_out(dataset.sequences)
    torch.manual_seed(0)
    model = L2Rec(tiny.small(**options), Catalog(dataset.catalog), tiny.random_backbone(family))
    stages = model.stages(lr, 0.01)
    groups = [
        {"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay}
        for stage in stages
        for g in stage.groups
    ]
    optimizer = torch.optim.AdamW(groups)

    # What a history holds is no negative of the catalog's loss: nothing is said of its scores.
    metric = "ndcg@10_masked" if model.config.form == "catalog" else "ndcg@10"

    def ndcg(cases: Cases) -> float:
        return evaluate(model, cases.histories, cases.targets).metrics()[metric]

    untrained = ndcg(split.valid)
    assert untrained < 0.6
    reached = 0.0
    for epoch in range(epochs):
        model.train()
        for stage in stages:
            if stage.begin_epoch is not None:
                stage.begin_epoch(epoch)
        made = model.batches(split.train, seed=0, epoch=epoch, batch_users=40, batch_tokens=10**5)
        for batch in made.iterate():
            optimizer.zero_grad()
            model.loss(batch).total.backward()
            optimizer.step()
        if epoch % 5 == 4:
            reached = ndcg(split.valid)
            if reached > 0.98:
                break
    assert reached > 0.95
    # And the item after it: a history that validation never showed.
    assert ndcg(split.test) > 0.9
