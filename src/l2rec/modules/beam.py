"""Constrained beam search over a catalog: the one decoder of all methods that answer with tokens.

A beam is a node of the `Trie` and the log-probability of the tokens that lead there, each
normalised over the whole vocabulary: what Transformers' ``generate`` computes with
``prefix_allowed_tokens_fn`` and a length penalty of 0. Nothing outside of the catalog can come out,
and no beam is lost on it.

    Seq2SeqDecoder   T5 and its like: the prompt's keys and values are computed once for a user and
                     shared by all beams
    CausalDecoder    decoder-only models: the prompt is read once, each beam's token attends to the
                     prompt and to its own ancestors

In both all beams of a user stand in one row, so that neither the prompt nor its keys are copied for
every beam, and a step of all beams is one pass. Legend: B users, K beams, V vocabulary, N items.
"""

from __future__ import annotations

__all__ = ["Beams", "CausalDecoder", "Decoder", "Seq2SeqDecoder", "beam_search", "item_scores"]

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from l2rec.modules.trie import END, Trie

FORBIDDEN = float("-inf")


class Decoder(Protocol):
    """A model that continues B prompts."""

    def start(self) -> Tensor:
        """Return the logits of the first token, [B, 1, V]."""
        ...

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Continue beams and return the logits of the next token, [B, K, V].

        tokens: [B, K], what each beam says now; `END` for one that has ended, whose logits are
        not read. parents: [B, K], the beam of the step before that it continues.
        """
        ...


@dataclass(frozen=True)
class Beams:
    """The K best codes of every user, best first; all of them, where there are fewer codes.

    leaves: [B, K] int64, of the trie. scores: [B, K] float32, log-probabilities.
    """

    leaves: Tensor
    scores: Tensor


def beam_search(decoder: Decoder, trie: Trie, beams: int, users: int) -> Beams:
    """Search for the ``beams`` most probable codes of each of ``users``.

    Exact if no depth has more nodes than there are beams.
    """
    logits = decoder.start()
    nodes = torch.zeros((users, 1), dtype=torch.int64, device=logits.device)
    scores = torch.zeros((users, 1), dtype=torch.float32, device=logits.device)
    for depth, tokens in enumerate(trie.tokens):
        children, real = trie.children(depth, nodes)
        said = tokens[children]  # [B, K, W]
        logits = logits.float()
        gain = logits.gather(-1, said.clamp_min(0)) - logits.logsumexp(-1, keepdim=True)
        total = scores[..., None] + gain.masked_fill(said == END, 0.0)
        total = total.masked_fill(~real, FORBIDDEN).flatten(1)
        # Every beam has a child, so that no more are asked for than there are.
        scores, best = total.topk(min(beams, len(tokens)))
        parents = best // real.shape[-1]
        nodes = children.flatten(1).gather(1, best)
        if depth + 1 < trie.depth:
            logits = decoder.extend(said.flatten(1).gather(1, best), parents)
    return Beams(nodes, scores)


def item_scores(beams: Beams, trie: Trie) -> Tensor:
    """Return the scores of all items, [B, N] float32: that of its code, for every item of a code
    that was found (ties, which the evaluator ranks by their mean), -inf for the others.
    """
    found = beams.scores.new_full((len(beams.scores), len(trie.items_first) - 1), FORBIDDEN)
    found.scatter_reduce_(1, beams.leaves, beams.scores, "amax")
    return found[:, trie.leaf]


class Seq2SeqDecoder:
    """Beams of an encoder-decoder model with positions relative to one another (T5).

    Args:
        model: with ``encoder``, ``decoder`` and ``lm_head``. prompts: [B, S] token ids or vectors
            [B, S, d]. real: [B, S], 1 where a prompt has a token.
    """

    def __init__(self, model: PreTrainedModel, prompts: Tensor, real: Tensor) -> None:
        self._model, self._real = model, real
        given = "input_ids" if prompts.ndim == 2 else "inputs_embeds"
        read = model.get_encoder()(**{given: prompts}, attention_mask=real)
        self._states = read.last_hidden_state
        self._cross: Any = DynamicCache()
        begin = model.config.decoder_start_token_id
        self._rows = prompts.new_full((len(prompts), 1, 1), begin, dtype=torch.int64)

    def start(self) -> Tensor:
        """Read the token that every answer begins with."""
        return self._last()

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read all beams anew, a few tokens each: cheaper than to move their keys about."""
        rows = self._rows.gather(1, parents[..., None].expand(-1, -1, self._rows.shape[-1]))
        self._rows = torch.cat((rows, tokens.clamp_min(0)[..., None]), dim=-1)
        return self._last()

    def _last(self) -> Tensor:
        """Return the logits after the last token of every beam, [B, K, V]."""
        users, beams, length = self._rows.shape
        cache = EncoderDecoderCache(DynamicCache(), self._cross)
        states = self._model.get_decoder()(
            input_ids=self._rows.flatten(1),
            attention_mask=_apart(beams, length, self._states).expand(users, -1, -1, -1),
            encoder_hidden_states=self._states,
            encoder_attention_mask=self._real,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state.view(users, beams, length, -1)[:, :, -1]
        self._cross = cache.cross_attention_cache
        if getattr(self._model.config, "scale_decoder_outputs", False):  # T5
            states = states * self._model.config.d_model**-0.5
        logits: Tensor = self._model.get_output_embeddings()(states)
        return logits


def _apart(beams: int, length: int, like: Tensor) -> Tensor:
    """Return what attention adds for beams that stand one after the other, [1, 1, K t, K t]: each
    token sees those of its own beam up to itself. Positions count from key to query, and are right
    within a beam wherever it stands.
    """
    own = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
    seen = torch.block_diag(*[own] * beams)
    added = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return added.masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


class CausalDecoder:
    """Beams of a decoder-only model.

    Args:
        model: for causal language modelling. prompts: [B, S] token ids or vectors [B, S, d], padded
            on the left. real: [B, S], 1 where a prompt has a token.
    """

    def __init__(self, model: PreTrainedModel, prompts: Tensor, real: Tensor) -> None:
        self._model, self._real = model, real.bool()
        self._prompts = prompts
        self._cache = DynamicCache()
        self._length = real.sum(-1)  # place of the next token
        # Who sees whom among the tokens after the prompt, [B, K, tokens so far].
        self._seen = torch.empty(0)

    def start(self) -> Tensor:
        """Read the prompts."""
        place = (self._real.cumsum(-1) - 1).clamp_min(0)
        given = "input_ids" if self._prompts.ndim == 2 else "inputs_embeds"
        found = self._model(
            **{given: self._prompts},
            attention_mask=self._real.long(),
            position_ids=place,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._seen = self._real[:, None, :0]
        logits: Tensor = found.logits[:, -1:]
        return logits

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read one token of each beam, all in one row."""
        users, beams = tokens.shape
        before = self._seen.gather(1, parents[..., None].expand(-1, -1, self._seen.shape[-1]))
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(users, -1, -1)
        self._seen = torch.cat((before, itself), dim=-1)
        prompt = self._real[:, None].expand(-1, beams, -1)
        seen = torch.cat((prompt, self._seen), dim=-1)[:, None]
        dtype = self._model.dtype
        added = torch.zeros(seen.shape, dtype=dtype, device=tokens.device)
        found = self._model(
            input_ids=tokens.clamp_min(0),
            attention_mask=added.masked_fill(~seen, torch.finfo(dtype).min),
            position_ids=self._length[:, None].expand(-1, beams),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._length = self._length + 1
        logits: Tensor = found.logits
        return logits
