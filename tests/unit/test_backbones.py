"""Families of backbones: packed rows are Hugging Face's own, or a model is refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from tests.support import tiny
from tests.support.benchmarks import FOLDER, script
from tests.support.errors import one_line
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel

from l2rec.config import BackboneConfig
from l2rec.errors import BackboneError
from l2rec.modules import packing as packing_module
from l2rec.modules.backbone import Backbone, load_backbone, multiplies_bfloat16
from l2rec.modules.packing import Attend, Packing, pack
from l2rec.studies.doctor.backbones import shape_backbone

ENCODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW: dict[str, Any] = {"sliding_window": 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
SEES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
IMAGES = {"image_token_id": 5, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
SHORT: dict[str, Any] = {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}

ALIBI: dict[str, Any] = {"alibi": True, "multi_query": False, "parallel_attn": False}
GPT: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
MPT: dict[str, Any] = {
    **{"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 48},
    "attn_config": {"clip_qkv": 2.0},
}
DISENTANGLED: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
BART: dict[str, Any] = {
    **ENCODER,
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
}

# name: model type, changes, whether it is causal, most tokens of a row
EXACT: dict[str, tuple[str, dict[str, Any], bool, int]] = {
    "bert": ("bert", ENCODER, False, 64),
    "bert decoder": ("bert", ENCODER | {"is_decoder": True}, True, 64),
    "bert decoder of an encoder": (
        "bert",
        ENCODER | {"is_decoder": True, "add_cross_attention": True},
        True,
        64,
    ),
    "electra": ("electra", ENCODER | {"embedding_size": 32}, False, 64),
    "modernbert": ("modernbert", ENCODER | SHORT, False, 64),
    "gpt2": ("gpt2", ENCODER | {"n_embd": 32, "n_head": 4, "n_layer": 2}, True, 64),
    "opt": ("opt", ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}, True, 64),
    "mistral": ("mistral", DECODER | WINDOW, True, 64),
    "mistral, bidirectional": ("mistral", DECODER | WINDOW | {"is_causal": False}, False, 8),
    "llama, bidirectional": ("llama", DECODER | {"is_causal": False}, False, 64),
    "qwen2, window of one layer": (
        "qwen2",
        DECODER | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
        True,
        64,
    ),
    "qwen3-moe": ("qwen3_moe", DECODER | EXPERTS, True, 64),
    "phi-moe, window in the mask alone": ("phimoe", DECODER | EXPERTS | WINDOW, True, 8),
    "gemma": ("gemma", DECODER, True, 64),
    "gemma2": ("gemma2", DECODER | WINDOW | LAYERS | {"attn_logit_softcapping": 2.0}, True, 64),
    "gemma3": ("gemma3_text", DECODER | WINDOW | LAYERS, True, 64),
    "embeddinggemma": (
        "gemma3_text",
        DECODER | LAYERS | {"sliding_window": 16, "use_bidirectional_attention": True},
        False,
        64,
    ),
    "gpt-oss": ("gpt_oss", DECODER | EXPERTS | WINDOW | LAYERS, True, 64),
    "deepseek-v3": ("deepseek_v3", DECODER | LATENT, True, 64),
    "llama4, in chunks": (
        "llama4_text",
        DECODER | {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 48},
        True,
        16,
    ),
    "t5gemma, its encoder": (
        "t5gemma",
        {"encoder": DECODER | WINDOW | LAYERS, "decoder": DECODER | WINDOW | LAYERS},
        False,
        8,
    ),
    "t5, its encoder": (
        "t5",
        {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        False,
        0,
    ),
    "bloom": ("bloom", {"vocab_size": 60, "hidden_size": 48, "n_layer": 2, "n_head": 6}, True, 0),
    "falcon, rotary": ("falcon", ENCODER | {"new_decoder_architecture": True}, True, 64),
    "falcon, alibi": ("falcon", ENCODER | ALIBI, True, 64),
    "mpt": ("mpt", MPT, True, 48),
    "deberta": ("deberta", ENCODER | DISENTANGLED, False, 64),
    "deberta-v3": (
        "deberta-v2",
        ENCODER
        | DISENTANGLED
        | {"position_buckets": 8, "share_att_key": True, "position_biased_input": False},
        False,
        64,
    ),
    "deberta-v2, apart": (
        "deberta-v2",
        ENCODER | DISENTANGLED | {"max_relative_positions": 16, "pos_att_type": ["p2c"]},
        False,
        64,
    ),
    "gpt-j": ("gptj", {"vocab_size": 60, "n_embd": 32, "rotary_dim": 4} | GPT, True, 64),
    "gpt-neo": (
        "gpt_neo",
        ENCODER
        | {"num_layers": 2, "num_heads": 4, "window_size": 8, "attention_dropout": 0.0}
        | {"attention_types": [[["global", "local"], 1]]},
        True,
        64,
    ),
    "gpt": ("openai-gpt", {"vocab_size": 60, "n_embd": 32} | GPT, True, 64),
    "xglm": (
        "xglm",
        ENCODER | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        True,
        64,
    ),
    "roformer": ("roformer", ENCODER | {"embedding_size": 16}, False, 64),
    "rembert": (
        "rembert",
        ENCODER | {"input_embedding_size": 16, "output_embedding_size": 16},
        False,
        64,
    ),
    "big_bird, in full": ("big_bird", ENCODER | {"attention_type": "original_full"}, False, 64),
    "electra, narrow words": ("electra", ENCODER | {"embedding_size": 16}, False, 64),
    "albert, narrow words": ("albert", ENCODER | {"embedding_size": 16}, False, 64),
    "opt, narrow words": ("opt", ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 16}, True, 64),
    "bart, its encoder": ("bart", BART, False, 64),
    "pegasus, its encoder": ("pegasus", BART, False, 64),
    "m2m_100, its encoder": ("m2m_100", BART, False, 64),
    "mpnet": ("mpnet", ENCODER | {"pad_token_id": 1, "max_position_embeddings": 66}, False, 64),
    "nemotron": ("nemotron", DECODER, True, 64),
    "stablelm": ("stablelm", DECODER, True, 64),
    "gemma3 with images": (
        "gemma3",
        IMAGES | {"text_config": DECODER | WINDOW | LAYERS, "vision_config": SEES},
        True,
        64,
    ),
    "qwen3-vl": (
        "qwen3_vl",
        IMAGES
        | {
            "text_config": DECODER | MROPE,
            "vision_config": SEES | {"deepstack_visual_indexes": [0]},
        },
        True,
        64,
    ),
    "mistral3 with images": (
        "mistral3",
        IMAGES
        | {
            "text_config": DECODER | {"model_type": "mistral", "sliding_window": None},
            "vision_config": SEES | {"model_type": "pixtral"},
        },
        True,
        64,
    ),
}
LEAKS = "rows leak into each other"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "convolutions": ("lfm2", DECODER | {"layer_types": ["conv", "full_attention"]}, LEAKS),
    "recurrences": ("recurrent_gemma", DECODER | {"lru_width": 32, "num_hidden_layers": 3}, LEAKS),
    "trigrams": (
        "mobilebert",
        ENCODER | {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        LEAKS,
    ),
    "token ids in layers": (
        "gemma3n_text",
        DECODER
        | LAYERS
        | {
            "vocab_size_per_layer_input": 60,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        "read token ids",
    ),
    "two opinions": ("gemma", DECODER | {"use_bidirectional_attention": True}, "sees the future"),
    "sparse indexer": (
        "deepseek_v32",
        DECODER | LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
        "its layers read the attention mask themselves",
    ),
    "text of images": ("clip_text_model", ENCODER, "takes token ids alone, not word vectors"),
    "a pooled output": ("dpr", ENCODER, "it gives no last hidden states"),
    "a limit on all tokens": (
        "tipsv2_text_model",
        ENCODER,
        "takes no more tokens in all rows together than one row may have: ValueError: Sequence",
    ),
    "blocks": (
        "longt5",
        {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        LEAKS,
    ),
    "no words at all": (
        "convnext",
        {"hidden_sizes": [8] * 4, "depths": [1] * 4},
        "word embeddings",
    ),
    "no words": ("vit", ENCODER | {"image_size": 28, "patch_size": 14}, "word embeddings"),
    "recurrent": ("mamba", ENCODER, LEAKS),
    "attention without a name": ("big_bird", ENCODER, "attention functions by name"),
    "a convolution beside attention": (
        "deberta-v2",
        ENCODER | DISENTANGLED | {"conv_kernel_size": 3},
        LEAKS,
    ),
}


def model_of(family: str, changes: dict[str, Any]) -> nn.Module:
    """Draw weights so large that attention is sharp and norms are not one."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**changes)
    model: nn.Module = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn_like(parameter)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    return model


def backbone_of(model: nn.Module, name: str) -> Backbone:
    return Backbone(model, None, name=name, source="random", revision=None)


def packed(backbone: Backbone, rows: list[Tensor]) -> Tensor:
    attend = Attend.CAUSAL if backbone.causal else Attend.FULL
    group, positions = pack(torch.tensor([len(row) for row in rows]), attend)
    return backbone(backbone.embed(torch.cat(rows)), Packing((group,), positions))


def alone(model: Any, rows: list[Tensor]) -> Tensor:
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    else:  # for its masks; Falcon's eager attention counts ALiBi twice
        model.config._attn_implementation = "sdpa" if "falcon" in name_of(model) else "eager"
    return torch.cat([model(input_ids=row[None]).last_hidden_state[0] for row in rows])


def name_of(model: Any) -> str:
    return str(model.config.model_type)


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_packed_rows_are_those_of_the_model_alone(name: str) -> None:
    family, changes, causal, longest = EXACT[name]
    model = model_of(family, changes)
    backbone = backbone_of(model, name)
    assert (backbone.causal, backbone.max_positions or 0) == (causal, longest)
    longest = longest or 64
    torch.manual_seed(1)
    rows = [torch.randint(8, 60, (n,)) for n in (3, min(40, longest), 1, min(29, longest))]
    ours = packed(backbone, rows)
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    whole = model.get_encoder() if encodes else model  # type: ignore[operator]
    torch.testing.assert_close(ours, alone(whole, rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["t5, its encoder", "mpnet", "gemma2", "gpt-oss", "bloom", "deberta-v3"]
)
@torch.no_grad()
def test_other_formulas_are_the_same_with_gradients_and_for_every_length(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes, _, _ = EXACT[name]
    backbone = backbone_of(model_of(family, changes), name)
    rows = [torch.arange(8, 8 + n) for n in (3, 40, 1, 29)]
    fused = packed(backbone, rows)
    for longest in (0, 1000):  # the two ways of `_attend`
        monkeypatch.setattr(packing_module, "LONG_ROW", {torch.float32: longest})
        with torch.enable_grad():
            torch.testing.assert_close(packed(backbone, rows), fused, rtol=1e-3, atol=1e-4)


def test_rows_longer_than_the_model_takes_are_refused() -> None:
    backbone = backbone_of(model_of(*EXACT["llama4, in chunks"][:2]), "chunks")
    with pytest.raises(BackboneError, match="a row of 17 tokens: backbone 'chunks' takes 16; low"):
        packed(backbone, [torch.arange(8, 25)])


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_when_packed_is_refused(name: str) -> None:
    family, changes, reason = REFUSED[name]
    model = model_of(family, changes)
    with pytest.raises(BackboneError) as caught:
        backbone_of(model, "tiny")
    assert reason in one_line(caught) and f"'tiny' ({family})" in one_line(caught)


@pytest.mark.parametrize("name", ["opt, narrow words", "embeddinggemma2, wide states"])
def test_the_size_of_states_is_what_the_model_gives(name: str) -> None:
    wide = {"embedding_dim": 48, "num_global_key_value_heads": 2, "global_head_dim": 8}
    families = EXACT | {
        "embeddinggemma2, wide states": (
            "embedding_gemma2_text",
            DECODER | LAYERS | WINDOW | {"hidden_size_per_layer_input": 8} | wide,
            False,
            64,
        )
    }
    backbone = backbone_of(model_of(*families[name][:2]), name)
    assert (backbone.dim, backbone.word_dim) == ((16, 16) if "opt" in name else (48, 32))
    assert packed(backbone, [torch.arange(8, 12)]).shape == (4, backbone.dim)


def test_a_model_that_is_more_than_its_text_part_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, changes, _, _ = EXACT["mistral3 with images"]
    model: Any = model_of(family, changes)
    plain = model.forward

    def more(**inputs: Any) -> Any:
        output = plain(**inputs)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    monkeypatch.setattr(model, "forward", more)
    with pytest.raises(BackboneError, match="is more than its text part"):
        backbone_of(model, "tiny")


@pytest.mark.parametrize("name", ["mistral", "modernbert", "embeddinggemma"])
@pytest.mark.parametrize("attend", Attend)
@torch.no_grad()
def test_windows_are_bands_of_every_way_to_attend(name: str, attend: Attend) -> None:
    """Compare with Hugging Face's layers under an explicit mask, built token by token."""
    family, changes, _, _ = EXACT[name]
    model: Any = model_of(family, changes)
    backbone = backbone_of(model, name)
    window = {"mistral": 8, "modernbert": 5, "embeddinggemma": 9}[name]
    lengths = [23, 2, 11]
    blocks = torch.cat([torch.arange(n) // 3 + 10 * i for i, n in enumerate(lengths)])
    torch.manual_seed(1)
    ids = torch.randint(8, 60, (sum(lengths),))
    group, positions = pack(torch.tensor(lengths), attend, blocks=blocks)
    ours = backbone(backbone.embed(ids), Packing((group,), positions))
    model.set_attn_implementation("eager")
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        q, k = torch.arange(n)[:, None], torch.arange(n)[None]
        seen = {
            Attend.FULL: q >= 0,
            Attend.CAUSAL: k <= q,
            Attend.BLOCK_CAUSAL: blocks[part][None] <= blocks[part][:, None],
        }[attend].expand(n, n)
        near = (q - k).abs() < window
        masks = {
            kind: torch.zeros(n, n).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
            for kind, mask in (("full_attention", seen), ("sliding_attention", seen & near))
        }
        mask = masks["sliding_attention"] if name == "mistral" else masks
        theirs = model(inputs_embeds=backbone.embed(ids[part])[None], attention_mask=mask)
        torch.testing.assert_close(ours[part], theirs.last_hidden_state[0], rtol=1e-3, atol=1e-4)
        start += n


def test_a_decoder_whose_modules_do_not_say_so_is_tried() -> None:
    model = model_of("opt", EXACT["opt"][1])
    for module in model.modules():
        if hasattr(module, "is_causal"):
            del module.is_causal
    assert backbone_of(model, "silent").causal


def test_word_vectors_are_those_of_the_model_s_own_module() -> None:
    """A normed embedding, and Gemma's times sqrt(D)."""
    model: Any = model_of("llama", DECODER)

    class Normed(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.normalize(super().forward(ids), dim=-1)

    model.embed_tokens = Normed(60, 32)
    backbone = backbone_of(model, "normed")
    rows = [torch.arange(8, 20), torch.arange(30, 33)]
    torch.testing.assert_close(packed(backbone, rows), alone(model, rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.word_scale(), torch.tensor(32**-0.5))
    gemma = backbone_of(model_of("gemma", DECODER), "gemma")
    raw = gemma.word_embeddings.weight.square().mean().sqrt()
    torch.testing.assert_close(gemma.word_scale(), raw * 32**0.5)


def test_the_probe_leaves_the_random_numbers_and_the_attention_alone() -> None:
    model: Any = model_of("llama", DECODER)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    backbone = backbone_of(model, "llama")
    assert torch.equal(torch.rand(3), expected)
    assert model.config._attn_implementation == "l2rec_packed"
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    "name",
    [
        *("bert", "gemma3", "gpt-oss", "deepseek-v3", "mistral", "falcon, alibi", "mpt"),
        *("deberta-v3", "roformer"),
    ],
)
def test_bfloat16_is_no_reason_to_refuse(name: str) -> None:
    family, changes, _, longest = EXACT[name]
    model = model_of(family, changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    assert backbone_of(model, name).max_positions == longest
    broken = model_of(*REFUSED["convolutions"][:2])
    for parameter in broken.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(BackboneError, match=LEAKS):
        backbone_of(broken, "broken")


# ------------------------------------------------------------------------------- bfloat16


def saved(folder: Path, family: str, changes: dict[str, Any], draw: float) -> Path:
    """Write a random model with a tokenizer."""
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(CONFIG_MAPPING[family](**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, draw)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer.normal_()
    model.save_pretrained(folder)
    tiny.tokenizer("qwen").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("alone", [True, False], ids=["as peft writes it", "beside a model"])
def test_an_adapter_is_no_backbone(backbone_folder: Path, tmp_path: Path, alone: bool) -> None:
    folder = tmp_path / "adapter"
    if alone:
        folder.mkdir()
        save_file(
            {"base_model.model.a.lora_A.weight": torch.ones(2, 2)},
            folder / "adapter_model.safetensors",
        )
    else:
        shutil.copytree(backbone_folder, folder)
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "org/other"}'
    )
    for load in (load_backbone, shape_backbone):
        with pytest.raises(BackboneError, match="is an adapter and no model; merge it") as error:
            load(BackboneConfig(name=str(folder)))
        one_line(error)


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_vnni", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx512f avx512_vnni", False),
    ],
)
def test_where_bfloat16_is_the_faster(vendor: str, flags: str, faster: bool) -> None:
    """Intel's AVX-512 multiplies it half as fast as float32; AMD's twice as fast."""
    described = f"vendor_id\t: {vendor}\nmodel name\t: any\nflags\t\t: fpu {flags}\n"
    assert multiplies_bfloat16(described) is faster


def loaded(folder: Path, dtype: Literal["float32", "bfloat16"], **changes: Any) -> Backbone:
    return load_backbone(BackboneConfig(name=str(folder), dtype=dtype, **changes))


@torch.no_grad()
def test_bfloat16_errs_as_hugging_face_s_own_does_at_far_positions(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "head_dim": 128, "num_attention_heads": 2, "vocab_size": 200}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    changes = DECODER | shape | rope | {"max_position_embeddings": 1024, "num_hidden_layers": 3}
    folder = saved(tmp_path, "qwen3", changes, 0.25)
    row = torch.randint(8, 200, (1024,), generator=torch.Generator().manual_seed(1))
    exact = packed(loaded(folder, "float32"), [row])
    ours = packed(loaded(folder, "bfloat16"), [row])
    theirs = alone(AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval(), [row])
    for part in (slice(0, 64), slice(512, 1024)):
        error, bound = (
            float((1 - nn.functional.cosine_similarity(x[part].float(), exact[part])).mean())
            for x in (ours, theirs)
        )
        assert 0 < error < 1.25 * bound < 0.1, (part, error, bound)


@pytest.mark.parametrize("random", [False, True], ids=["saved", "random"])
@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "gemma", "modernbert"])
def test_bfloat16_keeps_what_is_float32_and_the_hash_of_earlier_runs(
    name: str, random: bool, tmp_path: Path
) -> None:
    family, changes, _, _ = EXACT[name]
    folder = saved(tmp_path, family, changes | {"vocab_size": 200}, 0.1)
    backbone = loaded(folder, "bfloat16", random_weights=random)
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    kept = {n: b for n, b in backbone.model.named_buffers() if "inv_freq" in n or "bias" in n}
    assert kept and {b.dtype for b in kept.values()} == {torch.float32}
    earlier = loaded(folder, "float32", random_weights=random)
    earlier.model.to(torch.bfloat16)  # how they were loaded, frequencies and all
    assert backbone.weight_hash() == earlier.weight_hash()


@pytest.mark.parametrize(
    "name",
    [
        *("gemma3 with images", "qwen3-vl", "t5, its encoder", "mpnet", "bloom", "deberta-v3"),
        *("albert, narrow words", "bart, its encoder", "m2m_100, its encoder"),
    ],
)
@torch.no_grad()
def test_parts_of_a_saved_model_load(name: str, tmp_path: Path) -> None:
    family, changes, _, _ = EXACT[name]
    words = {"vocab_size": 200}
    if "text_config" in changes:
        changes = changes | {"text_config": changes["text_config"] | words}
    folder = saved(tmp_path, family, changes | words, 0.3)
    backbone = loaded(folder, "float32")
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [torch.arange(8, 8 + n) for n in (3, 20, 1)]
    encodes = family in ("t5", "bart", "m2m_100")
    whole = model.get_encoder() if encodes else model
    torch.testing.assert_close(packed(backbone, rows), alone(whole, rows), rtol=1e-3, atol=1e-4)
    assert loaded(folder, "bfloat16").dtype is torch.bfloat16


# ------------------------------------------------------------------------------- the sweep


def documented() -> list[str]:
    """Read which families docs/backbones.md has as exact."""
    text = (FOLDER.parent / "docs" / "backbones.md").read_text(encoding="utf-8")
    table = text.partition("| exact |")[2].partition("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def test_the_sweep_tells_families_apart() -> None:
    sweep = script("backbones")
    rows = [sweep.tried(family) for family in ("llava", "fnet", "vit")]
    assert [row.outcome for row in rows] == ["exact", "refused", "refused"]
    rows.append(sweep.Row("seen", "not tried", "Seen requires the timm library but it was not"))
    table = sweep.table(rows)
    assert "1 exact, 2 refused, 0 wrong, 1 not tried." in table
    assert "| llava | " in table and "| needs timm, which is not installed here | seen |" in table
    assert "| no language model: has no hidden_size or no word embeddings | vit |" in table
    assert f"{LEAKS}, for its layers mix tokens outside of attention | fnet |" in table


@pytest.mark.slow
@pytest.mark.parametrize("family", documented())
def test_families_of_the_document_are_exact(family: str) -> None:
    row = script("backbones").tried(family)
    assert row.outcome == "exact", row.said
