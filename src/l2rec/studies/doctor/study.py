"""What a training would take, before it is begun: `l2rec doctor`.

    shapes     parameters, memory on a card, disk, operations, the largest batch that fits: no
               weights are loaded and nothing is computed (`l2rec.studies.doctor.shapes`)
    measured   time of an epoch and of a validation and the peak memory on this machine, from a few
               real steps in a process of their own (`l2rec.studies.doctor.measure`)

Both read the batches that training would make of the same data.
"""

from __future__ import annotations

__all__ = ["doctor", "parts_of"]

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from l2rec.config import RunConfig, method_class
from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.splits import Split
from l2rec.errors import ConfigError
from l2rec.modules.backbone import Backbone
from l2rec.modules.fused import Part, is_matrix
from l2rec.modules.quantized import Bits, held_bytes
from l2rec.protocols import Embedder, Progress, Stage
from l2rec.runs.checkpoint import KEEP_STATES, trained_tensors
from l2rec.runs.folder import training_split
from l2rec.runs.loop import gradients_only_for
from l2rec.studies.doctor.backbones import shape_backbone, weights_at_hand
from l2rec.studies.doctor.measure import epoch_of, largest, measured
from l2rec.studies.doctor.shapes import (
    NumbersNeeded,
    ShapesOnly,
    StepShape,
    bytes_of,
    step_shape,
)

CARD = 80.0
"""GB of the card, unless another is asked for."""
SPARE = 0.08
"""Share of a card that a batch leaves free: the driver's own memory, gaps of the allocator."""
RATE = 200e12
"""Operations a second of a card of these days that is kept about half busy, in bfloat16."""
MOST, LEAST = 1 << 22, 64
"""Largest and smallest ``batch_tokens`` that are tried."""
RANKED_USER = 60
"""Bytes on disk of the ranks and the list of one user, about."""
PARTS = (
    ("experts", r"experts\.mixtures\.\d+\.(shared_)?[ab]$"),
    ("routers", r"experts\."),
    ("gate", r"fusion\.gate\."),
    ("projections", r"(projector|fusion)\."),
    ("table", r"table\."),
)
"""Names of L2Rec's parts, and of the parameters in them; others are named by their module."""


def doctor(
    config: RunConfig,
    data: Path,
    *,
    backbones: Sequence[str] = (),
    gpu_memory: float = CARD,
    measure: bool = True,
    progress: Progress,
) -> dict[str, Any]:
    """Say what training a recipe on a data set takes, for each of some backbones.

    Args:
        backbones: names to look at in place of the recipe's own; a folder may hold a config.json
            and nothing else.
        gpu_memory: GB (10^9 bytes) of the card.
        measure: also take a few real steps, where a backbone's weights lie on this machine.

    Returns:
        The data set, the card, and for each backbone what ``shapes`` and ``measured`` say; the
        latter is None where nothing was measured. Sizes are bytes.

    Raises:
        ConfigError: a card without memory, or backbones for a method that reads none.
        L2RecError: what training would raise before its first step.
    """
    if gpu_memory <= 0:
        raise ConfigError(f"--gpu-memory {gpu_memory:g}: give GB, such as 80")
    dataset = open_dataset(data)
    split = training_split(config, dataset)
    reads = method_class(config.method).uses_backbone
    if backbones and not reads:
        raise ConfigError(f"--backbone {backbones[0]}: {config.method} reads no backbone")
    patients = []
    for name in backbones or [config.backbone.name if reads else "none"]:
        chosen = config
        if reads:
            named = config.backbone.model_copy(update={"name": name})
            chosen = config.model_copy(update={"backbone": named})
        progress.line(f"{name}: shapes")
        patient = {
            "backbone": name,
            "shapes": _shapes(chosen, dataset, split, gpu_memory * 1e9),
            "measured": None,
        }
        if measure and (not reads or weights_at_hand(chosen.backbone)):
            progress.line(f"{name}: a few steps and a sample of validation in another process")
            patient["measured"] = _course(chosen, measured(chosen, data))
        patients.append(patient)
    return {
        "method": config.method.rpartition(":")[2],
        "dataset": dataset.identity,
        "gpu_memory": gpu_memory,
        "batch_users": config.training.batch_users,
        "backbones": patients,
    }


def parts_of(model: nn.Module) -> dict[str, int]:
    """Count the trained parameters of a model by part; a backbone's are none of them."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of = (part for part, names in PARTS if re.match(names, name))
            part = next(of, name.partition(".")[0])
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


@dataclass(frozen=True)
class _Patient:
    """A model of shapes, and what its training is made of."""

    config: RunConfig
    split: Split
    backbone: Backbone | None
    model: Any
    stages: list[Stage]

    @property
    def frozen(self) -> int:
        """Bytes of the backbone."""
        return 0 if self.backbone is None else bytes_of([*self.backbone.parameters()])

    def frozen_in(self, bits: Bits) -> int:
        """Bytes of the backbone with the matrices of its linear layers in 8 or 4 bits, and the one
        at a time, the largest, that is made anew for a product.
        """
        assert self.backbone is not None
        parts = [Part.whole(m) for m in self.backbone.modules() if is_matrix(m)]
        held = sum(held_bytes((part.rows, part.in_features), bits) for part in parts)
        weights = [part.weight for part in parts]
        return (
            self.frozen
            - bytes_of(weights)
            + held
            + max([bytes_of([w]) for w in weights], default=0)
        )

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def held(self) -> int:
        """Bytes of what is neither trained nor the backbone's: buffers, frozen parameters."""
        others = [*self.model.buffers(), *self.model.parameters()]
        apart = {id(p) for p in self.trained}
        if self.backbone is not None:
            apart |= {id(t) for t in (*self.backbone.parameters(), *self.backbone.buffers())}
        return bytes_of([t for t in others if id(t) not in apart])

    @property
    def vectors(self) -> int:
        """Bytes of the item vectors that a validation ranks by."""
        if not isinstance(self.model, Embedder):
            return 0
        with ShapesOnly():
            one: torch.Tensor = self.model.encode_items(np.zeros(1, dtype=np.int32))
        return self.model.n_items * bytes_of([one])


def _shapes(config: RunConfig, dataset: Dataset, split: Split, card: float) -> dict[str, Any]:
    """Say what a training takes by its shapes alone."""
    method = method_class(config.method)
    backbone, own = shape_backbone(config.backbone) if method.uses_backbone else (None, True)
    if backbone is not None and config.training.checkpointing:
        backbone.recompute()
    with torch.device("meta"), ShapesOnly():
        model = method(config.model, Catalog(dataset.warm_catalog), backbone, cache=None).to("meta")
        stages = model.stages(config.training.lr, config.training.weight_decay)
    patient = _Patient(config, split, backbone, model, stages)
    step_of = _Steps(patient)
    tokens = config.training.batch_tokens
    kinds = {"none": 0} if backbone is None else {_name(backbone.dtype): patient.frozen}
    if backbone is not None:
        kinds |= {"8-bit": patient.frozen_in("8bit"), "4-bit": patient.frozen_in("4bit")}
    trained = bytes_of(patient.trained)
    memory = []
    for kind, frozen in kinds.items():
        still = frozen + patient.held + patient.vectors + 3 * trained
        rows = {
            "weights": kind,
            "frozen": frozen,
            "trained_with_moments": 4 * trained,
            "buffers": patient.held,
            "item_vectors": patient.vectors,
        }
        if stages:
            rows |= _with_step(step_of, tokens, still, trained, int(card * (1 - SPARE)))
        memory.append(rows)
    frozen_count = 0 if backbone is None else sum(p.numel() for p in backbone.parameters())
    return {
        "tokens_are": "counted" if own else "estimated",
        "frozen_parameters": frozen_count,
        "trained_parameters": sum(p.numel() for p in patient.trained),
        "parts": parts_of(model),
        "memory": memory,
        "disk": _disk(patient, dataset),
        "stages": {s.name: _epoch(patient, s, step_of) for s in stages},
    }


def _with_step(
    step_of: Callable[[int], StepShape], tokens: int, still: int, trained: int, room: int
) -> dict[str, Any]:
    """Return the memory of the largest step, and the largest batch; nothing where it is unknown.

    still: bytes that stay from step to step, gradients not among them. trained: of the weights.
    """
    try:
        step = step_of(tokens)
        found = _largest_batch(step_of, tokens, room - still)
    except NumbersNeeded:
        return {}
    # Gradients are among what a step holds; the optimiser's own temporaries come after it.
    total = still + max(step.bytes, 2 * trained)
    shown = {"activations": total - still - trained, "total": total}
    return {**shown, "tokens": step.tokens, "fits": total <= room, **found}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Steps:
    """The step that takes most, by ``batch_tokens``: of the largest batch of any stage."""

    def __init__(self, patient: _Patient) -> None:
        self._patient = patient
        self._known: dict[int, StepShape] = {}
        self._by_batch: dict[tuple[str, bytes, bytes], StepShape] = {}

    def __call__(self, batch_tokens: int) -> StepShape:
        if batch_tokens not in self._known:
            self._known[batch_tokens] = self._take(batch_tokens)
        return self._known[batch_tokens]

    def _take(self, batch_tokens: int) -> StepShape:
        patient = self._patient
        steps = []
        for stage in patient.stages:
            batches = epoch_of(patient.config, patient.split, stage, batch_tokens)
            steps.append(self.of(stage, largest(patient.model, batches)[0]))
        return max(steps, key=lambda step: step.bytes)

    def of(self, stage: Stage, batch: Batch) -> StepShape:
        """Take a step on a batch, once."""
        patient = self._patient
        key = (stage.name, batch.users.tobytes(), batch.histories.values.tobytes())
        if key not in self._by_batch:
            patient.model.train()
            with gradients_only_for(patient.model, stage):
                self._by_batch[key] = step_shape(stage, batch)
        return self._by_batch[key]


def _largest_batch(step_of: Callable[[int], StepShape], tokens: int, room: int) -> dict[str, Any]:
    """Find the largest ``batch_tokens``, to about an eighth, whose step fits into ``room`` bytes.

    ``unlimited``: whatever it is, a step fits: ``batch_users`` or the data end the batches.
    """

    def fits(batch_tokens: int) -> bool:
        return step_of(batch_tokens).bytes <= room

    if fits(MOST):
        return {"largest_batch_tokens": None, "unlimited": True}
    low, high = tokens, MOST
    if fits(tokens):
        while low * 2 < MOST and fits(low * 2):
            low *= 2
        high = low * 2
    else:
        while not fits(low):
            if low <= LEAST:
                return {"largest_batch_tokens": None, "unlimited": False}
            low, high = low // 2, low
    while high - low > max(LEAST, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"largest_batch_tokens": low, "unlimited": False}


def _epoch(patient: _Patient, stage: Stage, step_of: _Steps) -> dict[str, Any]:
    """Count steps, tokens and operations of an epoch of a stage by those of its largest batch."""
    batches = epoch_of(patient.config, patient.split, stage)
    batch, costs = largest(patient.model, batches)
    try:
        step = step_of.of(stage, batch)
    except NumbersNeeded:
        return {"steps": len(batches)}
    share = float(costs.sum() / costs.max())
    return {
        "steps": len(batches),
        "tokens": round(step.tokens * share),
        "operations": step.operations * share,
        "seconds_on_a_card": step.operations * share / RATE,
    }


def _disk(patient: _Patient, dataset: Dataset) -> dict[str, int]:
    """Estimate the bytes of a run folder and of what is cached beside the data."""
    with ShapesOnly():
        tensors = list(trained_tensors(patient.model).values())
    weights, catalog = bytes_of(tensors), dataset.catalog.nbytes
    states = KEEP_STATES if patient.stages else 1
    moments = 2 * bytes_of(patient.trained)
    cached = 0 if patient.backbone is None else 4 * patient.backbone.dim * dataset.n_items
    ranks = RANKED_USER * len(patient.split.test)
    run = (2 + states) * weights + states * moments + patient.vectors + ranks + catalog
    return {"run": run + cached, "cache": cached}


def _course(config: RunConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Add how long the whole training takes at most: patience may end it before. The model is
    validated before its first step, too.
    """
    training = validations = 0.0
    options = config.training
    for stage in found["stages"].values():
        epochs = min(stage["epochs"], (options.max_steps or math.inf) / stage["steps_an_epoch"])
        training += epochs * stage["seconds_epoch"]
        validations += epochs / stage["eval_every"] if stage["validated"] else 0
    if options.max_minutes is not None and training:
        share = min(1.0, 60 * options.max_minutes / training)
        training, validations = share * training, share * validations
    seconds = training + (1 + validations) * found["seconds_validation"]
    return {**found, "seconds_at_most": found["seconds_reading"] + seconds}
