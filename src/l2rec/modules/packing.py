"""Rows of unlike length in one pass without padding, and the attention that keeps them apart.

A *packed* batch is one flat run of real tokens [1, N, D]: rows (users, items) of every view one
after the other. Linear layers, norms and adapters see real tokens only; attention alone needs to
know where a row ends, and gets it from `Packing`. Hugging Face's code of a model calls
`packed_attention` by its name, with the packing as a keyword.

    pack(lengths, attend)                one group of rows
    lay(parts, dtype)                    a packed batch of several groups

Legend: B rows, n tokens of a group, N of the packed batch, C cells of all grids, H heads, d size of
a head, D hidden size.
"""

from __future__ import annotations

__all__ = [
    "Attend",
    "Bucket",
    "Group",
    "Packing",
    "lay",
    "pack",
    "packed_attention",
    "split",
    "split_groups",
]

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from l2rec.modules import memory

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

PACKING: ContextVar[Packing | None] = ContextVar("l2rec_packing", default=None)
"""The packing of the pass that is under way, for models that do not hand keywords on."""


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
    packing = PACKING.get() if packing is None else packing
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
