"""FamouSRec-style: a frequency-augmented mixture of heterogeneous experts.

After Zhang, Xie, Lu, Sun, Zhao, Kang, et al., "Frequency-Augmented Mixture-of-Heterogeneous-Experts
Framework for Sequential Recommendation", WWW '25.

This is a reconstruction. The paper's idea is that each kind of sequence encoder favours some
frequencies of a history (self-attention the low ones), so that experts of different kinds should
be mixed by a router that sees frequencies, with two contrastive tasks that keep them different and
in one space. No code of the authors could be found; everything below that idea is our own design,
and its scores are those of a "FamouSRec-style" model.

For a history X [n, h] of item embeddings, with the real Fourier transform over its own n items,

    X_k = irFFT(m_k * rFFT(X))                          expert k's band, m_k in (0, 1) trained
    u_k = expert_k(X + X_k)                             the state at the newest item
    p   = softmax(MLP([log |m_k * rFFT(X)|^2]_k, mean X))
    u   = sum_k p_k u_k                                 over the top_n experts, p renormalised
    r_i = u . E[i]

    L = CE(r, next) + specialization * SPE + alignment * ALI + balance * BAL

    SPE  of u_k, the same expert's u'_k under another dropout is the positive, the other experts'
         u'_j of the same user are the negatives
    ALI  of u_k, another expert's u_j of the same user is the positive, those of other users in the
         batch are the negatives
    BAL  the Switch load balance of p                   l2rec.modules.experts

SPE and ALI are InfoNCE of cosine / temperature. The experts are a causal Transformer (SASRec), a
GRU (GRU4Rec), a learned filter over the whole spectrum (FMLP-Rec) and dilated causal convolutions
(NextItNet); in the order of ``experts`` their bands start from the lowest to the highest.

A filter mixes all items of a row, those after a position too. So a row is one prefix that predicts
its next item alone, and its transform is that of its own length: neither padding nor the rest of a
batch changes anything. m_k and the filters of FMLP-Rec are stored on the frequencies of a row of
``max_items`` and read in between (linearly) for shorter rows, whose frequencies are fewer.
"""

from __future__ import annotations

__all__ = ["FamouSRec", "FamouSRecConfig", "RowSpectra", "Spectra", "alignment_loss"]

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, initialize
from l2rec.modules.experts import load_balance, top_n
from l2rec.modules.item_table import ItemTable
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.sequences import encode_rows, last_of, pad, sequence_batches
from l2rec.protocols import Losses, Stage, decayed

Kind = Literal["transformer", "gru", "filter", "convolution"]

BAND = 3.0
"""Logit of m_k at the start: inside its band, and its negative outside."""
QUIET = 1e-8
"""Energy of silence: the least that is told from none."""


class FamouSRecConfig(BaseModel):
    """Options of FamouSRec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    experts: tuple[Kind, ...] = ("transformer", "gru", "filter", "convolution")
    """One kind several times makes the mixture homogeneous."""
    top_n: int = Field(2, ge=1)
    """Experts that a user's vector is made of."""
    router_width: int = Field(64, ge=1)
    max_items: int = Field(50, ge=1)
    layers: int = Field(2, ge=1)
    """Of every expert but the GRU, which has one."""
    heads: int = Field(2, ge=1)
    inner: int = Field(256, ge=1)
    """Width of the feed-forward parts."""
    gru_width: int = Field(128, ge=1)
    kernel: int = Field(3, ge=1)
    """Items that one convolution sees, ``2 ** layer`` apart."""
    dropout: float = Field(0.5, ge=0, lt=1)
    attention_dropout: float = Field(0.5, ge=0, lt=1)

    targets_per_user: int = Field(4, ge=1)
    """Prefixes of a user in one epoch, drawn anew each time."""
    temperature: float = Field(0.2, gt=0)
    """Of the contrastive tasks."""
    specialization: float = Field(0.1, ge=0)
    alignment: float = Field(0.1, ge=0)
    balance: float = Field(0.01, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> FamouSRecConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")
        if len(self.experts) < 2:
            raise ValueError(f"experts={list(self.experts)} leaves no choice; name two or more")
        if self.top_n > len(self.experts):
            raise ValueError(f"top_n={self.top_n} exceeds the {len(self.experts)} experts")
        return self


# -- the spectrum of rows of any length ----------------------------------------------------------


@dataclass(frozen=True)
class RowSpectra:
    """Fourier transforms of the B rows of one batch, each over its own length n <= T.

    F is T // 2 + 1, of which a row of length n has n // 2 + 1. A spectrum is [..., 2, F, h]: real
    and imaginary parts, scaled so that its energy is that of the row.

    basis: [B, 2, F, T], zero where a row has no such item or frequency.
    between: [B, F, G], a row's frequencies between those of the grid of ``Spectra``.
    """

    basis: Tensor
    between: Tensor

    def transform(self, x: Tensor) -> Tensor:
        """Rows [B, T, h], padding ignored -> spectra [B, 2, F, h]."""
        return (self.basis.flatten(1, 2) @ x).view(*self.basis.shape[:3], -1)

    def inverse(self, spectra: Tensor) -> Tensor:
        """Spectra [B, K, 2, F, h] -> rows [B, K, T, h], zero on padding."""
        back = self.basis.flatten(1, 2).transpose(1, 2)[:, None]
        return back @ spectra.flatten(2, 3)

    def read(self, grid: Tensor) -> Tensor:
        """Functions of frequency [G, d] on the grid -> at each row's frequencies [B, F, d]."""
        return self.between @ grid


class Spectra(nn.Module):
    """Fourier bases of rows of 0 to ``max_items`` items, and a grid of G frequencies.

    The grid has the frequencies of the longest row, 0 to 1/2 cycles an item.
    """

    def __init__(self, max_items: int) -> None:
        super().__init__()
        self.grid = max_items // 2 + 1
        length = np.arange(max_items + 1)[:, None, None]
        frequency = np.arange(self.grid)[None, :, None]
        item = np.arange(max_items)[None, None, :]
        size = np.maximum(length, 1)
        angle = 2 * np.pi * (frequency * item % size) / size
        # Each frequency stands for its mirror image too, but for zero and one half.
        mirrored = (frequency > 0) & (2 * frequency < length)
        scale = np.sqrt((1 + mirrored) / size) * (item < length) * (2 * frequency <= length)
        basis = np.stack((scale * np.cos(angle), -scale * np.sin(angle)), axis=1)
        place = np.minimum(frequency / size * max_items, self.grid - 1)  # in steps of the grid
        between = np.maximum(1 - np.abs(place - np.arange(self.grid)[None, None, :]), 0)
        self.register_buffer("basis", torch.from_numpy(basis).float(), persistent=False)
        self.register_buffer("between", torch.from_numpy(between).float(), persistent=False)
        self.basis: Tensor
        self.between: Tensor

    def forward(self, real: Tensor) -> RowSpectra:
        """real: [B, T] bool, padding on the right."""
        longest, lengths = real.shape[1], real.sum(1)
        frequencies = longest // 2 + 1
        return RowSpectra(
            self.basis[:, :, :frequencies, :longest][lengths],
            self.between[:, :frequencies][lengths],
        )


# -- the experts ---------------------------------------------------------------------------------


class _Transformer(nn.Module):
    """SASRec's encoder."""

    def __init__(self, config: FamouSRecConfig) -> None:
        super().__init__()
        self.encoder = SequenceEncoder(
            config.dim,
            layers=config.layers,
            heads=config.heads,
            inner=config.inner,
            max_items=config.max_items,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )

    def forward(self, x: Tensor, real: Tensor, spectra: RowSpectra) -> Tensor:
        """x: [B, T, h] -> states [B, T, h], as of every expert."""
        states: Tensor = self.encoder(x, real)
        return states


class _GRU(nn.Module):
    """GRU4Rec's recurrence and projection."""

    def __init__(self, config: FamouSRecConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(config.dim, config.gru_width, bias=False, batch_first=True)
        self.out = nn.Linear(config.gru_width, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        for weight in self.gru.parameters():
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, real: Tensor, spectra: RowSpectra) -> Tensor:
        states: Tensor = self.norm(self.out(self.gru(self.dropout(x))[0]))
        return states


class _Filter(nn.Module):
    """FMLP-Rec: layers of a complex gain for each frequency and dimension, and a feed-forward.

    A row of one length is filtered in a circle, so order is known by what is read last; there are
    no position embeddings.
    """

    def __init__(self, config: FamouSRecConfig) -> None:
        super().__init__()
        dim, grid = config.dim, config.max_items // 2 + 1
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.gains = nn.Parameter(0.02 * torch.randn(config.layers, grid, 2 * dim))
        self.inner = nn.ModuleList(nn.Linear(dim, config.inner) for _ in range(config.layers))
        self.outer = nn.ModuleList(nn.Linear(config.inner, dim) for _ in range(config.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * config.layers))
        self.inner.apply(initialize)
        self.outer.apply(initialize)

    def forward(self, x: Tensor, real: Tensor, spectra: RowSpectra) -> Tensor:
        x = self.dropout(self.norm(x))
        for layer, gains in enumerate(self.gains):
            re, im = spectra.transform(x).unbind(1)  # [B, F, h]
            gain_re, gain_im = spectra.read(gains).chunk(2, -1)
            product = torch.stack((re * gain_re - im * gain_im, re * gain_im + im * gain_re), 1)
            filtered = spectra.inverse(product[:, None])[:, 0]
            x = self.norms[2 * layer](x + self.dropout(filtered))
            wide = F.gelu(self.inner[layer](x))
            x = self.norms[2 * layer + 1](x + self.dropout(self.outer[layer](wide)))
        return x


class _Convolution(nn.Module):
    """NextItNet: residual causal convolutions, each twice as far apart as the one before."""

    def __init__(self, config: FamouSRecConfig) -> None:
        super().__init__()
        self.reach = config.kernel - 1
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.dim, config.dim, config.kernel, dilation=2**layer)
            for layer in range(config.layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(config.layers))

    def forward(self, x: Tensor, real: Tensor, spectra: RowSpectra) -> Tensor:
        x = self.dropout(self.norm(x))
        for layer, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            seen = F.pad(x.transpose(1, 2), (self.reach * 2**layer, 0))
            x = norm(x + self.dropout(F.relu(convolve(seen).transpose(1, 2))))
        return x


EXPERTS: dict[Kind, type[nn.Module]] = {
    "transformer": _Transformer,
    "gru": _GRU,
    "filter": _Filter,
    "convolution": _Convolution,
}


# -- the recommender -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """What the experts make of B users.

    states: u_k [B, K, h]. again: the same under another dropout, None if not asked for.
    scores: p [B, K]. kept: [B, K] bool, the experts that u is made of. user: u [B, h].
    """

    states: Tensor
    again: Tensor | None
    scores: Tensor
    kept: Tensor
    user: Tensor


class FamouSRec(ItemTable):
    """The recommender. A user is the mixture of its experts, an item its embedding."""

    Config = FamouSRecConfig
    uses_backbone = False
    item_tensors = frozenset({"items.weight"})

    def __init__(
        self,
        config: FamouSRecConfig,
        catalog: Catalog,
        backbone: Backbone | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        count = len(config.experts)
        self.items = nn.Embedding(len(catalog), config.dim)
        self.spectra = Spectra(config.max_items)
        self.experts = nn.ModuleList(EXPERTS[kind](config) for kind in config.experts)
        place = torch.arange(self.spectra.grid) * count // self.spectra.grid
        inside = F.one_hot(place, count).float()
        self.bands = nn.Parameter(BAND * (2 * inside - 1))  # logits of m: [G, K]
        self.router = nn.Sequential(
            nn.Linear(count + config.dim, config.router_width),
            nn.ReLU(),
            nn.Linear(config.router_width, count),
        )
        self.items.apply(initialize)
        self.router.apply(initialize)

    def forward(self, histories: Ragged, *, twice: bool = False) -> Mixture:
        """Users of rows of 1 to ``max_items`` items; ``twice``: the experts under two dropouts."""
        items, real = pad(histories, self.items.weight.device)
        x = self.items(items) * real[..., None]
        spectra = self.spectra(real)
        gains = spectra.read(torch.sigmoid(self.bands)).transpose(1, 2)  # m: [B, K, F]
        heard = spectra.transform(x)[:, None] * gains[:, :, None, :, None]  # [B, K, 2, F, h]
        energy = heard.square().sum((2, 3, 4))
        mean = x.sum(1) / real.sum(1, keepdim=True)
        scores = self.router(torch.cat((torch.log(energy + QUIET), mean), 1)).softmax(-1)
        kept = top_n(scores, self.config.top_n)
        inputs = x[:, None] + spectra.inverse(heard)
        states = self._read(inputs, real, spectra)
        again = self._read(inputs, real, spectra) if twice else None
        weights = scores * kept
        weights = weights / weights.sum(-1, keepdim=True)
        return Mixture(states, again, scores, kept, (weights[:, None] @ states)[:, 0])

    def _read(self, inputs: Tensor, real: Tensor, spectra: RowSpectra) -> Tensor:
        """Every expert's state at the newest item. inputs: [B, K, T, h] -> [B, K, h]."""
        parts = zip(self.experts, inputs.unbind(1), strict=True)
        return torch.stack([last_of(expert(x, real, spectra), real) for expert, x in parts], 1)

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Prefixes of the training sequences, each with its next item."""
        return sequence_batches(
            sequences,
            supervision="last",
            n_items=self.n_items,
            max_items=self.config.max_items,
            seed=seed,
            epoch=epoch,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            targets_per_user=self.config.targets_per_user,
        )

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        return [
            Stage("train", decayed(self.parameters(), lr, weight_decay), self.batches, self.loss)
        ]

    def loss(self, batch: Batch) -> Losses:
        """Next-item loss, the two contrastive tasks and the load balance, mean over rows."""
        config = self.config
        mixture = self(batch.histories, twice=config.specialization > 0)
        device = mixture.user.device
        targets = torch.from_numpy(batch.targets.astype(np.int64)).to(device)
        parts = {
            "rec": catalog_loss(mixture.user @ self.items.weight.T, targets),
            "balance": load_balance(mixture.scores, mixture.kept)[0],
        }
        total = parts["rec"] + config.balance * parts["balance"]
        if mixture.again is not None:
            parts["specialization"] = specialization_loss(
                mixture.states, mixture.again, config.temperature
            )
            total = total + config.specialization * parts["specialization"]
        if config.alignment:
            users = torch.from_numpy(batch.users).to(device)
            parts["alignment"] = alignment_loss(mixture.states, users, config.temperature)
            total = total + config.alignment * parts["alignment"]
        lengths = batch.histories.lengths
        return Losses(
            total,
            {name: part.detach() for name, part in parts.items()},
            int(lengths.sum()),
            len(lengths) * int(lengths.max()),
        )

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """[B, h] float32."""
        return encode_rows(
            self, histories, lambda rows: self(rows).user, max_items=self.config.max_items
        )


def specialization_loss(states: Tensor, again: Tensor, temperature: float) -> Tensor:
    """SPE: which expert made u_k, told from the u'_j of the same user; mean. [B, K, h] both."""
    scores = F.normalize(states, dim=-1) @ F.normalize(again, dim=-1).mT / temperature  # [B, K, K]
    own = torch.arange(scores.shape[1], device=scores.device).repeat(len(scores))
    return F.cross_entropy(scores.flatten(0, 1), own)


def alignment_loss(states: Tensor, users: Tensor, temperature: float) -> Tensor:
    """ALI: whose history u_k is of, told from the u_j of the batch; mean over pairs k != j.

    states: [B, K, h]. users: [B]; other rows of the same user are no negatives.
    """
    unit = F.normalize(states, dim=-1).transpose(0, 1)  # [K, B, h]
    count, rows = unit.shape[:2]
    k, j = (~torch.eye(count, dtype=torch.bool, device=unit.device)).nonzero(as_tuple=True)
    scores = unit[k] @ unit[j].mT / temperature  # [K (K - 1), B, B]
    same = (users[:, None] == users).fill_diagonal_(False)
    own = torch.arange(rows, device=unit.device).repeat(len(k))
    return F.cross_entropy(scores.masked_fill(same, -math.inf).flatten(0, 1), own)
