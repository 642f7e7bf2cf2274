"""FamouSRec-style: a frequency-augmented mixture of heterogeneous experts.

After Zhang, Xie, Lu, Sun, Zhao, Kang, et al., "Frequency-Augmented Mixture-of-Heterogeneous-Experts
Framework for Sequential Recommendation", WWW '25.

This is a reconstruction. The paper's idea is that each kind of sequence encoder favours some
frequencies of a history (self-attention the low ones), so that experts of different kinds should
be mixed by a router that sees frequencies, with two contrastive tasks that keep them different and
in one space. We know of no code of the authors; everything below that idea is our own design, and
its scores are those of a "FamouSRec-style" model.

For a history X [n, h] of item embeddings, with the real Fourier transform over its own n items,

    X_k = irFFT(m_k * rFFT(X))                          expert k's band, m_k in (0, 1) trained
    u_k = expert_k(X + X_k)                             the state at the newest item
    p   = softmax(MLP([log |m_k * rFFT(X)|^2]_k, mean X))
    u   = sum_k p_k u_k                                 over the top_n experts, p renormalised
    r_i = u . E[i]

    L = CE(r, next) + specialization * SPE + alignment * ALI + balance * BAL

    SPE  for u_k the positive is the same expert's u'_k under another dropout mask, the negatives
         are the other experts' u'_j of the same user
    ALI  for u_k the positive is another expert's u_j of the same user, the negatives are that
         expert's vectors of other users in the batch
    BAL  the Switch load balance of p                   l2rec.modules.experts

SPE and ALI are InfoNCE of cosine / temperature. The experts are a causal Transformer (SASRec), a
GRU (GRU4Rec), a learned filter over the whole spectrum (FMLP-Rec) and dilated causal convolutions
(NextItNet); in the order of ``experts`` their bands start from the lowest to the highest.

A filter mixes all items of a row, also those after a position. So a row is one prefix that predicts
its next item alone, and its transform is that of its own length: neither padding nor the rest of a
batch changes it. m_k and the filters of FMLP-Rec are stored at the frequencies of a row of
``max_items`` and interpolated linearly for shorter rows, which have fewer frequencies.
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
from l2rec.modules.encoder import SequenceEncoder, check_heads, initialize
from l2rec.modules.experts import load_balance, top_n
from l2rec.modules.item_table import ItemTable
from l2rec.modules.objectives import fused_catalog_loss
from l2rec.modules.processes import everyone
from l2rec.modules.sequences import as_index, encode_rows, last_of, pad, sequence_batches
from l2rec.protocols import Losses, Stage, decayed

Kind = Literal["transformer", "gru", "filter", "convolution"]

BAND = 3.0
"""Logit of m_k inside its band before training; outside it is the negative of this."""
QUIET = 1e-8
"""Energy added before the logarithm, so that a band without any is finite."""


class FamouSRecConfig(BaseModel):
    """Options of FamouSRec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int = Field(64, ge=1)
    """Width of item vectors and states."""
    experts: tuple[Kind, ...] = ("transformer", "gru", "filter", "convolution")
    """Kind of each expert; a kind may occur several times."""
    top_n: int = Field(2, ge=1)
    """Experts mixed into a user vector, those that the router scores highest."""
    router_width: int = Field(64, ge=1)
    """Width of the router's hidden layer."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    layers: int = Field(2, ge=1)
    """Layers of every expert but the GRU, which has one."""
    heads: int = Field(2, ge=1)
    """Attention heads of the Transformer; they divide ``dim``."""
    inner: int = Field(256, ge=1)
    """Width of the feed-forward parts of Transformer and filter."""
    gru_width: int = Field(128, ge=1)
    """Width of the GRU's state."""
    kernel: int = Field(3, ge=1)
    """Items that one convolution reads, ``2 ** layer`` apart."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of attention weights."""

    targets_per_user: int = Field(4, ge=1)
    """Most prefixes of a user in an epoch, drawn anew in each."""
    temperature: float = Field(0.2, gt=0)
    """Temperature of both contrastive tasks."""
    specialization: float = Field(0.1, ge=0)
    """Weight of SPE; 0 leaves it out."""
    alignment: float = Field(0.1, ge=0)
    """Weight of ALI; 0 leaves it out."""
    balance: float = Field(0.01, ge=0)
    """Weight of BAL."""

    @model_validator(mode="after")
    def _consistent(self) -> FamouSRecConfig:
        check_heads(self.dim, self.heads)
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
    between: [B, F, G] weights that interpolate the grid of `Spectra` at a row's frequencies.
    """

    basis: Tensor
    between: Tensor

    def transform(self, x: Tensor) -> Tensor:
        """Transform rows [B, T, h], whose padding is ignored, to spectra [B, 2, F, h]."""
        return (self.basis.flatten(1, 2) @ x).view(*self.basis.shape[:3], -1)

    def inverse(self, spectra: Tensor) -> Tensor:
        """Transform spectra [B, K, 2, F, h] to rows [B, K, T, h], zero at padding."""
        back = self.basis.flatten(1, 2).transpose(1, 2)[:, None]
        return back @ spectra.flatten(2, 3)

    def read(self, grid: Tensor) -> Tensor:
        """Interpolate functions of frequency on the grid [G, d] at each row's: [B, F, d]."""
        return self.between @ grid


class Spectra(nn.Module):
    """Fourier bases of rows of 0 to ``max_items`` items, and a grid of G frequencies.

    The grid has the frequencies of a row of ``max_items``, from 0 to 1/2 cycles an item.
    """

    def __init__(self, max_items: int) -> None:
        super().__init__()
        self.grid = max_items // 2 + 1
        length = np.arange(max_items + 1)[:, None, None]
        frequency = np.arange(self.grid)[None, :, None]
        item = np.arange(max_items)[None, None, :]
        size = np.maximum(length, 1)
        angle = 2 * np.pi * (frequency * item % size) / size
        # Each frequency but zero and one half stands for its mirror image too.
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
        """Select the bases of the rows of a grid; real: [B, T] bool, padding on the right."""
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
        self.encoder = SequenceEncoder.from_config(config, dim=config.dim)

    def forward(self, x: Tensor, real: Tensor, spectra: RowSpectra) -> Tensor:
        """Encode rows [B, T, h] to states [B, T, h], as every expert does."""
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
    """FMLP-Rec: layers of a complex gain for each frequency and dimension, and a feed-forward part.

    There are no position embeddings: a row is filtered as a circle, and the state at its newest
    item is read.
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
    """NextItNet: residual causal convolutions, each dilated twice as far as the one before."""

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
    """Outputs of the experts for B users, and the user vectors mixed from them."""

    states: Tensor
    """u_k [B, K, h]."""
    again: Tensor | None
    """u'_k [B, K, h], the same under another dropout mask; None if not asked for."""
    scores: Tensor
    """p [B, K]."""
    chosen: Tensor
    """Experts that are mixed [B, K] bool."""
    user: Tensor
    """u [B, h]."""


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
        """Encode rows of 1 to ``max_items`` items; ``twice`` also under another dropout mask."""
        items, real = pad(histories, self.items.weight.device)
        x = self.items(items) * real[..., None]
        spectra = self.spectra(real)
        gains = spectra.read(torch.sigmoid(self.bands)).transpose(1, 2)  # m: [B, K, F]
        heard = spectra.transform(x)[:, None] * gains[:, :, None, :, None]  # [B, K, 2, F, h]
        energy = heard.square().sum((2, 3, 4))
        mean = x.sum(1) / real.sum(1, keepdim=True)
        scores = self.router(torch.cat((torch.log(energy + QUIET), mean), 1)).softmax(-1)
        chosen = top_n(scores, self.config.top_n)
        inputs = x[:, None] + spectra.inverse(heard)
        states = self._read(inputs, real, spectra)
        again = self._read(inputs, real, spectra) if twice else None
        weights = scores * chosen
        weights = weights / weights.sum(-1, keepdim=True)
        return Mixture(states, again, scores, chosen, (weights[:, None] @ states)[:, 0])

    def _read(self, inputs: Tensor, real: Tensor, spectra: RowSpectra) -> Tensor:
        """Read each expert's state at the newest item: inputs [B, K, T, h] -> [B, K, h]."""
        parts = zip(self.experts, inputs.unbind(1), strict=True)
        return torch.stack([last_of(expert(x, real, spectra), real) for expert, x in parts], 1)

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return prefixes of the training sequences, each with its next item."""
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
        """Compute the next-item loss, contrastive tasks and load balance, mean over rows."""
        config = self.config
        mixture = self(batch.histories, twice=config.specialization > 0)
        device = mixture.user.device
        targets = as_index(batch.targets, device)
        parts = {
            "rec": fused_catalog_loss(mixture.user, self.items.weight, targets),
            "balance": load_balance(mixture.scores, mixture.chosen)[0],
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
        """Return user vectors [B, h] float32, the mixtures u.

        Raises:
            DataError: an empty history.
        """
        return encode_rows(
            self, histories, lambda rows: self(rows).user, max_items=self.config.max_items
        )


def specialization_loss(states: Tensor, again: Tensor, temperature: float) -> Tensor:
    """Compute SPE, mean over users and experts.

    Args:
        states: u_k [B, K, h].
        again: u'_k [B, K, h], under another dropout mask.
        temperature: divides the cosines.
    """
    scores = F.normalize(states, dim=-1) @ F.normalize(again, dim=-1).mT / temperature  # [B, K, K]
    same = torch.arange(scores.shape[1], device=scores.device).repeat(len(scores))
    return F.cross_entropy(scores.flatten(0, 1), same)


def alignment_loss(states: Tensor, users: Tensor, temperature: float) -> Tensor:
    """Compute ALI, mean over users and pairs of experts k != j.

    Args:
        states: u_k [B, K, h].
        users: [B] int64; other rows of the same user are no negatives.
        temperature: divides the cosines.

    Where a batch is dealt out over processes, negatives are the rows of all of them.
    """
    unit = F.normalize(states, dim=-1).transpose(0, 1)  # [K, B, h]
    others, first = everyone(F.normalize(states, dim=-1))
    count, rows = unit.shape[:2]
    k, j = (~torch.eye(count, dtype=torch.bool, device=unit.device)).nonzero(as_tuple=True)
    scores = unit[k] @ others.transpose(0, 1)[j].mT / temperature  # [K (K - 1), B, B of all]
    own = first + torch.arange(rows, device=unit.device)
    same = (users[:, None] == everyone(users)[0]).scatter(1, own[:, None], False)
    positive = own.repeat(len(k))
    return F.cross_entropy(scores.masked_fill(same, -math.inf).flatten(0, 1), positive)
