"""A frozen backbone divided among the processes that train together: FSDP2, layer by layer.

What does not fit a card is the backbone, which no process changes. Each process keeps its part of
every matrix; a block of a layer (attention, MLP) is put together when it runs, forwards and
backwards, and taken apart again. What is trained stands beside it, whole in every process, and is
averaged as ever (`l2rec.runs.launch`): a checkpoint is that of one process.

Putting together is done by all processes at once, so all make as many passes, of the same layers:
`processes.Lockstep`. Word vectors and norms stay whole.
"""

from __future__ import annotations

__all__ = ["shard", "weights_here"]

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from l2rec.errors import BackboneError
from l2rec.modules.backbone import Backbone
from l2rec.modules.fused import is_matrix
from l2rec.modules.layers import layers_of
from l2rec.modules.probe import call_order
from l2rec.modules.processes import World


def shard(backbone: Backbone, world: World, device: torch.device) -> None:
    """Divide the layers of a backbone among the processes of a training, in place.

    backbone: whole, in the memory of the processor. device: where each process has its part.

    Raises:
        BackboneError: it is quantised, its layers are not to be found, or a block runs twice.
    """
    if backbone.quantized != "none":
        raise BackboneError(
            f"backbone.quantize={backbone.quantized} cannot be divided; set training.shard=false, "
            "or backbone.quantize=none"
        )
    layers = list(layers_of(backbone.model)[1])
    blocks = _blocks(backbone, layers)
    backbone.known_hash = backbone.weight_hash()
    assert world.lockstep is not None
    mesh = DeviceMesh.from_group(world.lockstep.group, device.type)
    for block in chain.from_iterable(blocks):
        divided: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # Once outside of inference mode, whose tensors no gradient passes: they are used again.
        divided.unshard()
        divided.reshard()
    backbone.to(device)
    kinds = [(0, len(layers))]
    kinds += [part for k in range(1, len(layers)) for part in ((0, k), (k, len(layers)))]
    first = world.lockstep.add(
        [partial(_take_part, list(chain.from_iterable(blocks[a:b]))) for a, b in kinds]
    )
    number = {kind: first + place for place, kind in enumerate(kinds)}
    begin: Callable[[int], None] = world.lockstep.begin

    def before_pass(start: int, stop: int) -> None:
        begin(number[start, len(layers) if stop < 0 else stop])

    backbone.before_pass = before_pass


def weights_here(backbone: Backbone) -> int:
    """Count the frozen weights that this process holds."""
    held = [getattr(p, "to_local", lambda p=p: p)() for p in backbone.parameters()]
    return sum(p.numel() for p in held)


def _blocks(backbone: Backbone, layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Return the parts of each layer that hold matrices, in the order of a pass."""
    found = [[child for child in _children(layer) if _has_matrix(child)] for layer in layers]
    called = call_order(backbone, list(chain.from_iterable(found)))
    place = {block: number for number, block in enumerate(called)}
    if len(place) < len(called):
        raise BackboneError(
            f"backbone {backbone.name!r} runs a block of its layers twice, which cannot be "
            "divided; set training.shard=false"
        )
    return [sorted((b for b in of if b in place), key=place.__getitem__) for of in found]


def _children(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer, those of its lists one by one."""
    children: list[nn.Module] = []
    for child in layer.children():
        children += _children(child) if isinstance(child, nn.ModuleList) else [child]
    return children


def _has_matrix(module: nn.Module) -> bool:
    return any(is_matrix(part) for part in module.modules())


def _take_part(blocks: Sequence[Any]) -> None:
    """Put blocks together for those who run them."""
    for block in blocks:
        block.unshard()
        block.reshard()
