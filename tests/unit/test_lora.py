"""LoRA is its formula, only where it is asked for; and the output layer over the word matrix."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.support import tiny
from torch import nn
from transformers import AutoModelForCausalLM

from l2rec.errors import BackboneError
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Backbone
from l2rec.modules.lora import LoRA
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.words import WordHead, mask_token

LENGTHS = torch.tensor([5, 3, 4])


def states(backbone: Backbone, x: torch.Tensor) -> torch.Tensor:
    group, positions = pack(LENGTHS, Attend.CAUSAL if backbone.causal else Attend.FULL)
    return backbone(x, Packing((group,), positions))


def adapted(backbone: Backbone, **options: float) -> LoRA:
    lora = LoRA(find_linears(backbone.model, ("q", "v")), rank=3, alpha=6.0, **options)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    lora.attach()
    return lora


def test_ranks_are_weighed_by_token_or_by_row() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 5)
    lora = LoRA({"layer.q_proj": linear}, rank=3, alpha=6.0)
    nn.init.normal_(lora.b[0])
    lora.attach()
    x, weights = torch.randn(2, 7, 4), torch.rand(2, 3)
    plain = linear(x)
    expected = torch.stack(
        [
            row + 2.0 * u @ (lora.b[0] * w @ lora.a[0]).T
            for row, u, w in zip(plain, x, weights, strict=True)
        ]
    )
    of_tokens = weights.repeat_interleave(7, dim=0)
    for given, shape in ((weights, x), (weights, x.flatten(0, 1)), (of_tokens, x.view(1, 14, 4))):
        with lora.enabled(given):
            torch.testing.assert_close(linear(shape), expected.reshape(*shape.shape[:-1], 5))


@pytest.mark.parametrize(("family", "count"), [("bert", 6), ("qwen3", 7)])
def test_all_matrices_of_a_block_may_be_asked_for(family: str, count: int) -> None:
    model = tiny.random_model(family)
    assert len(find_linears(model, None)) == 2 * count, "two blocks"


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_the_update_is_that_of_merged_weights(family: str) -> None:
    torch.manual_seed(0)
    backbone = tiny.random_backbone(family)
    merged = copy.deepcopy(backbone)
    lora = adapted(backbone)
    for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
        merged.model.get_submodule(name).weight.data += 6.0 / 3 * b @ a
    x = torch.randn(12, 32)
    bare = states(backbone, x)
    with lora.enabled():
        inside = states(backbone, x)
        with lora.enabled():
            pass
        assert torch.equal(states(backbone, x), inside), "an inner context switches nothing off"
    torch.testing.assert_close(inside, states(merged, x), rtol=0, atol=1e-5)
    assert not torch.allclose(inside, bare, atol=1e-3)
    assert torch.equal(states(backbone, x), bare), "outside of the context it is the frozen one"
    lora.detach()
    with lora.enabled():
        assert torch.equal(states(backbone, x), bare)
    lora.attach()
    lora.attach()
    with lora.enabled():
        assert torch.equal(states(backbone, x), inside), "attached once"


def test_untrained_it_changes_nothing_and_only_it_is_trained() -> None:
    backbone = tiny.random_backbone()
    lora = LoRA(find_linears(backbone.model, ("q", "v")), rank=2)
    lora.attach()
    x = torch.randn(12, 32)
    with lora.enabled():
        out = states(backbone, x)
    assert torch.equal(out, states(backbone, x))
    out.sum().backward()
    assert all(b.grad is not None and bool(b.grad.any()) for b in lora.b)
    assert all(p.grad is None for p in backbone.parameters())
    assert not any(name.startswith("_") for name, _ in lora.named_parameters())


def test_dropout_is_for_training_alone() -> None:
    torch.manual_seed(0)
    backbone = tiny.random_backbone()
    lora = adapted(backbone, dropout=0.5)
    x = torch.randn(12, 32)
    with lora.enabled():
        lora.train()
        assert not torch.equal(states(backbone, x), states(backbone, x))
        lora.eval()
        assert torch.equal(states(backbone, x), states(backbone, x))


def test_two_of_them_on_one_backbone() -> None:
    torch.manual_seed(0)
    backbone = tiny.random_backbone()
    first, second = adapted(backbone), adapted(backbone)
    x = torch.randn(12, 32)
    with first.enabled():
        a = states(backbone, x)
    with second.enabled():
        b = states(backbone, x)
    with first.enabled(), second.enabled():
        both = states(backbone, x)
    assert not torch.allclose(a, b) and not torch.allclose(both, a) and not torch.allclose(both, b)


# ------------------------------------------------------------------------------- words


def test_a_tied_causal_backbone_is_its_own_head() -> None:
    config = tiny.qwen3_config(tie_word_embeddings=True, initializer_range=0.2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    backbone = Backbone(
        copy.deepcopy(model.model), tiny.tokenizer("qwen"), name="", source="", revision=None
    )
    head = WordHead(backbone, np.zeros(0, dtype=np.int32))
    assert not list(head.parameters())
    ids = torch.randint(config.vocab_size, (1, 7))
    expected = model(ids).logits[0]
    group, positions = pack(torch.tensor([7]), Attend.CAUSAL)
    out = backbone(backbone.embed(ids[0]), Packing((group,), positions))
    matrix = backbone.word_embeddings.weight
    torch.testing.assert_close(head(out, matrix), expected, rtol=0, atol=1e-4)
    some = torch.tensor([3, 11])
    torch.testing.assert_close(head(out, matrix, some), expected[:, some], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_any_other_has_a_trained_map(family: str) -> None:
    """Tiny Qwen 3 does not tie its output layer."""
    torch.manual_seed(0)
    backbone = tiny.random_backbone(family)
    head, matrix = (
        WordHead(backbone, np.array([7, 7, 9], dtype=np.int32)),
        (backbone.word_embeddings.weight),
    )
    share = (torch.bincount(torch.tensor([7, 7, 9]), minlength=len(matrix)) + 0.1).double()
    torch.testing.assert_close(head.bias.double(), (share / share.sum()).log())
    x = torch.randn(4, 32)
    torch.testing.assert_close(head(x, matrix), x @ matrix.T + head.bias)
    nn.init.normal_(head.transform.weight)
    y = x @ head.transform.weight.T @ matrix.T + head.bias
    torch.testing.assert_close(head(x, matrix), y)
    some = torch.tensor([9, 2])
    torch.testing.assert_close(head(x, matrix, some), y[:, some])


def test_what_stands_for_a_hidden_word() -> None:
    backbone = tiny.random_backbone()
    assert mask_token(backbone) == tiny.VOCABULARY.index("[UNK]")
    backbone.tokenizer.mask_token = "red"
    assert mask_token(backbone) == tiny.VOCABULARY.index("red")
    backbone.tokenizer.mask_token = backbone.tokenizer.unk_token = None
    with pytest.raises(BackboneError, match="no mask token to hide words behind"):
        mask_token(backbone)
