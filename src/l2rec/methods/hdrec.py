"""HDRec: Hybrid Dual-Semantics Modeling for Enhancing Large Language Model Based Recommendation.

Liu, Li, Li, Zhang, Li, Li. WSDM '26, https://doi.org/10.1145/3773966.3777943

One frozen language model reads a history twice, each time with a low-rank adapter of its own, and
one item projection layer (IPL) turns the state at every [SEQ] into logits over the catalog:

    text   prompt, text_1 [SEQ], text_2 [SEQ], ...     adapter phi   z_text     Eq. 3-4, 8
    id     prompt, id_1   [SEQ], id_2   [SEQ], ...     adapter psi   z_id       Eq. 5, 8
           id_k = Proj(frozen SASRec row)                                       Eq. 7
    align  prompt, text [ALIGN] -> the item itself     adapter phi              Eq. 1-2

    L_Text = CE(z_text) + lambda KL(z_id || z_text) + L_align                   Eq. 9-10
    L_ID   = CE(z_id)   + lambda KL(z_text || z_id)                             Eq. 11-12
    each with the other side detached, alternately, T steps a batch             Algorithm 1

    z = z_text + alpha (z_id - min z_id + eps) sigmoid(z_id - mean z_id)        Eq. 13-18

The SASRec that the ids come from is trained first, on the same training prefixes, in a stage of its
own. Every comparison of the paper is a switch: ``design`` (Table 4), ``adapters`` and ``heads``
(its hybrid rows), ``alternate`` and ``kl`` (Fig. 4), ``training_loss`` and ``dominant`` (Fig. 5),
``kl`` and ``alpha`` (Fig. 6).

Choices where the paper leaves one:

- z in Eq. 13-18 are logits, although Eq. 8 calls them distributions: a sigmoid of centred
  probabilities would be one half everywhere. ``calibrate=probabilities`` is the other reading.
- IPL and [SEQ] belong to both sides and move with both losses; Proj moves with L_ID.
- A bidirectional backbone reads histories causally over items (each item sees itself whole and
  those before it), so that every [SEQ] may predict.
- Task 1 is not part of Eq. 10; it is added to it, over ``align_items`` items drawn for each update.
- The last ID representation of Algorithm 1 (t = T) is neither used nor computed.

The softmax over the catalog is fixed. A new item is served through the text path: its row of IPL
(and its id vector) is the mean of those of the items that its own [ALIGN] state takes it for.
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
from l2rec.errors import ConfigError, DataError
from l2rec.methods.sasrec import SASRec, SASRecConfig
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import ENCODED_TOKENS, Attend, Backbone, Packing, pack
from l2rec.modules.item_text import separators
from l2rec.modules.lora import LoRA
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.sequences import encode_rows
from l2rec.modules.views import Segments, semantic_tokens
from l2rec.protocols import EpochBatches, Losses, Scorer, Stage, decayed

Side = Literal["text", "id"]
DOMINANT = ("text", "id", "both")
"""Which side is not calibrated: Eq. 18, its mirror image, none."""


class HDRecConfig(BaseModel):
    """Options of HDRec; the defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # what is read
    design: Literal["hybrid", "text", "id", "early", "late"] = "hybrid"
    """Table 4: both sides, one of them, both in one input, or text beside a SASRec of its own."""
    max_items: int = Field(20, ge=1)
    item_tokens: int = Field(24, ge=1)
    """Most tokens of one item's text."""
    max_tokens: int = Field(1024, ge=8)
    sequence_prompt: str = "Provide the next item's hidden state for each [SEQ]. User's history:"
    align_prompt: str = "Provide the item's hidden state for [ALIGN]. Item Description:"

    # what is trained
    matrices: tuple[str, ...] = ("q", "v")
    rank: int = Field(8, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    adapters: Literal[1, 2] = 2
    """Low-rank adapters: one for each side, or one for both ("Single LoRA")."""
    heads: Literal[1, 2] = 1
    """Item projection layers: shared, or one for each side ("Dual IPL")."""
    id_dim: int = Field(128, ge=1)
    """Size of SASRec's rows."""
    pretrained_id: bool = True
    """False: ids (of ``late``: the whole SASRec) start from scratch and are trained along."""
    sasrec_epochs: int = Field(60, ge=1)
    sasrec_lr: float = Field(1e-3, gt=0)

    # losses
    alternate: bool = True
    """False: both sides in one backward pass ("w/o DLA")."""
    steps: int = Field(2, ge=2)
    """T of Algorithm 1: T - 1 updates of either side for each batch."""
    kl: float = Field(0.7, ge=0)
    """lambda; 0 is "w/o KL"."""
    align: float = Field(1.0, ge=0)
    """Weight of Task 1."""
    align_items: int = Field(32, ge=1)
    """Items that are drawn for it in each update of the text side."""
    training_loss: Literal["separate", "fused"] = "separate"
    """``fused``: cross-entropy of the fused logits instead (variant 1 of Fig. 5)."""

    # fusion
    alpha: float = Field(0.5, ge=0)
    dominant: Literal["text", "id", "both"] = "text"
    """``id`` swaps the roles (variant 2 of Fig. 5), ``both`` calibrates both (variant 3)."""
    calibrate: Literal["logits", "probabilities"] = "logits"
    neighbours: int = Field(10, ge=1)
    """Items that a new one borrows its rows from."""

    @model_validator(mode="after")
    def _consistent(self) -> HDRecConfig:
        if self.design != "hybrid" and (self.heads == 2 or self.training_loss == "fused"):
            raise ValueError(
                f"heads=2 and training_loss=fused need design=hybrid, not {self.design}"
            )
        return self


@dataclass(frozen=True)
class Reading:
    """Logits [K, N] float32 at every [SEQ], and the tokens that were read and computed for them."""

    logits: Tensor
    tokens: int
    computed: int


def calibrated(z: Tensor, eps: float = 1e-8) -> Tensor:
    """Eq. 13-16: (z - min z + eps) sigmoid(z - mean z) over the catalog, [B, N]."""
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
    """Eq. 17-18 and the variants of Fig. 5: logits of both sides [B, N] -> scores [B, N]."""
    if calibrate == "probabilities":
        text, identity = text.softmax(-1), identity.softmax(-1)
    if dominant == "id":
        return identity + alpha * calibrated(text)
    return (calibrated(text) if dominant == "both" else text) + alpha * calibrated(identity)


def alignment(own: Tensor, other: Tensor) -> Tensor:
    """KL(other || own) of Eq. 9 and 11, mean over positions; logits [K, N], ``other`` detached."""
    target = other.detach().log_softmax(-1)
    return F.kl_div(own.log_softmax(-1), target, log_target=True, reduction="batchmean")


class ItemProjection(nn.Module):
    """IPL of Eq. 2: states [K, D] -> logits [K, N] float32, by a feed-forward network.

    Rows of items that came after training stand behind the trained ones.
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
        """Items as mixtures of the trained ones: weights [n, N]."""
        self.added = torch.cat((self.added, weights @ self.items.weight))
        self.added_bias = torch.cat((self.added_bias, weights @ self.items.bias))

    def forward(self, states: Tensor) -> Tensor:
        hidden = F.gelu(self.hidden(states.to(self.hidden.weight.dtype)))
        logits: Tensor = self.items(hidden)
        if len(self.added):
            added = F.linear(hidden, self.added, self.added_bias)
            logits = torch.cat((logits, added), dim=-1)
        return logits


class HDRec(nn.Module):
    """The recommender: it ranks, and has no vectors whose inner products are its scores."""

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
        scale = float(backbone.word_embeddings.weight.float().square().mean().sqrt())
        self.seq = nn.Parameter(scale * torch.randn(dim))
        if "text" in self.sides:
            self.align = nn.Parameter(scale * torch.randn(dim))
        if self._has_ids:
            self.sasrec = SASRec(SASRecConfig(dim=config.id_dim), catalog)
        if self._projects_ids:
            self.project = nn.Sequential(
                nn.Linear(config.id_dim, dim), nn.GELU(), nn.Linear(dim, dim)
            )
        # Id vectors of items that were added later.
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
        """No row may be cut: the length of a later text would decide what earlier ones read."""
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
        """Tokens after an item's text: [SEQ], and its id before that with early fusion."""
        return 2 if self.config.design == "early" else 1

    @property
    def n_items(self) -> int:
        """N, items of the catalog, those added later included."""
        return len(self.tokens)

    # -- reading ---------------------------------------------------------------------------------

    def _id_vectors(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Proj(SRS row), Eq. 7: [K, D]."""
        rows = self.sasrec.items.weight
        if self.config.pretrained_id:
            rows = rows.detach()
        rows = torch.cat((rows, self.added_ids))
        vectors: Tensor = self.project(rows[self._ints(items)])
        return vectors.to(self.backbone.dtype)

    def _ints(self, items: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(items.astype(np.int64)).to(self.seq.device)

    def _run(self, x: Tensor, segments: Segments, side: Side) -> tuple[Tensor, Packing]:
        """The frozen model with the adapter of a side: states [n, D] of a packed batch."""
        attend = Attend.CAUSAL if self.backbone.causal else Attend.BLOCK_CAUSAL
        group, positions = pack(segments.lengths, attend, blocks=segments.block)
        packing = Packing((group,), positions)
        adapter: LoRA = self.lora[self._of(side, len(self.lora))]  # type: ignore[assignment]
        with adapter.enabled():
            return self.backbone(x, packing), packing

    def _of(self, side: Side, count: int) -> int:
        """Which of ``count`` adapters or heads a side uses."""
        return min(self.sides.index(side), count - 1)

    def _head(self, states: Tensor, side: Side) -> Tensor:
        """IPL: states [K, D] -> logits [K, N] float32."""
        logits: Tensor = self.ipl[self._of(side, len(self.ipl))](states)
        return logits

    def read(self, histories: Ragged, side: Side, *, every: bool) -> Reading:
        """Logits of one side at every item of rows of at most ``max_items``, or at the newest."""
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
        """Eq. 3: x [n, D] of ``prompt, text [SEQ], text [SEQ], ...``."""
        config = self.config
        read = semantic_tokens(
            histories,
            self.tokens,
            item_tokens=config.item_tokens,
            max_tokens=config.max_tokens,
            max_items=config.max_items,
            before=prompt,
            after=[0] * self._marks,  # replaced by what is learned
            device=self.seq.device,
        )
        x, ends = self.backbone.embed(read.ids), read.segments.last_token
        if config.design == "early":
            x = x.index_copy(0, ends - 1, self._id_vectors(histories.values))
        return x.index_copy(0, ends, self._mark(self.seq, ends)), read.segments

    def _mark(self, vector: Tensor, places: Tensor) -> Tensor:
        return vector.to(self.backbone.dtype).expand(len(places), -1)

    def _id_input(self, histories: Ragged) -> tuple[Tensor, Segments]:
        """Eq. 5: x [n, D] of ``prompt, id [SEQ], id [SEQ], ...``."""
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
        """design=late: the other model's scores [K, N] at the same positions."""
        states, real = self.sasrec(histories)
        users = states[real] if every else states[torch.arange(len(real)), real.sum(1) - 1]
        logits: Tensor = users @ self.sasrec.items.weight.T
        return logits

    def _align_states(self, items: npt.NDArray[np.integer]) -> tuple[Tensor, Packing]:
        """Eq. 1: states [K, D] at [ALIGN] of ``prompt, text [ALIGN]``, one row for each item."""
        rows = Ragged(items.astype(np.int32), np.arange(len(items) + 1))
        read = semantic_tokens(
            rows,
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
        """SASRec first, where its rows are needed and pretrained; then the adapters."""
        stages = []
        frozen: set[nn.Parameter] = set()
        if self._has_ids and self.config.pretrained_id:
            stages.append(
                Stage(
                    "SASRec, for its item vectors",
                    decayed(self.sasrec.parameters(), self.config.sasrec_lr, 0.0),
                    self._sasrec_batches,
                    self.sasrec.loss,
                    validates=self.sasrec,
                    epochs=self.config.sasrec_epochs,
                )
            )
        if self._has_ids and self.config.design != "late":
            frozen |= set(self.sasrec.encoder.parameters())
            if self.config.pretrained_id:
                frozen |= set(self.sasrec.parameters())
        rest = [p for p in self.parameters() if p not in frozen]
        if "text" in self.sides and not self._aligns:
            rest = [p for p in rest if p is not self.align]
        stages.append(Stage("adapters", decayed(rest, lr, weight_decay), self.batches, self.loss))
        return stages

    def _sasrec_batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> EpochBatches:
        """Batches of SASRec's own usual size: those of the language model are too small for it."""
        del batch_users, batch_tokens
        return self.sasrec.batches(
            sequences, seed=seed, epoch=epoch, batch_users=1024, batch_tokens=16384
        )

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Every next item of every training sequence is a target once an epoch."""
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
        """[N] tokens an item adds to the rows of all sides."""
        text = self.tokens.lengths + self._marks
        return text * ("text" in self.sides) + 2 * ("id" in self.sides)

    def loss(self, batch: Batch) -> Losses | Iterator[Losses]:
        """The updates of one batch: alternating, or one."""
        targets = self._ints(batch.targets)
        separate = len(self.sides) == 2 and self.config.training_loss == "separate"
        if separate and self.config.alternate:
            return self._alternate(batch.histories, targets)
        return self._jointly(batch.histories, targets)

    def _alternate(self, histories: Ragged, targets: Tensor) -> Iterator[Losses]:
        """Algorithm 1 for one batch, with ids and texts detached for each other."""
        with torch.no_grad():
            text = self.read(histories, "text", every=True).logits  # t = 1: no update
        for _ in range(1, self.config.steps):
            identity = self.read(histories, "id", every=True)
            yield self._side_loss("id", identity, text, targets)
            # As represented before the update, line 21.
            held, own = identity.logits.detach(), self.read(histories, "text", every=True)
            yield self._side_loss("text", own, held, targets)
            text = own.logits.detach()

    def _side_loss(self, side: Side, own: Reading, other: Tensor | None, targets: Tensor) -> Losses:
        """L_Text of Eq. 10 (with Task 1) or L_ID of Eq. 12."""
        config = self.config
        total = catalog_loss(own.logits, targets)
        parts: dict[str, Tensor] = {side: total}
        tokens, computed = own.tokens, own.computed
        if other is not None and config.kl > 0:
            parts[f"kl_{side}"] = alignment(own.logits, other)
            total = total + config.kl * parts[f"kl_{side}"]
        if side == "text" and config.align > 0:
            items = torch.randint(self.n_items, (config.align_items,)).numpy()
            states, packing = self._align_states(items)
            parts["align"] = catalog_loss(self._head(states, "text"), self._ints(items))
            total = total + config.align * parts["align"]
            tokens, computed = tokens + len(packing.positions), computed + packing.computed
        return Losses(total, {n: p.detach() for n, p in parts.items()}, tokens, computed)

    def _jointly(self, histories: Ragged, targets: Tensor) -> Losses:
        """One backward pass: a single side, both at once, or the fused logits."""
        read = {side: self.read(histories, side, every=True) for side in self.sides}
        if len(read) == 1:
            ((side, own),) = read.items()
            return self._side_loss(side, own, None, targets)
        text, identity = read["text"], read["id"]
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
        config = self.config
        return fuse(
            text,
            identity,
            config.alpha if alpha is None else alpha,
            dominant=dominant or config.dominant,
            calibrate=config.calibrate,
        )

    def side_logits(self, histories: Ragged) -> list[Tensor]:
        """Logits of the next item [B, N] float32 of each side, text first.

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
        """Scorers of this model at other weights, and in another order, of its two sides.

        They share the logits of both sides for the histories that they are asked for in turn.

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
        """Histories of B users -> [B, N] float32: fused logits, Eq. 18."""

        def score(histories: Ragged) -> Tensor:
            logits = self.side_logits(histories)
            return logits[0] if len(logits) == 1 else self._fused(logits[0], logits[1])

        return score

    @torch.no_grad()
    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """New items by text alone, recommendable at once. Returns their item ints.

        The catalog's softmax has no row for them: each takes the weighted mean of the rows of the
        ``neighbours`` items that its [ALIGN] state is most likely to be.

        Raises:
            DataError: an empty text. ConfigError: a model that reads no texts.
        """
        if self.config.design in ("id", "late"):
            raise ConfigError(
                f"HDRec with design={self.config.design} ranks what it was trained on: its id side "
                "knows no other item"
            )
        if any(not text.strip() for text in texts):
            raise DataError("a new item needs a text: it is all that is known of it")
        first = self.n_items
        known: int = self.ipl[0].items.out_features  # type: ignore[union-attr,assignment]
        added = tokenize(texts, self.backbone.tokenizer, self.config.item_tokens)
        self.tokens = Ragged(
            np.concatenate((self.tokens.values, added.values)),
            np.concatenate((self.tokens.offsets, self.tokens.offsets[-1] + added.offsets[1:])),
        )
        items = np.arange(first, self.n_items, dtype=np.int32)
        weights = self._likely(items, known)
        for head in self.ipl:
            head.add(weights)  # type: ignore[operator]
        if self._has_ids:
            self.added_ids = torch.cat((self.added_ids, weights @ self.sasrec.items.weight))
        return items

    def _likely(self, items: npt.NDArray[np.integer], known: int) -> Tensor:
        """[n, known] weights of the likeliest known items of each item by Task 1, summing to 1."""
        parts = []
        for rows in plan_batches(self.tokens.lengths[items], None, max_rows=256, max_cost=4096):
            states, _ = self._align_states(items[rows])
            likely = self._head(states, "text")[:, :known].softmax(-1)
            best = likely.topk(min(self.config.neighbours, known), dim=-1)
            kept = torch.zeros_like(likely).scatter_(-1, best.indices, best.values)
            parts.append((rows, kept / kept.sum(-1, keepdim=True)))
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return torch.cat([kept for _, kept in parts])[torch.from_numpy(order)]
