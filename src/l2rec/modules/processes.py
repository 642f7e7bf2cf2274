"""Several processes that train one model together: what one of them needs of the others.

    World         this process among those of a training; alone unless `joined`
    Part          rows that the processes divide among themselves, and their results put together
    everyone      rows of all processes, with gradients: in-batch negatives
    summed        sums over all processes, with gradients
    Lockstep      passes of layers that are divided among the processes

Losses are written for the rows at hand. The training loop deals the rows of a batch out
(`l2rec.runs.loop`) and averages gradients over the processes, each loss weighed by its share of
the targets, so that a mean over targets is that of the whole batch. What a loss compares with
beyond its own rows it asks for here. Outside a dealt-out batch all functions return what they were
given, without a copy.

A gradient that reaches `everyone` or `summed` is the sum over the processes' losses: averaged over
the processes afterwards, as all gradients are, it is that of the mean loss.
"""

from __future__ import annotations

__all__ = [
    "Lockstep",
    "Part",
    "World",
    "alone",
    "current",
    "dealt_out",
    "everyone",
    "from_first",
    "joined",
    "summed",
]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from l2rec.errors import L2RecError

CPU = torch.device("cpu")
Result = TypeVar("Result")
Numbers = TypeVar("Numbers", bound=np.generic)


class Lockstep:
    """Passes of layers that are divided among processes: all take part in each, in one order.

    A process begins a pass by saying which kind it is (`begin`). If another one is at another kind,
    or has nothing to pass (`finish`), it still puts the layers together for those who run them. So
    processes may read different numbers of batches; only a pass with gradients has to be one of
    all.
    """

    def __init__(self, group: Any, size: int, device: torch.device) -> None:
        self.group, self._size, self._device = group, size, device
        self._kinds: list[Callable[[], None]] = []

    def add(self, kinds: Sequence[Callable[[], None]]) -> int:
        """Take kinds of passes, the same in all processes; return the number of the first.

        kinds: what a process calls that only takes part.
        """
        self._kinds += kinds
        return len(self._kinds) - len(kinds)

    def _told(self, kind: int | None) -> list[int]:
        """Tell the others the kind of the next pass; return how many are at each."""
        counts = torch.zeros(len(self._kinds), dtype=torch.int64, device=self._device)
        if kind is not None:
            counts[kind] = 1
        dist.all_reduce(counts, group=self.group)
        return counts.tolist()

    def begin(self, kind: int) -> None:
        """Return when it is this kind's turn: the pass has to follow."""
        while True:
            counts = self._told(kind)
            turn = next(number for number, count in enumerate(counts) if count)
            if turn == kind:
                assert not torch.is_grad_enabled() or counts[kind] == self._size, counts
                return
            self._kinds[turn]()

    def finish(self) -> None:
        """Take part in the others' passes until all have come here."""
        while self._kinds and any(counts := self._told(None)):
            self._kinds[next(number for number, count in enumerate(counts) if count)]()


@dataclass(frozen=True)
class World:
    """This process among those of one training.

    rank: from 0. size: number of processes. group: theirs, for what is not the average of
    gradients. device: where a collective's tensors lie. accelerator: Accelerate's, None when alone.
    lockstep: passes of layers that are divided, None when alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device = CPU
    accelerator: Any = None
    lockstep: Lockstep | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def finish_passes(self) -> None:
        """Take part in the others' passes until all have come here."""
        if self.lockstep is not None:
            self.lockstep.finish()

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            self.finish_passes()
            dist.barrier(group=self.group)

    def total(self, values: npt.NDArray[Numbers]) -> npt.NDArray[Numbers]:
        """Add up arrays of one shape over all processes."""
        if self.size == 1:
            return values
        self.finish_passes()
        shared = torch.from_numpy(values).to(self.device)
        dist.all_reduce(shared, group=self.group)
        return shared.cpu().numpy()

    def from_main(self, call: Callable[[], Result]) -> Result:
        """Call something in the main process alone; return its result, or raise its error, in all.

        Raises:
            L2RecError: what the call raised.
        """
        if self.size == 1:
            return call()
        box: list[Any] = [None, None]
        if self.main:
            try:
                with alone():
                    box[0] = call()
            except L2RecError as error:
                box[1] = error
        self.finish_passes()
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        if box[1] is not None:
            raise box[1]
        result: Result = box[0]
        return result


_WORLD: ContextVar[World] = ContextVar("world", default=World())  # noqa: B039 (it is frozen)
_DEALT: ContextVar[World | None] = ContextVar("dealt", default=None)
"""The processes that have the batch at hand dealt out among them."""


def current() -> World:
    """Return the processes that this one has joined."""
    return _WORLD.get()


@contextmanager
def joined(world: World) -> Iterator[World]:
    """Let evaluation and training know that this process is one of several."""
    token = _WORLD.set(world)
    try:
        yield world
    finally:
        _WORLD.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Leave the others for what one process does by itself."""
    with joined(World()):
        yield


@contextmanager
def dealt_out(world: World | None) -> Iterator[None]:
    """Let losses see the rows of the others; None: every process has the same rows."""
    token = _DEALT.set(world if world is not None and world.size > 1 else None)
    try:
        yield
    finally:
        _DEALT.reset(token)


class _Sum(torch.autograd.Function):
    """Sum over processes, forwards and backwards. (That of torch.distributed.nn is deprecated.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _sum(x: Tensor, world: World) -> Tensor:
    apply: Any = _Sum.apply
    shared: Tensor = apply(x, world.group)
    return shared


def summed(x: Tensor) -> Tensor:
    """Add up tensors of one shape over the processes of a dealt-out batch, with gradients."""
    world = _DEALT.get()
    return x if world is None else _sum(x, world)


def everyone(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes, rank by rank, with gradients.

    x: [n, ...], n may differ between processes. Returns [sum of n, ...] and where this process'
    own rows begin.
    """
    world = _DEALT.get()
    if world is None:
        return x, 0
    counts = np.zeros(world.size, dtype=np.int64)
    counts[world.rank] = len(x)
    counts = world.total(counts)
    before, after = int(counts[: world.rank].sum()), int(counts[world.rank + 1 :].sum())
    return _sum(_padded(x, before, after), world), before


def from_first(x: Tensor) -> Tensor:
    """Return what the first process drew: in a dealt-out batch each draws by itself."""
    world = _DEALT.get()
    if world is None:
        return x
    return _sum(x if world.main else torch.zeros_like(x), world)


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """Put rows of zeros before and after x."""
    return F.pad(x, (0, 0) * (x.ndim - 1) + (before, after))


@dataclass(frozen=True)
class Part:
    """The rows, of ``count`` that all processes have alike, that this one computes."""

    rows: slice
    count: int

    @classmethod
    def of(cls, count: int) -> Part:
        """Divide ``count`` rows evenly; too few to give each process one are computed by all."""
        world = _DEALT.get()
        if world is None or count < world.size:
            return cls(slice(0, count), count)
        edges = np.linspace(0, count, world.size + 1).astype(int)
        return cls(slice(int(edges[world.rank]), int(edges[world.rank + 1])), count)

    def joined(self, x: Tensor) -> Tensor:
        """Put together what the processes computed of their rows: [n, ...] -> [count, ...]."""
        world = _DEALT.get()
        if world is None or len(x) == self.count:
            return x
        return _sum(_padded(x, self.rows.start, self.count - self.rows.stop), world)
