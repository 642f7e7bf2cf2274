"""L2Rec: Towards Dual-View Understanding of LLMs for Personalized Recommendation.

Pan, Zhou, Lu, Fei, Chen, Luo. SIGIR '26, https://doi.org/10.1145/3805712.3809943

    Eq. 1-2   two views of a user                     l2rec.modules.views, l2rec.modules.entry
    Eq. 3-6   experts and routers (DPMoE)             l2rec.modules.experts
    Eq. 7     adaptive cross-view fusion (ACF)        l2rec.modules.fusion
    Eq. 8-9   losses                                  l2rec.modules.objectives
    h_i       item side, two forms                    l2rec.modules.item_side
    this file how they are joined: h_u, r_{u,i}, the total loss, and every choice

Where the paper leaves a choice, the default is the reading below; each is an option of `Config`.

- "32M parameters" on Qwen3-0.6B: LoRA r=8 on q and v, one shared expert and eight for each view,
  routers of hidden width 16, square P_U and P_v, a gate for every dimension.
- u is the mean of the view's *input* over real positions. It sees the whole input, so one input
  predicts one target.
- h_u: the last position for causal backbones, the mean for bidirectional ones.
- An item is a history of one item through the same pipeline, with u from the item itself.
- Negatives are the other positives of the batch and 10 sampled for each user; another occurrence
  of the positive item is never its negative.

Deviations from the paper are named options, off by default. ``form=catalog`` is the largest, and
the form that trains on a processor. It keeps the paper's items, histories of one through the same
pipeline, and compares every position with the whole catalog: behavioural item vectors are computed
in every step, semantic ones once an epoch. Every position predicts its next item in one pass, for
which attention is causal over items and u is the mean up to each item, so that no prediction sees
what follows it. The semantic output is the newest item plus a learned share of the mean. What the
prefix holds already is no negative, nor is an item that training never meets. u has RMS 1
(``user_norm``), since it enters the routers beside inputs of that scale; with ``item_residual`` an
item has a trained r_i beside its text, E^B = P_U(norm(e_i + r_i)), none if training never meets it.

- ``project_items=false``: P_v of Eq. 7 is of users alone. With P_v on both sides, as in the paper,
  a user of one item and that item have one vector: what follows an item is looked for near it.
- ``text_dropout``: parts of the text vectors are dropped wherever they are read in training.
- ``item_layers``: the lowest K layers of the backbone read each item's text by itself, once for the
  catalog (`l2rec.modules.entry`). Both views enter at layer K: the semantic one as the states of
  its items' tokens, the behavioural one as their means (or text vectors) through P_U; a trained
  vector for the place of an item in its row, zero at the start, is added. Experts, routers and u
  are those of the layers above.

Co-occurrence counts and a term for items that the user has already are no part of the method:
``l2rec blend`` puts them beside any run.
"""

from __future__ import annotations

__all__ = ["L2Rec", "L2RecConfig", "UserState"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged, flat_index
from l2rec.data.text import tokenize
from l2rec.errors import ConfigError
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import ENCODED_ROWS, ENCODED_TOKENS, Backbone
from l2rec.modules.entry import Entry, LayerEntry, WordEntry
from l2rec.modules.experts import DPMoE, Routing, ViewSlice, user_share
from l2rec.modules.fusion import AdaptiveFusion
from l2rec.modules.item_side import CatalogItems, EncodedItems, ItemSide, LookUp
from l2rec.modules.item_text import separators
from l2rec.modules.objectives import bpc_loss
from l2rec.modules.packing import Attend, Packing, split_groups
from l2rec.modules.sequences import (
    check_new_texts,
    evaluating,
    in_batches,
    one_each,
    raw_texts,
)
from l2rec.modules.views import (
    BehavioralProjector,
    Segments,
    View,
    ViewInput,
    mean_of,
    pack_views,
    prefix_mean,
)
from l2rec.protocols import ExpertLoad, Losses, ParameterGroup, Scorer, Stage

Views = tuple[View, ...]
Kept = TypeVar("Kept")

ALL = slice(None)
BEHAVIORAL_BOOST = 16.0
"""Scale at which item vectors enter at the words, in units of the word embeddings' RMS. Small
values drown in position and type embeddings: on MiniLM all single-item outputs coincide below 4.
Nothing is added at a later layer: there the scale is that of its states."""

OPTIONS_OF_FORMS = {
    "text_dropout": "catalog",
    "item_residual": "catalog",
    "residual_prior": "catalog",
    "sampled_items": "catalog",
    "behavioral_pool": "paper",
    "normalize_views": "paper",
    "negatives": "paper",
    "share_negatives": "paper",
}
"""The form that alone has an option."""
GONE: dict[str, Any] = {
    "items": "encode",
    "supervision": "last",
    "user_pooling": "mean",
    "pooling": "auto",
    "last_item_skip": False,
    "gate": "vector",
    "learn_temperature": False,
    "targets_per_user": 1,
    "behavioral_boost": BEHAVIORAL_BOOST,
    "table_dropout": 0.2,
    "repeat_bias": False,
    "cooccurrence": False,
    "text_neighbors": False,
    "behavioral_epochs": 0,
    "view_loss": 0.0,
}
"""Options of earlier versions, which run folders still name, and what each always is now."""


class L2RecConfig(BaseModel):
    """Options of L2Rec; the defaults are the paper's.

    Beside each: *paper*, a number or choice of the paper; *ablation*, one of its Table 3; *ours*.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal["paper", "catalog"] = "paper"
    """Ours: catalog, every position a target against the whole catalog."""

    # Eq. 1-2: the views
    views: Views = ("semantic", "behavioral")
    """Ablation: one view alone is "w/o Semantic" or "w/o Behavioral"."""
    max_items: int = Field(50, ge=1)
    """Paper: L, most items of a history."""
    max_tokens: int = Field(1024, ge=8)
    """Paper: T, most tokens of the semantic view."""
    semantic_items: int = Field(50, ge=1)
    """Ours: most items of the semantic view."""
    item_tokens: int = Field(128, ge=1)
    """Ours: most tokens of one item's text inside a view, a limit for giants: what does not fit
    into T is dropped by whole items, oldest first."""
    item_layers: int = 0
    """Ours: lowest layers of the backbone that read each item's text by itself, once; the views and
    all experts stand above them. -1 is all layers but the topmost, 0 is the paper's."""
    behavioral_pool: Literal["embeddings", "encoder"] = "embeddings"
    """Paper: an item's vector is the mean of its token embeddings; ours: of the frozen backbone's
    outputs. Of the paper's form alone."""
    text_tokens: int = Field(128, ge=1)
    """Ours: most tokens of a text for the backbone's text vectors (catalog, encoder pool)."""

    # Eq. 3-6: experts and routers
    adapt: bool = True
    """Ablation: False is the frozen backbone alone, no experts, no projections, no training ("w/o
    Adapt")."""
    matrices: tuple[str, ...] = ("q", "v")
    """Paper: the adapted matrices of a block (q, k, v, o, gate, up, down). Ours: none, and only
    what stands around the backbone is trained."""
    shared_experts: int = Field(1, ge=0)
    """Paper: experts of both views, always active."""
    view_experts: int = Field(8, ge=1)
    """Paper: routed experts of each view."""
    top_n: int = Field(2, ge=1)
    """Paper: routed experts that are active for a token."""
    rank: int = Field(8, ge=1)
    """Paper: r of every expert."""
    alpha: float = Field(16.0, gt=0)
    """Paper: updates are scaled by alpha / r."""
    router_width: int = Field(16, ge=1)
    """Ours: hidden width of the routers, which the paper does not give."""
    personalized_router: bool = True
    """Ablation: False is g = g^c, a router that does not know the user ("w/o PR")."""
    user_norm: bool = False
    """Ours: RMSNorm on u. As a mean of inputs it can be far smaller than the x beside it."""
    gate_norm: bool = False
    """Ours: gates of the chosen experts add up to 1. By Eq. 5 those of E near-equal experts are
    about 1.25 / E each."""

    # outputs and Eq. 7
    project_items: bool = True
    """Ours: False is P_v of Eq. 7 for users alone. With P_v on both sides, a user of one item and
    that item have one vector, and what follows an item can only be what is like it."""
    normalize_views: bool = False
    """Ours: both h^v at unit length before Eq. 7, so that neither view drowns the other at the
    start. Of the paper's form alone."""

    # the catalog's items
    item_residual: bool = False
    """Ours: a trained r_i beside the text of every item that training holds. Of form=catalog
    alone."""
    residual_prior: float = Field(0.0, ge=0)
    """Ours: kappa; r_i ~ N(0, 1/kappa), so that items of few events stay near their texts. 0 is no
    prior. Of item_residual alone."""
    sampled_items: int = Field(0, ge=0)
    """Ours: items, beside those to predict, that a step compares with, for catalogs too large to
    encode in every step; 0: all. Of form=catalog alone."""
    table_lr: float = Field(2e-4, gt=0)
    """Ours: learning rate of r_i."""
    text_dropout: float = Field(0.0, ge=0, lt=1)
    """Ours: dropout of text vectors in training. Of form=catalog alone."""

    # Eq. 8-9
    temperature: float = Field(0.05, gt=0)
    """Paper: tau, whose value it does not give."""
    negatives: int = Field(10, ge=0)
    """Paper: sampled negatives of each user. Of the paper's form alone."""
    share_negatives: bool = False
    """Ours: every user is also contrasted with the negatives sampled for the others. Of the paper's
    form alone."""
    bpc: float = Field(0.1, ge=0)
    """Paper: gamma. Ablation: 0 is "w/o BPC"."""
    bpc_distance: float = Field(1e-4, ge=0)
    """Paper: lambda of Eq. 9."""
    balance: float = Field(0.01, ge=0)
    """Paper: beta."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, values: Any) -> Any:
        """Read the options of earlier versions, if they are set to what is always so now."""
        if not isinstance(values, Mapping):
            return values
        gone = {option: values[option] for option in GONE if option in values}
        changed = {o: value for o, value in gone.items() if value != GONE[o]}
        if values.get("form") == "table":
            changed = {"form": "table"}
        for option, value in changed.items():
            raise ValueError(
                f"{option}={value} is no option any more; train without it, such as recipe "
                "l2rec-plus"
            )
        return {option: value for option, value in values.items() if option not in gone}

    @model_validator(mode="after")
    def _consistent(self) -> L2RecConfig:
        if not self.views or len(set(self.views)) != len(self.views):
            raise ValueError("views must name semantic, behavioral, or both, once each")
        if self.top_n > self.view_experts:
            raise ValueError(f"top_n={self.top_n} exceeds view_experts={self.view_experts}")
        if self.item_tokens + 8 > self.max_tokens:
            raise ValueError(f"item_tokens={self.item_tokens} leaves no room in {self.max_tokens=}")
        for option, form in OPTIONS_OF_FORMS.items():
            default = type(self).model_fields[option].default
            if self.form != form and getattr(self, option) != default:
                raise ValueError(f"{option} needs form={form}")
        return self

    @property
    def pools_words(self) -> bool:
        """Whether an item's vector of Eq. 2 is the mean of its token embeddings."""
        return self.form == "paper" and self.behavioral_pool == "embeddings"


def _check_lengths(config: L2RecConfig, backbone: Backbone) -> None:
    """Refuse rows that the backbone cannot hold."""
    limit = backbone.max_positions
    before, after = map(len, separators(backbone))
    needed = config.max_tokens if "semantic" in config.views else 0
    needed = max(needed, config.max_items if "behavioral" in config.views else 0)
    if config.item_layers and backbone.positions_in_words:  # only single texts have positions
        needed = config.item_tokens + before + after
    if config.form == "catalog" or config.behavioral_pool == "encoder":
        needed = max(needed, config.text_tokens + before + after)
    if limit is not None and needed > limit:
        raise ConfigError(
            f"max_tokens={config.max_tokens}, max_items={config.max_items}, "
            f"text_tokens={config.text_tokens}: backbone {backbone.name!r} has {limit} "
            f"positions; lower them to at most {limit}, special tokens included"
        )
    if config.form == "catalog" and "semantic" in config.views:
        # Otherwise the length of a later text would decide which old items an earlier position
        # still reads.
        items = min(config.max_items, config.semantic_items)
        longest = before + items * (config.item_tokens + after)
        if config.item_layers:  # every item with the start of a row
            longest = items * (before + config.item_tokens + after)
        if longest > config.max_tokens:
            raise ConfigError(
                f"form={config.form}: {items} items of {config.item_tokens} tokens may need "
                f"{longest} tokens, max_tokens={config.max_tokens}; raise it, or lower "
                "semantic_items or item_tokens"
            )


def _entry(config: L2RecConfig, backbone: Backbone, tokens: Ragged, cache: Path | None) -> Entry:
    if config.item_layers:
        read = "semantic" in config.views or config.pools_words
        return LayerEntry(
            backbone, tokens, config.item_tokens, config.item_layers, cache, read=read
        )
    return WordEntry(backbone, tokens, config.item_tokens)


def _item_side(
    config: L2RecConfig,
    backbone: Backbone,
    tokens: Ragged,
    entry: Entry,
    fusion: AdaptiveFusion,
    cache: Path | None,
) -> ItemSide:
    if config.form == "catalog":
        return CatalogItems(
            backbone,
            tokens,
            text_tokens=config.text_tokens,
            text_dropout=config.text_dropout,
            residual=config.item_residual,
            prior=config.residual_prior,
            sampled=config.sampled_items,
            project=config.project_items,
            semantic="semantic" in config.views,
            fusion=fusion,
            cache=cache,
        )
    return EncodedItems(
        backbone,
        tokens,
        entry,
        pool=config.behavioral_pool if "behavioral" in config.views else None,
        text_tokens=config.text_tokens,
        share_negatives=config.share_negatives,
        normalize_views=config.normalize_views,
        cache=cache,
    )


@dataclass(frozen=True)
class UserState:
    """Both views and their fusion for P predictions (one per row, or one per position).

    outputs: h^v [P, D] of the views that were read, before Eq. 7.
    behavioral, semantic: h~^B, h~^S [P, D], or None where the view is not read.
    fused: h^F [P, D]. delta: [P, D], None with one view. position: [P] index into the histories'
    flat items of the newest item that each prediction has seen. row: [P].
    """

    outputs: Mapping[View, Tensor]
    behavioral: Tensor | None
    semantic: Tensor | None
    fused: Tensor
    delta: Tensor | None
    position: Tensor
    row: Tensor
    routing: Routing | None
    tokens: int
    computed_tokens: int

    @classmethod
    def joined(cls, states: Sequence[UserState], order: Tensor, histories: Ragged) -> UserState:
        """Join states of one prediction a row; ``order`` [B]: where each row went."""

        def join(name: str) -> Any:
            values = [getattr(state, name) for state in states]
            return None if values[0] is None else torch.cat(values)[order.to(values[0].device)]

        return cls(
            outputs={},
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


def _mean_until(x: Tensor, parts: Segments, newest: Tensor, every: bool) -> Tensor:
    """Average the tokens of a row up to the end of some blocks: [P, D], see `L2Rec._read`."""
    if every:
        return prefix_mean(x, parts)[newest]
    return mean_of(x, parts.row[parts.block], len(parts.blocks))


def without_routing(state: UserState) -> UserState:
    """Drop what only a loss reads, so that many states fit."""
    return replace(state, outputs={}, routing=None)


class L2Rec(nn.Module):
    """The recommender. Only experts, P_U, ACF and, with form=catalog, its few tensors are trained.

    Args:
        config: options.
        catalog: the items' texts.
        backbone: the frozen language model.
        cache: folder for token tables and text vectors, keyed by content; None keeps nothing.
    """

    Config = L2RecConfig
    uses_backbone = True
    item_tensors = frozenset(
        {"items.table.residual", "items.table.mean", "items.table.held", "items.semantic"}
    )

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
        self.backbone = backbone
        self._every = config.form == "catalog"  # every position predicts, not the last alone
        _check_lengths(config, backbone)
        texts = catalog.require_texts("L2Rec")
        tokens = self._tokenize(texts, cache) if len(texts) else Ragged.from_rows([])
        self.entry = _entry(config, backbone, tokens, cache)
        self.linears = {
            name: matrix
            for name, matrix in find_linears(backbone.model, config.matrices).items()
            if not self.entry.is_before(name)
        }
        self.experts = DPMoE(
            self.linears,
            self.entry.width,  # user vectors are means of inputs
            views=len(config.views),
            shared_experts=config.shared_experts,
            view_experts=config.view_experts,
            rank=config.rank,
            alpha=config.alpha,
            top=config.top_n,
            width=config.router_width,
            personalized=config.personalized_router,
            gate_norm=config.gate_norm,
        )
        self.experts.attach()
        self.projector = BehavioralProjector(
            self.entry.width if config.pools_words else backbone.dim, self.entry.width
        )
        self.fusion = AdaptiveFusion(backbone.dim)
        # The place of an item in its row, where the layers that know places are below the views.
        self.places: nn.Parameter | None = None
        if config.item_layers:
            places = torch.zeros(len(config.views), config.max_items, self.entry.width)
            self.places = nn.Parameter(places)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=False
        )
        self.blend = nn.Parameter(torch.tensor(0.5), requires_grad=self._every)
        self.items = _item_side(config, backbone, tokens, self.entry, self.fusion, cache)
        if "behavioral" in config.views and backbone.device.type != "meta":
            self._calibrate_projector()
        for unused in self._unused():
            unused.requires_grad_(False)

    # -- construction ----------------------------------------------------------------------------

    @torch.no_grad()
    def _calibrate_projector(self) -> None:
        projector = self.projector.to(self.backbone.device)
        boost = 1.0 if self.config.item_layers else BEHAVIORAL_BOOST
        projector.calibrate(self.items.rows, boost * self.entry.scale)

    def _unused(self) -> list[nn.Parameter]:
        """Return the parameters that are not trained: switched off, or of a view not read."""
        if not self.config.adapt:
            return list(self.parameters())
        off: list[nn.Module] = [] if self.linears else [self.experts]
        blend: list[nn.Parameter] = []
        if "semantic" not in self.config.views:
            off += [self.fusion.project_semantic, self.fusion.gate]
            blend = [self.blend]
        if "behavioral" not in self.config.views:
            off += [self.fusion.project_behavioral, self.fusion.gate, self.projector]
        return [parameter for module in off for parameter in module.parameters()] + blend

    def _tokenize(self, texts: Sequence[str], cache: Path | None = None) -> Ragged:
        longest = max(self.config.text_tokens, self.config.item_tokens)
        return tokenize(texts, self.backbone.tokenizer, longest, cache)

    @property
    def cached(self) -> Sequence[Path]:
        """Cache entries this model was built from."""
        return [*self.entry.cached, *self.items.cached]

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read, by the semantic view where there is one."""
        config = self.config
        inside = "semantic" in config.views or config.pools_words
        return config.item_tokens if inside else config.text_tokens

    def freeze(self) -> None:
        """Switch to evaluation mode and compute once what no history changes."""
        self.eval()
        self.items.freeze()
        self.experts.keep()

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once; return their item ints.

        Raises:
            DataError: an empty text.
        """
        check_new_texts(texts)
        tokens, first = self._tokenize(texts), self.n_items
        self.entry.add(tokens)
        self.items.add(tokens)
        return np.arange(first, self.n_items, dtype=np.int32)

    # -- the pipeline ----------------------------------------------------------------------------

    @property
    def n_items(self) -> int:
        """N, items of the catalog, those added later included."""
        return len(self.entry)

    @property
    def temperature(self) -> Tensor:
        """tau of Eq. 8, a scalar."""
        return self.log_temperature.exp()

    def forward(
        self,
        histories: Ragged,
        *,
        views: Views | None = None,
        every: bool = False,
        rows: LookUp | None = None,
        of_items: bool = False,
    ) -> UserState:
        """Pass the views of every history through the one backbone in one pass, then fuse them.

        Args:
            histories: item ints, oldest first, no row empty; only the newest ``max_items`` count.
            views: the views to read, by default the config's.
            every: one prediction per (kept) position instead of one per row.
            rows: `ItemSide.look_up`, where it was called already.
            of_items: the histories of one stand for items to compare users with.
        """
        views = self.config.views if views is None else views
        rows = self.items.look_up() if rows is None else rows
        # Positions of the newest max_items, in the caller's flat items.
        recent = Ragged(np.arange(len(histories.values)), histories.offsets)
        recent = recent.tail(self.config.max_items)
        items = Ragged(histories.values[recent.values], recent.offsets)
        inputs = [self._input(view, items, rows) for view in views]
        states, routing, packing = self._transform(inputs)

        # Predictions: every newest position that all views hold, or the last of each row.
        held = np.minimum.reduce([part.segments.blocks.cpu().numpy() for part in inputs])
        counts = np.minimum(held, self._window) if every else np.ones_like(held)
        position = recent.gather(recent.offsets[1:] - counts, counts).values
        outputs: dict[View, Tensor] = {}
        for part, h in zip(inputs, states, strict=True):
            ends = np.cumsum(part.segments.blocks.cpu().numpy())
            newest = torch.from_numpy(flat_index(ends - counts, counts)).to(h.device)
            read = self._read(part.view, h, part.segments, newest, every)
            outputs[part.view] = self.items.place(part.view, read)
        behavioral, semantic, fused, delta = self.fusion(
            outputs.get("behavioral"),
            outputs.get("semantic"),
            project=self.config.project_items or not of_items,
        )
        return UserState(
            outputs=outputs,
            behavioral=behavioral,
            semantic=semantic,
            fused=fused,
            delta=delta,
            position=torch.from_numpy(position),
            row=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            routing=routing,
            tokens=packing.tokens,
            computed_tokens=packing.computed,
        )

    def _input(self, view: View, items: Ragged, rows: LookUp) -> ViewInput:
        """Build a view by Eq. 1 or 2, and u of Eq. 6."""
        config = self.config
        if view == "semantic":
            x, segments = self.entry.read(items, config.max_tokens, config.semantic_items)
        else:
            x = self.projector(rows(items.values))
            segments = Segments.of_items(torch.from_numpy(items.lengths).to(x.device))
        if self.places is not None:
            place = segments.place[segments.block]
            x = x + self.places[config.views.index(view)].index_select(0, place)
        if self._every:
            u, user = prefix_mean(x, segments), segments.block
        else:
            user = segments.row[segments.block]
            u = mean_of(x, user, len(segments.lengths))
        if config.user_norm:
            u = F.rms_norm(u, u.shape[-1:])
        return ViewInput(view, x, segments, u, user)

    def _transform(
        self, inputs: Sequence[ViewInput]
    ) -> tuple[list[Tensor], Routing | None, Packing]:
        """Return TRM(E^v; DPMoE), states [n, D] of each view, of one packed pass."""
        packed, packing = pack_views(inputs, self._attend(), self.backbone.dtype)
        if self.has_experts:
            views = self.config.views
            slices = [
                ViewSlice.of_group(views.index(part.view), group, part.u, part.user)
                for part, group in zip(inputs, packing.groups, strict=True)
            ]
            with self.experts.routed(slices) as routing:
                states = self.entry.run(packed, packing)
        else:
            routing, states = None, self.entry.run(packed, packing)
        return list(split_groups(states, packing)), routing, packing

    def _attend(self) -> Attend:
        if self.backbone.causal:
            return Attend.CAUSAL
        return Attend.BLOCK_CAUSAL if self._every else Attend.FULL

    def _read(
        self, view: View, states: Tensor, parts: Segments, newest: Tensor, every: bool
    ) -> Tensor:
        """Return h^v [P, D] float32 at some blocks of the view.

        newest: [P] int64, the blocks: with ``every`` some of each row, else the last of each.
        """
        if not self.backbone.causal and not self._every:
            return _mean_until(states, parts, newest, every)
        if view == "behavioral" or self.backbone.causal:
            h = states[parts.last_token[newest]].float()
        else:
            h = mean_of(states, parts.block, len(parts.row))[newest]
        if self._every and view == "semantic":
            h = h + self.blend * _mean_until(states, parts, newest, every)
        return h

    def _read_last(self, part: ViewInput, states: Tensor) -> Tensor:
        """Return h^v [B, D] float32 after the last block of each row."""
        segments = part.segments
        return self._read(part.view, states, segments, segments.last, every=False)

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return one stage; none where nothing is trained. The free residual of items has a
        learning rate of its own.
        """
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if p.ndim < 2]
        slow = [p for n, p in named if n == "items.table.residual"]
        rest = [p for n, p in named if p.ndim >= 2 and n != "items.table.residual"]
        groups = [
            ParameterGroup("matrices", rest, lr, weight_decay),
            ParameterGroup("vectors", plain, lr, 0.0),
            ParameterGroup("table", slow, self.config.table_lr, 0.0),
        ]
        groups = [g for g in groups if g.parameters]
        if not groups:
            return []
        return [Stage("train", groups, self.batches, self.loss, begin_epoch=self._begin_epoch)]

    def _begin_epoch(self, epoch: int) -> None:
        """Let the item side compute anew what it keeps for an epoch."""
        if "semantic" not in self.config.views:
            return

        def encode(items: Ragged) -> Tensor:
            parts, order = self._in_batches(
                items, lambda state: state.outputs["semantic"], views=("semantic",)
            )
            return torch.cat(parts)[order.to(parts[0].device)]

        self.items.refresh(encode)

    def batches(
        self,
        sequences: Ragged,
        *,
        seed: int,
        epoch: int,
        batch_users: int,
        batch_tokens: int,
    ) -> TrainingBatches:
        """Return the batches of one epoch over training prefixes."""
        config = self.config
        return TrainingBatches(
            sequences,
            supervision="all" if self._every else "last",
            max_items=config.max_items,
            negatives=0 if self._every else config.negatives,
            item_costs=self._item_costs(),
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
            window=self._window,
        )

    @property
    def _window(self) -> int:
        """How many newest positions of a row are targets where all are."""
        semantic = "semantic" in self.config.views
        return min(self.config.max_items, self.config.semantic_items if semantic else 10**9)

    def costs(self, histories: Ragged) -> npt.NDArray[np.int64]:
        """Return about how many tokens each history takes in the backbone, all views, [B]."""
        costs = self._item_costs(histories.values)
        total = np.concatenate(([0], np.cumsum(costs)))
        tokens: npt.NDArray[np.int64] = total[histories.offsets[1:]] - total[histories.offsets[:-1]]
        return np.minimum(tokens, self.config.max_tokens)

    def _item_costs(self, items: npt.NDArray[np.integer] | slice = ALL) -> npt.NDArray[np.int64]:
        """Return how many tokens items, by default all, add to a row, [n]."""
        text, views = self.entry.costs(items), self.config.views
        costs: npt.NDArray[np.int64] = text * ("semantic" in views) + ("behavioral" in views)
        return costs

    def loss(self, batch: Batch) -> Losses:
        """Return L = L_Rec + gamma L_BPC + beta L_LB, and ours, the prior of r_i."""
        config = self.config
        rows = self.items.look_up()
        state = self(batch.histories, every=self._every, rows=rows)
        position = state.position.numpy()
        items = self.items.compare(
            batch,
            state.fused,
            position,
            batch.targets[position] if self._every else batch.targets,
            self.temperature,
            config.views,
            lambda items, of: self(items, views=of, rows=rows, of_items=True),
        )
        total = items.rec
        parts = {"rec": total}
        if state.behavioral is not None and state.semantic is not None and config.bpc > 0:
            users = torch.from_numpy(batch.users)[state.row].to(total.device)
            parts["bpc"] = bpc_loss(
                state.behavioral,
                state.semantic,
                users,
                self.temperature,
                config.bpc_distance,
            )
            total = total + config.bpc * parts["bpc"]
        routings = [r for r in (state.routing, *items.routings) if r is not None]
        if routings and config.balance > 0:
            terms = [term for routing in routings for term in routing.balance.values()]
            parts["balance"] = torch.cat(terms).mean()
            total = total + config.balance * parts["balance"]
        prior = self.items.prior()
        if prior is not None:
            parts["prior"] = prior
            total = total + prior
        return Losses(
            total,
            {name: part.detach() for name, part in parts.items()},
            tokens=state.tokens + items.tokens,
            computed_tokens=state.computed_tokens + items.computed_tokens,
        )

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return unit user vectors [B, D] float32; scores are inner products with items'."""
        return self._unit_vectors(histories)

    def _unit_vectors(
        self, histories: Ragged, *, rows: LookUp | None = None, of_items: bool = False
    ) -> Tensor:
        if not len(histories):
            return torch.zeros(0, self.backbone.dim, device=self.backbone.device)

        def unit(state: UserState) -> Tensor:
            return F.normalize(state.fused.float(), dim=-1)

        parts, order = self._in_batches(histories, unit, rows=rows, of_items=of_items)
        return torch.cat(parts)[order.to(parts[0].device)]

    def users_and_gates(self, histories: Ragged) -> tuple[Tensor, Tensor | None]:
        """Return unit user vectors [B, D] float32 and the mean of delta of Eq. 7 [B] float32 (1:
        all behavioural, 0: all semantic), None with one view.
        """
        state = self.user_states(histories)
        users = F.normalize(state.fused.float(), dim=-1)
        return users, None if state.delta is None else state.delta.float().mean(-1)

    def user_states(self, histories: Ragged) -> UserState:
        """Run `forward` over any number of rows, alike lengths together; results in their order.

        Raises:
            DataError: an empty history.
        """
        return UserState.joined(*self._in_batches(histories, without_routing), histories)

    def _in_batches(
        self,
        histories: Ragged,
        keep: Callable[[UserState], Kept],
        *,
        views: Views | None = None,
        rows: LookUp | None = None,
        of_items: bool = False,
    ) -> tuple[list[Kept], Tensor]:
        """Return what ``keep`` keeps of the state of each batch, and where each row went."""
        with evaluating(self):
            rows = self.items.look_up() if rows is None else rows
            return in_batches(
                histories,
                self.costs(histories),
                lambda some: keep(self(some, views=views, rows=rows, of_items=of_items)),
                max_rows=ENCODED_ROWS,
                max_cost=ENCODED_TOKENS,
            )

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return unit item vectors [n, D] float32, of catalog ints or of raw texts.

        Raises:
            DataError: an empty text.
        """
        if (texts := raw_texts(items)) is not None:
            return self._encode_texts(texts)
        return self._item_vectors(np.asarray(items, dtype=np.int32), self._rows())

    def _rows(self) -> LookUp:
        """Return `ItemSide.look_up` without training's noise."""
        with evaluating(self):
            return self.items.look_up()

    @torch.inference_mode()
    def _item_vectors(self, items: npt.NDArray[np.integer], rows: LookUp) -> Tensor:
        return self._unit_vectors(one_each(items), rows=rows, of_items=True)

    def _encode_texts(self, texts: list[str]) -> Tensor:
        count = self.n_items
        try:
            return self.encode_items(self.add_items(texts))
        finally:
            self.entry.shrink(count)
            self.items.shrink(count)

    def scorer(self) -> Scorer:
        """Encode the catalog; return histories -> r_{u,i} [B, N] = cosine / tau."""
        rows = self._rows()
        vectors = self._item_vectors(np.arange(self.n_items, dtype=np.int32), rows)
        temperature = float(self.temperature.detach())
        return lambda histories: self._unit_vectors(histories, rows=rows) @ vectors.T / temperature

    def calibrate(
        self, sequences: Ragged, histories: Ragged, targets: npt.NDArray[np.integer]
    ) -> None:
        """Tell the item side which items the training ``sequences`` hold."""
        self.items.restrict(sequences.values)

    # -- what it did -----------------------------------------------------------------------------

    @property
    def has_gate(self) -> bool:
        """Whether two views are fused."""
        return len(self.config.views) > 1

    @property
    def has_experts(self) -> bool:
        """Whether tokens are routed to experts."""
        return self.config.adapt and bool(self.linears)

    def expert_load(self, histories: Ragged) -> ExpertLoad | None:
        """Return where the tokens of these histories went; None without experts."""
        if not self.has_experts or not len(histories):
            return None

        def chosen(state: UserState) -> dict[int, tuple[Tensor, int]]:
            routing = state.routing
            assert routing is not None
            return {part.view: (routing.load[part.view], part.tokens) for part in routing.slices}

        with self.experts.watched() as signals:
            parts, _ = self._in_batches(histories, chosen)
        shares: dict[str, list[list[float]]] = {}
        for view in sorted(parts[0]):
            loads, tokens = zip(*(part[view] for part in parts), strict=True)
            share = sum(load * n for load, n in zip(loads, tokens, strict=True)) / sum(tokens)
            shares[self.config.views[view]] = share.tolist()
        user: dict[str, list[float]] = {
            view: user_share([s for s in signals if s.view == number])
            for number, view in enumerate(self.config.views)
            if self.config.personalized_router
        }
        return ExpertLoad(list(self.experts.names), shares, user)

    @torch.inference_mode()
    def view_layers(self, histories: Ragged) -> dict[str, dict[View, Tensor]]:
        """Return what is read of each view at every depth, [B, D] float32 each, the input first:
        its input, the states above each layer that runs, h^v, and h~^v of Eq. 7.

        Raises:
            BackboneError: the layers of the backbone are not to be found.
            DataError: an empty history.
        """
        views, rows = self.config.views, self._rows()

        def read(some: Ragged) -> dict[str, dict[View, Tensor]]:
            recent = some.tail(self.config.max_items)
            inputs = [self._input(view, recent, rows) for view in views]
            with self.backbone.layers_watched() as layers:
                last, _, packing = self._transform(inputs)
            depths: dict[str, Sequence[Tensor]] = {"input": [part.x for part in inputs]}
            for number, states in enumerate(layers[self.entry.layers :], self.entry.layers + 1):
                depths[f"layer {number}"] = split_groups(states, packing)
            found: dict[str, dict[View, Tensor]] = {
                depth: {
                    part.view: self._read_last(part, h.float())
                    for part, h in zip(inputs, states, strict=True)
                }
                for depth, states in depths.items()
            }
            found["h"] = {
                part.view: self.items.place(part.view, self._read_last(part, h))
                for part, h in zip(inputs, last, strict=True)
            }
            found["h~"] = {view: self.fusion.residual(view, h) for view, h in found["h"].items()}
            return found

        with evaluating(self):
            parts, order = in_batches(
                histories,
                self.costs(histories),
                read,
                max_rows=ENCODED_ROWS,
                max_cost=ENCODED_TOKENS,
            )
        return {
            depth: {
                view: torch.cat([part[depth][view].float() for part in parts])[
                    order.to(self.backbone.device)
                ]
                for view in views
            }
            for depth in parts[0]
        }
