"""HDRec: Hybrid Dual-Semantics Modeling for Enhancing Large Language Model Based Recommendation.

Liu, Li, Li, Zhang, Li, Li. WSDM '26, https://doi.org/10.1145/3773966.3777943

One frozen language model reads a history twice, with a low-rank adapter for each of two sides, and
an item projection layer (IPL) turns the state at every [SEQ] into logits over the catalog:

    text   prompt, text_1 [SEQ], text_2 [SEQ], ...     adapter phi   z_text     Eq. 3-4, 6, 8
    id     prompt, id_1   [SEQ], id_2   [SEQ], ...     adapter psi   z_id       Eq. 5, 8
           id_k = Proj(row of a frozen SASRec)                                  Eq. 7
    align  prompt, text [ALIGN] -> the item itself     adapter phi              Eq. 1-2

    L_Text = CE(z_text) + lambda KL(z_id || z_text) + L_align                   Eq. 9-10
    L_ID   = CE(z_id)   + lambda KL(z_text || z_id)                             Eq. 11-12
    each with the other side detached, alternately, T steps a batch             Algorithm 1

    z = z_text + alpha (z_id - min z_id + eps) sigmoid(z_id - mean z_id)        Eq. 13-18

The SASRec of the ids is trained first, on the same training prefixes, in a stage before the
adapters. Every comparison of the paper is an option: ``design`` (Table 4), ``adapters`` and
``heads`` (its hybrid rows), ``alternate`` and ``kl`` (Fig. 4), ``training_loss`` and ``dominant``
(Fig. 5), ``kl`` and ``alpha`` (Fig. 6).

Choices where the paper leaves one, and deviations:

- z in Eq. 13-18 are logits, although Eq. 8 defines them as distributions: a sigmoid of centred
  probabilities would be about one half everywhere. ``calibrate=probabilities`` follows Eq. 8.
- All losses are means over the positions of a batch. In the paper cross-entropies are sums over
  users and positions (Eq. 2, 4, 5) and KL is a mean over the positions of a user (Eq. 9, 11).
- L_align (Task 1) is not part of Eq. 10; it is added to it with weight ``align``, over
  ``align_items`` items drawn for each update.
- IPL and [SEQ] are shared and are updated by both losses; Proj is updated by L_ID alone, [ALIGN] by
  L_Text alone. IPL and Proj have one hidden layer with GELU, as wide as the backbone's states.
- The adapters update the matrices q and v of every block by default.
- The last ID representation of Algorithm 1 (t = T) is not used and so not computed.
- In variant 3 of Fig. 5 (``dominant=both``) alpha multiplies the id side alone; before both sides
  it would change no ranking.
- ``design=late`` adds the logits of the two models.
- A bidirectional backbone is masked by items: a token sees its whole item and the items before it,
  so that every [SEQ] can predict the next item.

The softmax is over the items of training. A new item enters by its text: its row of IPL, and its
SASRec row, are weighted means of the rows of those items that its [ALIGN] state predicts. A model
without Task 1 takes none.
"""

from __future__ import annotations

__all__ = ["HDRec", "HDRecConfig", "fuse"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches, plan_batches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged, flat_index
from l2rec.data.text import tokenize
from l2rec.errors import ConfigError
from l2rec.methods.sasrec import SASRec, SASRecConfig
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import ENCODED_TOKENS, Backbone
from l2rec.modules.item_text import separators
from l2rec.modules.lora import LoRA
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.sequences import (
    as_index,
    check_new_texts,
    encode_rows,
    last_of,
    one_each,
    stacked,
)
from l2rec.modules.views import Segments, semantic_tokens
from l2rec.protocols import Losses, Scorer, Stage, decayed

Side = Literal["text", "id"]
DOMINANT = ("text", "id", "both")
"""Values of ``dominant``, the side that is not calibrated."""


class HDRecConfig(BaseModel):
    """Options of HDRec; the defaults are the paper's where it gives a value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # what is read
    design: Literal["hybrid", "text", "id", "early", "late"] = "hybrid"
    """Row of Table 4: both sides, one of them, both in one input (early fusion), or the text side
    with a SASRec's logits added (late fusion).
    """
    max_items: int = Field(20, ge=1)
    """Most items of a history that are read, the newest."""
    item_tokens: int = Field(24, ge=1)
    """Most tokens of an item's text."""
    max_tokens: int = Field(1024, ge=8)
    """Most tokens of a row, prompt included."""
    sequence_prompt: str = "Provide the next item's hidden state for each [SEQ]. User's history:"
    """Prompt_seq of Eq. 3 and 5."""
    align_prompt: str = "Provide the item's hidden state for [ALIGN]. Item Description:"
    """Prompt_align of Eq. 1."""

    # what is trained
    matrices: tuple[str, ...] = ("q", "v")
    """Matrices of the backbone that the adapters update."""
    rank: int = Field(8, ge=1)
    """Rank of the adapters."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the adapters: their updates are multiplied by ``lora_alpha / rank``."""
    adapters: Literal[1, 2] = 2
    """Low-rank adapters: one for each side, or one for both ("Single LoRA")."""
    heads: Literal[1, 2] = 1
    """Item projection layers: one for both sides, or one for each ("Dual IPL")."""
    id_dim: int = Field(128, ge=1)
    """Width of SASRec's rows ("CF Emb Size")."""
    pretrained_id: bool = True
    """SASRec trained before the adapters; without it its rows start at random and are trained with
    the adapters. With ``design=late`` the whole SASRec is trained with them either way.
    """
    sasrec_epochs: int = Field(60, ge=1)
    """Most epochs of SASRec's stage."""
    sasrec_lr: float = Field(1e-3, gt=0)
    """Learning rate of SASRec's stage."""

    # losses
    alternate: bool = True
    """Algorithm 1; without it both sides are updated by one backward pass ("w/o DLA")."""
    steps: int = Field(2, ge=2)
    """T of Algorithm 1: T - 1 updates of each side for each batch."""
    kl: float = Field(0.7, ge=0)
    """lambda of Eq. 10 and 12, by default that of Scientific (Table 2); 0 is "w/o KL"."""
    align: float = Field(1.0, ge=0)
    """Weight of L_align; 0 leaves Task 1 out."""
    align_items: int = Field(32, ge=1)
    """Items drawn for L_align in each update of the text side."""
    training_loss: Literal["separate", "fused"] = "separate"
    """L_Text and L_ID, or the cross-entropy of the fused logits (variant 1 of Fig. 5)."""

    # fusion
    alpha: float = Field(0.5, ge=0)
    """alpha of Eq. 17, by default that of Scientific (Table 2)."""
    dominant: Literal["text", "id", "both"] = "text"
    """Side that is not calibrated: Eq. 18, with the roles swapped (variant 2 of Fig. 5), or with
    both sides calibrated (variant 3).
    """
    calibrate: Literal["logits", "probabilities"] = "logits"
    """Meaning of z in Eq. 13-18."""
    neighbours: int = Field(10, ge=1)
    """Items whose rows are averaged for a new item."""

    @model_validator(mode="after")
    def _consistent(self) -> HDRecConfig:
        if self.design != "hybrid" and (self.heads == 2 or self.training_loss == "fused"):
            raise ValueError(
                f"heads=2 and training_loss=fused need design=hybrid, not {self.design}"
            )
        return self


@dataclass(frozen=True)
class Reading:
    """Logits of one side, and the cost of reading them."""

    logits: Tensor
    """Logits [K, N] float32 at K positions [SEQ]."""
    tokens: int
    """Tokens read."""
    computed: int
    """Tokens computed, padding included."""


def calibrated(z: Tensor, eps: float = 1e-8) -> Tensor:
    """Compute (z - min z + eps) sigmoid(z - mean z) over the catalog, Eq. 13-16: [B, N]."""
    center = z.mean(-1, keepdim=True)
    lowest = z.amin(-1, keepdim=True)
    return (z - lowest + eps) * torch.sigmoid(z - center)


def fuse(
    text: Tensor,
    identity: Tensor,
    alpha: float,
    *,
    dominant: str = "text",
    calibrate: str = "logits",
) -> Tensor:
    """Fuse the logits of both sides [B, N] into scores [B, N]: Eq. 13-18 and variants of Fig. 5.

    Args:
        text, identity: z_text and z_id.
        alpha: weight of the calibrated side.
        dominant, calibrate: as of `HDRecConfig`.
    """
    if calibrate == "probabilities":
        text, identity = text.softmax(-1), identity.softmax(-1)
    if dominant == "id":
        return identity + alpha * calibrated(text)
    return (calibrated(text) if dominant == "both" else text) + alpha * calibrated(identity)


def alignment(logits: Tensor, other: Tensor) -> Tensor:
    """Compute KL(other || side) of Eq. 9 and 11, mean over positions.

    Args:
        logits: [K, N] of the side that is updated.
        other: [K, N] of the other side; no gradient reaches it.
    """
    target = other.detach().log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")


class ItemProjection(nn.Module):
    """IPL of Eq. 2: a feed-forward network from states [K, D] to logits [K, N] float32.

    Rows of items that are added after training follow the trained ones.
    """

    def __init__(self, dim: int, n_items: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.items = nn.Linear(dim, n_items)
        self.register_buffer("added", torch.zeros(0, dim), persistent=False)
        self.register_buffer("added_bias", torch.zeros(0), persistent=False)
        self.added: Tensor
        self.added_bias: Tensor

    def add(self, weights: Tensor) -> None:
        """Add n items whose rows are mixtures of the N trained ones: weights [n, N]."""
        self.added = torch.cat((self.added, weights @ self.items.weight))
        self.added_bias = torch.cat((self.added_bias, weights @ self.items.bias))

    def forward(self, states: Tensor) -> Tensor:
        """Compute logits [K, N] of states [K, D]."""
        hidden = F.gelu(self.hidden(states.to(self.hidden.weight.dtype)))
        logits: Tensor = self.items(hidden)
        if len(self.added):
            added = F.linear(hidden, self.added, self.added_bias)
            logits = torch.cat((logits, added), dim=-1)
        return logits


class HDRec(nn.Module):
    """The recommender. Its scores are fused logits, not inner products of vectors."""

    Config = HDRecConfig
    uses_backbone = True
    item_tensors = frozenset(
        f"{name}.{part}"
        for name in ("ipl.0.items", "ipl.1.items", "sasrec.items")
        for part in ("weight", "bias")
    )

    def __init__(
        self,
        config: HDRecConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.sides: tuple[Side, ...] = ("text", "id") if config.design == "hybrid" else ("text",)
        if config.design == "id":
            self.sides = ("id",)
        texts = catalog.texts if config.design == "id" else catalog.require_texts("HDRec")
        start = separators(backbone)[0]
        self.prompt = start + self._words(config.sequence_prompt)
        self.align_prompt = start + self._words(config.align_prompt)
        self._check_lengths()
        self.tokens = tokenize(texts, backbone.tokenizer, config.item_tokens, cache)

        linears = find_linears(backbone.model, config.matrices)
        count = min(config.adapters, len(self.sides))
        self.lora = nn.ModuleList(
            LoRA(linears, rank=config.rank, alpha=config.lora_alpha) for _ in range(count)
        )
        for adapter in self.lora:
            adapter.attach()  # type: ignore[operator]
        dim, n_items = backbone.dim, len(catalog)
        self.ipl = nn.ModuleList(ItemProjection(dim, n_items) for _ in range(config.heads))
        scale = float(backbone.word_scale())
        self.seq = nn.Parameter(scale * torch.randn(backbone.word_dim))
        if "text" in self.sides:
            self.align = nn.Parameter(scale * torch.randn(backbone.word_dim))
        if self._has_ids:
            self.sasrec = SASRec(SASRecConfig(dim=config.id_dim), catalog)
        if self._projects_ids:
            self.project = nn.Sequential(
                nn.Linear(config.id_dim, dim), nn.GELU(), nn.Linear(dim, backbone.word_dim)
            )
        # SASRec rows of items that are added after training.
        self.register_buffer("added_ids", torch.zeros(0, config.id_dim), persistent=False)
        self.added_ids: Tensor

    @property
    def _has_ids(self) -> bool:
        return self.config.design != "text"

    @property
    def _projects_ids(self) -> bool:
        return self.config.design in ("hybrid", "id", "early")

    @property
    def _aligns(self) -> bool:
        return self.config.align > 0 and self.config.training_loss == "separate"

    def _words(self, text: str) -> list[int]:
        tokenizer = self.backbone.tokenizer
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _check_lengths(self) -> None:
        """Check that no row is ever cut: a later text would decide which earlier ones are read.

        Raises:
            ConfigError: the longest possible row exceeds ``max_tokens`` or the backbone.
        """
        config = self.config
        item = 2 if config.design == "id" else config.item_tokens + self._marks
        needed = max(
            len(self.prompt) + config.max_items * item,
            len(self.align_prompt) + config.item_tokens + 1,
        )
        limit = min(config.max_tokens, self.backbone.max_positions or config.max_tokens)
        if needed > limit:
            raise ConfigError(
                f"max_items={config.max_items} of item_tokens={config.item_tokens} and the prompt "
                f"may need {needed} tokens, backbone and max_tokens allow {limit}; lower them"
            )

    @property
    def _marks(self) -> int:
        """Tokens after an item's text: [SEQ], with early fusion the item's id before it."""
        return 2 if self.config.design == "early" else 1

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.item_tokens

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.tokens)

    # -- reading ---------------------------------------------------------------------------------

    def _id_vectors(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Compute Proj(SRS row) of Eq. 7: items [K] -> [K, D]."""
        rows = self.sasrec.items.weight
        if self.config.pretrained_id:
            rows = rows.detach()
        rows = torch.cat((rows, self.added_ids))
        vectors: Tensor = self.project(rows[self._ints(items)])
        return vectors.to(self.backbone.dtype)

    def _ints(self, values: npt.NDArray[np.integer]) -> Tensor:
        return as_index(values, self.seq.device)

    def _run(self, x: Tensor, segments: Segments, side: Side) -> tuple[Tensor, Packing]:
        """Run the frozen model with the adapter of a side: inputs [n, D] -> states [n, D]."""
        attend = Attend.CAUSAL if self.backbone.causal else Attend.BLOCK_CAUSAL
        group, positions = pack(segments.lengths, attend, blocks=segments.block)
        packing = Packing((group,), positions)
        adapter: LoRA = self.lora[self._of(side, len(self.lora))]  # type: ignore[assignment]
        with adapter.enabled():
            return self.backbone(x, packing), packing

    def _of(self, side: Side, count: int) -> int:
        """Return the number of the adapter or head that a side uses, of ``count``."""
        return min(self.sides.index(side), count - 1)

    def _head(self, states: Tensor, side: Side) -> Tensor:
        """Apply the IPL of a side: states [K, D] -> logits [K, N] float32."""
        logits: Tensor = self.ipl[self._of(side, len(self.ipl))](states)
        return logits

    def read(self, histories: Ragged, side: Side, *, every: bool) -> Reading:
        """Compute the logits of one side.

        Args:
            histories: rows of at most ``max_items`` items.
            side: which side.
            every: whether to read every [SEQ], or that of the newest item alone.
        """
        if side == "id":
            x, segments = self._id_input(histories)
        else:
            x, segments = self._text_input(histories, self.prompt)
        states, packing = self._run(x, segments, side)
        read = segments.last_token if every else segments.last_token[segments.last]
        logits = self._head(states[read], side)
        if self.config.design == "late":
            logits = logits + self._sasrec_logits(histories, every)
        return Reading(logits, len(packing.positions), packing.computed)

    def _text_input(self, histories: Ragged, prompt: list[int]) -> tuple[Tensor, Segments]:
        """Embed ``prompt, text [SEQ], text [SEQ], ...`` of Eq. 3: x [n, D]."""
        config = self.config
        read = semantic_tokens(
            histories,
            self.tokens,
            item_tokens=config.item_tokens,
            max_tokens=config.max_tokens,
            max_items=config.max_items,
            before=prompt,
            after=[0] * self._marks,  # placeholders of the id and [SEQ] vectors
            device=self.seq.device,
        )
        x, ends = self.backbone.embed(read.ids), read.segments.last_token
        if config.design == "early":
            x = x.index_copy(0, ends - 1, self._id_vectors(histories.values))
        return x.index_copy(0, ends, self._mark(self.seq, ends)), read.segments

    def _mark(self, vector: Tensor, places: Tensor) -> Tensor:
        """Repeat a trained vector [D], [SEQ] or [ALIGN], for K places [K, D]."""
        return vector.to(self.backbone.dtype).expand(len(places), -1)

    def _id_input(self, histories: Ragged) -> tuple[Tensor, Segments]:
        """Embed ``prompt, id [SEQ], id [SEQ], ...`` of Eq. 5: x [n, D]."""
        counts, prompt = histories.lengths, len(self.prompt)
        size = np.full(len(histories.values), 2)
        size[histories.offsets[:-1]] += prompt
        ends = self._ints(np.cumsum(size) - 1)
        ids = np.zeros(int(size.sum()), dtype=np.int64)
        starts = np.cumsum(size)[histories.offsets[:-1]] - size[histories.offsets[:-1]]
        ids[flat_index(starts, np.full_like(starts, prompt))] = np.tile(self.prompt, len(counts))
        x = self.backbone.embed(self._ints(ids))
        x = x.index_copy(0, ends - 1, self._id_vectors(histories.values))
        x = x.index_copy(0, ends, self._mark(self.seq, ends))
        segments = Segments(
            lengths=self._ints(prompt + 2 * counts),
            blocks=self._ints(counts),
            block=self._ints(np.repeat(np.arange(len(size)), size)),
            row=self._ints(np.repeat(np.arange(len(counts)), counts)),
        )
        return x, segments

    def _sasrec_logits(self, histories: Ragged, every: bool) -> Tensor:
        """Compute SASRec's logits [K, N] at the same positions, for ``design=late``."""
        states, real = self.sasrec(histories)
        users = states[real] if every else last_of(states, real)
        logits: Tensor = users @ self.sasrec.items.weight.T
        return logits

    def _align_states(self, items: npt.NDArray[np.integer]) -> tuple[Tensor, Packing]:
        """Compute h_ALIGN of Eq. 2, the states at [ALIGN] of ``prompt, text [ALIGN]``: [K, D]."""
        read = semantic_tokens(
            one_each(items.astype(np.int32)),
            self.tokens,
            item_tokens=self.config.item_tokens,
            max_tokens=self.config.max_tokens,
            max_items=1,
            before=self.align_prompt,
            after=[0],
            device=self.seq.device,
        )
        ends = read.segments.last_token
        x = self.backbone.embed(read.ids).index_copy(0, ends, self._mark(self.align, ends))
        states, packing = self._run(x, read.segments, "text")
        return states[ends], packing

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return SASRec's stage, if its rows are used and pretrained, and that of the adapters."""
        stages = []
        frozen: set[nn.Parameter] = set()
        if self._has_ids and self.config.pretrained_id:
            stages.append(self.sasrec.for_vectors(self.config.sasrec_lr, self.config.sasrec_epochs))
        if self._has_ids and self.config.design != "late":
            frozen |= set(self.sasrec.encoder.parameters())
            if self.config.pretrained_id:
                frozen |= set(self.sasrec.parameters())
        rest = [p for p in self.parameters() if p not in frozen]
        if "text" in self.sides and not self._aligns:
            rest = [p for p in rest if p is not self.align]
        stages.append(Stage("adapters", decayed(rest, lr, weight_decay), self.batches, self.loss))
        return stages

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return batches in which every next item of every sequence is a target once an epoch."""
        return TrainingBatches(
            sequences,
            supervision="all",
            max_items=self.config.max_items,
            window=self.config.max_items,
            negatives=0,
            item_costs=self._item_costs(),
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
        )

    def _item_costs(self) -> npt.NDArray[np.int64]:
        """Count the tokens that an item adds to the rows of all sides: [N] int64."""
        text = self.tokens.lengths + self._marks
        return text * ("text" in self.sides) + 2 * ("id" in self.sides)

    def loss(self, batch: Batch) -> Losses | Iterator[Losses]:
        """Compute the loss of one batch, or of its alternating updates one after the other."""
        targets = self._ints(batch.targets)
        separate = len(self.sides) == 2 and self.config.training_loss == "separate"
        if separate and self.config.alternate:
            return self._alternate(batch.histories, targets)
        return self._jointly(batch.histories, targets)

    def _alternate(self, histories: Ragged, targets: Tensor) -> Iterator[Losses]:
        """Yield the losses of Algorithm 1 for one batch, each side detached for the other."""
        with torch.no_grad():
            z_text = self.read(histories, "text", every=True).logits  # t = 1: no update of phi
        for _ in range(1, self.config.steps):
            identity = self.read(histories, "id", every=True)
            yield self._side_loss("id", identity, z_text, targets)  # line 18
            z_id = identity.logits.detach()  # line 21: as it was before the update
            text = self.read(histories, "text", every=True)
            yield self._side_loss("text", text, z_id, targets)  # line 10, of the next t
            z_text = text.logits.detach()  # line 13

    def _side_loss(
        self, side: Side, reading: Reading, other: Tensor | None, targets: Tensor
    ) -> Losses:
        """Compute L_Text of Eq. 10, with L_align, or L_ID of Eq. 12.

        Args:
            side: which side is updated.
            reading: its logits at K positions.
            other: [K, N] logits of the other side, detached; None where there is none.
            targets: [K] int64, the next items.
        """
        config = self.config
        total = catalog_loss(reading.logits, targets)
        parts: dict[str, Tensor] = {side: total}
        tokens, computed = reading.tokens, reading.computed
        if other is not None and config.kl > 0:
            parts[f"kl_{side}"] = alignment(reading.logits, other)
            total = total + config.kl * parts[f"kl_{side}"]
        if side == "text" and config.align > 0:
            items = torch.randint(self.n_items, (config.align_items,)).numpy()
            states, packing = self._align_states(items)
            parts["align"] = catalog_loss(self._head(states, "text"), self._ints(items))
            total = total + config.align * parts["align"]
            tokens, computed = tokens + len(packing.positions), computed + packing.computed
        return Losses(total, {n: p.detach() for n, p in parts.items()}, tokens, computed)

    def _jointly(self, histories: Ragged, targets: Tensor) -> Losses:
        """Compute the loss of one backward pass: of one side, of both, or of the fused logits."""
        readings = {side: self.read(histories, side, every=True) for side in self.sides}
        if len(readings) == 1:
            ((side, reading),) = readings.items()
            return self._side_loss(side, reading, None, targets)
        text, identity = readings["text"], readings["id"]
        if self.config.training_loss == "fused":
            total = catalog_loss(self._fused(text.logits, identity.logits), targets)
            tokens, computed = text.tokens + identity.tokens, text.computed + identity.computed
            return Losses(total, {"fused": total.detach()}, tokens, computed)
        both = (
            self._side_loss("text", text, identity.logits.detach(), targets),
            self._side_loss("id", identity, text.logits.detach(), targets),
        )
        return Losses(
            both[0].total + both[1].total,
            {**both[0].parts, **both[1].parts},
            sum(losses.tokens for losses in both),
            sum(losses.computed_tokens for losses in both),
        )

    # -- inference -------------------------------------------------------------------------------

    def _fused(
        self,
        text: Tensor,
        identity: Tensor,
        alpha: float | None = None,
        dominant: str | None = None,
    ) -> Tensor:
        """Fuse logits [B, N] as the options say, unless an argument says otherwise."""
        config = self.config
        return fuse(
            text,
            identity,
            config.alpha if alpha is None else alpha,
            dominant=dominant or config.dominant,
            calibrate=config.calibrate,
        )

    def side_logits(self, histories: Ragged) -> list[Tensor]:
        """Compute each side's logits of the next item, [B, N] float32, text first.

        Raises:
            DataError: an empty history.
        """
        cost = int(self._item_costs().max(initial=1))
        rows = max(1, ENCODED_TOKENS // (cost + len(self.prompt)))
        return [
            encode_rows(
                self,
                histories,
                partial(self._next_logits, side=side),
                max_items=self.config.max_items,
                max_rows=8 * rows,
                max_cost=rows * self.config.max_items,
            )
            for side in self.sides
        ]

    def _next_logits(self, histories: Ragged, side: Side) -> Tensor:
        return self.read(histories, side, every=False).logits

    def fused_scorers(
        self, alphas: Sequence[float], dominant: str | None = None
    ) -> list[Callable[[], Scorer]]:
        """Return scorers of this model with other fusions, one for each alpha.

        Scorers that are asked for the same histories in turn share the logits of both sides.

        Args:
            alphas: alpha of Eq. 17 for each scorer.
            dominant: replaces the option of this name, unless it is None.

        Raises:
            ConfigError: a design that fuses nothing.
        """
        if len(self.sides) == 1:
            raise ConfigError(f"design={self.config.design} has no two sides to fuse")
        last: tuple[Ragged, list[Tensor]] | None = None

        def score(histories: Ragged, alpha: float) -> Tensor:
            nonlocal last
            if last is None or last[0] is not histories:
                last = (histories, self.side_logits(histories))
            text, identity = last[1]
            return self._fused(text, identity, alpha, dominant)

        def at(alpha: float) -> Scorer:
            return partial(score, alpha=alpha)

        return [partial(at, alpha) for alpha in alphas]

    def scorer(self) -> Scorer:
        """Return a scorer: histories of B users -> fused logits of Eq. 18, [B, N] float32."""

        def score(histories: Ragged) -> Tensor:
            logits = self.side_logits(histories)
            return logits[0] if len(logits) == 1 else self._fused(logits[0], logits[1])

        return score

    @torch.no_grad()
    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        IPL has no rows for them: each gets the mean of the rows of those ``neighbours`` items that
        Task 1 finds likeliest for its text, weighted by their probabilities.

        Raises:
            DataError: an empty text. ConfigError: a model that reads no texts, or was not trained
                on Task 1.
        """
        if self.config.design in ("id", "late"):
            raise ConfigError(
                f"HDRec with design={self.config.design} ranks what it was trained on: its id side "
                "knows no other item"
            )
        if not self._aligns:
            raise ConfigError(
                "HDRec without Task 1 (align=0 or training_loss=fused) ranks what it was trained "
                "on: nothing says what a new item reads like; train it with align=1 and "
                "training_loss=separate"
            )
        check_new_texts(texts)
        first = self.n_items
        trained: int = self.ipl[0].items.out_features  # type: ignore[union-attr,assignment]
        added = tokenize(texts, self.backbone.tokenizer, self.config.item_tokens)
        self.tokens = stacked(self.tokens, added)
        items = np.arange(first, self.n_items, dtype=np.int32)
        weights = self._likely(items, trained)
        for head in self.ipl:
            head.add(weights)  # type: ignore[operator]
        if self._has_ids:
            self.added_ids = torch.cat((self.added_ids, weights @ self.sasrec.items.weight))
        return items

    def _likely(self, items: npt.NDArray[np.integer], trained: int) -> Tensor:
        """Weigh the likeliest trained items of each item by Task 1: [n, trained], rows sum to 1."""
        parts = []
        for rows in plan_batches(self.tokens.lengths[items], None, max_rows=256, max_cost=4096):
            states, _ = self._align_states(items[rows])
            likely = self._head(states, "text")[:, :trained].softmax(-1)
            best = likely.topk(min(self.config.neighbours, trained), dim=-1)
            weights = torch.zeros_like(likely).scatter_(-1, best.indices, best.values)
            parts.append((rows, weights / weights.sum(-1, keepdim=True)))
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return torch.cat([weights for _, weights in parts])[torch.from_numpy(order)]
