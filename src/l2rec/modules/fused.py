"""Rows of a frozen matrix that play one part of a block: q of GPT-2's ``c_attn``, say.

Some families compute q, k and v of a block (or gate and up) as one matrix. Which rows are whose can
be read neither from names nor from shapes: it is in the code of the model, and here by model type.

    [q | k | v]                           GPT-2, Phi-3, ModernBERT
    [q1 | k1 | v1 | q2 | k2 | v2 | ...]   GPT-NeoX, BLOOM: head by head
    [q1 q2 | k1 | v1 | q3 q4 | ...]       Falcon: keys and values shared by some heads
    [k1 | v1 | k2 | v2 | ...]             DeepSeek's kv_b_proj: keys without their rotary places
    [gate | up]                           Phi-3, GLM, ModernBERT

All of them are groups of equally many rows, of which a part has the same ones in each: `Part`.
tests/parity/test_fused.py compares them with what the models of Hugging Face read.
"""

from __future__ import annotations

__all__ = ["Matrix", "Part", "fused_parts", "is_matrix"]

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from l2rec.errors import BackboneError


def is_matrix(module: nn.Module) -> bool:
    """Return True for a Linear module, and for the Conv1D of GPT-2, a Linear by another name."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of each of ``groups`` equal groups of rows of a module's matrix.

    module: a Linear or Conv1D. One group and all of its rows are the whole matrix (`whole`).
    """

    module: nn.Module
    groups: int
    start: int
    stop: int

    @classmethod
    def whole(cls, module: nn.Module) -> Part:
        """Return all rows of a module."""
        return cls(module, 1, 0, _shape(module)[0])

    @property
    def weight(self) -> Tensor:
        """Matrix of the whole module, [rows of the module, d_in]; one that is quantised is made
        anew each time.
        """
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight if isinstance(self.module, nn.Linear) else weight.T

    @property
    def rows(self) -> int:
        """Rows of the whole module."""
        return _shape(self.module)[0]

    @property
    def is_whole(self) -> bool:
        return self.out_features == self.rows

    @property
    def in_features(self) -> int:
        return _shape(self.module)[1]

    @property
    def out_features(self) -> int:
        return self.groups * (self.stop - self.start)

    def of(self, y: Tensor) -> Tensor:
        """Return the part's share of an output y [N, rows of the module], a view where it can be:
        [N, d_out].
        """
        if self.groups == 1:
            return y[:, self.start : self.stop]
        by_group: Tensor = y.unflatten(-1, (self.groups, -1))
        return by_group[..., self.start : self.stop].flatten(-2)

    def add_(self, y: Tensor, low: Tensor, b: Tensor) -> None:
        """Add low [N, R] b [R, d_out] in place to the part's share of y [N, rows of the module]."""
        if self.groups == 1:
            y[:, self.start : self.stop].addmm_(low, b)
        else:
            update = (low @ b).unflatten(-1, (self.groups, -1))
            y.unflatten(-1, (self.groups, -1))[..., self.start : self.stop] += update

    def spread(self, update: Tensor) -> Tensor:
        """Return [..., rows of the module]: update [..., d_out] in the part's rows, else zero."""
        if self.is_whole:
            return update
        padding = (self.start, self.rows // self.groups - self.stop)
        return nn.functional.pad(update.unflatten(-1, (self.groups, -1)), padding).flatten(-2)


Matrix = nn.Linear | Part
"""A frozen matrix W_j to adapt: a whole Linear, or something else than that."""

QKV, GATE_UP, KV = ("q", "k", "v"), ("gate", "up"), ("k", "v")
FUSED: dict[str, tuple[str, ...]] = {
    "c_attn": QKV,
    "query_key_value": QKV,
    "qkv_proj": QKV,
    "Wqkv": QKV,
    "W_pack": QKV,
    "in_proj": QKV,
    "gate_up_proj": GATE_UP,
    "Wi": GATE_UP,
    "kv_proj": KV,
    "kv_b_proj": KV,
}
"""Last names of fused matrices, and their parts."""
IN_A_ROW = ("gpt2", "openai-gpt", "phi3", "modernbert", "mpt", "dbrx", "baichuan")
"""Model types whose matrix is [q | k | v]."""
BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "deberta")
"""Model types whose matrix is [q | k | v] head by head."""
HALVES = (
    *("phi3", "glm", "glm4", "glm4v_text", "glm_ocr_text"),
    *("modernbert", "modernbert-decoder", "jetmoe"),
)
"""Model types whose other fused matrices are [gate | up], or [k | v], in halves. The gate is what
goes through the activation.
"""


def _heads(config: Any) -> tuple[int, int, int] | None:
    """Return how the rows of a model type's q, k and v are arranged: the number of groups, and in
    each the heads of q, and of k and of v; None if that is not known.
    """
    kind, heads = config.model_type, getattr(config, "num_attention_heads", 0)
    shared = getattr(config, "num_key_value_heads", None) or heads
    if kind in IN_A_ROW:
        return 1, heads, shared
    if kind in BY_HEAD:
        return heads, 1, 1
    if kind == "falcon" and config.new_decoder_architecture:
        return config.num_kv_heads, heads // config.num_kv_heads, 1
    if kind in ("falcon", "gpt_bigcode"):
        return (1, heads, 1) if config.multi_query else (heads, 1, 1)
    return None


def fused_parts(config: Any, name: str, module: nn.Module) -> dict[str, Part]:
    """Take a fused matrix apart.

    Args:
        config: the model's configuration, or None.
        name: full name of the module. module: a Linear or Conv1D.

    Returns:
        Its parts (``q``, ``k``, ``v``; ``gate``, ``up``) in the order of the rows; empty for a
        matrix that is not fused, or in a way that is not known here.

    Raises:
        BackboneError: the rows cannot be shared out as those of the model type are.
    """
    parts = FUSED.get(name.rpartition(".")[2], ())
    kind = getattr(config, "model_type", None)
    layout: tuple[int, ...] | None = None  # groups; units of each part in a group
    if parts == QKV and kind is not None:
        found = _heads(config)
        layout = None if found is None else (found[0], found[1], found[2], found[2])
    elif name.endswith("kv_b_proj") and hasattr(config, "qk_nope_head_dim"):
        layout = (config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim)
    elif parts and kind in HALVES:
        layout = (1, 1, 1)
    if layout is None:
        return {}
    groups, *units = layout
    rows = _shape(module)[0]
    size, rest = divmod(rows, groups * sum(units))
    if rest:
        raise BackboneError(
            f"the backbone ({kind}) has {rows} rows in {name}, which are not {groups} times "
            f"{' + '.join(map(str, units))} heads; leave {', '.join(parts)} out of model.matrices"
        )
    stops = [size * sum(units[: i + 1]) for i in range(len(units))]
    starts = [0, *stops[:-1]]
    return {
        part: Part(module, groups, start, stop)
        for part, start, stop in zip(parts, starts, stops, strict=True)
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return d_out and d_in of a module's matrix: a Conv1D keeps its transpose."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    d_in, d_out = module.weight.shape  # type: ignore[misc]
    return d_out, d_in
