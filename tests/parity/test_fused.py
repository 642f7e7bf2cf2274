"""Experts on rows of fused matrices: the rows are those that Hugging Face reads, and the updates of
Eq. 3-5, written out, added to those rows alone.
"""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support import tiny
from tests.support.mixtures import literal
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from l2rec.errors import BackboneError
from l2rec.modules.adapters import find_linears, part_of, side_by_side
from l2rec.modules.backbone import Backbone
from l2rec.modules.experts import DPMoE, ViewSlice
from l2rec.modules.fused import Part, fused_parts
from l2rec.modules.lora import LoRA
from l2rec.modules.packing import Attend, Packing, pack

ALL = ("q", "k", "v", "o", "gate", "up", "down")
PLAIN, GATED, ATTENTION = ("q", "k", "v", "o", "up", "down"), ALL, ("q", "k", "v")
SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 24, "vocab_size": 40}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 4}
LATENT = {
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 4},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5},
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}
DISENTANGLED: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # name of the case: model type, shape, the parts that it has
    "gpt2": ("gpt2", GPT, PLAIN),
    "gpt_bigcode": ("gpt_bigcode", GPT | {"multi_query": True}, PLAIN),
    "gpt_bigcode-heads": ("gpt_bigcode", GPT | {"multi_query": False}, PLAIN),
    "gpt_neox": ("gpt_neox", SHAPE, PLAIN),
    "persimmon": ("persimmon", SHAPE | {"qk_layernorm": False}, PLAIN),
    "bloom": ("bloom", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4}, PLAIN),
    "falcon-heads": ("falcon", SHAPE | {"multi_query": False}, PLAIN),
    "falcon-7b": ("falcon", SHAPE | {"multi_query": True, "bias": True}, PLAIN),
    "falcon-40b": ("falcon", SHAPE | {"new_decoder_architecture": True, "num_kv_heads": 2}, PLAIN),
    "falcon-alibi": ("falcon", SHAPE | {"alibi": True, "multi_query": False}, PLAIN),
    "mpt": ("mpt", {"vocab_size": 40, "d_model": 16, "n_heads": 4, "n_layers": 2}, PLAIN),
    "gpt": ("openai-gpt", GPT, PLAIN),
    "gptj": ("gptj", GPT | {"rotary_dim": 2}, PLAIN),
    "gpt_neox_japanese": ("gpt_neox_japanese", SHAPE | {"intermediate_multiple_size": 2}, PLAIN),
    "deberta": ("deberta", SHAPE | DISENTANGLED, PLAIN),
    "deberta-v3": (
        "deberta-v2",
        SHAPE | DISENTANGLED | {"share_att_key": True, "position_buckets": 4},
        PLAIN,
    ),
    "electra-narrow": ("electra", SHAPE | {"embedding_size": 8}, PLAIN),
    "albert-narrow": ("albert", SHAPE | {"embedding_size": 8}, PLAIN),
    "phi3": ("phi3", SHAPE | {"num_key_value_heads": 2}, GATED),
    "glm": ("glm", SHAPE | {"num_key_value_heads": 2, "head_dim": 4}, GATED),
    "glm4": ("glm4", SHAPE | {"num_key_value_heads": 2, "head_dim": 4}, GATED),
    "glm4v_text": ("glm4v_text", SHAPE | {"num_key_value_heads": 2} | ROPE, GATED),
    "glm_ocr_text": (
        "glm_ocr_text",
        SHAPE | {"num_key_value_heads": 2, "head_dim": 4} | ROPE,
        GATED,
    ),
    "dbrx": (
        "dbrx",
        {
            **{"vocab_size": 40, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
        ("q", "k", "v", "o"),
    ),
    "jetmoe": (
        "jetmoe",
        SHAPE | EXPERTS | {"num_key_value_heads": 2, "kv_channels": 4, "num_local_experts": 4},
        ("k", "v"),
    ),
    "modernbert": ("modernbert", SHAPE, GATED),
    "modernbert-decoder": ("modernbert-decoder", SHAPE, GATED),
    "bert": ("bert", SHAPE, PLAIN),
    "electra": ("electra", SHAPE | {"embedding_size": 16}, PLAIN),
    "albert": ("albert", SHAPE | {"embedding_size": 16}, PLAIN),
    "opt": ("opt", SHAPE | {"ffn_dim": 24, "word_embed_proj_dim": 16}, PLAIN),
    "phi": ("phi", SHAPE, PLAIN),
    "ctrl": ("ctrl", GPT | {"dff": 24}, ("q", "k", "v", "o")),
    "starcoder2": ("starcoder2", SHAPE | {"num_key_value_heads": 2}, PLAIN),
    "mpnet": ("mpnet", SHAPE, PLAIN),
    "mixtral": ("mixtral", SHAPE | {"num_key_value_heads": 2}, ("q", "k", "v", "o")),
    "qwen2_moe": ("qwen2_moe", SHAPE | EXPERTS | {"num_experts": 4}, GATED),
    "qwen3_moe": (
        "qwen3_moe",
        SHAPE | EXPERTS | {"num_experts": 4, "num_key_value_heads": 2, "head_dim": 4},
        ("q", "k", "v", "o"),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        SHAPE | EXPERTS | LATENT,
        GATED,
    ),
    "olmoe": ("olmoe", SHAPE | EXPERTS | {"num_experts": 4}, ("q", "k", "v", "o")),
}
FUSED = [
    *("deberta", "gpt", "gpt_neox_japanese"),
    *("gpt2", "gpt_bigcode", "gpt_bigcode-heads", "gpt_neox", "persimmon", "bloom"),
    *("falcon-heads", "falcon-7b", "falcon-40b", "mpt", "phi3", "modernbert", "dbrx", "jetmoe"),
]
"""Families with q, k and v in one matrix."""
GATES = ("phi3", "glm", "glm4", "glm4v_text", "glm_ocr_text", "modernbert", "modernbert-decoder")
"""Families with gate and up in one matrix."""
LED = [
    *("bloom", "falcon-heads", "falcon-7b", "falcon-40b", "falcon-alibi", "mpt", "gpt", "gptj"),
    *("gpt_neox_japanese", "deberta", "deberta-v3"),
]
"""Families whose attention is led to the packed one by hand."""
OWN_SPLIT: dict[str, Any] = {
    "bloom": lambda owner, y: owner._reshape(y),
    "falcon": lambda owner, y: owner._split_heads(y),
    "mpt": lambda _, y: y.chunk(3, dim=2),  # in its forward
    "deberta": lambda owner, y: owner.transpose_for_scores(y).chunk(3, dim=-1),  # too
}
"""Model types that take no attention functions: how they take the matrix apart."""


def model_of(case: str) -> nn.Module:
    """Draw a tiny model of the real class, float64; no two weights are alike, biases included."""
    kind, shape, _ = FAMILIES[case]
    torch.manual_seed(0)
    model: nn.Module = AutoModel.from_config(
        AutoConfig.for_model(kind, **shape),
        attn_implementation="sdpa" if kind == "falcon" else "eager",
        experts_implementation="eager",
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def states(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids[None]).last_hidden_state
    return out[0]


def read_by_the_model(case: str, model: nn.Module, module: nn.Module) -> dict[str, Tensor]:
    """Return which rows of a fused module its model reads as q, k and v: [d_out] of each.

    A single token stands at position 0, where rotation changes nothing: what the attention function
    is given are rows of the module's output. Models without such functions are asked themselves.
    """
    seen: dict[str, Any] = {}
    kind = FAMILIES[case][0]
    [owner] = [m for m in model.modules() if module in m.children()]
    rows = len(Part.whole(module).weight)
    if kind in OWN_SPLIT:
        numbers = torch.arange(rows, dtype=torch.float64)[None, None]
        parts = OWN_SPLIT[kind](owner, numbers)
        return {p: x.flatten().unique().long() for p, x in zip(ATTENTION, parts, strict=True)}

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        if module is owner:
            seen.update(q=q.flatten(), k=k.flatten(), v=v.flatten())
        heads = q.shape[1] // v.shape[1]
        return v.repeat_interleave(heads, dim=1).transpose(1, 2), None

    handle = module.register_forward_hook(lambda _, x, y: seen.update(y=y.flatten()))
    if hasattr(owner, "_attn"):  # a method instead of a function
        plain = owner._attn
        owner._attn = lambda q, k, v, *rest: attention(owner, q, k, v) and plain(q, k, v, *rest)
        states(model, torch.tensor([7]))
        del owner._attn
    else:
        AttentionInterface.register("tested", attention)
        model.set_attn_implementation("tested")
        states(model, torch.tensor([7]))
        model.set_attn_implementation("eager")
    handle.remove()
    read = {}
    latent = kind == "deepseek_v3"  # queries are of another matrix, and rotary places of keys
    for part in [p for p in ATTENTION[latent:] if p in FAMILIES[case][2]]:
        gap, row = (seen[part][:, None] - seen["y"]).abs().min(1)
        if latent:
            gap, row = gap[gap < 1e-6], row[gap < 1e-6]
            assert len(row) == 4 * {"k": 6, "v": 5}[part]
        assert gap.max() < 1e-6, part  # some rotate in float32
        read[part] = torch.tensor(list(dict.fromkeys(row.tolist())))  # JetMoE repeats keys
    return read


@pytest.mark.parametrize("case", FUSED)
def test_rows_are_those_that_the_model_reads(case: str) -> None:
    model = model_of(case)
    parts = [part for part in FAMILIES[case][2] if part in ATTENTION]
    found = find_linears(model, parts)
    assert len(found) == len(parts) * 2
    for name, part in found.items():
        assert isinstance(part, Part)
        read = read_by_the_model(case, model, part.module)[name.rpartition(".")[2]]
        ours = part.of(torch.arange(len(part.weight))[None])[0]
        assert ours.tolist() == read.tolist()
        assert len(ours) == part.out_features


@pytest.mark.parametrize("case", GATES)
def test_the_gate_is_what_is_activated(case: str) -> None:
    model = model_of(case)
    seen: dict[str, Tensor] = {}
    for name, part in find_linears(model, ("gate",)).items():
        assert isinstance(part, Part)
        [mlp] = [m for m in model.modules() if part.module in m.children()]
        act = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act
        act.register_forward_hook(lambda _, x, y: seen.update(gate=x[0]))
        part.module.register_forward_hook(lambda _, x, y: seen.update(y=y))
        states(model, torch.tensor([7, 3]))
        assert torch.equal(part.of(seen["y"][0]), seen["gate"][0]), name


def rows_of(case: str, model: nn.Module, moe: DPMoE) -> list[Tensor]:
    """Return the rows of every adapted matrix in the output of its module, as the model reads them.

    Halves of [gate | up] are written out.
    """
    rows = []
    for name, part in zip(moe.names, moe._parts, strict=True):
        last, every = name.rpartition(".")[2], torch.arange(len(part.weight))
        if part.is_whole:
            rows.append(every)
        elif last in ("gate", "up"):
            rows.append(every.chunk(2)[last == "up"])
        else:
            rows.append(read_by_the_model(case, model, part.module)[last])
    return rows


def with_experts(case: str) -> tuple[Any, Any, DPMoE]:
    """Build a model, a copy of it that stays as it is, and experts for every part it has."""
    model = model_of(case)
    untouched = copy.deepcopy(model)
    linears = find_linears(model, FAMILIES[case][2])
    moe = DPMoE(linears, 5, view_experts=3, rank=2, alpha=3.0, top=2, width=3).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, untouched, moe


def two_views() -> tuple[list[torch.Tensor], list[ViewSlice]]:
    """Draw two users for each of two views, and route five tokens by them."""
    us = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    users = (torch.tensor([0, 1, 1]), torch.tensor([0, 1]))
    return us, [ViewSlice(0, 0, 3, us[0], users[0]), ViewSlice(1, 3, 5, us[1], users[1])]


@pytest.mark.parametrize("case", [case for case in FAMILIES if case != "deberta-v3"])
def test_experts_on_rows_are_eq_3_to_5(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare outputs and all gradients; two views, float64, every part that the family has."""
    monkeypatch.setattr("tests.parity.test_experts.WIDTH", 3)
    model, untouched, moe = with_experts(case)
    assert {part_of(name) or name.rpartition(".")[2] for name in moe.names} == set(
        FAMILIES[case][2]
    )
    us, slices = two_views()
    literal(untouched, moe, rows_of(case, model, moe), slices)
    ids = torch.tensor([7, 3, 11, 7, 20])
    bare = states(model, ids)
    moe.attach()
    with moe.routed(slices) as routing:
        ours = states(model, ids)
    assert not routing.ready
    assert torch.equal(states(model, ids), bare), "outside of routed() nothing is adapted"
    theirs = states(untouched, ids)
    moe.detach()
    assert torch.equal(states(model, ids), bare)
    assert (ours - bare).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    leaves = [*moe.parameters(), *us]
    grads, expected = (
        torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in (ours, theirs)
    )
    for mine, other, leaf in zip(grads, expected, leaves, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if mine is None else mine, zero if other is None else other, rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize("case", LED)
def test_experts_in_led_attention_are_eq_3_to_5(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a packed row with the row alone, in Hugging Face's code with Eq. 3-5 hooked in."""
    monkeypatch.setattr("tests.parity.test_experts.WIDTH", 3)
    model, untouched, moe = with_experts(case)
    us, slices = two_views()
    literal(untouched, moe, rows_of(case, model, moe), slices)
    ids = torch.tensor([7, 3, 11, 7, 20])
    backbone = Backbone(model, tiny.tokenizer(), name=case, source="", revision=None)
    group, positions = pack(torch.tensor([5]), Attend.CAUSAL if backbone.causal else Attend.FULL)
    moe.attach()
    with moe.routed(slices):
        ours = backbone(backbone.embed(ids), Packing((group,), positions))
    theirs = states(untouched, ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # some rotate in float32
    weight = torch.randn(ours.shape, dtype=torch.float64)
    grads, expected = (
        torch.autograd.grad((y * weight).sum(), us, allow_unused=True) for y in (ours, theirs)
    )
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", FUSED)
def test_lora_on_rows_is_that_of_merged_weights(case: str) -> None:
    model = model_of(case)
    merged = copy.deepcopy(model)
    lora = LoRA(find_linears(model, FAMILIES[case][2]), rank=2, alpha=3.0).double()
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    modules = dict(merged.named_modules())
    for name, part, a, b in zip(lora.names, lora._parts, lora.a, lora.b, strict=True):
        module = modules[name] if name in modules else modules[name.rpartition(".")[0]]
        rows = part.of(torch.arange(len(part.weight))[None])[0]
        Part.whole(module).weight.data[rows] += 3.0 / 2 * b @ a
    lora.attach()
    ids = torch.tensor([7, 3, 11])
    with lora.enabled():
        torch.testing.assert_close(states(model, ids), states(merged, ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "phi3", "modernbert"])
def test_untrained_experts_leave_a_packed_backbone_as_it_is(case: str) -> None:
    """Rows attend side by side, in float32; q and v share a module with a k that is frozen."""
    backbone = Backbone(
        model_of(case).float(), tiny.tokenizer(), name=case, source="", revision=None
    )
    moe = DPMoE(find_linears(backbone.model, ("q", "v")), 5, view_experts=3, rank=2)
    moe.attach()
    lengths = torch.tensor([3, 1])
    group, positions = pack(lengths, Attend.CAUSAL if backbone.causal else Attend.FULL)
    packing, x = Packing((group,), positions), backbone.embed(torch.tensor([7, 3, 11, 9]))
    user = torch.repeat_interleave(torch.arange(2), lengths)
    with moe.routed([ViewSlice(0, 0, 4, torch.randn(2, 5), user)]) as routing:
        inside = backbone(x, packing)
    assert torch.equal(inside, backbone(x, packing))
    assert len(routing.balance[0]) == 4
    one, where = pack(torch.tensor([1]), Attend.CAUSAL if backbone.causal else Attend.FULL)
    with moe.routed([ViewSlice(0, 0, 1, torch.randn(1, 5), torch.tensor([0]))]):
        assert backbone(x[:1], Packing((one,), where)).shape == (1, 16)


def test_names_and_groups_of_parts() -> None:
    found = find_linears(model_of("gpt2"), PLAIN)
    assert list(found)[:6] == [
        *("h.0.attn.c_attn.q", "h.0.attn.c_attn.k", "h.0.attn.c_attn.v"),
        *("h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"),
    ]
    assert side_by_side(found)[:4] == [[0, 1, 2], [3], [4], [5]]
    phi = find_linears(model_of("phi3"), ("v", "up", "q", "gate"))
    assert [name.rpartition(".")[2] for name in phi] == ["q", "v", "gate", "up"] * 2
    assert side_by_side(phi) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_what_is_missing_is_named_with_what_there_is() -> None:
    with pytest.raises(
        BackboneError,
        match=r"^the backbone \(gpt2\) has no 'gate' matrix, but q k v o up down; change",
    ):
        find_linears(model_of("gpt2"), ("q", "gate"))
    with pytest.raises(
        BackboneError,
        match=r"\(mixtral\) has no 'up' matrix, but q k v o \(its routed experts cannot be adapted",
    ):
        find_linears(model_of("mixtral"), ("up",))
    with pytest.raises(BackboneError, match=r"has no 'q' matrix, but none of them; change"):
        find_linears(nn.ModuleDict({"other": nn.Linear(2, 2)}), ("q",))


def test_a_mixture_of_experts_says_what_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        find_linears(model_of("phi3"), ("q", "up"))
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        find_linears(model_of("qwen2_moe"), ("q", "up"))
    assert caplog.messages == [
        "note: the backbone (qwen2_moe) is a mixture of experts: adapted are 2 q, 2 up, in "
        "attention, dense layers and shared experts; its routed experts are left out"
    ]


def test_the_packed_matrix_of_baichuan_is_three_in_a_row() -> None:
    """Its own code: ``proj.unflatten(-1, (3, D))`` and then q, k, v = proj[0], proj[1], proj[2]."""
    packed = nn.Linear(16, 48, bias=False)
    config = SimpleNamespace(model_type="baichuan", num_attention_heads=4)
    y = torch.randn(5, 48)
    parts = fused_parts(config, "layers.0.self_attn.W_pack", packed)
    for i, part in enumerate(("q", "k", "v")):
        assert torch.equal(parts[part].of(y), y.unflatten(-1, (3, 16))[:, i])


def test_a_layout_that_is_not_known_is_no_part() -> None:
    config = AutoConfig.for_model("codegen")
    assert fused_parts(config, "h.0.attn.qkv_proj", nn.Linear(4, 12)) == {}
    assert fused_parts(None, "h.0.attn.c_attn", nn.Linear(4, 12)) == {}
    assert fused_parts(config, "h.0.attn.out_proj", nn.Linear(4, 4)) == {}
    neox = AutoConfig.for_model("gpt_neox", **SHAPE)
    with pytest.raises(
        BackboneError, match=r"13 rows in a\.query_key_value, which are not 4 times"
    ):
        fused_parts(neox, "a.query_key_value", nn.Linear(4, 13))


def test_cross_attention_is_never_run_and_never_found() -> None:
    config = AutoConfig.for_model("bert", **SHAPE, is_decoder=True, add_cross_attention=True)
    found = find_linears(AutoModel.from_config(config), PLAIN)
    assert len(found) == 2 * 6
    assert not any("cross" in name for name in found)
