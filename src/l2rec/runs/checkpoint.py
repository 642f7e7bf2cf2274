"""Checkpoints of a run.

    RUN/model.safetensors   trained tensors of the best step, without the frozen backbone
    RUN/state/step-N/       a state to resume from: model, optimiser, random state, counters

Each file is written under another name, flushed to disk and renamed, so that a kill at any moment
leaves the last good one. Nothing is ever unpickled.
"""

from __future__ import annotations

__all__ = [
    "State",
    "latest_state",
    "load_tensors",
    "load_trained",
    "read_state",
    "save_tensors",
    "trained_tensors",
    "without_gone",
    "write_state",
]

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from l2rec.disk import read_json, replacing, replacing_folder, write_json
from l2rec.errors import CheckpointError
from l2rec.protocols import SizedByData

KEEP_STATES = 2
"""Newest states that are not deleted; the older one serves if the newest is torn."""
GONE = frozenset({"skip", "spread", "items.semantic"})
"""Tensors that L2Rec and blends of earlier versions had and never read; the last without the
semantic view."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written.
    """
    with replacing(path) as partial:
        contiguous = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
        save_file(contiguous, partial, metadata=dict(metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing or torn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; was this run ever checkpointed?") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not a safetensors file: {error}") from error


# -- trained tensors -----------------------------------------------------------------------------


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model's state without those of the frozen backbone, each once
    where several modules share it.
    """
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in once and not name.startswith("backbone.")
    }


def without_gone(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what `GONE` names from saved tensors, unless the model has it as its ``own``."""
    return {name: t for name, t in tensors.items() if name in own or name not in GONE}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load trained tensors, whose names and shapes must be exactly the model's.

    Buffers that a method names in ``sized_by_data`` take the shape they were saved with.
    ``where`` names the source in errors.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape.
    """
    own = trained_tensors(model)
    tensors = without_gone(tensors, own)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: its tensors are not this model's: missing {missing[:3] or 'none'}, "
            f"unexpected {unexpected[:3] or 'none'}"
        )
    free = model.sized_by_data & own.keys() if isinstance(model, SizedByData) else frozenset()
    for name in free:
        owner, _, buffer = name.rpartition(".")
        empty = own[name].new_empty(tensors[name].shape)
        setattr(model.get_submodule(owner), buffer, empty)
    for name, tensor in tensors.items():
        if name not in free and own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, this model and data set need "
                f"{tuple(own[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)


# -- states to resume from -----------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """A point to resume from."""

    model: dict[str, Tensor]
    """Trained tensors of the model."""
    optimizer: dict[str, Tensor]
    """Tensors of the optimiser and random state, see `optimizer_tensors`."""
    counters: dict[str, Any]
    """Everything else, as JSON values."""


def write_state(run: Path, step: int, state: State) -> Path:
    """Write RUN/state/step-N as a whole folder, delete all but the newest two, return its path."""
    final = run / "state" / f"step-{step:08d}"
    with replacing_folder(final) as partial:
        save_tensors(partial / "model.safetensors", state.model)
        save_tensors(partial / "optimizer.safetensors", state.optimizer)
        write_json(partial / "counters.json", state.counters)
    for old in sorted(final.parent.glob("step-*"))[:-KEEP_STATES]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_state(run: Path) -> State | None:
    """Read the newest state of a run that is not torn; return None if there is no state.

    Raises:
        CheckpointError: all states are torn.
    """
    problem = None
    for path in sorted((run / "state").glob("step-*"), reverse=True):
        try:
            return read_state(path)
        except CheckpointError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def read_state(path: Path) -> State:
    """Read a state folder.

    Raises:
        CheckpointError: a file is missing or torn.
    """
    return State(
        load_tensors(path / "model.safetensors")[0],
        load_tensors(path / "optimizer.safetensors")[0],
        read_json(path / "counters.json"),
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's tensors as ``INDEX.KEY``, and the random state of CPU and GPU."""
    state = optimizer.state_dict()["state"]
    tensors = {f"{index}.{key}": value for index, s in state.items() for key, value in s.items()}
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the optimiser and the random state from `optimizer_tensors`.

    Raises:
        CheckpointError: the tensors hold no random state.
    """
    tensors = dict(tensors)
    if "rng" not in tensors:
        raise CheckpointError("this optimiser state has no random state: l2rec did not write it")
    rng, cuda = tensors.pop("rng"), tensors.pop("rng_cuda", None)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(rng)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
