"""Linear modules of a frozen backbone: finding them by their part, and taking over their forward.

The backbone stays Hugging Face's code. `find_linears` names the matrices W_j to adapt; an `Adapter`
(`experts.DPMoE`, `lora.LoRA`) holds trained parameters for them and replaces their forward.
"""

from __future__ import annotations

__all__ = ["Adapter", "Forward", "find_linears", "side_by_side"]

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import Tensor, nn

from l2rec.errors import BackboneError, ConfigError

Forward = Callable[[Tensor], Tensor]
"""Forward of a Linear module: x [..., d_in] -> [..., d_out]."""
State = TypeVar("State")

MATRIX_NAMES = {
    "q": ("q_proj", "query", "q_lin", "q"),
    "k": ("k_proj", "key", "k_lin", "k"),
    "v": ("v_proj", "value", "v_lin", "v"),
    "o": ("o_proj", "attention.output.dense", "out_lin", "attn.Wo", "attn.o"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "intermediate.dense", "lin1", "mlp.Wi"),
    "down": ("down_proj", "lin2", "mlp.Wo"),
}
"""Names that model families give to each part of an attention or MLP block."""

SIDE_BY_SIDE = (("q", "k", "v"), ("gate", "up"))
"""Parts of a block that read the same input."""


def _plays(name: str, matrix: str) -> bool:
    return any(name == s or name.endswith(f".{s}") for s in MATRIX_NAMES[matrix])


def find_linears(model: nn.Module, matrices: Sequence[str]) -> dict[str, nn.Linear]:
    """Find the Linear modules of every block that play the given parts.

    Args:
        model: a Hugging Face transformer.
        matrices: parts, of ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``.

    Returns:
        The modules by full name, in the model's order.

    Raises:
        ConfigError: an unknown part. BackboneError: the model has no matrix of that part.
    """
    chosen: dict[str, nn.Linear] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for matrix in matrices:
        if matrix not in MATRIX_NAMES:
            raise ConfigError(
                f"matrices: unknown {matrix!r}; choose from {', '.join(MATRIX_NAMES)}"
            )
        hits = {n: m for n, m in linears.items() if _plays(n, matrix)}
        if not hits:
            raise BackboneError(f"the backbone has no {matrix!r} matrix; change model.matrices")
        chosen.update(hits)
    order = list(linears)
    return dict(sorted(chosen.items(), key=lambda item: order.index(item[0])))


def side_by_side(names: Sequence[str]) -> list[list[int]]:
    """Group matrices that read the same input: q, k and v of a block; gate and up.

    Returns:
        Consecutive runs of places in ``names``, in order; a matrix without a neighbour is a group
        of its own.
    """

    def block_and_input(place: int) -> tuple[str, object]:
        name = names[place]
        inputs = (row for row in SIDE_BY_SIDE if any(_plays(name, part) for part in row))
        return name.rpartition(".")[0], next(inputs, name)

    return [list(group) for _, group in itertools.groupby(range(len(names)), block_and_input)]


class Adapter(nn.Module, Generic[State]):
    """Base of the adapters: takes over the forward of Linear modules and gives it back.

    An attached adapter answers for its modules: inside `active` with `_output`, outside of it with
    the forward that it replaced. Several may be attached to one backbone, each on top of those
    before it; they detach in the opposite order.

    Args:
        linears: frozen modules by name (`find_linears`). They do not become submodules: their
            weights are neither trained nor saved with the adapter.

    Attributes:
        names: names of the adapted modules; place j is matrix W_j.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.names = list(linears)
        self._linears = list(linears.values())
        self._replaced: list[tuple[nn.Linear, Forward, Forward]] = []
        self._state: State | None = None

    def attach(self) -> None:
        """Take over the forward of every module, unless that is done already."""
        if not self._replaced:
            for j, linear in enumerate(self._linears):
                plain = linear.forward
                forward = self._forward(j, plain)
                linear.forward = forward  # type: ignore[assignment,method-assign]
                self._replaced.append((linear, plain, forward))

    def detach(self) -> None:
        """Give every module its forward back: the backbone is what it was before `attach`."""
        for linear, plain, forward in reversed(self._replaced):
            assert linear.forward is forward, "adapters detach in the opposite order of attach"
            linear.forward = plain  # type: ignore[assignment,method-assign]
        self._replaced = []

    @contextmanager
    def active(self, state: State) -> Iterator[State]:
        """Adapt the attached modules within this context; ``state`` is handed to `_output`."""
        before, self._state = self._state, state
        try:
            yield state
        finally:
            self._state = before

    def _forward(self, j: int, plain: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            state = self._state
            return plain(x) if state is None else self._output(j, x, plain, state)

        return forward

    def _output(self, j: int, x: Tensor, plain: Forward, state: State) -> Tensor:
        """Return what module j makes of x [..., d_in] inside `active`: [..., d_out].

        plain: the forward that was replaced.
        """
        raise NotImplementedError
