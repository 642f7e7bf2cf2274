"""L2Rec: Towards Dual-View Understanding of LLMs for Personalized Recommendation.

Pan, Zhou, Lu, Fei, Chen, Luo. SIGIR '26, https://doi.org/10.1145/3805712.3809943

    Eq. 1-2   two views of a user                     l2rec.modules.views
    Eq. 3-6   experts and routers (DPMoE)             l2rec.modules.experts
    Eq. 7     adaptive cross-view fusion (ACF)        l2rec.modules.fusion
    Eq. 8-9   losses                                  l2rec.modules.objectives
    this file how they are joined: h_u, h_i, r_{u,i}, the total loss, and every choice

Where the paper leaves a choice, the default is the reading below; each is an option of `Config`.

- "32M parameters" on Qwen3-0.6B: LoRA r=8 on q and v, one shared expert and eight for each view,
  routers of hidden width 16, square P_U and P_v, a gate for every dimension.
- u is the mean of the view's *input* over real positions (``user_pooling=mean``). It sees the whole
  input, so one input predicts one target. ``running`` takes the mean up to each item instead.
- h_u: the last position for causal backbones, the mean for bidirectional ones (``pooling``).
- An item is a history of one item through the same pipeline, with u from the item itself.
- Negatives are the other positives of the batch and 10 sampled for each user; another occurrence
  of the positive item is never its negative.

Deviations from the paper are named options, off by default:

- ``items=table``: the item side is a trained table T = norm(E + E L + R) that starts at the
  backbone's text vectors E (L, R zero), with the full softmax; an item that is new, or that
  training never meets, enters as norm(e + e L).
- ``supervision=all``: every position predicts its next item in one pass; attention is causal over
  items and u is the running mean, so that no prediction sees what follows it.
- ``pooling=blend``: newest item plus a learned share of the mean.
- ``last_item_skip``: the newest item's table vector is added to the behavioural output.
- ``view_loss``: each view is also trained on the recommendation loss alone.
- ``text_dropout``: parts of the text vectors E are dropped wherever the table is read in training.
- ``repeat_bias``: a learned scalar is added to r_{u,i} of every item of the user's history.
- ``cooccurrence``: w m_{u,i} is added to r_{u,i} of every other item, with m the counts of what was
  met near the user's newest items (`l2rec.modules.cooccurrence`). The views are trained
  without it; w is chosen by NDCG@10 before each validation.
- ``text_neighbors``: among these counts too, a little, what reads like those newest items.
- ``behavioral_epochs``: the behavioural view and the table are trained alone for so long, before
  both views: it is by far the cheaper one, and the semantic view then meets a table that knows
  something.

With ``repeat_bias`` or ``cooccurrence``, scores are no longer inner products of the embeddings
alone.
"""

from __future__ import annotations

__all__ = ["L2Rec", "L2RecConfig", "UserState"]

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import (
    ENCODED_ROWS,
    ENCODED_TOKENS,
    Attend,
    Backbone,
    Group,
    Packing,
    pack,
    split,
)
from l2rec.modules.cooccurrence import NEAR, CoOccurrence, Weights, choose, text_neighbors
from l2rec.modules.experts import DPMoE, Routing, ViewSlice
from l2rec.modules.fusion import AdaptiveFusion
from l2rec.modules.item_text import catalog_vectors, separators, text_vectors
from l2rec.modules.objectives import Added, bpc_loss, contrastive_loss, cosine, fused_catalog_loss
from l2rec.modules.text_table import TextTable
from l2rec.modules.views import (
    BehavioralProjector,
    Segments,
    mean_of,
    prefix_mean,
    semantic_tokens,
)
from l2rec.protocols import Losses, ParameterGroup, Scorer, Stage

View = Literal["semantic", "behavioral"]
Kept = TypeVar("Kept")

ALL = slice(None)
REPEAT_LR = 0.1
"""Of a scalar that must go far: repeats may be worth minus five, or plus five."""


class L2RecConfig(BaseModel):
    """Options of L2Rec; the defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Eq. 1-2: the views
    views: tuple[View, ...] = ("semantic", "behavioral")
    """Drop one for the ablations "w/o Semantic" and "w/o Behavioral"."""
    max_items: int = Field(50, ge=1)
    """L, most items of a history."""
    semantic_items: int = Field(50, ge=1)
    """Most items of the semantic view."""
    max_tokens: int = Field(1024, ge=8)
    """T, most tokens of the semantic view."""
    item_tokens: int = Field(32, ge=1)
    """Most tokens of one item's text inside a view."""
    behavioral_pool: Literal["embeddings", "encoder"] = "embeddings"
    """An item's vector: mean of its token embeddings, or of the frozen backbone's outputs."""
    behavioral_boost: float = Field(16.0, gt=0)
    """Scale at which item vectors enter, in units of the word embeddings' RMS. Small values drown
    in position and type embeddings: on MiniLM all single-item outputs coincide below 4."""

    # Eq. 3-6: experts and routers
    adapt: bool = True
    """False: the frozen backbone alone, no experts, no projections, no training ("w/o Adapt")."""
    matrices: tuple[str, ...] = ("q", "v")
    """None: the backbone is as it was, and what stands around it is trained."""
    shared_experts: int = Field(1, ge=0)
    view_experts: int = Field(8, ge=1)
    top_n: int = Field(2, ge=1)
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    router_width: int = Field(16, ge=1)
    personalized_router: bool = True
    """False: g = g^c, the router does not know the user ("w/o PR")."""
    user_pooling: Literal["mean", "running"] = "mean"

    # outputs and Eq. 7
    pooling: Literal["auto", "mean", "last", "blend"] = "auto"
    gate: Literal["vector", "scalar"] = "vector"
    normalize_views: bool = False
    """Scale both h^v to unit length before Eq. 7, so that neither view drowns the other at the
    start (with ``items=table`` they always are)."""

    # items
    items: Literal["encode", "table"] = "encode"
    text_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text for the backbone's own text vectors (table, encoder pool)."""
    table_dropout: float = Field(0.2, ge=0, lt=1)
    table_lr: float = Field(2e-4, gt=0)
    text_dropout: float = Field(0.0, ge=0, lt=1)
    last_item_skip: bool = False

    # Eq. 8, what is added to r_{u,i}
    repeat_bias: bool = False
    cooccurrence: bool = False
    text_neighbors: bool = False

    # Eq. 8-9
    supervision: Literal["last", "all"] = "last"
    targets_per_user: int = Field(1, ge=1)
    temperature: float = Field(0.05, gt=0)
    learn_temperature: bool = False
    negatives: int = Field(10, ge=0)
    """Sampled negatives for each user."""
    share_negatives: bool = False
    """Every user is also contrasted with the negatives sampled for the others of the batch."""
    bpc: float = Field(0.1, ge=0)
    """gamma; 0 is "w/o BPC"."""
    bpc_distance: float = Field(1e-4, ge=0)
    """lambda."""
    balance: float = Field(0.01, ge=0)
    """beta."""
    view_loss: float = Field(0.0, ge=0)
    behavioral_epochs: int = Field(0, ge=0)
    """No matter where one view is all there is."""

    @model_validator(mode="after")
    def _consistent(self) -> L2RecConfig:
        if not self.views or len(set(self.views)) != len(self.views):
            raise ValueError("views must name semantic, behavioral, or both, once each")
        if self.top_n > self.view_experts:
            raise ValueError(f"top_n={self.top_n} exceeds view_experts={self.view_experts}")
        if self.supervision == "all" and self.user_pooling != "running":
            raise ValueError(
                "supervision=all with user_pooling=mean would route by items still to be "
                "predicted; set user_pooling=running"
            )
        if self.item_tokens + 8 > self.max_tokens:
            raise ValueError(f"item_tokens={self.item_tokens} leaves no room in {self.max_tokens=}")
        for option in ("last_item_skip", "text_dropout", "repeat_bias", "cooccurrence"):
            if getattr(self, option) and self.items != "table":
                raise ValueError(f"{option} needs items=table")
        if self.text_neighbors and not self.cooccurrence:
            raise ValueError("text_neighbors needs cooccurrence=true")
        return self


@dataclass(frozen=True)
class UserState:
    """Both views and their fusion for P predictions (one per row, or one per position).

    behavioral, semantic: h~^B, h~^S [P, D], or None where the view is switched off.
    fused: h^F [P, D]. delta: [P, D] or [P, 1], None with one view. position: [P] index into the
    histories' flat items of the newest item that each prediction has seen. row: [P].
    """

    behavioral: Tensor | None
    semantic: Tensor | None
    fused: Tensor
    delta: Tensor | None
    position: Tensor
    row: Tensor
    routing: Routing | None
    tokens: int
    computed_tokens: int


@dataclass(frozen=True)
class _OneView:
    """The method with one of its views, to be trained and validated so for a while."""

    model: L2Rec
    view: View

    @contextmanager
    def _alone(self) -> Iterator[None]:
        before, self.model.views = self.model.views, (self.view,)
        try:
            yield
        finally:
            self.model.views = before

    @property
    def n_items(self) -> int:
        return self.model.n_items

    def groups(self, lr: float, weight_decay: float) -> list[ParameterGroup]:
        with self._alone():
            return self.model._groups(lr, weight_decay)

    def batches(self, sequences: Ragged, **options: Any) -> TrainingBatches:
        with self._alone():
            return self.model.batches(sequences, **options)

    def loss(self, batch: Batch) -> Losses:
        with self._alone():
            return self.model.loss(batch)

    def calibrate(self, *validation: Any) -> None:
        with self._alone():
            self.model.calibrate(*validation)

    def scorer(self) -> Scorer:
        with self._alone():
            score = self.model.scorer()

        def alone(histories: Ragged) -> Tensor:
            with self._alone():
                return score(histories)

        return alone


@dataclass(frozen=True)
class _ViewInput:
    """One view of a batch: x [n, D] inputs, u [U, D] user vectors, user [n] their row of u."""

    view: View
    x: Tensor
    segments: Segments
    u: Tensor
    user: Tensor


class L2Rec(nn.Module):
    """The recommender. Only experts, P_U, ACF (and the table) are trained.

    Args:
        config: options. catalog: the items' texts. backbone: the frozen language model.
        cache: folder for token tables and text vectors, keyed by content; None keeps nothing.
    """

    Config = L2RecConfig
    uses_backbone = True
    item_tensors = frozenset(
        {"table.residual", "table.mean", "table.held"}
        | {f"together.{name}" for name in ("offsets", *CoOccurrence.sized_by_data)}
    )
    sized_by_data = frozenset(f"together.{name}" for name in CoOccurrence.sized_by_data)

    def __init__(
        self,
        config: L2RecConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.views = config.views
        """Those that are read; fewer than the config's in the stage of ``behavioral_epochs``."""
        self.backbone = backbone
        self._cache = cache
        self.cached: list[Path] = []
        """Cache entries this model was built from."""
        self.before, self.after = separators(backbone)
        self._check_lengths()
        self.linears = find_linears(backbone.model, config.matrices)
        self.experts = DPMoE(
            self.linears,
            backbone.dim,
            views=len(config.views),
            shared_experts=config.shared_experts,
            view_experts=config.view_experts,
            rank=config.rank,
            alpha=config.alpha,
            top=config.top_n,
            width=config.router_width,
            personalized=config.personalized_router,
        )
        self.experts.attach()
        self.projector = BehavioralProjector(backbone.dim)
        self.fusion = AdaptiveFusion(backbone.dim, config.gate)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.learn_temperature
        )
        self.blend = nn.Parameter(torch.tensor(0.5), requires_grad=config.pooling == "blend")
        self.skip = nn.Parameter(torch.tensor(1.0), requires_grad=config.last_item_skip)
        self.repeat = nn.Parameter(torch.tensor(0.0)) if config.repeat_bias else None
        self.together = CoOccurrence(len(catalog)) if config.cooccurrence else None
        self.near: Tensor | None  # w
        self.register_buffer("near", torch.tensor(0.0) if config.cooccurrence else None)
        self.table: TextTable | None = None
        self.item_vectors: Tensor
        self._set_catalog(catalog.require_texts("L2Rec"))
        for unused in self._unused():
            unused.requires_grad_(False)

    # -- construction ----------------------------------------------------------------------------

    def _unused(self) -> list[nn.Parameter]:
        """What the ablations switch off, or has no part in the views that are read now."""
        if not self.config.adapt:
            return list(self.parameters())
        off: list[nn.Module] = [] if self.linears else [self.experts]
        blend: list[nn.Parameter] = []
        if "semantic" not in self.views:
            off += [self.fusion.project_semantic, self.fusion.gate]
            blend = [self.blend]
        if "behavioral" not in self.views:
            off += [self.fusion.project_behavioral, self.fusion.gate, self.projector]
        return [parameter for module in off for parameter in module.parameters()] + blend

    def _check_lengths(self) -> None:
        config, limit = self.config, self.backbone.max_positions
        needed = config.max_tokens if "semantic" in config.views else 0
        needed = max(needed, config.max_items if "behavioral" in config.views else 0)
        if config.items == "table" or config.behavioral_pool == "encoder":
            needed = max(needed, config.text_tokens + len(self.before) + len(self.after))
        if limit is not None and needed > limit:
            raise ConfigError(
                f"max_tokens={config.max_tokens}, max_items={config.max_items}, "
                f"text_tokens={config.text_tokens}: backbone {self.backbone.name!r} has {limit} "
                f"positions; lower them to at most {limit}, special tokens included"
            )

        if config.supervision == "all" and "semantic" in config.views:
            # Otherwise the length of a later text would decide which old items an earlier
            # position still reads.
            items = min(config.max_items, config.semantic_items)
            longest = len(self.before) + items * (config.item_tokens + len(self.after))
            if longest > config.max_tokens:
                raise ConfigError(
                    f"supervision=all: {items} items of {config.item_tokens} tokens may need "
                    f"{longest} tokens, max_tokens={config.max_tokens}; raise it, or lower "
                    "semantic_items or item_tokens"
                )

    def _set_catalog(self, texts: Sequence[str]) -> None:
        config, device = self.config, self.backbone.device
        self.tokens = self._tokenize(texts)
        if device.type == "meta":
            self.item_vectors = torch.empty(0, self.backbone.dim, device=device)
            return
        if config.items == "table":
            self.table = TextTable(
                self._catalog_text(), config.table_dropout, config.text_dropout
            ).to(device)
            with torch.no_grad():
                vectors = self.table()
        elif "behavioral" in config.views:
            vectors = self.item_vectors = self._pooled(self.tokens, cached=True)
        else:
            self.item_vectors = torch.empty(0, self.backbone.dim, device=device)
            return
        words = self.backbone.word_embeddings.weight.float().square().mean().sqrt()
        self.projector.to(device).calibrate(vectors, config.behavioral_boost * float(words))

    def _tokenize(self, texts: Sequence[str]) -> Ragged:
        longest = max(self.config.text_tokens, self.config.item_tokens)
        if not len(texts):
            return Ragged.from_rows([])
        return tokenize(texts, self.backbone.tokenizer, longest, self._cache)

    def _pooled(self, tokens: Ragged, *, cached: bool = False) -> Tensor:
        """pool(Embed(c_i)) of Eq. 2, or the frozen encoder's text vector: [N, D] float32."""
        if self.config.behavioral_pool == "encoder":
            return self._catalog_text() if cached else self._text_vectors(tokens)
        out = torch.zeros(len(tokens), self.backbone.dim, device=self.backbone.device)
        for start in range(0, len(tokens), 4096):
            part = Ragged(tokens.values, tokens.offsets[start : start + 4097])
            rows = part.take(np.arange(len(part))).head(self.config.item_tokens)
            ids = torch.from_numpy(rows.values.astype(np.int64)).to(out.device)
            index = np.repeat(np.arange(len(rows)), rows.lengths)
            out[start : start + len(rows)] = mean_of(
                self.backbone.embed(ids), torch.from_numpy(index).to(out.device), len(rows)
            )
        return out

    def _catalog_text(self) -> Tensor:
        """Text vectors of the whole catalog, from the cache if they are there."""
        vectors, files = catalog_vectors(
            self.backbone, self.tokens, self.config.text_tokens, self._cache
        )
        self.cached += files
        return vectors

    def _text_vectors(self, tokens: Ragged) -> Tensor:
        """The bare backbone's text vectors (no routing is set, so the experts do not act)."""
        return text_vectors(self.backbone, tokens, self.config.text_tokens)

    def freeze(self) -> None:
        """For a model that is only used from here on: what no history changes is computed once."""
        self.eval()
        if self.table is not None:
            self.table.keep()

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """New items by text alone, recommendable at once. Returns their item ints.

        Raises:
            DataError: an empty text.
        """
        if any(not text.strip() for text in texts):
            raise DataError("a new item needs a text: it is all that is known of it")
        tokens = tokenize(
            texts, self.backbone.tokenizer, max(self.config.text_tokens, self.config.item_tokens)
        )
        first = self.n_items
        with torch.no_grad():
            if self.table is not None:
                self.table.extend(self._text_vectors(tokens))
            elif "behavioral" in self.config.views:
                self.item_vectors = torch.cat((self.item_vectors, self._pooled(tokens)))
        self.tokens = Ragged(
            np.concatenate((self.tokens.values, tokens.values)),
            np.concatenate((self.tokens.offsets, self.tokens.offsets[-1] + tokens.offsets[1:])),
        )
        return np.arange(first, self.n_items, dtype=np.int32)

    # -- the pipeline ----------------------------------------------------------------------------

    @property
    def n_items(self) -> int:
        """N, items of the catalog, those added later included."""
        return len(self.tokens)

    @property
    def temperature(self) -> Tensor:
        """tau of Eq. 8, a scalar."""
        return self.log_temperature.exp()

    def forward(
        self, histories: Ragged, *, every: bool = False, table: Tensor | None = None
    ) -> UserState:
        """Both views of every row through the one backbone in one pass, then the fusion.

        Args:
            histories: item ints, oldest first, no row empty; only the newest ``max_items`` count.
            every: one prediction per (kept) position instead of one per row.
            table: T, where it was computed already.
        """
        if table is None and self.table is not None:
            table = self.table()
        # Positions of the newest max_items, in the caller's flat items.
        recent = Ragged(np.arange(len(histories.values)), histories.offsets)
        recent = recent.tail(self.config.max_items)
        items = Ragged(histories.values[recent.values], recent.offsets)
        inputs = [self._input(view, items, table) for view in self.views]
        states, routing, packing = self._transform(inputs)

        # Predictions: every newest position that all views hold, or the last of each row.
        held = np.minimum.reduce([part.segments.blocks.cpu().numpy() for part in inputs])
        counts = np.minimum(held, self._window()) if every else np.ones_like(held)
        position = recent.gather(recent.offsets[1:] - counts, counts).values
        outputs: dict[str, Tensor] = {}
        for part, h in zip(inputs, states, strict=True):
            ends = np.cumsum(part.segments.blocks.cpu().numpy())
            newest = torch.from_numpy(flat_index(ends - counts, counts)).to(h.device)
            outputs[part.view] = self._read(part.view, h, part.segments)[newest]
        if table is not None and "behavioral" in outputs:
            last = self._on_device(histories.values[position])
            outputs["behavioral"] = self._beside_last_item(outputs["behavioral"], table, last)
        behavioral, semantic, fused, delta = self._fuse(outputs)
        return UserState(
            behavioral=behavioral,
            semantic=semantic,
            fused=fused,
            delta=delta,
            position=torch.from_numpy(position),
            row=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            routing=routing,
            tokens=len(packing.positions),
            computed_tokens=packing.computed,
        )

    def _on_device(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Item ints as an int64 tensor beside the backbone."""
        return torch.from_numpy(items.astype(np.int64)).to(self.backbone.device)

    def _input(self, view: View, items: Ragged, table: Tensor | None) -> _ViewInput:
        """Eq. 1 or 2, and u of Eq. 6."""
        config = self.config
        if view == "semantic":
            read = semantic_tokens(
                items,
                self.tokens,
                item_tokens=config.item_tokens,
                max_tokens=config.max_tokens,
                max_items=config.semantic_items,
                before=self.before,
                after=self.after,
                device=self.backbone.device,
            )
            x, segments = self.backbone.embed(read.ids), read.segments
        else:
            vectors = self.item_vectors if table is None else table
            x = self.projector(vectors.index_select(0, self._on_device(items.values)))
            segments = Segments.of_items(torch.from_numpy(items.lengths).to(x.device))
        if config.user_pooling == "running":
            return _ViewInput(view, x, segments, prefix_mean(x, segments), segments.block)
        row = segments.row[segments.block]
        return _ViewInput(view, x, segments, mean_of(x, row, len(segments.lengths)), row)

    def _transform(
        self, inputs: Sequence[_ViewInput]
    ) -> tuple[list[Tensor], Routing | None, Packing]:
        """TRM(E^v; DPMoE) of all views in one packed pass: states [n, D] of each view."""
        groups: list[Group] = []
        positions: list[Tensor] = []
        slices: list[ViewSlice] = []
        start = 0
        for part in inputs:
            segments = part.segments
            group, position = pack(
                segments.lengths, self._attend(), blocks=segments.block, start=start
            )
            view = self.config.views.index(part.view)
            slices.append(ViewSlice(view, start, group.stop, part.u, part.user))
            groups.append(group)
            positions.append(position)
            start = group.stop
        packing = Packing(tuple(groups), torch.cat(positions))
        packed = torch.cat([part.x.to(self.backbone.dtype) for part in inputs])
        if self.config.adapt and self.linears:
            with self.experts.routed(slices) as routing:
                states = self.backbone(packed, packing)
        else:
            routing, states = None, self.backbone(packed, packing)
        return list(split(states, [len(part.x) for part in inputs])), routing, packing

    def _attend(self) -> Attend:
        if self.backbone.causal:
            return Attend.CAUSAL
        return Attend.BLOCK_CAUSAL if self.config.supervision == "all" else Attend.FULL

    def _read(self, view: str, states: Tensor, parts: Segments) -> Tensor:
        """h^v at every block of the view: [K, D] float32."""
        pooling = self.config.pooling
        if pooling == "auto":
            pooling = "last" if self.backbone.causal else "mean"
        if pooling == "mean":
            h = prefix_mean(states, parts)
        elif view == "behavioral" or self.backbone.causal:
            h = states[parts.last_token].float()
        else:
            h = mean_of(states, parts.block, len(parts.row))
        if pooling == "blend" and view == "semantic":
            h = h + self.blend * prefix_mean(states, parts)
        if self.table is not None and view == "semantic":
            return F.normalize(F.normalize(h, dim=-1) - self.table.mean, dim=-1)
        return F.normalize(h, dim=-1) if self.config.normalize_views else h

    def _beside_last_item(self, h: Tensor, table: Tensor, last: Tensor) -> Tensor:
        """items=table: the behavioural output at half length, plus the newest item's row."""
        h = 0.5 * F.normalize(h, dim=-1)
        return h + self.skip * table.index_select(0, last) if self.config.last_item_skip else h

    def _fuse(
        self, outputs: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        behavioral, semantic = outputs.get("behavioral"), outputs.get("semantic")
        if behavioral is None or semantic is None:
            h = behavioral if behavioral is not None else semantic
            assert h is not None
            project = (
                self.fusion.project_behavioral
                if behavioral is not None
                else self.fusion.project_semantic
            )
            h = h + project(h)
            return (h, None, h, None) if behavioral is not None else (None, h, h, None)
        behavioral, semantic = self.fusion.residual(behavioral, semantic)
        fused, delta = self.fusion.fuse(behavioral, semantic)
        return behavioral, semantic, fused, delta

    # -- training --------------------------------------------------------------------------------

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """The batches of one epoch over training prefixes."""
        config = self.config
        return TrainingBatches(
            sequences,
            supervision=config.supervision,
            max_items=config.max_items,
            negatives=0 if config.items == "table" else config.negatives,
            item_costs=self._item_costs(),
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
            targets_per_user=config.targets_per_user,
            window=self._window(),
        )

    def _window(self) -> int:
        """Newest positions of a row that are supervised with ``supervision=all``."""
        semantic = "semantic" in self.views
        return min(self.config.max_items, self.config.semantic_items if semantic else 10**9)

    def costs(self, histories: Ragged) -> npt.NDArray[np.int64]:
        """[B] tokens that each history takes in the backbone, both views, about."""
        cost = np.concatenate(([0], np.cumsum(self._item_costs(histories.values))))
        tokens: npt.NDArray[np.int64] = cost[histories.offsets[1:]] - cost[histories.offsets[:-1]]
        return np.minimum(tokens, self.config.max_tokens)

    def _item_costs(self, items: npt.NDArray[np.integer] | slice = ALL) -> npt.NDArray[np.int64]:
        """[N] tokens that items, by default all, add to a row, all views that are read."""
        starts, ends = self.tokens.offsets[:-1][items], self.tokens.offsets[1:][items]
        text = np.minimum(ends - starts, self.config.item_tokens) + len(self.after)
        views = self.views
        costs: npt.NDArray[np.int64] = text * ("semantic" in views) + ("behavioral" in views)
        return costs

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """The behavioural view alone (``behavioral_epochs``), and all views. The free residual of
        the table has a learning rate of its own.
        """
        if not (groups := self._groups(lr, weight_decay)):
            return []
        stages = [Stage("train", groups, self.batches, self.loss)]
        if self.config.behavioral_epochs and len(self.config.views) > 1:
            alone = _OneView(self, "behavioral")
            before = Stage(
                "behavioral",
                alone.groups(lr, weight_decay),
                alone.batches,
                alone.loss,
                select=False,
                validates=alone,
                epochs=self.config.behavioral_epochs,
            )
            stages.insert(0, before)
        return stages

    def _groups(self, lr: float, weight_decay: float) -> list[ParameterGroup]:
        """Everything that is trained with the views that are read now."""
        unused = set(self._unused())
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad and p not in unused]
        repeat = [p for n, p in named if n == "repeat"]
        plain = [p for n, p in named if p.ndim < 2 and n != "repeat"]
        slow = [p for n, p in named if n == "table.residual"]
        rest = [p for n, p in named if p.ndim >= 2 and n != "table.residual"]
        groups = [
            ParameterGroup("matrices", rest, lr, weight_decay),
            ParameterGroup("vectors", plain, lr, 0.0),
            ParameterGroup("table", slow, self.config.table_lr, 0.0),
            ParameterGroup("repeat", repeat, REPEAT_LR, 0.0),
        ]
        return [g for g in groups if g.parameters]

    def loss(self, batch: Batch) -> Losses:
        """L = L_Rec + gamma L_BPC + beta L_LB (and, as an option, each view's own L_Rec)."""
        config = self.config
        table = None if self.table is None else self.table()
        every = config.supervision == "all"
        state = self(batch.histories, every=every, table=table)
        targets = batch.targets[state.position.numpy()] if every else batch.targets
        positive = self._on_device(targets)
        tokens, computed = state.tokens, state.computed_tokens
        balances = [state.routing] if state.routing is not None else []
        if table is not None:
            items: dict[str, Tensor | None] = dict.fromkeys(
                ("fused", "behavioral", "semantic"), table
            )
            allowed = None
        else:
            # Every distinct item of the batch is encoded once.
            distinct = np.unique(np.concatenate((targets, batch.negatives.reshape(-1))))
            encoded = self(Ragged(distinct, np.arange(len(distinct) + 1)))
            tokens, computed = tokens + encoded.tokens, computed + encoded.computed_tokens
            balances += [encoded.routing] if encoded.routing is not None else []
            items = {
                "fused": encoded.fused,
                "behavioral": encoded.behavioral,
                "semantic": encoded.semantic,
            }
            column = torch.from_numpy(np.searchsorted(distinct, targets)).to(positive.device)
            allowed = self._negatives(batch, state.row, distinct, column)
            positive = column

        repeats = None
        if self.repeat is not None:
            rows, seen = self._repeats(batch.histories, state.position.numpy())
            repeats = Added(self.repeat, rows, seen)

        def rec(users: Tensor, side: Tensor | None) -> Tensor:
            assert side is not None
            if allowed is not None:
                return contrastive_loss(cosine(users, side) / self.temperature, positive, allowed)
            users = F.normalize(users.float(), dim=-1) / self.temperature  # as T is already
            return fused_catalog_loss(
                users, side, positive, added=repeats, dtype=self.backbone.dtype
            )

        total = rec(state.fused, items["fused"])
        parts = {"rec": total}
        both = state.behavioral is not None and state.semantic is not None
        if both and config.bpc > 0:
            assert state.behavioral is not None and state.semantic is not None
            parts["bpc"] = bpc_loss(
                state.behavioral,
                state.semantic,
                torch.from_numpy(batch.users)[state.row].to(positive.device),
                self.temperature,
                config.bpc_distance,
            )
            total = total + config.bpc * parts["bpc"]
        if both and config.view_loss > 0:
            for view, users in (("behavioral", state.behavioral), ("semantic", state.semantic)):
                assert users is not None
                parts[view] = rec(users, items[view])
                total = total + config.view_loss * parts[view]
        if balances and config.balance > 0:
            terms = [view for routing in balances for view in routing.balance.values()]
            parts["balance"] = torch.cat(terms).mean()
            total = total + config.balance * parts["balance"]
        return Losses(
            total,
            {name: part.detach() for name, part in parts.items()},
            tokens=tokens,
            computed_tokens=computed,
        )

    def _repeats(self, histories: Ragged, ends: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """What prefixes up to ``ends`` [P] hold: rows [n] int64 below P, ascending, and items."""
        starts = histories.offsets[np.searchsorted(histories.offsets, ends, side="right") - 1]
        counts = ends - starts + 1
        rows = np.repeat(np.arange(len(ends)), counts)
        cells = np.unique(rows * self.n_items + histories.values[flat_index(starts, counts)])
        rows, items = divmod(cells, self.n_items)
        return self._on_device(rows), self._on_device(items)

    def _negatives(
        self, batch: Batch, row: Tensor, distinct: npt.NDArray[np.integer], positive: Tensor
    ) -> Tensor:
        """[P, n] bool: the positives of the batch, and each user's own sampled items (or, with
        ``share_negatives``, everybody's). The positive item's column is set by the loss.
        """
        device = positive.device
        if self.config.share_negatives:
            return torch.ones(len(positive), len(distinct), dtype=torch.bool, device=device)
        allowed = torch.zeros(len(batch.users), len(distinct), dtype=torch.bool, device=device)
        own = torch.from_numpy(np.searchsorted(distinct, batch.negatives)).to(device)
        allowed.scatter_(1, own, True)
        allowed[:, positive.unique()] = True
        return allowed[row.to(device)]

    # -- inference -------------------------------------------------------------------------------

    def user_states(self, histories: Ragged) -> UserState:
        """`forward` over any number of rows in batches of equal token budget, in the rows' order.

        Raises:
            DataError: an empty history.
        """
        states, order = self._in_batches(histories, lambda state: replace(state, routing=None))

        def join(name: str) -> Any:
            values = [getattr(state, name) for state in states]
            return None if values[0] is None else torch.cat(values)[order.to(values[0].device)]

        return UserState(
            behavioral=join("behavioral"),
            semantic=join("semantic"),
            fused=join("fused"),
            delta=join("delta"),
            position=torch.from_numpy(histories.offsets[1:] - 1),
            row=torch.arange(len(histories)),
            routing=None,
            tokens=sum(state.tokens for state in states),
            computed_tokens=sum(state.computed_tokens for state in states),
        )

    def encode_users(self, histories: Ragged) -> Tensor:
        """Unit-length user vectors [B, D] float32; scores are their inner products with items'."""
        return self._unit_users(histories)

    def _unit_users(self, histories: Ragged, table: Tensor | None = None) -> Tensor:
        """`encode_users`, where T may be known already."""
        if not len(histories):
            return torch.zeros(0, self.backbone.dim, device=self.backbone.device)
        parts, order = self._in_batches(
            histories, lambda state: F.normalize(state.fused.float(), dim=-1), table
        )
        return torch.cat(parts)[order.to(parts[0].device)]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """In eval mode within; nothing is touched where it is already."""
        was_training = self.training
        if was_training:
            self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    @torch.inference_mode()
    def _in_batches(
        self, histories: Ragged, keep: Callable[[UserState], Kept], table: Tensor | None = None
    ) -> tuple[list[Kept], Tensor]:
        """What is kept of the state of each batch, and where each row went."""
        if len(histories) and int(histories.lengths.min()) == 0:
            raise DataError("an empty history: give at least one item")
        plan = plan_batches(
            self.costs(histories), None, max_rows=ENCODED_ROWS, max_cost=ENCODED_TOKENS
        )
        order = np.argsort(np.concatenate(plan)) if plan else np.zeros(0, dtype=np.int64)
        with self._evaluating():
            if table is None and self.table is not None:
                table = self.table()
            kept = [keep(self(histories.take(rows), table=table)) for rows in plan]
        return kept, torch.from_numpy(order)

    @torch.inference_mode()
    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Unit-length item vectors [n, D] float32, of catalog ints or of raw texts."""
        if len(items) and isinstance(items[0], str):
            return self._encode_texts([str(text) for text in items])
        chosen = np.asarray(items, dtype=np.int32)
        if self.table is not None:
            with self._evaluating():
                table: Tensor = self.table()
            return table.index_select(0, self._on_device(chosen))
        return self.encode_users(Ragged(chosen, np.arange(len(chosen) + 1)))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        known = self.tokens, self.item_vectors if self.table is None else self.table.text
        try:
            return self.encode_items(self.add_items(texts))
        finally:
            self.tokens = known[0]
            if self.table is None:
                self.item_vectors = known[1]
            else:
                self.table.take_back(known[1])

    def _cosines(self) -> Scorer:
        """Histories -> cosines with every catalog item [B, N] float32. Encodes the catalog."""
        vectors = self.encode_items(np.arange(self.n_items, dtype=np.int32))
        table = None if self.table is None else vectors
        return lambda histories: self._unit_users(histories, table) @ vectors.T

    def scorer(self) -> Scorer:
        """Histories -> cosine / tau with every catalog item [B, N] float32. Encodes the catalog."""
        cosine_of = self._cosines()
        temperature = float(self.temperature.detach())

        def score(histories: Ragged) -> Tensor:
            cosines, prior = cosine_of(histories), self.prior(histories)
            return (cosines if prior is None else cosines + prior) / temperature

        return score

    @torch.inference_mode()
    def prior(self, histories: Ragged) -> Tensor | None:
        """What ``repeat_bias`` and ``cooccurrence`` add to the inner products of user and item
        vectors, [B, N] float32; None without them.
        """
        if self.together is not None and self.near is not None:
            weights = Weights(float(self.near), self._repeat())
            added = weights.added(*self.together.dense(histories, self.n_items))
        elif self.repeat is not None:
            added = torch.zeros(len(histories), self.n_items, device=self.backbone.device)
            added[self._repeats(histories, histories.offsets[1:] - 1)] = self.repeat
        else:
            return None
        return added * self.temperature

    @cached_property
    def _alike(self) -> Any:
        """K of ``text_neighbors`` [N, N], sparse: the texts do not change."""
        assert self.table is not None and self.together is not None
        return text_neighbors(self.table.text[: self.together.n_items])

    def _repeat(self) -> float:
        """What ``repeat_bias`` has learned, 0 without it."""
        return 0.0 if self.repeat is None else float(self.repeat.detach())

    @torch.no_grad()  # not inference mode: what is counted here is loaded into later
    def calibrate(
        self, sequences: Ragged, histories: Ragged, targets: npt.NDArray[np.integer]
    ) -> None:
        """Choose w of ``cooccurrence`` for the views as they are now, and tell the table which
        items training holds.

        sequences: what is counted, of training. histories, targets: of validation.
        """
        if self.table is not None:
            self.table.restrict(sequences.values)
        if self.together is None or self.near is None:
            return
        together = self.together
        together.count(sequences, self._alike if self.config.text_neighbors else None)
        cosine_of = self._cosines()

        def parts(rows: Ragged) -> tuple[Tensor, Tensor, Tensor]:
            own = cosine_of(rows) / self.temperature
            return own, *together.dense(rows, self.n_items)

        tried = [Weights(near, self._repeat()) for near in NEAR]
        best = choose(parts, self.n_items, histories, targets, tried)
        self.near.fill_(best.near)
