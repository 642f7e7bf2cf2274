"""LLaRA: Large Language-Recommendation Assistant.

Liao, Li, Yang, Wu, Yuan, Wang, He. SIGIR '24, https://arxiv.org/abs/2312.02445

    prompt      before, title_1 [E_1], title_2 [E_2], ..., after it a question
    [E_i]       Proj(e_i) = W_2 gelu(W_1 e_i + b_1) + b_2, e_i: a row of a frozen SASRec
    answer      the title of the next item and an end
    loss        cross-entropy of the answer's tokens, of LoRA on a frozen language model
    curriculum  at step t of T a batch has these hybrid prompts with probability t / T; else they
                are text alone and Proj is not moved

SASRec is trained first, on the same training prefixes, in a stage of its own.

``head=titles`` is the paper's form. Ranking is a beam search among the titles of the catalog
(`l2rec.modules.beam`), without a list of candidates in the prompt. What the beam does not reach
ties behind it. Items of one title tie. It needs a decoder-only backbone whose output layer is its
word embeddings.

``head=items`` is ours, not the paper's: the state h at the end of the prompt is compared with
another projection of all items, h . Proj'(e_i), and the loss is the softmax over the catalog. It
also takes encoders, which read the prompt in both directions.

Choices where the paper leaves one, and deviations:

- The authors rank 20 candidates that the prompt lists, by HR@1 among valid answers. Here all items
  are ranked, by one evaluator, so neither training nor ranking has a list.
- Text-only prompts leave the places of [E_i] out; the authors put an untrained token there.
- T is the number of steps of ``curriculum`` epochs; set it to those of the training. The authors'
  counter seems to start anew with every epoch.
- A title is an item's text, cut to ``item_tokens``: prepare data with texts that are titles alone
  to be like the paper. An entry of the prompt and an answer end alike, with the token that ends a
  text for this tokenizer, or a line break.
- Logits are products with the word embeddings: what some models do to theirs besides (a scale in
  Granite, a cap in Gemma 2) is left out.
- Proj has the one learning rate and weight decay of all; the authors have 1e-5 for its decay.
- ``targets_per_user`` positions of a user's sequence are predicted in an epoch, drawn anew in each.

Legend: B users, N items, n tokens of a batch, D hidden size, V vocabulary, R rank.
"""

from __future__ import annotations

__all__ = ["LLaRA", "LLaRAConfig"]

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.data.batches import Batch, TrainingBatches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged, flat_index
from l2rec.data.text import tokenize
from l2rec.errors import ConfigError
from l2rec.methods.sasrec import SASRec, SASRecConfig
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import ENCODED_ROWS, ENCODED_TOKENS, Backbone
from l2rec.modules.beam import CausalDecoder, beam_remark, beam_search, item_scores
from l2rec.modules.item_text import separators
from l2rec.modules.lora import LoRA
from l2rec.modules.objectives import catalog_loss
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.probe import check_search
from l2rec.modules.sequences import as_index, evaluating, in_batches, stacked
from l2rec.modules.trie import Trie
from l2rec.modules.words import Speaker, WordHead
from l2rec.protocols import Losses, Scorer, Stage, decayed

SLOT = -1
"""Token at the place of [E_i]."""
SEARCHED = 64
"""Histories whose beams are searched at once."""


class LLaRAConfig(BaseModel):
    """Options of LLaRA; the defaults are the paper's where it gives a value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # what is read
    max_items: int = Field(10, ge=1)
    """Most items of a history that are read, the newest."""
    item_tokens: int = Field(24, ge=1)
    """Most tokens of a title."""
    prompt: str = "This user has chosen these items, the newest last:"
    """Words before the history."""
    question: str = "The item that this user will choose next:"
    """Words after the history."""
    id_dim: int = Field(64, ge=1)
    """Width of SASRec's rows."""

    # what is said
    head: Literal["titles", "items"] = "titles"
    """``titles``: the next title, token by token; ``items`` (ours): one state, compared with all
    items.
    """
    beams: int = Field(20, ge=1)
    """Titles that are kept while searching, and ranked at the end, with ``head=titles``."""

    # what is trained
    matrices: tuple[str, ...] | None = None
    """Matrices of the backbone that are updated; by default all of a block: q, k, v, o, gate, up,
    down, as far as the backbone has them.
    """
    rank: int = Field(8, ge=1)
    """Rank of the updates."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the updates: they are multiplied by ``lora_alpha / rank``."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate of what the updates read."""
    curriculum: int = Field(5, ge=0)
    """Epochs in which the share of hybrid batches rises from none to all; 0: all from the start."""
    targets_per_user: int = Field(1, ge=1)
    """Positions of a user's sequence that are predicted in an epoch."""
    sasrec_epochs: int = Field(60, ge=1)
    """Most epochs of SASRec's stage."""
    sasrec_lr: float = Field(1e-3, gt=0)
    """Learning rate of SASRec's stage."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know beside the scores."""
        if self.head == "titles":
            return (beam_remark(self.beams, "titles"),)
        return ("its head, one state that is compared with all items, is ours, not the paper's",)


class TextOnly(Batch):
    """A batch whose prompts are text alone."""


class Curriculum:
    """Batches of one epoch, each hybrid or text-only; the same for the same (seed, epoch).

    share: [batches] probability t / T of each to be hybrid, where t counts the steps of all epochs
    from 0 and T is the number of steps in ``epochs`` of them. hybrid: [batches] bool, as drawn.
    """

    def __init__(self, batches: TrainingBatches, *, seed: int, epoch: int, epochs: int) -> None:
        self._batches = batches
        count = len(batches)
        step = epoch * count + np.arange(count)
        self.share = np.minimum(1.0, step / (epochs * count)) if epochs else np.ones(count)
        self.hybrid = np.random.default_rng([seed, epoch]).random(count) < self.share

    def __len__(self) -> int:
        return len(self._batches)

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches ``start``, ``start + 1``, ... of the epoch."""
        for number, batch in enumerate(self._batches.iterate(start), start):
            yield batch if self.hybrid[number] else TextOnly(**vars(batch))


@dataclass(frozen=True)
class Prompts:
    """Prompts, and the answers where they are given, row after row.

    x: [n, word_dim] inputs. ids: [n] int64 tokens, `SLOT` where x is Proj(e_i). lengths: [B] int64.
    """

    x: Tensor
    ids: Tensor
    lengths: Tensor

    @property
    def last(self) -> Tensor:
        """Last token of each row, [B] int64."""
        return self.lengths.cumsum(0) - 1

    def padded(self) -> tuple[Tensor, Tensor]:
        """Arrange the rows as a grid: x [B, S, word_dim], zero on the left of a row, and which
        places are real, [B, S] bool.
        """
        longest = int(self.lengths.max())
        places = torch.arange(longest, device=self.x.device)
        real = places >= longest - self.lengths[:, None]
        grid = self.x.new_zeros(*real.shape, self.x.shape[1])
        grid[real] = self.x
        return grid, real


def projector(id_dim: int, hidden: int, out: int) -> nn.Sequential:
    """Build Proj: rows of SASRec [..., id_dim] -> [..., out]."""
    return nn.Sequential(nn.Linear(id_dim, hidden), nn.GELU(), nn.Linear(hidden, out))


class LLaRA(nn.Module):
    """The recommender.

    Raises:
        ConfigError: ``head=titles`` and a backbone that cannot say titles, or a prompt that is
            longer than the backbone's rows. BackboneError: titles cannot be searched for with it.
    """

    Config = LLaRAConfig
    uses_backbone = True
    item_tensors = frozenset({"sasrec.items.weight"})

    def __init__(
        self,
        config: LLaRAConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        texts = [" ".join(text.split()) for text in catalog.require_texts(type(self).__name__)]
        titles = tokenize(texts, backbone.tokenizer, config.item_tokens, cache)
        start, end = separators(backbone)
        before = [*start, *self._words(config.prompt), *end]
        after = [*self._words(config.question), *end]
        self.pieces = stacked(titles, Ragged.from_rows([before, [SLOT, *end], after, end]))
        """Tokens of the titles, then of what stands before, between and after them."""
        self._before, self._mark, self._after, self._end = len(texts) + np.arange(4)
        self._check_lengths()

        self.lora = LoRA(
            find_linears(backbone.model, config.matrices),
            rank=config.rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
        )
        self.lora.attach()
        self.sasrec = SASRec(SASRecConfig(dim=config.id_dim), catalog)
        self.project = projector(config.id_dim, backbone.dim, backbone.word_dim)
        if config.head == "items":
            self.project_items = projector(config.id_dim, backbone.dim, backbone.dim)
        else:
            self.words = WordHead(backbone, titles.values)
            self._check_speaks()

    def _words(self, text: str) -> list[int]:
        return list(self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _longest(self) -> int:
        """Count the tokens of the longest possible row, the answer included."""
        config = self.config
        before, mark, after, end = self.pieces.lengths[-4:].tolist()
        prompt = before + config.max_items * (config.item_tokens + mark) + after
        return int(prompt + (config.item_tokens + end) * (config.head == "titles"))

    def _check_lengths(self) -> None:
        config, limit, needed = self.config, self.backbone.max_positions, self._longest()
        if limit is not None and needed > limit:
            raise ConfigError(
                f"max_items={config.max_items} of item_tokens={config.item_tokens} and the words "
                f"around them may need {needed} tokens, backbone {self.backbone.name!r} takes "
                f"{limit}; lower them"
            )

    def _check_speaks(self) -> None:
        name, remedy = self.backbone.name, "such as Qwen/Qwen3-0.6B, or set head=items"
        if not self.backbone.causal:
            raise ConfigError(
                f"head=titles: backbone {name!r} reads in both directions and cannot go on with a "
                f"prompt; choose a decoder-only one, {remedy}"
            )
        if self.words.trained:
            raise ConfigError(
                f"head=titles: the output layer of backbone {name!r} is not its word embeddings, "
                f"and is not loaded with it; choose one that ties them, {remedy}"
            )
        if self.backbone.device.type != "meta":
            check_search(self.backbone, self._longest())

    @property
    def n_items(self) -> int:
        """N, number of items."""
        return self.sasrec.n_items

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.item_tokens

    # -- reading ---------------------------------------------------------------------------------

    def _rows(self, histories: Ragged, answers: npt.NDArray[np.integer] | None = None) -> Ragged:
        """Write prompts as rows of `pieces`: before, then title and mark of each item, after; with
        ``answers`` [B] also their titles and the end.
        """
        counts = histories.lengths
        lengths = 2 * counts + (2 if answers is None else 4)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        first, last = offsets[:-1], offsets[:-1] + 2 * counts + 1
        values = np.full(offsets[-1], self._mark)
        values[first], values[last] = self._before, self._after
        values[flat_index(first + 1, 2 * counts)[::2]] = histories.values
        if answers is not None:
            values[last + 1], values[last + 2] = answers, self._end
        return Ragged(values, offsets)

    def _lengths(self, rows: Ragged) -> npt.NDArray[np.int64]:
        """Count the tokens of rows of `pieces`, [B] int64."""
        lengths: npt.NDArray[np.int64] = np.add.reduceat(
            self.pieces.lengths_of(rows.values), rows.offsets[:-1]
        )
        return lengths

    def costs(self, histories: Ragged) -> npt.NDArray[np.int64]:
        """Count the tokens of the prompts, [B] int64."""
        return self._lengths(self._rows(histories.tail(self.config.max_items)))

    def prompts(
        self,
        histories: Ragged,
        answers: npt.NDArray[np.integer] | None = None,
        *,
        hybrid: bool = True,
    ) -> Prompts:
        """Embed the prompts of histories of at most ``max_items`` items.

        Args:
            histories: B of them.
            answers: [B] item ints whose titles follow the prompts; None for no answers.
            hybrid: whether Proj(e_i) follows each title.
        """
        rows, device = self._rows(histories, answers), self.backbone.device
        ids = as_index(self.pieces.take(rows.values).values, device)
        lengths = as_index(self._lengths(rows), device)
        slot = ids == SLOT
        if not hybrid:
            ids = ids[~slot]
            return Prompts(
                self.backbone.embed(ids), ids, lengths - as_index(histories.lengths, device)
            )
        x = self.backbone.embed(ids.clamp_min(0))
        vectors = self.project(self._id_rows()[as_index(histories.values, device)])
        return Prompts(x.index_copy(0, slot.nonzero().flatten(), vectors.to(x.dtype)), ids, lengths)

    def _id_rows(self) -> Tensor:
        """Return e_i of all items, [N, id_dim]."""
        return self.sasrec.items.weight.detach()

    def rank_weights(self, histories: Ragged) -> Tensor | None:
        """Return the weights of the ranks of the updates for each user, [B, R]; None: all one."""
        del histories
        return None

    def _adapted(
        self, histories: Ragged, lengths: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Return the context of a pass over the prompts of these histories, packed rows of these
        lengths [B], or a grid.
        """
        weights = self.rank_weights(histories)
        if weights is not None and lengths is not None:
            weights = weights.repeat_interleave(lengths, dim=0)
        return self.lora.enabled(weights)

    def _read(self, histories: Ragged, prompts: Prompts) -> tuple[Tensor, int]:
        """Run packed prompts: states [n, D], and the number of tokens that are computed."""
        attend = Attend.CAUSAL if self.backbone.causal else Attend.FULL
        group, positions = pack(prompts.lengths, attend)
        packing = Packing((group,), positions)
        with self._adapted(histories, prompts.lengths):
            return self.backbone(prompts.x, packing), packing.computed

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return SASRec's stage, and that of LoRA and the projectors."""
        frozen = set(self.sasrec.parameters())
        rest = [p for p in self.parameters() if p not in frozen]
        return [
            self.sasrec.for_vectors(self.config.sasrec_lr, self.config.sasrec_epochs),
            Stage("prompts", decayed(rest, lr, weight_decay), self.batches, self.loss),
        ]

    def batches(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> Curriculum:
        """Return prefixes, each with the item after it, in batches of like length."""
        mark = self.pieces.lengths[self._mark]
        batches = TrainingBatches(
            sequences,
            supervision="last",
            max_items=self.config.max_items,
            negatives=0,
            item_costs=self.pieces.lengths[: self.n_items] + mark,
            batch_users=batch_users,
            batch_tokens=batch_tokens,
            seed=seed,
            epoch=epoch,
            targets_per_user=self.config.targets_per_user,
        )
        return Curriculum(batches, seed=seed, epoch=epoch, epochs=self.config.curriculum)

    def loss(self, batch: Batch) -> Losses:
        """Compute the cross-entropy of the next titles, mean over their tokens, or items."""
        titles, hybrid = self.config.head == "titles", not isinstance(batch, TextOnly)
        answers = batch.targets if titles else None
        prompts = self.prompts(batch.histories, answers, hybrid=hybrid)
        states, computed = self._read(batch.histories, prompts)
        if titles:
            said = self._answered(prompts, batch.targets)
            logits = self.words(states[said - 1], self.backbone.word_embeddings.weight)
            total = F.cross_entropy(logits, prompts.ids[said])
        else:
            logits = self._compared(states[prompts.last], self.item_vectors())
            total = catalog_loss(logits, as_index(batch.targets, logits.device))
        parts = {"next": total.detach(), "hybrid": torch.tensor(float(hybrid))}
        return Losses(total, parts, len(prompts.ids), computed)

    def _answered(self, prompts: Prompts, answers: npt.NDArray[np.integer]) -> Tensor:
        """Return the places of the answers' tokens in the batch, int64."""
        sizes = self.pieces.lengths_of(answers) + self.pieces.lengths[self._end]
        ends = prompts.last.cpu().numpy() + 1
        return as_index(flat_index(ends - sizes, sizes), prompts.ids.device)

    # -- inference -------------------------------------------------------------------------------

    def item_vectors(self) -> Tensor:
        """Compute Proj'(e_i) of ``head=items``, [N, D]."""
        vectors: Tensor = self.project_items(self._id_rows())
        return vectors

    def _compared(self, states: Tensor, items: Tensor) -> Tensor:
        """Compare states [B, D] with item vectors [N, D]: scores [B, N]."""
        return states.to(items.dtype) @ items.T

    def _nearest(self, histories: Ragged, items: Tensor) -> Tensor:
        """Score all items by the states at the ends of the prompts, [B, N]."""
        prompts = self.prompts(histories)
        states, _ = self._read(histories, prompts)
        return self._compared(states[prompts.last], items)

    def title_codes(self) -> Ragged:
        """Return what is said of each item, N rows of tokens: its title and the end."""
        items = np.arange(self.n_items)
        said = self.pieces.take(np.stack((items, np.full_like(items, self._end)), axis=1).ravel())
        return Ragged(said.values, said.offsets[::2])

    def _searched(self, histories: Ragged, trie: Trie) -> Tensor:
        """Search for the likeliest titles after the prompts: scores of all items, [B, N]."""
        grid, real = self.prompts(histories).padded()
        with self.backbone.unpacked() as model, self._adapted(histories):
            speaker = Speaker(model, self.words, self.backbone.word_embeddings.weight)
            decoder = CausalDecoder(speaker, grid, real)
            return item_scores(beam_search(decoder, trie, self.config.beams, len(histories)), trie)

    def scorer(self) -> Scorer:
        """Return histories -> scores [B, N] float32: log-probabilities of the titles that the beam
        found, -inf for all other items; with ``head=items`` h . Proj'(e_i).
        """
        if self.config.head == "titles":
            trie = Trie.of(self.title_codes(), self.backbone.device)
            find, max_rows = partial(self._searched, trie=trie), SEARCHED
        else:
            with evaluating(self):
                find, max_rows = partial(self._nearest, items=self.item_vectors()), ENCODED_ROWS

        def score(histories: Ragged) -> Tensor:
            recent = histories.tail(self.config.max_items)
            with evaluating(self):
                parts, order = in_batches(
                    recent, self.costs(recent), find, max_rows=max_rows, max_cost=ENCODED_TOKENS
                )
            return torch.cat(parts)[order.to(parts[0].device)]

        return score
