"""GGUF files of tiny random models, written as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
BYTES = list(bytes_to_unicode().values())
"""Tokens of byte-level tokenizers."""
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
PIECES += [chr(i) for i in range(33, 127)]
"""Tokens of sentencepiece tokenizers."""
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{NAMES[module]}.{kind}"
    _, layer, of_layer = module.split(".", 2)
    return f"blk.{layer}.{NAMES[of_layer]}.{kind}"


def _permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Order the rows of a head as llama.cpp rotates them: the halves in turn, one row of each."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _stored(value: np.ndarray[Any, Any], kind: str) -> tuple[np.ndarray[Any, Any], Any, Any]:
    """Return what is written of a tensor, its type, and its values as that type has them."""
    if value.ndim == 1 or kind == "F32":
        return value, None, value
    if kind == "F16":
        half = value.astype(np.float16)
        return half, None, half.astype(np.float32)
    quant = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quants.quantize(value, quant)
    return blocks, quant, gguf.quants.dequantize(blocks, quant)


def write(
    path: Path,
    model: nn.Module,
    kind: str,
    *,
    factors: np.ndarray[Any, Any] | None = None,
    scaling: str | None = None,
) -> dict[str, torch.Tensor]:
    """Write a Llama, Qwen2 or Qwen3 model.

    kind: of its matrices, ``F32``, ``F16``, ``Q8_0`` or ``Q4_0``. factors: by which its rotary
    frequencies are divided. scaling: name of another way to scale them. Returns the model's state
    as the file has it, under its own names.
    """
    config: Any = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    head_dim = config.head_dim if arch == "qwen3" else 16
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if arch == "llama":
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES)
        writer.add_token_scores([-float(i) for i in range(len(PIECES))])
        kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2]
        kinds += [gguf.TokenType.BYTE] * 256
        writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(PIECES) - len(kinds)))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*BYTES, "th", "<|endoftext|>"])
        normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
        writer.add_token_types([normal] * 257 + [control])
        writer.add_token_merges(["t h"])
        writer.add_eos_token_id(257)
        writer.add_pad_token_id(257)
    if scaling is not None:
        writer.add_string(f"{arch}.rope.scaling.type", scaling)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    state = {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        written, quant, value = _stored(tensor.float().numpy(), kind)
        rotated = heads.get(name.split(".")[-2]) if arch == "llama" else None
        if rotated is not None:
            written = _permuted(written, rotated)
        writer.add_tensor(_name(name), written, raw_dtype=quant)
        state[name] = torch.from_numpy(np.array(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state
