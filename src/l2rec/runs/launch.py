"""Several processes that train one run, as `torchrun` or `accelerate launch` begins them.

    joined      the processes of this training, found by the environment that both set
    averaging   gradients that are averaged over them: DDP, through Accelerate
    dealt       the rows of a batch that are this process' own
    Silent      the progress of all but the first

The recipe is that of one process: a batch of ``training.batch_users`` is one batch of all, and its
rows are dealt out. So the number of processes changes how long a training takes and not what it
learns, and a run may be resumed by another number of them. One process needs no Accelerate.
"""

from __future__ import annotations

__all__ = ["Silent", "averaging", "dealt", "first_on_each_machine", "joined", "rows_of"]

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2rec.data.batches import Batch
from l2rec.data.ragged import IntArray
from l2rec.errors import ConfigError, TrainingError
from l2rec.modules import processes
from l2rec.modules.processes import Lockstep, World
from l2rec.protocols import Progress

PATIENCE = timedelta(days=1)
"""How long processes wait for one: the first reads a catalog's texts. One that dies ends them all,
by its launcher."""


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that were launched together; alone otherwise, or if joined already.

    Raises:
        ConfigError: Accelerate is not installed.
        TrainingError: fewer processes answer than were launched.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or processes.current().size > 1:
        yield processes.current()
        return
    world = _world(size)
    try:
        with processes.joined(world):
            yield world
            world.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _world(size: int) -> World:
    """Begin the process group and count those that answer."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError:
        raise ConfigError(
            f"{size} processes were launched, which takes Accelerate: "
            "pip install 'l2rec[distributed]'"
        ) from None
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=True,  # by one loss of several
        gradient_as_bucket_view=True,  # no copies of the gradients
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # methods choose the dtypes of their products
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    # A group of its own: sums inside a loss never stand in line between DDP's.
    group = torch.distributed.new_group(timeout=PATIENCE)
    rank = accelerator.process_index
    # And one for layers that are divided, which are also put together between DDP's sums.
    lockstep = Lockstep(torch.distributed.new_group(timeout=PATIENCE), size, accelerator.device)
    world = World(rank, size, group, accelerator.device, accelerator, lockstep)
    answered = int(world.total(np.ones(1, dtype=np.int64))[0])
    if not answered == size == accelerator.num_processes:
        raise TrainingError(f"{size} processes were launched, {answered} answer")
    return world


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Let one process of each machine go first, and the others of it afterwards."""
    world = processes.current()
    if world.size == 1:
        yield
        return
    first = world.accelerator.is_local_main_process
    if not first:
        world.barrier()
    yield
    if first:
        world.barrier()
    world.finish_passes()


class Silent(Progress):
    """Progress that nobody watches."""

    def training(self, epoch: float, step: int, total: int, text: str) -> None:
        """Show nothing."""

    def validating(self, done: int, total: int) -> None:
        """Show nothing."""

    def line(self, text: str) -> None:
        """Show nothing."""


class _Whole(nn.Module):
    """A model as DDP takes it: what passes is a loss whose graph stands already.

    DDP leaves alone what is not trained: it is the same in all processes, and never sent.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        buffers = [name for name, _ in self.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = frozen + buffers

    def forward(self, total: Tensor) -> Tensor:
        return total


@contextmanager
def averaging(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function of a loss, after which its gradients are the means over all processes.

    Enter it where only what is trained needs gradients. The weights of the first process become
    those of all.
    """
    world = processes.current()
    if world.size == 1:
        yield lambda total: total
        return
    wrapped = world.accelerator.prepare_model(_Whole(model), device_placement=False)
    try:
        yield wrapped
    finally:
        world.accelerator.free_memory()


def rows_of(lengths: IntArray, rank: int, size: int) -> IntArray:
    """Return the rows that are one process' own, ascending: dealt out from the longest to the
    shortest, there and back, so that all read about as many tokens.
    """
    turn = np.arange(len(lengths)) % (2 * size)
    mine = (turn == rank) | (turn == 2 * size - 1 - rank)
    rows: IntArray = np.sort(np.argsort(-lengths, kind="stable")[mine])
    return rows


@contextmanager
def dealt(batch: Batch, *, gather: bool, draw: tuple[int, int]) -> Iterator[tuple[Batch, float]]:
    """Yield this process' rows of a batch, and the weight of their loss in the mean over processes.

    A batch with fewer rows than processes is computed whole by each. Rows are dealt out by length.

    Args:
        gather: losses see the rows of the others (`processes.everyone`).
        draw: seed and step. What is drawn inside the loss differs between processes; what is drawn
            outside of it does not.
    """
    world = processes.current()
    if world.size == 1:
        yield batch, 1.0
        return
    part, among = batch, None
    if len(batch) >= world.size:
        part, among = batch.take(rows_of(batch.histories.lengths, world.rank, world.size)), world
    weight = part.terms * world.size / batch.terms if among else 1.0
    own_draws: Any = nullcontext()
    if among is not None:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        own_draws = torch.random.fork_rng(devices)
    with own_draws, processes.dealt_out(among if gather else None):
        if among is not None:
            words = np.random.SeedSequence([*draw, world.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0] >> 1))
        yield part, weight
