"""RecFormer: Text Is All You Need: Learning Language Representations for Sequential Recommendation.

Li, Wang, Li, Fu, Shen, Shang, McAuley. KDD '23, https://arxiv.org/abs/2305.13731

    x   = Embed(word) + A[type] + B[position of its item, newest = 1]      type: mark, key, value
    z   = Transformer(newest item, ..., oldest item)[CLS]                  an item: a row of one
    r_{u,i} = cos(z_u, z_i) / tau

It is trained in three stages:

- Pre-training (``pretrain_epochs``): a row is cut before a random item of its second half, the
  target. Loss: softmax over the targets of the batch + ``mlm`` (MLM(row) + MLM(target)).
- Fine-tuning: at the start of each epoch all items are encoded into a table, which is then frozen.
  One random target for each user and epoch; softmax over the whole table. Users are scored
  against the table of the best epoch, with its weights.
- Fine-tuning beside a fixed table: training goes on from these weights and this table, which is not
  encoded again.

With ``finetune=false`` a run is pre-training alone, for the ``--init`` of runs on other data.

Any backbone will do. A bidirectional one gets the newest item first, and its state at the first
token is z. A causal one gets the oldest item first, and its state at a learned [SEQ] vector after
the newest is z; in place of MLM it has the loss of the next token, in the same pass.

Choices and deviations:

- ``tuning=lora`` trains low-rank updates of the frozen backbone, ``full`` (the paper's) a float32
  copy of all its weights but the word embeddings. The paper's Longformer, whose attention cannot
  read packed rows, is not used. Layers drop nothing inside, where the authors' do.
- A and B start at zero and are added to the backbone's own position and type embeddings.
- ``keys`` names the catalog's fields that are read as key-value pairs; ``text`` is the prepared
  text. A new item has a value for the first key alone.
- What exceeds ``max_tokens`` is dropped as whole items, oldest first.
- A target in the batch is no negative for a user who has the same target.
- The output layer of both language losses is `l2rec.modules.words`. A tokenizer without a mask
  token hides words behind its unknown-word token.
- A new item is encoded by the current weights, also beside a fixed table.
"""

from __future__ import annotations

__all__ = ["RecFormer", "RecFormerConfig"]

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import TEXT, Catalog
from l2rec.data.ragged import Ragged, flat_index
from l2rec.data.text import tokenize
from l2rec.errors import BackboneError, ConfigError
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Backbone
from l2rec.modules.item_text import separators
from l2rec.modules.lora import LoRA
from l2rec.modules.losses import in_batch_loss
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.room import Room
from l2rec.modules.sequences import (
    as_index,
    check_new_texts,
    encode_rows,
    one_each,
    raw_texts,
    stacked,
)
from l2rec.modules.words import WordHead, mask_token
from l2rec.protocols import Losses, Scorer, Stage, decayed, inner_product_scorer

MARK, KEY, VALUE = range(3)
"""Types of tokens."""


class RecFormerConfig(BaseModel):
    """Options of RecFormer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # input
    keys: tuple[str, ...] = ("text",)
    """Fields of the catalog in the order in which they are read; ``text`` is the prepared text."""
    item_tokens: int = Field(96, ge=2)
    """Most tokens of an item, an equal share for each key with its value."""
    max_items: int = Field(50, ge=1)
    """Most items of a history that are read, the newest."""
    max_tokens: int = Field(512, ge=8)
    """Most tokens of a row; the paper has 1024."""

    # what is trained
    tuning: Literal["lora", "full"] = "lora"
    """Low-rank updates of the backbone, or a copy of all its weights."""
    matrices: tuple[str, ...] = ("q", "v")
    """Matrices of the backbone that are updated, for ``tuning=lora``."""
    rank: int = Field(8, ge=1)
    """Rank of the updates."""
    alpha: float = Field(16.0, gt=0)
    """Scale of the updates: they are multiplied by ``alpha / rank``."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate of the inputs of the low-rank updates; for ``tuning=full``, of the inputs of the
    first layer."""

    # stages and losses
    pretrain_epochs: int = Field(32, ge=0)
    """Epochs of pre-training; 0 leaves it out."""
    finetune: bool = True
    """Fine-tuning after pre-training; without it the run is for others to start from."""
    temperature: float = Field(0.05, gt=0)
    """tau."""
    mlm: float = Field(0.1, ge=0)
    """Weight of the language losses; 0 leaves them out."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of words that MLM hides."""
    mlm_apart: bool = True
    """Separate pass for MLM; without it the contrast too reads rows with hidden words, and
    pre-training takes half the time.
    """

    @model_validator(mode="after")
    def _consistent(self) -> RecFormerConfig:
        if not self.finetune and not self.pretrain_epochs:
            raise ValueError("finetune=false and pretrain_epochs=0 leave nothing to train")
        if not self.keys or self.item_tokens < 2 * len(self.keys):
            raise ValueError(
                f"item_tokens={self.item_tokens} for keys={list(self.keys)}; give at least one "
                "key, and two tokens or more for each"
            )
        return self


@dataclass(frozen=True)
class ItemTokens:
    """Token ids of every item, and the type of each token in the same places."""

    ids: Ragged
    types: Ragged

    def followed_by(self, other: ItemTokens) -> ItemTokens:
        """Return these items, then the other ones."""
        return ItemTokens(stacked(self.ids, other.ids), stacked(self.types, other.types))


@dataclass(frozen=True)
class Rows:
    """Packed batch of B rows, n tokens together."""

    ids: Tensor
    """Token ids [n] int64."""
    types: Tensor
    """Types of the tokens [n] int64."""
    items: Tensor
    """Position of each token's item in its row [n] int64, the newest at 1; 0 for marks."""
    lengths: Tensor
    """Tokens of each row [B] int64."""
    read: Tensor
    """Token whose state stands for the row [B] int64."""


@dataclass(frozen=True)
class Reading:
    """Rows and the states that the language model has given them."""

    rows: Rows
    states: Tensor
    """Last hidden states [n, D]."""
    computed: int
    """Tokens computed, padding included."""

    @property
    def z(self) -> Tensor:
        """Unit vectors of the rows [B, D] float32; their inner products are cosines."""
        return F.normalize(self.states.index_select(0, self.rows.read).float(), dim=-1)


class RecFormer(nn.Module):
    """The recommender: users and items are rows of text, read by one language model."""

    Config = RecFormerConfig
    uses_backbone = True
    item_tensors = frozenset({"table", "kept"})

    def __init__(
        self,
        config: RecFormerConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.before = separators(backbone)[0]
        _check(config, backbone, self.before)
        self.backbone = backbone
        if config.tuning == "full":
            weights = _weights(backbone)
            self._names = list(weights)
            self.tuned = nn.ParameterList(w.detach().float().clone() for w in weights.values())
        else:
            linears = find_linears(backbone.model, config.matrices)
            self.lora = LoRA(linears, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
            self.lora.attach()
        self.types = nn.Parameter(torch.zeros(3, backbone.word_dim))
        self.positions = nn.Parameter(torch.zeros(1 + config.max_items, backbone.word_dim))
        if backbone.causal:
            scale = backbone.word_scale()
            self.seq = nn.Parameter(torch.randn(backbone.word_dim) * scale.cpu())
        fields = [catalog.texts if key == TEXT else catalog.field(key) for key in config.keys]
        if config.keys == (TEXT,):
            catalog.require_texts("RecFormer")
        self.tokens = self._tokenize(fields, cache)
        self.head = WordHead(backbone, self.tokens.ids.values)
        self.mask = 0 if backbone.causal or config.mlm == 0 else mask_token(backbone)
        if config.pretrain_epochs == 0 or config.mlm == 0:
            self.head.requires_grad_(False)
        self.table: Tensor
        self.kept: Tensor
        self.continues: Tensor
        self.register_buffer("table", torch.zeros(len(catalog), backbone.dim))
        self._room = Room()
        # True once the table has the items; before that they are encoded on demand.
        self.register_buffer("kept", torch.tensor(False))
        self.register_buffer("continues", _continues_word(backbone), persistent=False)

    # -- items and rows as tokens ----------------------------------------------------------------

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.tokens.ids)

    @property
    def text_tokens(self) -> int:
        """Most tokens of a value that are read, beside its key."""
        return min(self._share - len(self._name(key)) for key in self.config.keys)

    @property
    def _share(self) -> int:
        """Tokens of an item for each key with its value."""
        return self.config.item_tokens // len(self.config.keys)

    def _name(self, key: str) -> list[int]:
        """Return the tokens of a key, at most all of its share but one."""
        name: list[int] = self.backbone.tokenizer(key, add_special_tokens=False)["input_ids"]
        return name[: self._share - 1]

    def _tokenize(self, fields: Sequence[Sequence[str]], cache: Path | None = None) -> ItemTokens:
        """Tokenise items by their values, given as one list for each of the first keys."""
        tokenizer, config = self.backbone.tokenizer, self.config
        ids: list[Ragged] = []
        for key, texts in zip(config.keys, fields, strict=False):
            name = self._name(key)
            values = tokenize(texts, tokenizer, self._share, cache).head(self._share - len(name))
            named = (values.lengths > 0) * len(name)  # a key without a value is left out
            offsets = np.concatenate(([0], np.cumsum(named)))
            names = np.tile(np.asarray(name, dtype=np.int32), int((named > 0).sum()))
            ids += [Ragged(names, offsets), values]
        types = [
            Ragged(np.full_like(part.values, KEY if n % 2 == 0 else VALUE), part.offsets)
            for n, part in enumerate(ids)
        ]
        return ItemTokens(_joined(ids), _joined(types))

    def _rows(self, histories: Ragged) -> Rows:
        """Pack histories as tokens: marks, and the newest items that fit."""
        config, causal, tokens = self.config, self.backbone.causal, self.tokens
        marks = [*self.before, 0] if causal else self.before  # 0 stands where [SEQ] will be
        recent = _newest_that_fit(
            histories.tail(config.max_items), tokens.ids.lengths, config.max_tokens - len(marks)
        )
        counts = recent.lengths
        place = flat_index(np.zeros_like(counts), counts)
        if causal:
            items, age = recent.values, np.repeat(counts, counts) - place
        else:
            items, age = recent.values[np.repeat(recent.offsets[1:], counts) - 1 - place], place + 1
        sizes = tokens.ids.lengths[items]
        text = flat_index(tokens.ids.offsets[:-1][items], sizes)
        until = np.concatenate(([0], np.cumsum(sizes)))[recent.offsets]
        ends = until[1:] + len(marks) * np.arange(1, len(recent) + 1)
        lengths = np.diff(ends, prepend=0)
        starts = ends - lengths
        is_text = np.ones(int(ends[-1]), dtype=bool)
        is_text[flat_index(starts, np.full_like(starts, len(self.before)))] = False
        if causal:
            is_text[ends - 1] = False

        def spread(marked: list[int], values: npt.NDArray[np.integer]) -> Tensor:
            out = np.empty(len(is_text), dtype=np.int64)
            out[~is_text] = np.tile(marked, len(recent))
            out[is_text] = values
            return torch.from_numpy(out).to(self.types.device)

        none = [MARK] * len(marks)
        return Rows(
            ids=spread(marks, tokens.ids.values[text]),
            types=spread(none, tokens.types.values[text]),
            items=spread(none, np.repeat(age, sizes)),
            lengths=torch.from_numpy(lengths).to(self.types.device),
            read=torch.from_numpy(ends - 1 if causal else starts).to(self.types.device),
        )

    # -- the model -------------------------------------------------------------------------------

    def forward(self, histories: Ragged) -> Reading:
        """Read histories with the adapted language model."""
        return self._read(self._rows(histories))

    def _read(self, rows: Rows) -> Reading:
        model = self.backbone
        x = model.embed(rows.ids) + F.embedding(rows.types, self.types)
        x = x + F.embedding(rows.items, self.positions)
        if model.causal:
            x = x.index_copy(0, rows.read, self.seq.expand(len(rows.read), -1))
        group, positions = pack(rows.lengths, Attend.CAUSAL if model.causal else Attend.FULL)
        packing = Packing((group,), positions)
        return Reading(rows, self._run(x, packing), packing.computed)

    def _run(self, x: Tensor, packing: Packing) -> Tensor:
        """Run the adapted language model: inputs [n, word_dim] -> last hidden states [n, D]."""
        if self.config.tuning == "lora":
            with self.lora.enabled():
                return self.backbone(x, packing)  # type: ignore[no-any-return]
        x = F.dropout(x, self.config.dropout, self.training)
        tuned = (w.to(self.backbone.dtype) for w in self.tuned)
        weights = dict(zip(self._names, tuned, strict=True))
        return functional_call(self.backbone, weights, (x, packing))  # type: ignore[no-any-return]

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return pre-training and both fine-tuning stages, without what the options leave out."""
        config = self.config
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        reading = [p for name, p in named if not name.startswith("head.")]
        tuned = decayed(reading, lr, weight_decay)
        pretrain = Stage(
            "pre-training",
            decayed([p for _, p in named], lr, weight_decay),
            self.pretraining_batches,
            self.pretraining_loss,
            select=False,
            epochs=config.pretrain_epochs,
            begin_epoch=self._drop_table,
        )
        finetune = Stage(
            "fine-tuning", tuned, self.batches, self.loss, begin_epoch=self._renew_table
        )
        fixed = Stage(
            "fine-tuning beside a fixed table",
            tuned,
            self.batches,
            self.loss,
            begin_epoch=self._have_table,
        )
        return [pretrain] * (config.pretrain_epochs > 0) + [finetune, fixed] * config.finetune

    def pretraining_batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return the newest items of every training sequence, which the loss then splits."""
        return TrainingBatches(
            sequences,
            supervision="sequence",
            max_items=self.config.max_items + 1,
            window=int(sequences.lengths.max(initial=1)),  # so that a user has one row
            negatives=0,
            item_costs=self.tokens.ids.lengths,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
        )

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return one random target for each user, with the items before it."""
        return TrainingBatches(
            sequences,
            supervision="last",
            max_items=self.config.max_items,
            negatives=0,
            item_costs=self.tokens.ids.lengths,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
        )

    def pretraining_loss(self, batch: Batch) -> Losses:
        """Compute the contrast of rows with their targets, + ``mlm`` times both language losses."""
        config = self.config
        histories, targets = split_rows(batch.histories)
        users, words_of_users, user_readings = self._with_words(self._rows(histories))
        items, words_of_items, item_readings = self._with_words(self._rows(one_each(targets)))
        target = as_index(targets, users.z.device)
        contrast = in_batch_loss(users.z, items.z, target, temperature=config.temperature)
        words = words_of_users + words_of_items
        parts = {"contrast": contrast.detach(), "words": words.detach()}
        return _losses(contrast + config.mlm * words, parts, user_readings + item_readings)

    def _with_words(self, rows: Rows) -> tuple[Reading, Tensor, list[Reading]]:
        """Read one side of the contrast.

        Returns:
            The reading for the contrast, the language loss, and all readings made for the two.
        """
        if self.config.mlm == 0:
            reading = self._read(rows)
            return reading, reading.states.new_zeros(()), [reading]
        if self.backbone.causal:
            reading = self._read(rows)
            return reading, self._next_words(reading), [reading]
        ids, hidden = self._hide(rows)
        gaps = self._read(replace(rows, ids=ids))
        words = self._word_loss(gaps.states, rows.ids, hidden)
        if not self.config.mlm_apart:
            return gaps, words, [gaps]
        reading = self._read(rows)
        return reading, words, [reading, gaps]

    def loss(self, batch: Batch) -> Losses:
        """Compute the softmax of cos / tau over the whole frozen table, mean over users."""
        reading = self(batch.histories)
        scores = reading.z @ self.table.T / self.config.temperature
        total = catalog_loss(scores, as_index(batch.targets, scores.device))
        return _losses(total, {"rec": total.detach()}, [reading])

    def _next_words(self, reading: Reading) -> Tensor:
        """Compute the cross-entropy of every word of the items, given those before it."""
        rows = reading.rows
        predicted = rows.types != MARK
        predicted[rows.lengths.cumsum(0) - rows.lengths] = False  # nothing before it
        return self._word_loss(reading.states.roll(1, 0), rows.ids, predicted)

    def _word_loss(self, states: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
        """Compute the cross-entropy of the chosen tokens, mean; ``chosen``: [n] bool."""
        logits = self.head(states[chosen], self.backbone.word_embeddings.weight)
        loss = F.cross_entropy(logits, ids[chosen], reduction="sum")
        return loss / max(1, len(logits))

    def _hide(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Corrupt rows as BERT does, by whole words.

        Of the chosen tokens 80% are masked, 10% are random words and 10% stay as they are.

        Returns:
            Corrupted ids [n] int64, and which tokens are to be predicted [n] bool.
        """
        tokenizer, ids = self.backbone.tokenizer, rows.ids
        begins = ~self.continues[ids]
        begins[1:] |= rows.items[1:] != rows.items[:-1]
        word = begins.cumsum(0) - 1
        chosen = torch.rand(len(ids), device=ids.device) < self.config.mask_share
        hidden = chosen[word] & (rows.types != MARK)
        fate = torch.rand(len(ids), device=ids.device)
        drawn = torch.randint(len(tokenizer), ids.shape, device=ids.device)
        masked = torch.where(hidden & (fate < 0.8), self.mask, ids)
        return torch.where(hidden & (fate >= 0.9), drawn, masked), hidden

    # -- the frozen table ------------------------------------------------------------------------

    def _renew_table(self, epoch: int) -> None:
        """Encode all items with the current weights into the table, which is saved with these."""
        self.table.copy_(self._encode(np.arange(self.n_items)))
        self.kept.fill_(True)

    def _drop_table(self, epoch: int) -> None:
        """Forget the table of a start on the same items, which pre-training makes older."""
        self.kept.fill_(False)

    def _have_table(self, epoch: int) -> None:
        """Encode the table if no epoch before this stage has left one."""
        if not self.kept:
            self._renew_table(epoch)

    # -- inference -------------------------------------------------------------------------------

    def encode_users(self, histories: Ragged) -> Tensor:
        """Return unit user vectors [B, D] float32.

        Raises:
            DataError: an empty history.
        """
        config = self.config
        return encode_rows(
            self,
            histories,
            lambda rows: self(rows).z,
            max_items=config.max_items,
            max_rows=512,
            max_cost=max(1, 16384 // config.item_tokens),
        )

    def _encode(self, items: npt.NDArray[np.integer]) -> Tensor:
        """Encode items [n] with the current weights: unit vectors [n, D] float32."""
        return self.encode_users(one_each(items))

    def encode_items(self, items: npt.NDArray[np.integer] | Sequence[str]) -> Tensor:
        """Return unit item vectors [n, D] float32 of catalog ints or of raw texts."""
        texts = raw_texts(items)
        if texts is not None:
            return self._encode_texts(texts)
        chosen = np.asarray(items, dtype=np.int64)
        if not self.kept:
            return self._encode(chosen)
        return self.table.index_select(0, torch.from_numpy(chosen).to(self.table.device))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        """Encode texts as items that are added and forgotten: unit vectors [n, D] float32."""
        known = self.tokens, self.table
        try:
            return self.encode_items(self.add_items(texts))
        finally:
            self.tokens, self.table = known

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        Raises:
            DataError: an empty text.
        """
        check_new_texts(texts)
        first = self.n_items
        self.tokens = self.tokens.followed_by(self._tokenize([texts]))
        new = np.arange(first, self.n_items, dtype=np.int32)
        self.table = self._room.followed(self.table, self._encode(new))
        return new

    def scorer(self) -> Scorer:
        return inner_product_scorer(self)


def split_rows(rows: Ragged) -> tuple[Ragged, npt.NDArray[np.integer]]:
    """Cut each row before a random item of its second half; return the rows and these items [B].

    Rows have two items or more.
    """
    lengths = rows.lengths
    first = np.maximum(1, (lengths - 1) // 2)
    drawn = torch.rand(len(lengths), dtype=torch.float64).numpy()
    at = first + np.floor(drawn * (lengths - first)).astype(np.int64)
    return rows.gather(rows.offsets[:-1], at), rows.values[rows.offsets[:-1] + at]


def _newest_that_fit(rows: Ragged, costs: npt.NDArray[np.int64], budget: int) -> Ragged:
    """Select the newest items of each row that together cost no more than the budget."""
    total = np.concatenate(([0], np.cumsum(costs[rows.values])))
    to_end = np.repeat(total[rows.offsets[1:]], rows.lengths) - total[:-1]
    row = np.repeat(np.arange(len(rows)), rows.lengths)
    fitting = np.bincount(row[to_end <= budget], minlength=len(rows))
    return rows.gather(rows.offsets[1:] - fitting, fitting)


def _joined(parts: Sequence[Ragged]) -> Ragged:
    """Join row i of every part, one after the other, into row i."""
    lengths = np.stack([part.lengths for part in parts])
    offsets = np.concatenate(([0], np.cumsum(lengths.sum(0))))
    starts = offsets[:-1] + np.cumsum(lengths, axis=0) - lengths
    values = np.empty(int(offsets[-1]), dtype=np.int32)
    for part, start in zip(parts, starts, strict=True):
        values[flat_index(start, part.lengths)] = part.values
    return Ragged(values, offsets)


def _weights(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Select the weights of ``tuning=full``: all but word embeddings and the unused pooler."""
    words = backbone.word_embeddings.weight
    return {
        name: p
        for name, p in backbone.named_parameters()
        if p is not words and "pooler" not in name
    }


def _continues_word(backbone: Backbone) -> Tensor:
    """Find the tokens that continue the word before them, by how vocabularies mark it: [V] bool."""
    tokenizer = backbone.tokenizer
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    result = torch.zeros(len(backbone.word_embeddings.weight), dtype=torch.bool)
    pieces = any(token.startswith("##") for token in tokens)
    marked = any(token.startswith(("\u0120", "\u2581")) for token in tokens)
    if pieces:
        continues = [token.startswith("##") for token in tokens]
    else:  # byte-level and SentencePiece vocabularies mark the space before a word
        continues = [marked and not token.startswith(("\u0120", "\u2581")) for token in tokens]
    result[: len(tokens)] = torch.tensor(continues)
    return result


def _check(config: RecFormerConfig, backbone: Backbone, before: list[int]) -> None:
    """Check that the backbone can read rows of the configured length.

    Raises:
        ConfigError: rows or items are too long.
        BackboneError: a bidirectional backbone has no token before a text.
    """
    limit, marks = backbone.max_positions, len(before) + backbone.causal
    if limit is not None and config.max_tokens > limit:
        raise ConfigError(
            f"max_tokens={config.max_tokens}: backbone {backbone.name!r} has {limit} positions; "
            f"lower it to at most {limit}"
        )
    if config.item_tokens + marks > config.max_tokens:
        raise ConfigError(
            f"item_tokens={config.item_tokens} and {marks} mark(s) exceed "
            f"max_tokens={config.max_tokens}; lower item_tokens"
        )
    if backbone.causal:
        return
    if not before:
        raise BackboneError(
            f"the tokenizer of backbone {backbone.name!r} puts no token such as [CLS] before a "
            "text, at which a row could be read; choose another backbone"
        )


def _losses(total: Tensor, parts: dict[str, Tensor], readings: Sequence[Reading]) -> Losses:
    """Combine a loss with the token counts of all readings that were made for it."""
    return Losses(
        total,
        parts,
        tokens=sum(len(reading.rows.ids) for reading in readings),
        computed_tokens=sum(reading.computed for reading in readings),
    )
