"""Backbones in 8 and 4 bits: products with W as it is given back, literally, and what loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import tiny
from tests.support.errors import one_line
from tests.support.mixtures import RANK, WIDTH, literal
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, BitsAndBytesConfig

from l2rec.config import BackboneConfig, resolve
from l2rec.errors import BackboneError, ConfigError
from l2rec.modules import quantized
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Backbone, load_backbone
from l2rec.modules.experts import DPMoE, ViewSlice
from l2rec.modules.fused import Part, is_matrix
from l2rec.modules.lora import LoRA
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.modules.quantized import QuantizedLinear, bits_of, held_bytes

SHAPE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # model type: shape, adapted matrices
    "bert": (SHAPE, ("q", "k", "up", "down")),
    "llama": (GROUPED, ("q", "v", "o", "gate", "up")),
    "phi3": (GROUPED, ("q", "v", "up", "down")),
    "gpt2": ({"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4}, ("q", "v", "up")),
    "t5": (
        {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        ("q", "v", "up"),
    ),
}
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
NF4 += (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
NF4 += (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 += (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def saved(folder: Path, family: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**FAMILIES[family][0] | changes)
    model: nn.Module = AutoModel.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny.tokenizer("qwen").save_pretrained(folder)
    return folder


def load(folder: Path, quantize: Any = "none", dtype: Any = "float32") -> Backbone:
    return load_backbone(BackboneConfig(name=str(folder), quantize=quantize, dtype=dtype))


def held(backbone: Backbone) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in backbone.model.named_modules() if isinstance(m, QuantizedLinear)}


def by_hand(module: QuantizedLinear) -> Tensor:
    """Give W back weight by weight, float64."""
    rows, columns = module.out_features, module.in_features
    w = torch.zeros(rows, columns, dtype=torch.float64)
    scales = module.scales.double()
    for i in range(rows):
        for j in range(columns):
            if module.bits == "8bit":
                w[i, j] = int(module.codes[i, j]) * scales[i]
            else:
                place = i * columns + j
                byte = int(module.codes.flatten()[place // 2])
                w[i, j] = NF4[byte % 16 if place % 2 else byte // 16] * scales[place // 64]
    return w


def twin(folder: Path, backbone: Backbone) -> nn.Module:
    """Load the plain model in float64 and give it the matrices of the quantised one."""
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    modules = dict(model.eval().requires_grad_(False).named_modules())
    left = {n for n, m in modules.items() if is_matrix(m)} - held(backbone).keys()
    assert all(name.endswith(".wo") for name in left)  # T5's, which Hugging Face leaves in float32
    for name, module in held(backbone).items():
        Part.whole(modules[name]).weight.data.copy_(module.matrix(torch.float32))
    plain: nn.Module = model
    return plain


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_matrices_are_near_and_given_back_as_the_format_says(bits: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, "bert")
    plain, backbone = load(folder), load(folder, bits)
    assert backbone.quantized == bits and plain.quantized == "none"
    assert backbone.size == plain.size == sum(p.numel() for p in plain.model.parameters())
    modules = dict(plain.model.named_modules())
    for name, module in list(held(backbone).items())[-3:]:
        matrix, exact = module.matrix(torch.float32), modules[name].weight
        torch.testing.assert_close(matrix.double(), by_hand(module), rtol=1e-6, atol=1e-8)
        error, size = (matrix - exact).abs(), exact.abs()
        if bits == "8bit":  # half a step of the row's 127, and a rounding to float16 before that
            most = size.amax(1, keepdim=True) / 254 + size.amax() / 2048
        else:  # half of the widest gap of the table, in units of the block's largest
            most = size.amax() * (NF4[1] - NF4[0]) / 2 * 1.001
        assert error.max() > 0 and bool((error <= most).all())
        held_in = sum(t.numel() * t.element_size() for t in (module.codes, module.scales))
        assert held_in == held_bytes((module.out_features, module.in_features), module.bits)
        assert torch.equal(module.matrix(torch.bfloat16), matrix.bfloat16())
    others = {n: p for n, p in plain.model.named_parameters() if not n.endswith("dense.weight")}
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, others.get(name, parameter)), name
    assert load(folder, bits, "bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_on_quantised_matrices_are_eq_3_to_5(
    family: str, bits: str, tmp_path: Path
) -> None:
    """Compare states and all gradients with float64, W given back, token by token."""
    folder = saved(tmp_path, family)
    backbone = load(folder, bits)
    untouched = twin(folder, backbone)
    moe = DPMoE(
        find_linears(backbone.model, FAMILIES[family][1]),
        5,
        view_experts=3,
        rank=RANK,
        alpha=3.0,
        top=2,
        width=WIDTH,
    )
    torch.manual_seed(1)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    rows = [part.of(torch.arange(part.rows)[None])[0] for part in moe._parts]
    x = (torch.randn(5, 32) * 0.5).requires_grad_()
    us = [torch.randn(2, 5, requires_grad=True) for _ in range(2)]
    users = (torch.tensor([0, 1, 1]), torch.tensor([0, 1]))
    slices = [ViewSlice(0, 0, 3, us[0], users[0]), ViewSlice(1, 3, 5, us[1], users[1])]
    group, positions = pack(torch.tensor([5]), Attend.CAUSAL if backbone.causal else Attend.FULL)
    moe.attach()
    with moe.routed(slices):
        ours = backbone(x, Packing((group,), positions))
    weight = torch.randn(5, 32)
    leaves: list[Tensor] = [*moe.parameters(), x, *us]
    grads = torch.autograd.grad((ours * weight).sum(), leaves)

    exact = moe.double()
    wide = [s.__class__(s.view, s.start, s.stop, s.u.double(), s.user) for s in slices]
    literal(untouched, exact, rows, wide)
    theirs = untouched(inputs_embeds=x.double()[None]).last_hidden_state[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((theirs * weight).sum(), [*exact.parameters(), x, *us])
    for mine, other in zip(grads, expected, strict=True):
        near = 1e-3 * float(other.abs().max())
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-3, atol=near)


def test_plain_products_and_lora_have_exact_gradients(tmp_path: Path) -> None:
    backbone = load(saved(tmp_path, "llama"), "8bit")
    module = held(backbone)["layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 32, requires_grad=True)
    goal = torch.randn(2, 3, 32)
    w = module.weight
    assert torch.equal(module(x), x @ w.T)
    [mine] = torch.autograd.grad((module(x) * goal).sum(), [x])
    torch.testing.assert_close(mine, goal @ w, rtol=1e-5, atol=1e-5)
    lora = LoRA(find_linears(backbone.model, ("q",)), rank=2)
    nn.init.normal_(lora.b[0])
    lora.attach()
    with lora.enabled():
        merged = w + lora.scaling * lora.b[0] @ lora.a[0]
        torch.testing.assert_close(module(x), x @ merged.T, rtol=1e-4, atol=1e-4)


def test_the_hash_tells_weights_apart_and_stays(tmp_path: Path) -> None:
    folder = saved(tmp_path, "bert")
    hashes = {bits: load(folder, bits).weight_hash() for bits in ("none", "8bit", "4bit")}
    assert len(set(hashes.values())) == 3
    backbone = load(folder, "8bit")
    group, positions = pack(torch.tensor([3]), Attend.FULL)
    backbone(backbone.embed(torch.tensor([3, 4, 5])), Packing((group,), positions))
    assert backbone.weight_hash() == hashes["8bit"]


@pytest.mark.parametrize(
    "stored",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    ],
    ids=["int8", "nf4 twice", "fp4", "stored as bfloat16"],
)
def test_what_bitsandbytes_saved_is_read_as_it_is(stored: Any, tmp_path: Path) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    wide = {"hidden_size": 64, "intermediate_size": 128}  # its own code errs on others on a CPU
    folder, disk = saved(tmp_path / "plain", "llama", **wide), tmp_path / "saved"
    model: Any = AutoModel.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**stored)
    )
    model.save_pretrained(disk)
    tiny.tokenizer("qwen").save_pretrained(disk)
    backbone = load(disk)
    bits = "8bit" if "load_in_8bit" in stored else "4bit"
    assert backbone.quantized == bits == load(disk, bits).quantized
    theirs = dict(model.named_modules())
    for name, module in held(backbone).items():
        exact = dequantize_bnb_weight(theirs[name].weight, getattr(theirs[name], "state", None))
        torch.testing.assert_close(module.weight, exact, rtol=1e-6, atol=1e-8)
    other = {"8bit": "4bit", "4bit": "8bit"}[bits]
    with pytest.raises(BackboneError, match=f"is stored in {bits}, which .*={other} cannot"):
        load(disk, other)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors", "fp8", "aqlm"])
def test_other_kinds_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | {"quantization_config": {"quant_method": kind}}
    path.write_text(json.dumps(changed))
    for bits in ("none", "8bit"):
        with pytest.raises(BackboneError, match=f"is quantised by {kind}, which cannot") as error:
            load(folder, bits)
        one_line(error)


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "llama")
    find = quantized.importlib.util.find_spec
    monkeypatch.setattr(
        quantized.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(BackboneError, match=rf"needs {package}: pip install 'l2rec\[quantized\]'"):
        load(folder, "4bit")
    monkeypatch.undo()
    assert bits_of(load(folder).model) is None


def test_random_weights_are_not_quantised() -> None:
    with pytest.raises(ConfigError, match="random_weights and quantize do not go together"):
        resolve({"backbone": {"random_weights": True, "quantize": "8bit"}}, where="test")
