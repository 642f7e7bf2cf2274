"""Matrices of a frozen backbone: finding them by their part, and taking over their forward.

The backbone stays Hugging Face's code. `find_linears` names the matrices W_j to adapt: Linear
modules, or rows of one (`fused.Part`). An `Adapter` (`experts.DPMoE`, `lora.LoRA`) holds trained
parameters for them and replaces the forward of their modules.
"""

from __future__ import annotations

__all__ = ["ACTIVE", "Adapter", "Forward", "again", "find_linears", "part_of", "side_by_side"]

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from l2rec.errors import BackboneError, ConfigError
from l2rec.modules.fused import Matrix, Part, fused_parts, is_matrix

logger = logging.getLogger("l2rec")

Forward = Callable[[Tensor], Tensor]
"""Forward of a Linear module: x [..., d_in] -> [..., d_out]."""
State = TypeVar("State")

MATRIX_NAMES = {
    "q": ("q_proj", "query", "q_lin", "q", "Wq", "query_proj", "q_b_proj"),
    "k": ("k_proj", "key", "k_lin", "k", "Wk", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "v", "Wv", "value_proj"),
    "o": (
        *("o_proj", "attention.output.dense", "out_lin", "attn.Wo", "attn.o", "SelfAttention.o"),
        *("self_attn.out_proj", "attn.out_proj", "attention.out_proj", "attn.c_proj"),
        *("attention.dense", "self_attention.dense", "self_attn.dense"),
        "multi_head_attention.dense",
    ),
    "gate": ("gate_proj", "wi_0"),
    "up": (
        *("up_proj", "intermediate.dense", "lin1", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
        *("ffn", "wi", "wi_1"),
    ),
    "down": (
        *("down_proj", "lin2", "mlp.Wo", "output.dense", "fc2", "mlp.c_proj", "fc_out"),
        *("dense_4h_to_h", "ffn_output", "DenseReluDense.wo"),
    ),
}
"""Names that model families give to each part of an attention or MLP block; the longest counts."""

SIDE_BY_SIDE = (("q", "k", "v"), ("gate", "up"))
"""Parts of a block that read the same input."""

NEVER_RUN = ("crossattention", "encoder_attn", "cross_attn", "EncDecAttention")
"""Names of attention to another model's states: there are none."""


def part_of(name: str) -> str | None:
    """Return the part that a module plays by its full name, or None."""
    ends = {end: part for part, names in MATRIX_NAMES.items() for end in names}
    hits = [end for end in ends if name == end or name.endswith(f".{end}")]
    return ends[max(hits, key=len)] if hits else None


def _matrices(model: nn.Module) -> dict[str, dict[str, Matrix]]:
    """Find all matrices that play a part, in the model's order: by full name, by part."""
    found: dict[str, dict[str, Matrix]] = {part: {} for part in MATRIX_NAMES}
    for name, module in model.named_modules():
        if not is_matrix(module) or any(other in name for other in NEVER_RUN):
            continue
        fused = fused_parts(getattr(model, "config", None), name, module)
        for part, rows in fused.items():
            found[part][f"{name}.{part}"] = rows
        part_of_all = None if fused else part_of(name)
        if part_of_all is not None:
            found[part_of_all][name] = (
                module if isinstance(module, nn.Linear) else Part.whole(module)
            )
    return found


def find_linears(model: nn.Module, matrices: Sequence[str] | None) -> dict[str, Matrix]:
    """Find the matrices of every block that play the given parts.

    Of a mixture of experts, the routed ones are left out, with a note: they are no modules, but one
    parameter, and see some of the tokens only.

    Args:
        model: a Hugging Face transformer.
        matrices: parts, of ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``; None for all
            that the model has.

    Returns:
        The matrices by full name, in the model's order. A Linear module stands for itself; rows of
        a fused one are a `Part`, named after module and part: ``h.0.attn.c_attn.q``.

    Raises:
        ConfigError: an unknown part. BackboneError: the model has no matrix of that part.
    """
    for matrix in matrices or ():
        if matrix not in MATRIX_NAMES:
            raise ConfigError(
                f"matrices: unknown {matrix!r}; choose from {', '.join(MATRIX_NAMES)}"
            )
    if matrices is not None and not matrices:
        return {}
    found = _matrices(model)
    if matrices is None:
        matrices = [matrix for matrix in found if found[matrix]]
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    routed = _has_routed_experts(model)
    for matrix in matrices:
        if not found[matrix]:
            has = " ".join(part for part, of_part in found.items() if of_part)
            left_out = " (its routed experts cannot be adapted)" if routed else ""
            raise BackboneError(
                f"the backbone ({kind}) has no {matrix!r} matrix, but {has or 'none of them'}"
                f"{left_out}; change model.matrices"
            )
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    chosen = {
        name: one
        for matrix in MATRIX_NAMES
        if matrix in matrices
        for name, one in found[matrix].items()
    }

    def place(name: str) -> int:
        return order[name] if name in order else order[name.rpartition(".")[0]]

    if routed:
        counts = ", ".join(f"{len(found[m])} {m}" for m in MATRIX_NAMES if m in matrices)
        logger.warning(
            "note: the backbone (%s) is a mixture of experts: adapted are %s, in attention, dense "
            "layers and shared experts; its routed experts are left out",
            kind,
            counts,
        )
    return {name: chosen[name] for name in sorted(chosen, key=place)}


def _has_routed_experts(model: nn.Module) -> bool:
    """Return True if a parameter is a stack of matrices, as those of routed experts are."""
    return any(
        parameter.ndim == 3 and len(parameter) > 1
        for module in model.modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    )


def side_by_side(linears: Mapping[str, Matrix]) -> list[list[int]]:
    """Group matrices that read the same input: q, k and v of a block; gate and up.

    Returns:
        Consecutive runs of places in ``linears``, in order; a matrix without a neighbour is a group
        of its own. Parts of one module are in one group.
    """
    items = list(linears.items())

    def block_and_input(place: int) -> tuple[object, object]:
        name, matrix = items[place]
        if isinstance(matrix, Part) and not matrix.is_whole:
            return id(matrix.module), None
        inputs = (row for row in SIDE_BY_SIDE if part_of(name) in row)
        return name.rpartition(".")[0], next(inputs, name)

    return [list(group) for _, group in itertools.groupby(range(len(items)), block_and_input)]


ACTIVE: ContextVar[Mapping[Adapter[Any], Any]] = ContextVar(
    "l2rec_active", default=MappingProxyType({})
)
"""Adapters that are active, and their states."""


def again(states: Mapping[Adapter[Any], Any]) -> Mapping[Adapter[Any], Any]:
    """Return the states in which a part of a pass is computed once more: see `Adapter._again`."""
    return {adapter: adapter._again(state) for adapter, state in states.items()}


class Adapter(nn.Module, Generic[State]):
    """Base of the adapters: takes over the forward of frozen modules and gives it back.

    An attached adapter answers for its modules: inside `active` with `_output`, outside of it with
    the forward that it replaced. Several may be attached to one backbone, each on top of those
    before it; they detach in the opposite order.

    Args:
        linears: frozen matrices by name (`find_linears`). Their modules do not become submodules:
            the weights are neither trained nor saved with the adapter.

    Attributes:
        names: names of the adapted matrices; place j is matrix W_j.
    """

    def __init__(self, linears: Mapping[str, Matrix]) -> None:
        super().__init__()
        self.names = list(linears)
        self._parts = [m if isinstance(m, Part) else Part.whole(m) for m in linears.values()]
        self._modules_of = list(dict.fromkeys(part.module for part in self._parts))
        self._module_of = [self._modules_of.index(part.module) for part in self._parts]
        self._replaced: list[tuple[nn.Module, Forward, Forward]] = []

    def attach(self) -> None:
        """Take over the forward of every module, unless that is done already."""
        if not self._replaced:
            for number, module in enumerate(self._modules_of):
                plain = module.forward
                forward = self._forward(number, plain)
                module.forward = forward
                self._replaced.append((module, plain, forward))

    def detach(self) -> None:
        """Give every module its forward back: the backbone is what it was before `attach`."""
        for module, plain, forward in reversed(self._replaced):
            assert module.forward is forward, "adapters detach in the opposite order of attach"
            module.forward = plain
        self._replaced = []

    @contextmanager
    def active(self, state: State) -> Iterator[State]:
        """Adapt the attached modules within this context; ``state`` is handed to `_output`."""
        token = ACTIVE.set({**ACTIVE.get(), self: state})
        try:
            yield state
        finally:
            ACTIVE.reset(token)

    def _again(self, state: State) -> State:
        """Return a state for computing once more, in the backward, a part of the pass that `state`
        is of: one that takes the same choices, collects nothing and holds none of its results.
        """
        return state

    def _forward(self, number: int, plain: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            state = ACTIVE.get().get(self)
            return plain(x) if state is None else self._output(number, x, plain, state)

        return forward

    def _output(self, number: int, x: Tensor, plain: Forward, state: State) -> Tensor:
        """Return what a module makes of x [..., d_in] inside `active`: [..., rows of the module].

        number: its place among the distinct modules, in the order of the matrices. plain: the
        forward that was replaced.
        """
        raise NotImplementedError
