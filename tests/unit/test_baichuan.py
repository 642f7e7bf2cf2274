"""Checkpoints in the layout of Baichuan are read as what they are: Llama with packed q, k and v."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support import tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel
from transformers.utils import sentencepiece_model_pb2_new as spm

from l2rec.config import BackboneConfig
from l2rec.errors import BackboneError
from l2rec.modules.adapters import find_linears
from l2rec.modules.backbone import Backbone, load_backbone
from l2rec.modules.baichuan import convert_sentencepiece
from l2rec.modules.packing import Attend, Packing, pack

DIM, HEADS, LAYERS, WORDS, WIDE = 16, 4, 2, 280, 24
# The fields of config.json of Baichuan2-7B-Base, at the size of a test.
CONFIG: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": DIM,
    "initializer_range": 0.02,
    "intermediate_size": WIDE,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "model_type": "baichuan",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "_from_model_config": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "BaichuanTokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": WORDS,
}
TOKENIZER: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": True},
    "pad_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": True},
    "tokenizer_class": "BaichuanTokenizer",
    "use_fast": False,
}
PIECES = ("▁", "r", "e", "d", "c", "u", "p", "re", "cu", "red", "cup", "▁red", "▁cup", "up")


def weights() -> dict[str, Tensor]:
    """Draw a checkpoint: packed matrices, an output layer, rotations as old files store them."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (WORDS, DIM),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.W_pack.weight": (3 * DIM, DIM),
            f"{at}self_attn.o_proj.weight": (DIM, DIM),
            f"{at}mlp.gate_proj.weight": (WIDE, DIM),
            f"{at}mlp.up_proj.weight": (WIDE, DIM),
            f"{at}mlp.down_proj.weight": (DIM, WIDE),
            f"{at}input_layernorm.weight": (DIM,),
            f"{at}post_attention_layernorm.weight": (DIM,),
            f"{at}self_attn.rotary_emb.inv_freq": (DIM // HEADS // 2,),
        }
    return {name: 0.4 * torch.randn(shape) for name, shape in shapes.items()}


def sentencepiece(**normalizer: Any) -> bytes:
    """Build a sentencepiece model of byte pairs with `PIECES`, and all bytes to fall back on."""
    proto = spm.ModelProto()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<reserved_106>", 4)):
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)
    for number, piece in enumerate(PIECES):
        proto.pieces.add(piece=piece, score=-float(number), type=1)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = normalizer.get("add_dummy_prefix", False)
    proto.normalizer_spec.remove_extra_whitespaces = normalizer.get("remove", False)
    return bytes(proto.SerializeToString())


def write(folder: Path, **changes: Any) -> BackboneConfig:
    """Write a checkpoint in the layout of Baichuan2-7B; two shards, as large ones have."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer.model").write_bytes(sentencepiece())
    tensors = weights()
    shards = {n: f"model-0000{1 + ('layers.1' in n)}-of-00002.safetensors" for n in tensors}
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return BackboneConfig(name=str(folder), dtype="float32")


def literal(ids: Tensor) -> Tensor:
    """Compute the last hidden states [T, D] by the equations of Llama, float64, head by head."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    size = DIM // HEADS

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[name]

    def rotated(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for t in range(len(x)):
            for i in range(size // 2):
                angle = t * 10000.0 ** (-2 * i / size)
                a, b = x[t, i], x[t, i + size // 2]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        h = norm(x, f"{at}input_layernorm.weight")
        # Its own code: proj.unflatten(-1, (3, hidden_size)), and then q, k, v.
        q, k, v = (h @ w[f"{at}self_attn.W_pack.weight"].T).unflatten(-1, (3, DIM)).unbind(1)
        heads = []
        for n in range(HEADS):
            columns = slice(n * size, (n + 1) * size)
            scores = rotated(q[:, columns]) @ rotated(k[:, columns]).T / math.sqrt(size)
            seen = torch.ones(len(ids), len(ids)).tril().bool()
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, columns])
        x = x + torch.cat(heads, dim=-1) @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, f"{at}post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight")


def llama(ids: Tensor) -> Tensor:
    """Compute the same by the Llama of Hugging Face with the same weights, float32."""
    config = LlamaConfig(
        hidden_size=DIM,
        intermediate_size=WIDE,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        vocab_size=WORDS,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
    )
    model = LlamaModel(config).eval()
    state: dict[str, Tensor] = {}
    for name, tensor in weights().items():
        if "lm_head" in name or "inv_freq" in name:
            continue
        short = name.removeprefix("model.")
        if "W_pack" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                state[short.replace("W_pack", f"{part}_proj")] = third
        else:
            state[short] = tensor
    model.load_state_dict(state)
    with torch.no_grad():
        out: Tensor = model(input_ids=ids[None]).last_hidden_state
    return out[0]


def packed(backbone: Backbone, rows: list[Tensor]) -> list[Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    group, positions = pack(lengths, Attend.CAUSAL)
    out = backbone(backbone.embed(torch.cat(rows)), Packing((group,), positions))
    return list(out.split(lengths.tolist()))


def test_a_checkpoint_is_llama_with_its_weights(tmp_path: Path) -> None:
    backbone = load_backbone(write(tmp_path))
    assert backbone.causal and backbone.max_positions == 64 and backbone.dim == DIM
    rows = [torch.tensor([7, 3, 11, 7, 20, 41]), torch.tensor([9]), torch.tensor([5, 5, 30])]
    for row, out in zip(rows, packed(backbone, rows), strict=True):
        torch.testing.assert_close(out, llama(row), rtol=0, atol=2e-6)
        torch.testing.assert_close(out.double(), literal(row), rtol=0, atol=2e-6)


def test_remote_code_is_neither_needed_nor_run(tmp_path: Path) -> None:
    config = write(tmp_path)
    for name in ("configuration", "modeling", "tokenization"):
        (tmp_path / f"{name}_baichuan.py").write_text("raise ZeroDivisionError")
    backbone = load_backbone(config)
    parts = find_linears(backbone.model, ("q", "k", "v", "o", "gate", "up", "down"))
    assert len(parts) == 7 * LAYERS
    assert "layers.0.self_attn.q_proj" in parts


@pytest.mark.parametrize(
    "changes",
    [{"position_embedding": "ALIBI"}, {"hidden_size": 5120}, {"max_position_embeddings": None}],
)
def test_13b_has_alibi_and_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = write(tmp_path, **changes)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in fields.items() if value is not None})
    )
    with pytest.raises(BackboneError, match=r"^this Baichuan \(13B\) has ALiBi, .*choose a 7B"):
        load_backbone(config)


def test_a_missing_matrix_is_named(tmp_path: Path) -> None:
    config = write(tmp_path, num_hidden_layers=LAYERS + 1)
    with pytest.raises(BackboneError, match=r"its weights lack layers\.2\."):
        load_backbone(config)


# ------------------------------------------------------------------------------- tokenizer


def test_a_sentencepiece_file_is_its_merges(tmp_path: Path) -> None:
    """Expected pieces by hand: the pair with the best score is merged first."""
    tokenizer = load_backbone(write(tmp_path)).tokenizer
    assert len(tokenizer) == 4 + 256 + len(PIECES)
    cases = {
        "red cup": ["red", "▁cup"],
        " red": ["▁red"],
        "reduce": ["red", "u", "c", "e"],
        "upred": ["up", "red"],
        "red  cup": ["red", "▁", "▁cup"],
        "reZ": ["re", "<0x5A>"],
        "é": ["<0xC3>", "<0xA9>"],
    }
    for text, pieces in cases.items():
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == pieces, text
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>"
    assert tokenizer("<reserved_106>").input_ids == [3]


def test_spaces_are_as_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece(add_dummy_prefix=True, remove=True))
    assert convert_sentencepiece(file).encode("  red  cup ").tokens == ["▁red", "▁cup"]


def test_a_tokenizer_json_goes_before_it(tmp_path: Path) -> None:
    config = write(tmp_path)
    tiny.tokenizer("qwen").backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_backbone(config).tokenizer
    assert tokenizer("red").input_ids == [tiny.VOCABULARY.index("red")]


def test_what_cannot_be_converted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path)
    file = tmp_path / "tokenizer.model"
    unigram = spm.ModelProto.FromString(sentencepiece())
    unigram.trainer_spec.model_type = unigram.trainer_spec.UNIGRAM
    file.write_bytes(unigram.SerializeToString())
    with pytest.raises(BackboneError, match=r"no usable tokenizer: .* not one of byte pairs"):
        load_backbone(config)
    file.write_bytes(b"no such file")
    with pytest.raises(BackboneError, match="is not a sentencepiece model"):
        load_backbone(config)

    def missing() -> None:
        raise ImportError

    reader = importlib.import_module("transformers.convert_slow_tokenizer")
    monkeypatch.setattr(reader, "import_protobuf", missing)
    with pytest.raises(BackboneError, match=r"needs protobuf: pip install protobuf"):
        load_backbone(config)
    file.unlink()
    with pytest.raises(BackboneError, match="tokenizer"):
        load_backbone(config)
