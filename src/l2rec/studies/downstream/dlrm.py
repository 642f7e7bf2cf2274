"""DLRM: Deep Learning Recommendation Model for Personalization and Recommendation Systems.

Naumov, Mudigere, Shi et al. 2019, https://arxiv.org/abs/1906.00091, section 2. Here it is the
ranking stage of a production system, and the "DLRM-based matching system" that reads L2Rec's
vectors (L2Rec, section 3.6).

    x_0      = MLP_bottom(dense)                     all dense features of a pair   [B, d]
    x_f      = W_f[id]                               a categorical feature, one row [B, d]
    x_h      = mean of W_item[history]               several rows of one table      [B, d]
    z        = (<x_f, x_g>) for all f < g            pairwise interactions          [B, F(F-1)/2]
    logits   = MLP_top([x_0, z])                     one for each task: click, reply
    L        = sum over tasks of binary cross-entropy on exposures

Matching form, whose scores are inner products, so that it can be indexed (public DLRM has none):

    p_u      = norm(MLP_user([x, z]))                x, z of the user: hash, history, dense
    q_i      = norm(MLP_item([x, z]))                x, z of the item: id, attributes, dense
    s(u, i)  = (<p_u, q_i> + sum_j w_j a_j b_j) / tau
    L        = sum over tasks of BCE(alpha_t tau s + beta_t) on exposures
               + softmax CE of what was clicked among the items of the batch, s(u, i) - log Q(i)

with Q(i) the share of i among training exposures, from which the batch is drawn (Yi et al.:
Sampling-Bias-Corrected Neural Modeling, RecSys '19). a, b are vectors of user and item that another
model encoded and that stay frozen. In the ranking stage they are dense features, as are their
cosine and their elementwise product; between the towers, cosine and product enter through the
weights w, which start at zero. Without frozen vectors that term is missing, and nothing else
differs.

Deviations from the public code:

- All embedding tables are one matrix; offsets find the rows, and all ids are looked up at once.
- Towers read the vectors beside their dot products, because dot products alone have no direction.
- Smaller MLPs than 512-256-64 and 512-256, Adam instead of SGD, because logs here are smaller.
- Two tasks that share everything but the last layer's rows.
- Items of a batch are negatives with the features of the day that they were shown on.
"""

from __future__ import annotations

__all__ = ["DLRM", "DLRMConfig", "Features", "TwoTower", "matching_loss", "pairwise_dots"]

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.protocols import Losses

USER, ITEM = 0, 1
"""First embedding tables: of user hashes and of item ids (histories are rows of it). Those of
attributes follow."""
PACE = 10.0
"""Ratio of w to its parameter: under Adam w moves so many times faster. It starts at zero and has
to come near one before vectors of unit length count as much as those of the towers."""


class DLRMConfig(BaseModel):
    """Options of both stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(16, ge=1)
    """Size of an embedding, d."""
    bottom: tuple[int, ...] = (128, 64)
    """Widths of the bottom MLP before its last layer, which is d wide."""
    top: tuple[int, ...] = (128, 64)
    """Widths of the top MLP before the logits."""
    tower: tuple[int, ...] = (256, 64)
    """Widths of a tower's MLP; the last is the size of its vectors."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the dense features."""
    temperature: float = Field(0.1, gt=0)
    """Temperature tau of the matching scores."""


@dataclass(frozen=True)
class Features:
    """Features of B users, items or pairs.

    ``dense``: [B, K] float32, standardised. ``ids``: [B, F] int64, a row of each of F tables.
    ``history``, ``starts``: [total] int64 rows of the item table, and where each of B histories
    begins [B + 1]; None for items.
    """

    dense: Tensor
    ids: Tensor
    history: Tensor | None = None
    starts: Tensor | None = None


def pairwise_dots(vectors: Tensor) -> Tensor:
    """Compute <x_f, x_g> of all f < g: [B, F, d] -> [B, F (F - 1) / 2], ordered by f, then g."""
    count = vectors.shape[1]
    f, g = torch.triu_indices(count, count, offset=1, device=vectors.device)
    return torch.bmm(vectors, vectors.transpose(1, 2))[:, f, g]


def mlp(widths: Sequence[int], *, end: bool = False) -> nn.Sequential:
    """Build linear layers with ReLU between them, initialised as in the public DLRM code.

    ``end``: ReLU after the last layer too.
    """
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        linear = nn.Linear(inner, outer)
        nn.init.normal_(linear.weight, std=(2.0 / (inner + outer)) ** 0.5)
        nn.init.normal_(linear.bias, std=(1.0 / outer) ** 0.5)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[: None if end else -1])


class Tables(nn.Module):
    """Embedding tables of ``sizes`` rows in one matrix, one below the other."""

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        counts = torch.tensor(list(sizes))
        self.rows = nn.Embedding(int(counts.sum()), dim)
        with torch.no_grad():  # uniform within sqrt(1 / rows of its table)
            bound = counts.repeat_interleave(counts)[:, None].float().rsqrt()
            self.rows.weight.uniform_(-1, 1).mul_(bound)
        self.register_buffer("offsets", counts.cumsum(0) - counts, persistent=False)
        self.offsets: Tensor

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """Look up ids [B, F] in the F tables from ``first`` on -> [B, F, d]."""
        rows: Tensor = self.rows(ids + self.offsets[first : first + ids.shape[1]])
        return rows

    def mean(self, values: Tensor, starts: Tensor, table: int) -> Tensor:
        """Average the rows of each history: [B, d], zero for an empty one.

        values: [total] rows of ``table``. starts: [B + 1].
        """
        means: Tensor = F.embedding_bag(
            values + self.offsets[table],
            self.rows.weight,
            starts,
            mode="mean",
            include_last_offset=True,
        )
        return means


class _Side(nn.Module):
    """Embedding of features as vectors x: dense, then the history if there is one, then ids."""

    def __init__(self, config: DLRMConfig, dense: int, first: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.bottom = mlp((dense, *config.bottom, config.dim), end=True)
        self.first = first

    def forward(self, features: Features, tables: Tables) -> Tensor:
        """Compute x [B, F, d]."""
        vectors = [self.bottom(self.drop(features.dense))[:, None]]
        if features.history is not None and features.starts is not None:
            vectors.append(tables.mean(features.history, features.starts, ITEM)[:, None])
        vectors.append(tables(features.ids, self.first))
        return torch.cat(vectors, dim=1)


class DLRM(nn.Module):
    """The ranking stage.

    Args:
        config: options.
        sizes: rows of each embedding table (users, items, attributes ...).
        dense: number K of dense features of a pair.
        tasks: number of logits.
    """

    def __init__(
        self, config: DLRMConfig, sizes: Sequence[int], dense: int, tasks: int = 2
    ) -> None:
        super().__init__()
        # Tables come first so that with the same seed they start alike, whatever K is.
        self.tables = Tables(sizes, config.dim)
        count = len(sizes) + 2  # the dense vector and the history's
        self.top = mlp((config.dim + count * (count - 1) // 2, *config.top, tasks))
        self.side = _Side(config, dense, USER)

    def start_at(self, log_odds: Tensor) -> None:
        """Set the last bias to the tasks' average log odds [tasks]."""
        with torch.no_grad():
            self.top[-1].bias.copy_(log_odds)  # type: ignore[operator]

    def forward(self, pairs: Features) -> Tensor:
        """Compute logits [B, tasks]."""
        vectors = self.side(pairs, self.tables)
        logits: Tensor = self.top(torch.cat((vectors[:, 0], pairwise_dots(vectors)), dim=1))
        return logits

    def loss(self, pairs: Features, labels: Tensor) -> Losses:
        """Sum the tasks' mean cross-entropies. labels: [B, tasks] float32 of 0 and 1."""
        return _tasks_loss(self(pairs), labels)


class TwoTower(nn.Module):
    """The matching stage.

    Args:
        config: options.
        sizes: rows of each embedding table.
        user_dense, item_dense: numbers of dense features.
        frozen: size of the frozen vectors, 0 for none.
        tasks: number of logits of an exposure.
    """

    def __init__(
        self,
        config: DLRMConfig,
        sizes: Sequence[int],
        user_dense: int,
        item_dense: int,
        frozen: int = 0,
        tasks: int = 2,
    ) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.tables = Tables(sizes, config.dim)
        users, items = 3, len(sizes)  # dense, history, hash; dense, id, attributes
        self.user_top = mlp((_tower_inputs(users, config.dim), *config.tower))
        self.item_top = mlp((_tower_inputs(items, config.dim), *config.tower))
        self.user_side = _Side(config, user_dense, USER)
        self.item_side = _Side(config, item_dense, ITEM)
        self.alpha = nn.Parameter(torch.full((tasks,), 1.0 / config.temperature))
        self.beta = nn.Parameter(torch.zeros(tasks))
        self.weights = nn.Parameter(torch.zeros(frozen)) if frozen else None

    def start_at(self, log_odds: Tensor) -> None:
        """Set beta to the tasks' average log odds [tasks]."""
        with torch.no_grad():
            self.beta.copy_(log_odds)

    def users(self, features: Features, frozen: Tensor | None = None) -> Tensor:
        """Encode users: p_u and the frozen vectors times w, [B, h + D]; without them [B, h]."""
        vectors = self.user_side(features, self.tables)
        p = F.normalize(self.user_top(_tower_input(vectors)), dim=-1)
        if self.weights is None or frozen is None:
            return p
        return torch.cat((p, frozen * (PACE * self.weights)), dim=1)

    def items(self, features: Features, frozen: Tensor | None = None) -> Tensor:
        """Encode items: q_i and the frozen vectors, [B, h + D]; without them [B, h].

        Scores are inner products with the result of `users`.
        """
        vectors = self.item_side(features, self.tables)
        q = F.normalize(self.item_top(_tower_input(vectors)), dim=-1)
        if self.weights is None or frozen is None:
            return q
        return torch.cat((q, frozen), dim=1)

    def loss(
        self, users: Tensor, items: Tensor, labels: Tensor, ids: Tensor, log_q: Tensor
    ) -> Losses:
        """Compute the loss of B exposures: user n was shown item n.

        users, items: [B, h + D] results of `users` and `items`. labels: [B, tasks] float32, clicks
        first. ids: [B] item ints. log_q: [B] log Q of each item.
        """
        logits = (users * items).sum(1)[:, None] * self.alpha + self.beta
        tasks = _tasks_loss(logits, labels)
        clicked = labels[:, 0] > 0
        match = matching_loss(users[clicked] @ items.T / self.temperature, clicked, ids, log_q)
        return Losses(tasks.total + match, {**tasks.parts, "softmax": match.detach()})


def matching_loss(scores: Tensor, clicked: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """Compute the softmax cross-entropy of clicked items among the items of the batch.

    Scores are corrected for how often an item is drawn. Mean over clicks, 0 without any. Other rows
    of the clicked item are not negatives.

    scores: [C, B] of the C clicked rows. clicked: [B] bool. ids: [B] item ints. log_q: [B].
    """
    positives = clicked.nonzero()[:, 0]  # [C] column of each row's clicked item
    if not len(positives):
        return scores.sum()
    columns = torch.arange(len(ids), device=ids.device)
    same = (ids[positives][:, None] == ids[None]) & (columns[None] != positives[:, None])
    corrected = (scores - log_q).masked_fill(same, float("-inf"))
    return F.cross_entropy(corrected, positives)


def _tower_inputs(count: int, dim: int) -> int:
    """Return the width of a tower's input for ``count`` vectors."""
    return count * dim + count * (count - 1) // 2


def _tower_input(vectors: Tensor) -> Tensor:
    """Join vectors [B, F, d] and their dot products."""
    return torch.cat((vectors.flatten(1), pairwise_dots(vectors)), dim=1)


def _tasks_loss(logits: Tensor, labels: Tensor) -> Losses:
    """Sum the tasks' mean cross-entropies. logits, labels: [B, tasks]."""
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)
    parts = {f"task{n}": value.detach() for n, value in enumerate(each)}
    return Losses(each.sum(), parts)
