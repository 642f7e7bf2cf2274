"""A training step from shapes alone: its memory and its operations, with nothing computed.

Inside `ShapesOnly`, floating-point tensors have a shape and no numbers (the ``meta`` device), while
integers, booleans and `torch.rand` are real, so that the real loss of a real batch runs: which
tokens, how many rows, which of them are masked. Every storage is counted while it lives, on the
way forward and back, as an allocator would see it.

Limits: attention is that of a GPU, which keeps queries, keys, values and outputs but no scores; a
number read out of a tensor without numbers is 1.
"""

from __future__ import annotations

__all__ = [
    "NumbersNeeded",
    "ShapesOnly",
    "StepShape",
    "bytes_of",
    "step_shape",
]

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from l2rec.data.batches import Batch
from l2rec.protocols import Stage, updates

META, REAL = torch.device("meta"), torch.device("cpu")
BACKWARD = 2.5
"""Operations of the backward of fused attention, in units of its forward."""
aten: Any = torch.ops.aten
BY_MASK = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
    | {aten._index_put_impl_.default}
)
"""Operators whose indices may be masks: how much they select must be known."""
INTEGERS = frozenset({"aten::arange", "aten::randint", "aten::randperm"})
"""Factories of integers where no dtype is given."""


class NumbersNeeded(Exception):
    """A step's shapes depend on numbers that are not there."""


@dataclass(frozen=True)
class StepShape:
    """What a step takes: the most bytes at once beside weights, moments and buffers (gradients,
    activations, temporaries), the tokens of the backbone, and multiply-adds times two.
    """

    bytes: int
    tokens: int
    operations: float


def step_shape(stage: Stage, batch: Batch) -> StepShape:
    """Take a step of a stage.

    The model must be one of shapes alone, in training mode, its parameters outside of ``stage``
    without gradients.

    Raises:
        NumbersNeeded: which rows or tokens are read depends on what was computed.
    """
    parameters = [p for group in stage.groups for p in group.parameters]
    tokens, first = 0, None
    try:
        with ShapesOnly() as seen:
            for losses in updates(stage.loss(batch)):
                if first is None:  # so far, the gradients of the step before were held too
                    first = seen.peak + bytes_of(parameters)
                for parameter in parameters:  # here the training loop frees them
                    parameter.grad = None
                _backward(losses.total)
                tokens += losses.computed_tokens
            del losses
    except (RuntimeError, TypeError) as error:
        raise NumbersNeeded(str(error).splitlines()[0]) from error
    finally:
        for parameter in parameters:
            parameter.grad = None
    return StepShape(max(seen.peak, first or 0), tokens, seen.operations)


def _backward(total: Tensor) -> None:
    """Call autograd's engine itself: `Tensor.backward` leaves the context of `_Functions`, which
    blocks that are computed once more in the backward must find as they did before.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    ones = torch.ones_like(total)
    engine.run_backward(
        (total,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class ShapesOnly:
    """Context in which floating-point tensors are shapes, and all memory is counted.

    Attributes:
        now, peak: bytes of the storages made inside that live, and the most at once.
        operations: multiply-adds times two.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.operations = 0.0
        self._living: dict[int, weakref.ref[Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ShapesOnly:
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def count(self, tensor: Tensor) -> None:
        """Count a storage from now until nobody holds it."""
        storage: Any = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return

        def freed(_: Any) -> None:
            del self._living[key]
            self.now -= size

        self._living[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _is_real(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


class _Operators(TorchDispatchMode):
    """Run integers where they are, and everything that meets a shape as shapes."""

    def __init__(self, seen: ShapesOnly) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 1 if _is_real(args[0].dtype) else 1.0
        if func is aten.lift_fresh.default and not _is_real(args[0].dtype):  # torch.tensor(0.5)
            args = (_shape_of(args[0]),)
        elif "device" in kwargs or (not tensors and _takes_device(func)):
            kwargs["device"] = _place(func, args, kwargs, tensors)
        if any(t.is_meta for t in tensors):
            if func in BY_MASK:
                args = (args[0], _places(args[1]), *args[2:])
            args, kwargs = tree_map_only(Tensor, _shape_of, (args, kwargs))
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._seen.count(tensor)
        if (cost := flop_registry.get(func._overloadpacket)) is not None:
            self._seen.operations += cost(*args, **kwargs, out_val=out)
        return out


def _place(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> torch.device:
    """Return where the result of a factory or of a copy lives."""
    if tensors:
        dtype = kwargs.get("dtype") or tensors[0].dtype
        return META if tensors[0].is_meta or not _is_real(dtype) else REAL
    name = func._schema.name
    dtype = kwargs.get("dtype") or (torch.int64 if name in INTEGERS else torch.float32)
    return REAL if _is_real(dtype) or name == "aten::rand" else META


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace real masks by the places they select."""
    places: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not index.is_meta
        places += index.nonzero(as_tuple=True) if index is not None and mask else [index]
    return places


def _shape_of(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


class _Functions(TorchFunctionMode):
    """Let every tensor say that it is on the ``meta`` device, and attend as a GPU does."""

    def __init__(self, seen: ShapesOnly) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.device.__get__:
            return META
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return _Attention.apply(q, k, v, kwargs.get("attn_mask"), self._seen)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: q, k, v, the output and a sum for each row are kept, no scores."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: ShapesOnly
    ) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, mask)
        ctx.seen = seen
        ctx.operations = 2.0 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        seen.operations += ctx.operations
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        ctx.seen.operations += BACKWARD * ctx.operations
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Add up the bytes of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
