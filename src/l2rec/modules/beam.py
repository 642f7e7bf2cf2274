"""Constrained beam search over a catalog: the one decoder of all methods that answer with tokens.

A beam is a node of the `Trie` and the log-probability of the tokens that lead there, each
normalised over the whole vocabulary: what Transformers' ``generate`` computes with
``prefix_allowed_tokens_fn`` and a length penalty of 0. Nothing outside of the catalog can come out,
and no beam is lost on it.

    Seq2SeqDecoder   T5
    CausalDecoder    decoder-only models

In both the prompt is read once, and all beams of a user stand in one row: a step is one token of
each, which sees the prompt and its own ancestors. Neither the prompt's keys and values nor those of
a beam are ever copied. Legend: B users, K beams, V vocabulary, N items.
"""

from __future__ import annotations

__all__ = [
    "Beams",
    "CausalDecoder",
    "CausalModel",
    "Decoder",
    "Seq2SeqDecoder",
    "as_inputs",
    "beam_remark",
    "beam_search",
    "item_scores",
]

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


def beam_remark(beams: int, names: str) -> str:
    """Say how a method ranks by a search of so many beams; ``names``: what names an item."""
    return (
        f"ranks the items of the {beams} {names} that its beam search reaches; all others tie "
        f"behind them, so that MRR is MRR@{beams} but for what ties add, and items of the history "
        "take places of the beam where they are masked too"
    )


def item_scores(beams: Beams, trie: Trie) -> Tensor:
    """Return the scores of all items, [B, N] float32: that of its code, for every item of a code
    that was found (ties, which the evaluator ranks by their mean), -inf for the others.
    """
    found = beams.scores.new_full((len(beams.scores), len(trie.items_first) - 1), FORBIDDEN)
    found.scatter_reduce_(1, beams.leaves, beams.scores, "amax")
    return found[:, trie.leaf]


class _Ancestors:
    """Which tokens each beam goes on from: the tokens of all beams, step by step, in one row.

    seen: [B, K, tokens so far] bool, which of them a beam sees: its ancestors and itself.
    """

    def __init__(self, users: int, device: torch.device) -> None:
        self.seen = torch.empty(users, 1, 0, dtype=torch.bool, device=device)

    def follow(self, parents: Tensor) -> Tensor:
        """Add one token of each beam, that goes on from the beams ``parents`` [B, K] of the step
        before; return ``seen``.
        """
        users, beams = parents.shape
        before = self.seen.gather(1, parents[..., None].expand(-1, -1, self.seen.shape[-1]))
        itself = torch.eye(beams, dtype=torch.bool, device=parents.device)
        self.seen = torch.cat((before, itself.expand(users, -1, -1)), dim=-1)
        return self.seen


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to scores for what may be seen, alike: 0, or the least number."""
    added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return added.masked_fill(~seen, torch.finfo(dtype).min)


def as_inputs(prompts: Tensor) -> dict[str, Tensor]:
    """Name prompts as Transformers' models take them: token ids [B, S] or vectors [B, S, d]."""
    return {"input_ids" if prompts.ndim == 2 else "inputs_embeds": prompts}


class Seq2SeqDecoder:
    """Beams of a T5.

    Its positions are distances between places in a row, which are not those of tokens that stand
    beside each other's: the blocks are called one by one, with the bias of the true distances.

    Args:
        model: a T5 with ``lm_head``. prompts: [B, S] token ids or vectors [B, S, d]. real: [B, S],
            1 where a prompt has a token.
    """

    def __init__(self, model: PreTrainedModel, prompts: Tensor, real: Tensor) -> None:
        self._model, self._decoder = model, model.get_decoder()
        read = model.get_encoder()(**as_inputs(prompts), attention_mask=real)
        self._states = read.last_hidden_state
        self._prompt_seen = _added(real.bool()[:, None, None], self._states.dtype)
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._ancestors = _Ancestors(len(real), real.device)
        self._depths = torch.empty(0, dtype=torch.int64, device=real.device)

    def start(self) -> Tensor:
        """Read the token that every answer begins with."""
        first = torch.zeros_like(self._prompt_seen[:, 0, 0, :1], dtype=torch.int64)
        return self._read(first + self._model.config.decoder_start_token_id, first)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read one token of each beam."""
        return self._read(tokens.clamp_min(0), parents)

    def _read(self, tokens: Tensor, parents: Tensor) -> Tensor:
        seen = _added(self._ancestors.follow(parents)[:, None], self._states.dtype)
        depth = int(self._depths[-1]) + 1 if len(self._depths) else 0
        self._depths = torch.cat((self._depths, self._depths.new_full(tokens.shape[1:], depth)))
        blocks: Any = self._decoder.block
        distances = blocks[0].layer[0].SelfAttention.compute_bias(depth + 1, depth + 1)
        bias = distances[:, :, -1:].index_select(-1, self._depths)
        states = self._decoder.embed_tokens(tokens)
        across = None
        for block in blocks:
            states, _, across = block(
                states,
                seen,
                bias,
                self._states,
                self._prompt_seen,
                across,
                past_key_values=self._cache,
            )
        states = self._decoder.final_layer_norm(states)
        if getattr(self._model.config, "scale_decoder_outputs", False):
            states = states * self._model.config.d_model**-0.5
        logits: Tensor = self._model.get_output_embeddings()(states)
        return logits


class CausalModel(Protocol):
    """Model that `CausalDecoder` reads: one of Transformers, or `l2rec.modules.words.Speaker`."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, **inputs: Any) -> Any:
        """Return an object with ``logits``, as a model for causal language modelling does."""
        ...


class CausalDecoder:
    """Beams of a decoder-only model.

    Args:
        model: for causal language modelling. prompts: [B, S] token ids or vectors [B, S, d], padded
            on the left. real: [B, S], 1 where a prompt has a token.
    """

    def __init__(self, model: CausalModel, prompts: Tensor, real: Tensor) -> None:
        self._model, self._real = model, real.bool()
        self._prompts = prompts
        self._cache = DynamicCache()
        self._ancestors = _Ancestors(len(real), real.device)
        self._place = real.sum(-1)  # of the next token

    def start(self) -> Tensor:
        """Read the prompts."""
        found = self._model(
            **as_inputs(self._prompts),
            attention_mask=self._real.long(),
            position_ids=(self._real.cumsum(-1) - 1).clamp_min(0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = found.logits[:, -1:]
        return logits

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read one token of each beam."""
        beams = tokens.shape[1]
        prompt = self._real[:, None].expand(-1, beams, -1)
        seen = torch.cat((prompt, self._ancestors.follow(parents)), dim=-1)[:, None]
        found = self._model(
            input_ids=tokens.clamp_min(0),
            attention_mask=_added(seen, self._model.dtype),
            position_ids=self._place[:, None].expand(-1, beams),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._place = self._place + 1
        logits: Tensor = found.logits
        return logits
