"""IDGenRec: LLM-RecSys Alignment with Textual ID Learning.

Tan, Xu, Hua, Ge, Li, Zhang. SIGIR '24, https://arxiv.org/abs/2403.19021

    1. a generator reads an item's text and says a few words, its id; of several candidates the
       first that no other item has is taken, so that ids are unique
    2. a T5 reads the ids of a history and says that of the next item   l2rec.modules.code_generator
    3. both learn in turn: the generator's distribution over words, times the recommender's word
       vectors, stands for the ids of the history; the loss is the recommender's
    4. ranking: beam search among the ids of the catalog                l2rec.modules.beam

The generator (``generator``):

- ``keywords`` is ours, not the paper's: no model, but the words that tell an item from the others
  by their TF-IDF (`l2rec.modules.textual_ids`). Of the backbone only the tokenizer is used.
- ``language-model``: the backbone, a decoder, is prompted with the text and says candidates by
  diverse beam search, each beam a group of its own: which is greedy, where a word loses
  ``diversity`` for each earlier candidate that has it at that place.

Deviations:

- The generator is not a T5 that was tuned for tags of articles: it is prompted, or a rule. Words
  are those of the catalog's texts, in lower case.
- ``rounds=0``, the default, leaves it frozen. In the authors' code it learns at a rate of 1e-8,
  which hardly moves it, so that little is lost. ``rounds`` above zero learns in turn, as published,
  but through LoRA, and the T5 comes first: it starts from nothing and has nothing to tell before.
  Distributions are those along the ids in use, all in one pass; the authors decode anew.
- Candidates are tried in the order in which they are found, a further one only where it is needed;
  the authors sort all ten by likelihood, and ask again with a higher penalty. Where all are taken,
  a number makes the first unlike.
- The T5 is trained from nothing, without a prompt around the history, as P5's here; the paper's is
  pretrained, and with one trained on many data sets it ranks items of another unseen. Here words
  are numbered by the catalog, so that another one starts anew.
- No id of the user: users are their histories, as for TIGER and P5. The authors make it from a
  user's whole sequence, test item included (issue 1 of their repository); a method here is given
  no test item.

Items beyond the beam tie behind it, each at the mean of the ranks that are left.
"""

from __future__ import annotations

__all__ = ["IDGenRec", "IDGenRecConfig", "TagGenerator"]

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l2rec.data.batches import Batch, TrainingBatches, plan_batches
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged, flat_index
from l2rec.data.text import tokenize
from l2rec.disk import replacing
from l2rec.errors import ConfigError
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import ENCODED_ROWS, ENCODED_TOKENS, Backbone
from l2rec.modules.code_generator import PRETRAINED, CodeGenerator, GeneratorConfig
from l2rec.modules.item_text import catalog_key, separators
from l2rec.modules.lora import LoRA
from l2rec.modules.packing import Attend, lay, pack, split_groups
from l2rec.modules.sequences import as_index, check_new_texts
from l2rec.modules.textual_ids import (
    END_OF_ID,
    FIRST_WORD,
    Id,
    Keywords,
    Propose,
    Spelling,
    first_unused,
)
from l2rec.modules.words import WordHead
from l2rec.protocols import Losses, Scorer, Stage, decayed


class IDGenRecConfig(GeneratorConfig):
    """Options of IDGenRec."""

    generator: Literal["keywords", "language-model"] = "keywords"
    """What makes the ids: a rule, or the backbone, which is then a decoder."""
    text_tokens: int = Field(128, ge=1)
    """Most tokens of a text that are read."""
    id_tokens: int = Field(10, ge=1)
    """Most tokens of an id, without a number that may follow."""

    # generator=language-model
    prompt: str = "\nKeywords that tell this item from others, in lower case:"
    """Words between the text and the id."""
    candidates: int = Field(10, ge=1)
    """Most ids that are proposed for an item."""
    diversity: float = Field(1.0, ge=0)
    """What a word's log-probability loses for each earlier candidate that has it there."""
    rounds: int = Field(0, ge=0)
    """How often the generator learns for an epoch and the T5 learns the new ids; 0: never."""
    generator_lr: float = Field(1e-4, gt=0)
    """Learning rate of the generator's LoRA. The paper's 1e-8 is for all weights."""
    generator_users: int = Field(12, ge=1)
    """Most users of its batches."""
    lora_rank: int = Field(8, ge=1)
    """Rank of its updates."""
    lora_alpha: float = Field(16.0, gt=0)
    """Scale of the updates: they are multiplied by ``lora_alpha / lora_rank``."""
    matrices: tuple[str, ...] = ("q", "v")
    """Matrices that are updated."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know beside the scores."""
        rule = "its ids are made by a rule of ours, not by a model" * (self.generator == "keywords")
        return (*super().remarks, PRETRAINED, *filter(None, [rule]))

    @model_validator(mode="after")
    def _consistent(self) -> IDGenRecConfig:
        if self.rounds and self.generator == "keywords":
            raise ValueError(
                f"rounds={self.rounds}: a rule does not learn; choose rounds=0 or "
                "generator=language-model"
            )
        return self


class IDGenRec(nn.Module):
    """The recommender."""

    Config = IDGenRecConfig
    uses_backbone = True
    one_catalog = True
    """Items are codes of one catalog: a run is not trained on with more items."""
    item_tensors = frozenset({"generator.codes", "generator.t5.shared.weight"})
    sized_by_data = frozenset({"generator.codes"})
    """The longest id may become longer with new items and in rounds."""

    def __init__(
        self,
        config: IDGenRecConfig,
        catalog: Catalog,
        backbone: Backbone,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        texts = catalog.require_texts("IDGenRec")
        self.spelling = Spelling(texts, backbone.tokenizer, config.text_tokens)
        self.keywords = Keywords(self.spelling.words, config.id_tokens)
        self.tags: TagGenerator | None = None
        if config.generator == "language-model":
            self.tags = TagGenerator(config, backbone, self.spelling.tokens, texts)
        self.generator = CodeGenerator(
            config,
            len(texts),
            width=config.id_tokens + 1,
            codes=len(self.spelling),
            dtype=backbone.dtype,
            own_tokens=False,
        )
        self.cached: list[Path] = []
        """Cache entries this model was built from."""
        if backbone.device.type != "meta":
            self._take_ids(cache)

    @property
    def n_items(self) -> int:
        """N, number of items, with those added later."""
        return len(self.generator)

    @property
    def text_tokens(self) -> int:
        """Most tokens of an item's text that are read."""
        return self.config.text_tokens

    def ids(self) -> list[str]:
        """Return the items' ids as they read."""
        return [self.spelling.write(row) for row in self.generator.rows()]

    def _take_ids(self, cache: Path | None) -> None:
        """Give every item of the catalog its id, from the cache if a language model made it."""
        if self.tags is None:
            words = self.spelling.words
            self._write(first_unused(len(words), self.keywords.proposals(words), set()))
            return
        path = None if cache is None else cache / f"ids-{self.tags.key()}.safetensors"
        if path is not None and path.is_file():
            self.generator.codes = load_file(path)["codes"].to(self.generator.codes)
        else:
            self._write(first_unused(*self.tags.proposals(), set()))
            if path is not None:
                with replacing(path, remedy="free some space") as partial:
                    save_file({"codes": self.generator.codes.cpu()}, partial)
        self.cached = [] if path is None else [path]

    def _write(self, ids: Sequence[Id]) -> None:
        self.generator.write([(*words, END_OF_ID) for words in ids])

    # -- training --------------------------------------------------------------------------------

    def stages(self, lr: float, weight_decay: float) -> list[Stage]:
        """Return the T5's stage, then of each round the generator's and the T5's again."""
        learned = decayed(self.generator.parameters(), lr, weight_decay)
        recommender = Stage("recommender", learned, self.generator.batches, self.generator.loss)
        if self.tags is None or not self.config.rounds:
            return [recommender]
        updated = decayed(self.tags.parameters(), self.config.generator_lr, weight_decay)
        stages = [recommender]
        for number in range(1, self.config.rounds + 1):
            stages += [
                Stage(
                    f"id generator, round {number}",
                    updated,
                    self.few_users,
                    self.generator_loss,
                    select=False,
                    epochs=1,
                ),
                Stage(
                    f"recommender, round {number}",
                    learned,
                    self.generator.batches,
                    self.generator.loss,
                    begin_epoch=self._generate_anew,
                ),
            ]
        return stages

    def few_users(
        self, sequences: Ragged, *, seed: int, epoch: int, batch_users: int, batch_tokens: int
    ) -> TrainingBatches:
        """Return the T5's batches, with fewer users: each item of a history is read as a text."""
        return self.generator.batches(
            sequences,
            seed=seed,
            epoch=epoch,
            batch_users=min(batch_users, self.config.generator_users),
            batch_tokens=batch_tokens,
        )

    def generator_loss(self, batch: Batch) -> Losses:
        """Compute the T5's loss where what the generator would say stands for the history's ids.

        A word of an id is sum_w P(w | text, words before it) v_w; v are the T5's word vectors.
        """
        assert self.tags is not None
        items, which = np.unique(batch.histories.values, return_inverse=True)
        codes = self.generator.codes[as_index(items, self.generator.codes.device)]
        has = codes >= FIRST_WORD
        ends = np.concatenate(([0], has.sum(1).cumsum(0).cpu().numpy()))
        words = Ragged(codes[has].cpu().numpy(), ends)
        shares, read = self.tags.shares(items, words)
        vectors = self.generator.t5.shared.weight[-shares.shape[1] :]
        place = flat_index(words.offsets[:-1][which], words.lengths[which])
        soft = (shares @ vectors)[as_index(place, shares.device)]  # of each word of each history
        ids, real = self.generator.read(batch.histories)
        spots = ids > FIRST_WORD  # neither the end of an id, nor a number, nor padding
        prompts = self.generator.t5.shared(ids).masked_scatter(spots[..., None], soft)
        found = self.generator.loss_of(prompts, real, batch)
        return Losses(found.total, {"ids": found.total.detach()}, read, read)

    def _generate_anew(self, epoch: int) -> None:
        """Give every item the id that the generator says now, before the first epoch."""
        if epoch == 0:
            assert self.tags is not None
            self._write(first_unused(*self.tags.proposals(), set()))

    # -- inference -------------------------------------------------------------------------------

    def scorer(self) -> Scorer:
        """Return histories -> log-probabilities [B, N] float32 of what the beam found, -inf for all
        other items.
        """
        return self.generator.scorer()

    def add_items(self, texts: Sequence[str]) -> npt.NDArray[np.int32]:
        """Add items by text alone, recommendable at once, and return their item ints.

        Raises:
            DataError: an empty text.
        """
        check_new_texts(texts)
        known = [row[:-1] for row in self.generator.rows()]
        if self.tags is None:
            count, propose = len(texts), self.keywords.proposals(self.spelling.read(texts))
        else:
            count, propose = self.tags.add(texts)
        self._write([*known, *first_unused(count, propose, set(known))])
        return np.arange(len(known), self.n_items, dtype=np.int32)


class TagGenerator(nn.Module):
    """A decoder that reads items' texts and says words of the catalog.

    Args:
        config: options. backbone: a decoder whose output layer is its word embeddings.
        tokens: [V] token ids, ascending, of the words it may say; the codes of ids without
            `FIRST_WORD`. texts: of the catalog.

    Raises:
        ConfigError: the backbone is another model, or has too few positions.
    """

    def __init__(
        self,
        config: IDGenRecConfig,
        backbone: Backbone,
        tokens: Sequence[int],
        texts: Sequence[str],
    ) -> None:
        super().__init__()
        self._config, self._backbone = config, (backbone,)
        self.head = WordHead(backbone, np.array(tokens))
        if not backbone.causal or self.head.trained:
            raise ConfigError(
                f"generator=language-model: backbone {backbone.name!r} is no decoder whose output "
                "layer is its word embeddings; choose one, such as Qwen/Qwen3-0.6B, or "
                "generator=keywords"
            )
        self._before, after = separators(backbone)
        said = torch.tensor([*tokens, after[0]], device=backbone.device)
        self.register_buffer("said", said, persistent=False)
        self.said: Tensor
        self._prompt = backbone.tokenizer(config.prompt, add_special_tokens=False)["input_ids"]
        self.rows = self._rows(texts)
        self.lora: LoRA | None = None
        if config.rounds:
            linears = find_linears(backbone.model, config.matrices)
            self.lora = LoRA(linears, rank=config.lora_rank, alpha=config.lora_alpha)
            self.lora.attach()

    def _rows(self, texts: Sequence[str]) -> list[npt.NDArray[np.integer]]:
        """Return what is read of each text before its id: token ids."""
        config, (backbone,) = self._config, self._backbone
        read = tokenize(texts, backbone.tokenizer, config.text_tokens)
        rows = [
            np.array([*self._before, *read[row].tolist(), *self._prompt])
            for row in range(len(read))
        ]
        longest, limit = max(map(len, rows)) + config.id_tokens, backbone.max_positions
        if limit is not None and longest > limit:
            raise ConfigError(
                f"text_tokens={config.text_tokens} makes a row of {longest} tokens, prompt and id "
                f"included: backbone {backbone.name!r} has {limit} positions; lower text_tokens"
            )
        return rows

    def key(self) -> str:
        """Hash what the ids of the untrained generator depend on."""
        config, (backbone,) = self._config, self._backbone
        made_by = (config.id_tokens, config.candidates, config.diversity)
        return catalog_key(backbone, Ragged.from_rows([*self.rows, self.said.tolist()]), *made_by)

    def add(self, texts: Sequence[str]) -> tuple[int, Propose]:
        """Add items by text, and return their number and what proposes their ids."""
        first = len(self.rows)
        self.rows += self._rows(texts)
        return self.proposals(first)

    def proposals(self, first: int = 0) -> tuple[int, Propose]:
        """Return the number of items from ``first`` on, and what proposes their ids."""
        earlier: dict[int, list[Id]] = {item: [] for item in range(len(self.rows) - first)}

        def propose(items: list[int], number: int) -> list[Id]:
            if number == self._config.candidates:
                return [()] * len(items)
            rows = [self.rows[first + item] for item in items]
            found = self._say(rows, [earlier[item] for item in items])
            for item, said in zip(items, found, strict=True):
                earlier[item].append(said)
            return found

        return len(earlier), propose

    @torch.no_grad()
    def _say(
        self, rows: Sequence[npt.NDArray[np.integer]], earlier: Sequence[Sequence[Id]]
    ) -> list[Id]:
        """Return the next candidate of each row, after those of ``earlier``."""
        limit = self._config.id_tokens
        said: list[Id] = [()] * len(rows)
        costs = np.array([len(row) + limit for row in rows])
        for batch in plan_batches(costs, None, max_rows=ENCODED_ROWS, max_cost=ENCODED_TOKENS):
            left = batch.tolist()
            for place in range(limit):
                if not left:
                    break
                words = [np.array(said[row], dtype=np.int64) for row in left]
                states, ends = self._read([rows[row] for row in left], words)
                counts = self._earlier_words([earlier[row] for row in left], place)
                scores = self._scores(states[ends - 1]).log_softmax(-1)
                scores -= self._config.diversity * counts
                if place == 0:
                    scores[:, -1] = float("-inf")  # an id has a word
                best = scores.argmax(-1).tolist()
                stop = scores.shape[1] - 1
                for row, word in zip(left, best, strict=True):
                    if word != stop:
                        said[row] = (*said[row], FIRST_WORD + word)
                left = [row for row, word in zip(left, best, strict=True) if word != stop]
        return said

    def _earlier_words(self, earlier: Sequence[Sequence[Id]], place: int) -> Tensor:
        """Count the candidates of each row that have a word, or end, at this place: [n, V + 1]."""
        counts = torch.zeros(len(earlier), len(self.said), device=self.said.device)
        for row, candidates in enumerate(earlier):
            for words in candidates:
                if place < len(words):
                    counts[row, words[place] - FIRST_WORD] += 1
                elif place == len(words):
                    counts[row, -1] += 1
        return counts

    def shares(self, items: npt.NDArray[np.integer], words: Ragged) -> tuple[Tensor, int]:
        """Return the distribution of each word of the items' ids over all of them, given the text
        and the words before it: [words, V] float32; and the number of tokens read.

        words: codes of each item's id, without numbers and end; an item may have none.
        """
        rows = [self.rows[item] for item in items.tolist()]
        states, ends = self._read(rows, [words[row][:-1] for row in range(len(words))])
        lengths = torch.from_numpy(words.lengths).to(ends.device)
        ends, lengths = ends[lengths > 0], lengths[lengths > 0]
        first = torch.repeat_interleave(ends - lengths - (lengths.cumsum(0) - lengths), lengths)
        at = first + torch.arange(len(first), device=first.device)
        return self._scores(states[at])[:, :-1].softmax(-1), len(states)

    def _scores(self, states: Tensor) -> Tensor:
        """Return logits of all words, then of the end, [n, V + 1] float32, after states [n, D]."""
        (backbone,) = self._backbone
        logits: Tensor = self.head(states, backbone.word_embeddings.weight, self.said)
        return logits

    def _read(
        self,
        rows: Sequence[npt.NDArray[np.integer]],
        words: Sequence[npt.NDArray[np.integer]],
    ) -> tuple[Tensor, Tensor]:
        """Read rows, each with some words of an id behind it: the states of all tokens [n, D], and
        where each row ends in them, [rows] int64.
        """
        (backbone,) = self._backbone
        said = self.said.cpu().numpy()
        parts = [
            part
            for row, codes in zip(rows, words, strict=True)
            for part in (row, said[codes - FIRST_WORD])
        ]
        lengths = torch.tensor(
            [len(row) + len(codes) for row, codes in zip(rows, words, strict=True)]
        )
        group, positions = pack(lengths.to(backbone.device), Attend.CAUSAL)
        x = backbone.embed(as_index(np.concatenate(parts), backbone.device))
        x, packing = lay([(x, group, positions)], backbone.dtype)
        with nullcontext() if self.lora is None else self.lora.enabled():
            (states,) = split_groups(backbone(x, packing), packing)
        return states, lengths.cumsum(0).to(backbone.device)
