"""Frozen matrices in 8 or 4 bits: loading them, and multiplying by them.

bitsandbytes (Dettmers et al., https://arxiv.org/abs/2208.07339, https://arxiv.org/abs/2305.14314)
holds the numbers: int8 with one scale for each row, or NF4 with one for every 64 weights. The
products are made here, with W as the format gives it back:

    y = x W^T + b        dx = dy W        W made anew for each product, in the dtype of x

Its own 8-bit product rounds x too, in float16, by what else is in the batch; rows of a packed batch
would then depend on each other, and the experts' gradients on another W than their outputs.
"""

from __future__ import annotations

__all__ = [
    "Bits",
    "QuantizedLinear",
    "bits_of",
    "held_bytes",
    "packed_weights",
    "quantization",
    "take_over",
]

import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.errors import BackboneError

Bits = Literal["8bit", "4bit"]
PACKAGES = ("bitsandbytes", "accelerate")
"""What loading needs; the latter by the former's loader in transformers."""
BLOCK = 64
"""Weights that share a scale in 4 bits."""
DEQUANTIZED = ("mxfp4",)
"""Kinds on disk that Hugging Face loads as plain weights by itself (gpt-oss)."""


class QuantizedLinear(nn.Linear):
    """Frozen Linear whose matrix is held in 8 or 4 bits.

    Args:
        codes: int8 [d_out, d_in], or uint8, two weights in each byte, whole blocks.
        scales: float32, of each row [d_out], or of each block of weights. bias: [d_out] or None.
        dtype: of ``weight``.
        shape: d_out and d_in. kind: ``int8``, ``nf4`` or ``fp4``. block: weights of a block.

    Attributes:
        weight: W [d_out, d_in], made anew each time.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        bias: nn.Parameter | None,
        *,
        dtype: torch.dtype,
        shape: tuple[int, int],
        kind: str = "int8",
        block: int = BLOCK,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = bias  # type: ignore[assignment]
        self.dtype, self.kind, self.block = dtype, kind, block

    @property
    def bits(self) -> Bits:
        return "8bit" if self.kind == "int8" else "4bit"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.matrix(self.dtype)

    @torch.no_grad()
    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return W [d_out, d_in] in a dtype."""
        if self.kind == "int8":
            return (self.codes * self.scales[:, None]).to(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # Block by block: rows that end inside of a block come out wrong on a CPU (0.50.2).
        blocks = torch.Size((len(self.scales), self.block))
        state = QuantState(
            self.scales, shape=blocks, dtype=dtype, blocksize=self.block, quant_type=self.kind
        )
        weights: Tensor = dequantize_4bit(self.codes, state).flatten()
        return weights[: self.out_features * self.in_features].view(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b: [..., d_in] -> [..., d_out], in the dtype of x."""
        return _Product.apply(x, self)  # type: ignore[no-untyped-call,no-any-return]


class _Product(torch.autograd.Function):
    """Product x W^T + b with a `QuantizedLinear`; what is kept for the backward is not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.matrix(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.module.matrix(grads[0].dtype), None


def quantization(name: str, settings: Any, wanted: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options with which ``from_pretrained`` reads quantised weights, or makes them of
    plain ones, one by one: int8 by row, or NF4. Always on the CPU: they are the same everywhere.

    Args:
        name: of the backbone. settings: the model's configuration.
        wanted: ``backbone.quantize``. dtype: of all that is not quantised.

    Raises:
        BackboneError: the weights on disk are of another kind than wanted, or than can be read; or
            a package is missing.
    """
    stored: Any = getattr(settings, "quantization_config", None)
    if stored is not None and not isinstance(stored, Mapping):
        stored = stored.to_dict()
    kind = None if stored is None else stored.get("quant_method", "an unknown method")
    if wanted == "none" and (kind is None or kind in DEQUANTIZED):
        return {}
    if kind not in (None, "bitsandbytes"):
        raise BackboneError(
            f"backbone {name!r} is quantised by {kind}, which cannot be read here; give its "
            "weights as they were before that, with backbone.quantize=8bit or 4bit, or a "
            "checkpoint of bitsandbytes"
        )
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise BackboneError(
                f"backbone {name!r} in 8 or 4 bits needs {package}: pip install 'l2rec[quantized]'"
            )
    # It warns that a kernel is missing, which is not used here.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    options: dict[str, Any] = {"device_map": {"": "cpu"}}
    if stored is None:
        return options | {"quantization_config": _settings_of(wanted, dtype)}
    bits = "4bit" if stored.get("load_in_4bit") else "8bit"
    if wanted not in ("none", bits):
        raise BackboneError(
            f"backbone {name!r} is stored in {bits}, which backbone.quantize={wanted} cannot "
            "change; leave it out, or give weights that are not quantised"
        )
    return options


def _settings_of(wanted: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if wanted == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def take_over(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a `QuantizedLinear` in place of every Linear of bitsandbytes."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind == "Linear8bitLt":
            model.set_submodule(name, _from_8bit(module, dtype))
        elif kind == "Linear4bit":
            model.set_submodule(name, _from_4bit(module, dtype))


def _from_8bit(module: Any, dtype: torch.dtype) -> QuantizedLinear:
    weight = module.weight
    shape = module.out_features, module.in_features
    return QuantizedLinear(weight.data, weight.SCB / 127, module.bias, dtype=dtype, shape=shape)


def _from_4bit(module: Any, dtype: torch.dtype) -> QuantizedLinear:
    from bitsandbytes.functional import dequantize_blockwise

    state, scales = module.weight.quant_state, module.weight.quant_state.absmax
    if state.nested:  # the scales are quantised too
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    codes = module.weight.data.view(torch.uint8).flatten()
    missing = len(scales) * state.blocksize // 2 - len(codes)
    return QuantizedLinear(
        F.pad(codes, (0, missing)) if missing else codes,
        scales.float(),
        module.bias,
        dtype=dtype,
        shape=tuple(state.shape),
        kind=state.quant_type,
        block=state.blocksize,
    )


def held_bytes(shape: tuple[int, int], bits: Bits) -> int:
    """Return the bytes of a matrix [d_out, d_in] as it is held: codes and scales."""
    rows, weights = shape[0], math.prod(shape)
    if bits == "8bit":
        return weights + 4 * rows
    return math.ceil(weights / BLOCK) * (BLOCK // 2 + 4)


def bits_of(model: nn.Module) -> Bits | None:
    """Return in what the matrices of a model are held, None if as plain numbers."""
    return next((m.bits for m in model.modules() if isinstance(m, QuantizedLinear)), None)


def packed_weights(model: nn.Module) -> int:
    """Count the weights of all matrices that are held in 8 or 4 bits."""
    held = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return sum(m.out_features * m.in_features for m in held)
