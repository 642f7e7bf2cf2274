"""The Linear modules of a frozen backbone that adapters take over, by the part they play."""

from __future__ import annotations

__all__ = ["find_linears", "side_by_side"]

import itertools
from collections.abc import Sequence

from torch import nn

from l2rec.errors import BackboneError, ConfigError

# What the matrices of one attention or MLP block are called across model families.
MATRIX_NAMES = {
    "q": ("q_proj", "query", "q_lin", "q"),
    "k": ("k_proj", "key", "k_lin", "k"),
    "v": ("v_proj", "value", "v_lin", "v"),
    "o": ("o_proj", "attention.output.dense", "out_lin", "attn.Wo", "attn.o"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "intermediate.dense", "lin1", "mlp.Wi"),
    "down": ("down_proj", "lin2", "mlp.Wo"),
}


SIDE_BY_SIDE = (("q", "k", "v"), ("gate", "up"))
"""Parts of a block that read the same input."""


def _plays(name: str, matrix: str) -> bool:
    return any(name == s or name.endswith(f".{s}") for s in MATRIX_NAMES[matrix])


def find_linears(model: nn.Module, matrices: Sequence[str]) -> dict[str, nn.Linear]:
    """The Linear modules of every block that play the given parts (``q``, ``k``, ``v``, ``o``,
    ``gate``, ``up``, ``down``), by full name, in the model's order.

    Raises:
        ConfigError: an unknown part. BackboneError: the model has none of that part.
    """
    found: dict[str, nn.Linear] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for matrix in matrices:
        if matrix not in MATRIX_NAMES:
            raise ConfigError(
                f"matrices: unknown {matrix!r}; choose from {', '.join(MATRIX_NAMES)}"
            )
        hits = {n: m for n, m in linears.items() if _plays(n, matrix)}
        if not hits:
            raise BackboneError(f"the backbone has no {matrix!r} matrix; change model.matrices")
        found.update(hits)
    order = list(linears)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def side_by_side(names: Sequence[str]) -> list[list[int]]:
    """Places of matrices that read the same input, neighbours in ``names``; most are alone."""

    def reads(place: int) -> tuple[str, object]:
        name = names[place]
        found = (row for row in SIDE_BY_SIDE if any(_plays(name, part) for part in row))
        return name.rpartition(".")[0], next(found, name)

    return [list(group) for _, group in itertools.groupby(range(len(names)), reads)]
