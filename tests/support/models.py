"""What tests do to the model of any method: build it, shake it, take its batches."""

from __future__ import annotations

from typing import Any

import torch

from l2rec.data.batches import Batch
from l2rec.data.catalog import Catalog
from l2rec.data.ragged import Ragged
from l2rec.modules.backbone import Backbone


def build(
    method: Any,
    options: dict[str, Any],
    catalog: Catalog,
    backbone: Backbone | None = None,
    *,
    seed: int = 0,
    **given: Any,
) -> Any:
    """Return a model of `method` with these options, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    return method(method.Config(**options), catalog, backbone, **given)


def shaken(model: Any, scale: float = 0.1, seed: int = 1, *, still: tuple[str, ...] = ()) -> Any:
    """Move every parameter away from its neutral start, as training would; evaluation mode.

    Parameters whose names begin with one of `still` stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(still):
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def batches_of(source: Any, sequences: Ragged, **changes: int) -> list[Batch]:
    """Return the batches of one epoch of a stage or of a model's only one; a few users fit in one.

    `changes`: other values of `seed`, `epoch`, `batch_users` and `batch_tokens`.
    """
    sizes = {"seed": 0, "epoch": 0, "batch_users": 99, "batch_tokens": 10**6} | changes
    epoch_batches = source.batches(sequences, **sizes)
    batches = list(epoch_batches.iterate())
    assert len(epoch_batches) == len(batches) >= 1
    return batches


def one_batch(model: Any, sequences: Ragged, stage: int | None = None) -> Batch:
    """Return the one batch of an epoch over a few sequences.

    Without `stage`, the model has to have a single stage.
    """
    stages = model.stages(1e-3, 0.0)
    if stage is None:
        assert len(stages) == 1
    (batch,) = batches_of(stages[stage or 0], sequences)
    return batch
