"""Gradient checkpointing changes neither the loss nor any gradient, and keeps less."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel

from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Backbone
from l2rec.modules.experts import DPMoE, ViewSlice
from l2rec.modules.lora import LoRA
from l2rec.modules.packing import Attend, Packing, pack

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # name: shape, adapted matrices
    "bert": (SHAPE, ("q", "v", "up")),
    "llama": (SHAPE | {"num_key_value_heads": 2}, ("q", "v", "gate", "down")),
    "phi3": (SHAPE | {"num_key_value_heads": 2, "pad_token_id": 0}, ("q", "v", "up")),
    "gpt2": ({"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4}, ("q", "k", "down")),
    "albert": (SHAPE | {"embedding_size": 32}, ("q", "v", "up")),  # one block, called three times
    "mpnet": (SHAPE, ("q", "k", "o")),
    "t5": (T5, ("q", "v", "o", "down")),
    "nemotron": (SHAPE | {"num_key_value_heads": 2}, ("q", "v", "down")),
}


def backbone_of(family: str) -> Backbone:
    torch.manual_seed(0)
    model: nn.Module = AutoModel.from_config(CONFIG_MAPPING[family](**FAMILIES[family][0]))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return Backbone(model, None, name=family, source="random", revision=None)


class Setting:
    """A backbone with attached experts, and a batch of two views."""

    def __init__(self, family: str) -> None:
        self.backbone = backbone_of(family)
        linears = find_linears(self.backbone.model, FAMILIES[family][1])
        self.moe = DPMoE(linears, 32, view_experts=4, rank=2, width=3)
        self.moe.attach()
        torch.manual_seed(1)
        for parameter in self.moe.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.x = torch.randn(17, 32, requires_grad=True)
        self.u = torch.randn(3, 32, requires_grad=True)
        self.goal = torch.randn(17, 32)
        full = Attend.CAUSAL if self.backbone.causal else Attend.FULL
        groups, places = [], []
        for lengths, start in (([5, 2, 4], 0), ([1, 3, 2], 11)):
            group, positions = pack(torch.tensor(lengths), full, start=start)
            groups.append(group)
            places.append(positions)
        self.packing = Packing(tuple(groups), torch.cat(places))
        self.users = [
            torch.repeat_interleave(torch.arange(3), torch.tensor(n))
            for n in ([5, 2, 4], [1, 3, 2])
        ]

    def loss(self) -> Tensor:
        """Run a pass; the load balance of all routers is in the loss."""
        slices = [
            ViewSlice(0, 0, 11, self.u, self.users[0]),
            ViewSlice(1, 11, 17, self.u * 2, self.users[1]),
        ]
        self.held = weakref.ref(slices[1].u)
        with self.moe.routed(slices) as routing:
            states = self.backbone(self.x, self.packing)
        return (states * self.goal).sum() + sum(t.sum() for t in routing.balance.values())

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.moe.parameters(), self.x, self.u]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_to_the_bit(family: str) -> None:
    setting = Setting(family)
    loss = setting.loss()
    expected = torch.autograd.grad(loss, setting.leaves)
    setting.backbone.recompute()
    with torch.no_grad():
        # Another kernel of attention.
        torch.testing.assert_close(setting.loss(), loss, rtol=1e-4, atol=1e-4)
    again = setting.loss()
    assert torch.equal(again, loss)
    found = torch.autograd.grad(again, setting.leaves)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert all(g.abs().max() > 0 for g in expected)


def test_a_backward_may_be_taken_twice_and_in_another_order() -> None:
    setting = Setting("bert")
    expected = torch.autograd.grad(setting.loss(), setting.leaves)
    setting.backbone.recompute()
    one, other = setting.loss(), setting.loss()
    for loss, keep in ((one, True), (other, False), (one, False)):
        found = torch.autograd.grad(loss, setting.leaves, retain_graph=keep)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_lora_and_its_dropout_are_the_same() -> None:
    backbone = backbone_of("llama")
    lora = LoRA(find_linears(backbone.model, ("q", "up")), rank=2, dropout=0.5)
    lora.attach()
    for b in lora.b:
        nn.init.normal_(b)
    x = torch.randn(9, 32, requires_grad=True)
    group, positions = pack(torch.tensor([4, 5]), Attend.CAUSAL)

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        with lora.enabled():
            states = backbone(x, Packing((group,), positions))
        return torch.autograd.grad(states.square().sum(), [*lora.parameters(), x])

    expected = gradients()
    backbone.recompute()
    for mine, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_backward_keeps_less(family: str) -> None:
    setting = Setting(family)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack_(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_, lambda tensor: tensor):
            loss = setting.loss()
        del loss
        return sum(sizes.values())

    before = kept()
    setting.backbone.recompute()
    assert kept() < before / 2


def test_a_pass_without_a_backward_is_freed() -> None:
    setting = Setting("bert")
    setting.backbone.recompute()
    loss = setting.loss()
    assert setting.held() is not None
    del loss
    gc.collect()
    assert setting.held() is None
