#!/usr/bin/env bash
# Transformers 5.23.0 drops the scaling of rotary positions from GGUF files without a word.
#
# Expected: from_pretrained(..., gguf_file=) applies the tensor rope_freqs.weight, by which llama.cpp
# stores Llama 3.1's scaling, and the rope.scaling.* keys, by which it stores YaRN; or it warns.
# Seen: both are passed over; a note at the level of info names the keys, nothing the tensor. Weights
# are right and outputs those of a model that was never scaled.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
cd "$work"
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$work/venv/bin/python" - <<'PY'
import io
import logging

import gguf
import torch
import transformers
from transformers import AutoModel, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

warnings = io.StringIO()
transformers.logging.add_handler(logging.StreamHandler(warnings))
print("transformers", transformers.__version__)
SHAPE = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SHAPE |= {"initializer_range": 0.2, "rms_norm_eps": 1e-6}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0}
YARN |= {"original_max_position_embeddings": 64}


def rows(name, weight):
    """Order the rows of Llama's q and k as llama.cpp has them."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, 128).swapaxes(1, 2).reshape(weight.shape).contiguous()


def write(path, family, arch, model, factors=None):
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(512)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("none")
    if factors is None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(8.0)
        writer.add_rope_scaling_orig_ctx_len(64)
    else:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    names = gguf.get_tensor_name_map(arch, 2)
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        weight = rows(name, weight) if family == "llama" else weight
        writer.add_tensor(f"{names.get_name('model.' + module)}.{kind}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def built(kind, settings, rotation, weights=None):
    torch.manual_seed(0)
    model = kind(settings(**SHAPE, rope_parameters=rotation)).eval()
    model.load_state_dict(weights or model.state_dict())
    return model


ids = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(0))
for family, arch, kind, settings, rotation in (
    ("llama", gguf.MODEL_ARCH.LLAMA, LlamaModel, LlamaConfig, LLAMA3),
    ("qwen2", gguf.MODEL_ARCH.QWEN2, Qwen2Model, Qwen2Config, YARN),
):
    scaled = built(kind, settings, rotation)
    plain = built(kind, settings, PLAIN, scaled.state_dict())
    factors = plain.rotary_emb.inv_freq / scaled.rotary_emb.inv_freq
    write("model.gguf", family, arch, scaled, factors if family == "llama" else None)
    loaded = AutoModel.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        outputs = [model(ids)[0] for model in (loaded, scaled, plain)]
    of_scaled, of_plain = ((outputs[0] - x).abs().max().item() for x in outputs[1:])
    print(f"{family}, {rotation['rope_type']}: outputs differ by up to {of_scaled:.2f} from those")
    print(f"  of the model that was written, by {of_plain:.6f} from those without its scaling")
    assert of_plain < 1e-4 and of_scaled > 0.1, "changed: the scaling is read"
assert "rope" not in warnings.getvalue(), f"changed: it warns: {warnings.getvalue()}"
print("no warning names it")
PY
