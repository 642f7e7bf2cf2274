"""SAID: item embeddings from which a language model can tell the items' texts, for SASRec.

Hu, Xia, Zhang, Fu, Ye, Tang, Zhou. Enhancing Sequential Recommendation via LLM-based Semantic
Embedding Learning. WWW '24 companion, https://doi.org/10.1145/3589335.3648307

    e_i  = |w| norm(W_2 gelu(W_1 t_i + b_1) + b_2)      t_i: a row of a trained table
    L_1  = - sum_t log P(w_t | e_i, w_<t)               a frozen language model, e_i its soft prompt
    x_i  = A white(e_i);  h = causal Transformer(x);  r_{t,i} = h_t . x_i
    L_2  = full softmax of r over the catalog

Stage 1 (``embeddings``) goes over the items, not the users: from one vector the frozen model must
predict the item's text, word for word. Stage 2 (``recommender``) is SASRec on these vectors,
through one map A for its inputs and its outputs.

No code of the authors is public. Choices where the paper leaves one, and deviations:

- |w| is the mean length of the model's word vectors, so that e_i has the scale of a word.
- ``whiten``: the vectors enter stage 2 with mean zero and uncorrelated, so that all directions have
  the same variance; else their few largest dominate A for a long time. ``whiten=false`` centres and
  scales them.
- ``freeze=true`` leaves the vectors as they are after stage 1; ``false`` trains them in stage 2.
- ``lora_rank`` above zero also adapts the language model in stage 1; it is frozen by default.
- ``vocabulary=catalog`` takes the softmax over the words of item texts alone: a smaller product.
- A bidirectional backbone does not model the next word. Its variant is infilling: the whole text is
  masked, and each word is predicted from e_i and its place. `l2rec.modules.words` is the output
  layer.
"""

from __future__ import annotations

__all__ = ["SAID", "SAIDConfig", "standardised"]

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.data.text import tokenize
from l2rec.errors import ConfigError
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Backbone
from l2rec.modules.encoder import SequenceEncoder, check_heads, computed_positions, initialize
from l2rec.modules.item_text import separators
from l2rec.modules.lora import LoRA
from l2rec.modules.objectives import fused_catalog_loss
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.sequences import (
    ItemBatches,
    as_index,
    catalog_rows,
    encode_rows,
    last_of,
    newest_state,
    next_item_batches,
    pad,
)
from l2rec.modules.views import semantic_tokens
from l2rec.modules.words import WordHead, mask_token
from l2rec.protocols import (
    Losses,
    ParameterGroup,
    Scorer,
    Stage,
    UserEncoder,
    decayed,
    inner_product_scorer,
)


class SAIDConfig(BaseModel):
    """Options of SAID."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # stage 1: embeddings
    item_dim: int = Field(128, ge=1)
    """Width of the table's rows t_i."""
    table_lr: float = Field(1e-2, gt=0)
    """Learning rate of the table in stage 1; high, as a row gets one step an epoch."""
    item_tokens: int = Field(128, ge=1)
    """Most tokens of an item's text."""
    prompt: str = "describe:"
    """Words between e_i and the text."""
    vocabulary: Literal["full", "catalog"] = "full"
    """Words of the softmax: all, or those of the item texts."""
    embed_epochs: int = Field(20, ge=1)
    """Passes over the items in stage 1."""
    embed_batch: int = Field(64, ge=1)
    """Most items of a batch in stage 1."""
    lora_rank: int = Field(0, ge=0)
    """Rank of the language model's updates in stage 1; 0 leaves it frozen."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of these updates: they are multiplied by ``lora_alpha / lora_rank``."""
    matrices: tuple[str, ...] = ("q", "v")
    """Matrices that are updated, unless ``lora_rank`` is zero."""

    # stage 2: SASRec
    whiten: bool = True
    """Decorrelation of the vectors before stage 2."""
    freeze: bool = True
    """Vectors stay as they are in stage 2."""
    dim: int = Field(64, ge=1)
    """Width of item vectors and states."""
    layers: int = Field(2, ge=1)
    """Transformer layers."""
    heads: int = Field(2, ge=1)
    """Attention heads; they divide ``dim``."""
    inner: int = Field(256, ge=1)
    """Width of the feed-forward part."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of the embedded inputs and of what each layer adds."""
    attention_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate of attention weights."""

    @model_validator(mode="after")
    def _consistent(self) -> SAIDConfig:
        check_heads(self.dim, self.heads)
        return self


class SAID(nn.Module):
    """The recommender: SASRec on vectors from which a language model can tell the items' texts."""

    Config = SAIDConfig
    uses_backbone = True
    item_tensors = frozenset({"table.weight", "vectors"})

    def __init__(
        self,
        config: SAIDConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.batches = next_item_batches(len(catalog), config.max_items)
        self.backbone = backbone
        tokenizer, words = backbone.tokenizer, backbone.word_embeddings.weight
        before, after = separators(backbone)
        prompt = tokenizer(config.prompt, add_special_tokens=False)["input_ids"]
        self.slot = len(before)
        """Position of e_i in a row; the token there is a placeholder."""
        self.before = [*before, 0, *prompt]
        self.after = [] if backbone.causal else after
        self._check_lengths()
        texts = catalog.require_texts("SAID")
        self.tokens = tokenize(texts, tokenizer, config.item_tokens, cache)
        self.mask = None if backbone.causal else mask_token(backbone)
        self.words: Tensor | None
        used = torch.from_numpy(np.unique(self.tokens.values).astype(np.int64))
        self.register_buffer(
            "words", used if config.vocabulary == "catalog" else None, persistent=False
        )

        self.table = nn.Embedding(len(catalog), config.item_dim)
        nn.init.normal_(self.table.weight, std=0.1)
        self.projector = nn.Sequential(
            nn.Linear(config.item_dim, backbone.dim),
            nn.GELU(),
            nn.Linear(backbone.dim, backbone.word_dim),
        )
        self.norm = float(words.float().norm(dim=-1).mean())
        self.head = WordHead(backbone, self.tokens.values)
        self.lora: LoRA | None = None
        if config.lora_rank:
            linears = find_linears(backbone.model, config.matrices)
            self.lora = LoRA(linears, rank=config.lora_rank, alpha=config.lora_alpha)
            self.lora.attach()

        self.vectors = nn.Parameter(
            torch.zeros(len(catalog), backbone.word_dim), requires_grad=not config.freeze
        )
        self.adaptor = nn.Linear(backbone.word_dim, config.dim)
        self.adaptor.apply(initialize)
        self.encoder = SequenceEncoder.from_config(config, dim=config.dim)
        self._take_vectors(0)

    def _check_lengths(self) -> None:
        limit = self.backbone.max_positions
        longest = len(self.before) + self.config.item_tokens + len(self.after)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"item_tokens={self.config.item_tokens} and {longest - self.config.item_tokens} "
                f"tokens around them: backbone {self.backbone.name!r} has {limit} positions; "
                "lower item_tokens"
            )

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.item_tokens

    @property
    def n_items(self) -> int:
        return self.table.num_embeddings

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return stage 1, the embeddings from texts, and stage 2, the recommender on them."""
        embed = [self.projector, self.head, *([self.lora] if self.lora else [])]
        recommend = [self.adaptor, self.encoder]
        vectors = [] if self.config.freeze else [self.vectors]
        table = ParameterGroup("table", list(self.table.parameters()), self.config.table_lr, 0.0)
        return [
            Stage(
                "embeddings",
                [table, *decayed([p for m in embed for p in m.parameters()], lr, weight_decay)],
                self.item_batches,
                self.text_loss,
                select=False,
                epochs=self.config.embed_epochs,
            ),
            Stage(
                "recommender",
                decayed([p for m in recommend for p in m.parameters()] + vectors, lr, weight_decay),
                self.batches,
                self.loss,
                begin_epoch=self._take_vectors,
            ),
        ]

    # -- stage 1: embeddings ---------------------------------------------------------------------

    def item_batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> ItemBatches:
        """Return the items in batches of like length; no event is read."""
        return ItemBatches(
            self.tokens.lengths,
            batch_items=self.config.embed_batch,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
        )

    def soft_prompts(self, items: Tensor | None = None) -> Tensor:
        """Compute e_i of the given items, or of all: [n, D] float32."""
        rows = self.table.weight if items is None else self.table(items)
        return self.norm * F.normalize(self.projector(rows), dim=-1)

    def text_loss(self, batch: Batch) -> Losses:
        """Compute L_1 = - log P(w_t | e_i, w_<t), mean over the words of the batch."""
        states, ids, predicted, computed = self._read(batch.histories)
        if self.backbone.causal:
            states = states.roll(1, 0)  # a word is predicted from the state before it
        logits = self.head(states[predicted], self.backbone.word_embeddings.weight, self.words)
        targets = ids[predicted]
        if self.words is not None:
            targets = torch.searchsorted(self.words, targets)
        total = F.cross_entropy(logits, targets)
        return Losses(total, {"text": total.detach()}, len(ids), computed)

    def _read(self, items: Ragged) -> tuple[Tensor, Tensor, Tensor, int]:
        """Read rows of one item through the frozen model, their soft prompts before the texts.

        Returns:
            Last hidden states [n, D], token ids [n], which of these are to be predicted [n] bool,
            and the number of tokens computed.
        """
        backbone = self.backbone
        part = semantic_tokens(
            items,
            self.tokens,
            item_tokens=self.config.item_tokens,
            max_tokens=len(self.before) + self.config.item_tokens + len(self.after),
            max_items=1,
            before=self.before,
            after=self.after,
            device=backbone.device,
        )
        lengths = part.segments.lengths
        attend = Attend.CAUSAL if backbone.causal else Attend.FULL
        group, positions = pack(lengths, attend)
        ends = torch.repeat_interleave(lengths, lengths, output_size=len(part.ids))
        predicted = (positions >= len(self.before)) & (positions < ends - len(self.after))
        shown = part.ids if self.mask is None else part.ids.masked_fill(predicted, self.mask)
        prompts = self.soft_prompts(as_index(items.values, backbone.device))
        at = lengths.cumsum(0) - lengths + self.slot
        x = backbone.embed(shown).float().index_copy(0, at, prompts)
        packing = Packing((group,), positions)
        with nullcontext() if self.lora is None else self.lora.enabled():
            return backbone(x, packing), part.ids, predicted, packing.computed

    # -- stage 2: the recommender ----------------------------------------------------------------

    @torch.no_grad()
    def _take_vectors(self, epoch: int) -> None:
        """Take the vectors of stage 1, before the first epoch of stage 2."""
        if epoch == 0:
            self.vectors.copy_(standardised(self.soft_prompts(), whiten=self.config.whiten))

    def item_rows(self) -> Tensor:
        """Compute x_i of all items [N, h], which serve as inputs and in scores."""
        rows: Tensor = self.adaptor(self.vectors)
        return rows

    def forward(self, histories: Ragged, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encode rows of at most ``max_items`` items: states [B, T, h], which are real [B, T].

        ``rows``: `item_rows`, which are computed once for many calls.
        """
        items, real = pad(histories, rows.device)
        return self.encoder(F.embedding(items, rows), real), real

    def loss(self, batch: Batch) -> Losses:
        """Compute L_2, the full softmax, mean over all positions of the batch."""
        rows = self.item_rows()
        states, real = self(batch.histories, rows)
        users = states[real]
        targets = as_index(batch.targets, users.device)
        total = fused_catalog_loss(users, rows, targets)
        return Losses(total, {"rec": total.detach()}, len(users), computed_positions(real))

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return user vectors [B, h] float32.

        Raises:
            DataError: an empty history.
        """
        with torch.no_grad():
            rows = self.item_rows()
        return encode_rows(
            self,
            histories,
            lambda batch: last_of(*self(batch, rows)),
            max_items=self.config.max_items,
        )

    def user_encoder(self) -> UserEncoder:
        """Return the states after the newest items as a function of `item_rows`."""
        return newest_state(self.item_rows().detach(), self.encoder.whole, self.config.max_items)

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return item vectors [n, h] float32 of catalog ints.

        Raises:
            DataError: raw texts, which SAID cannot read.
        """
        chosen = catalog_rows(items, "SAID", self.vectors.device)
        with torch.no_grad():
            rows: Tensor = self.adaptor(self.vectors[chosen])
        return rows

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)


def standardised(vectors: Tensor, *, whiten: bool) -> Tensor:
    """Shift and scale vectors [N, d] to mean zero and mean square one.

    With ``whiten`` they are also decorrelated, in the directions in which they differ at all.
    """
    x = (vectors - vectors.mean(0)).double()
    if whiten:
        variance, directions = torch.linalg.eigh(x.T @ x / len(x))
        differ = variance > 1e-9 * variance[-1]
        x = x @ (directions * torch.where(differ, variance, torch.inf).rsqrt()) @ directions.T
    return (x / x.square().mean().sqrt().clamp_min(1e-9)).to(vectors.dtype)
