"""A method of your own, in one file outside the package.

    l2rec train examples/own_method.py:Fading --data DATA --out RUN model.dim=32
    python examples/own_method.py    trains it on the made-up shop, into ./example-runs/own_method

A user is the mean of the vectors of their items, older ones fading by a learned factor. It is
trained, validated, scored, compared, served and embedded like every other. What a method has to
have is written in `l2rec.protocols`; a recipe names it by its file or import path.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.sequences import as_index, catalog_rows, next_item_batches, pad
from l2rec.protocols import Losses, Scorer, Stage, decayed, inner_product_scorer


class FadingConfig(BaseModel):
    """Options of Fading: keys of `model` in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    """Width of the vectors."""
    max_items: int = Field(20, ge=1)
    """Most items of a history that are read, the newest."""


class Fading(nn.Module):
    """u_t = sum_s a^(t - s) E[i_s], scores u_t . E[i]; trained to name each next item."""

    Config = FadingConfig
    uses_backbone: ClassVar[bool] = False
    item_tensors: ClassVar[frozenset[str]] = frozenset({"items.weight"})

    def __init__(
        self,
        config: FadingConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(len(catalog), config.dim)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)
        self.fading = nn.Parameter(torch.tensor(0.0))
        self.batches = next_item_batches(len(catalog), config.max_items)

    @property
    def n_items(self) -> int:
        return self.items.num_embeddings

    def forward(self, histories: Ragged) -> tuple[Tensor, Tensor]:
        """Read histories: users after each item [B, T, dim], and which places are real [B, T]."""
        items, real = pad(histories, self.items.weight.device)
        place = torch.arange(items.shape[1], device=items.device)
        ago = (place[:, None] - place[None, :]).clamp(min=0)
        weights = self.fading.sigmoid() ** ago * (place[:, None] >= place[None, :])  # [T, T]
        return weights @ (self.items(items) * real[..., None]), real

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        return [
            Stage("train", decayed(self.parameters(), lr, weight_decay), self.batches, self.loss)
        ]

    def loss(self, batch: Batch) -> Losses:
        """Compute the cross-entropy of every next item over the whole catalog."""
        users, real = self(batch.histories)
        scores = users[real] @ self.items.weight.T
        total = F.cross_entropy(scores, as_index(batch.targets, scores.device))
        return Losses(total, {"rec": total.detach()}, len(scores))

    @torch.inference_mode()
    def encode_users(self, histories: Ragged) -> Tensor:
        users, real = self(histories.tail(self.config.max_items))
        return users[torch.arange(len(histories)), real.sum(1) - 1]

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        weight = self.items.weight.detach()
        return weight[catalog_rows(items, "Fading", weight.device)]

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)


if __name__ == "__main__":
    import polars as pl
    from shop import write_shop

    import l2rec

    out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-runs/own_method")
    shop = write_shop(out / "shop")
    dataset = l2rec.Dataset.from_frames(
        pl.read_csv(shop / "events.csv"),
        pl.read_csv(shop / "items.csv"),
        out / "data",
        text="{title}",
    )
    model = l2rec.L2Rec(
        f"{Path(__file__).resolve()}:Fading",
        model={"dim": 32},
        training={"lr": 0.01, "epochs": 30, "batch_users": 128},
        out=out / "run",
    ).fit(dataset, resume=True)
    for name, scores in model.report_["scores"].items():
        print(f"{name:22} ndcg@10 with the history masked {scores['ndcg@10_masked']:.3f}")
    print(l2rec.load(out / "run").recommend(["co0a", "co2b"], 3).items)
