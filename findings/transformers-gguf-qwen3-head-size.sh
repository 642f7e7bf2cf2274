#!/usr/bin/env bash
# Transformers 5.23.0 reads no head size from a Qwen3 GGUF file: all have 128.
#
# Expected: from_pretrained(..., gguf_file=) takes head_dim from qwen3.attention.key_length, which
# llama.cpp writes, as it does for the mixture of experts of the same family (qwen3moe).
# Seen: the key is passed over and head_dim is the 128 of the configuration's default, also where the
# file's size is the hidden size / heads. A file with heads of 32 fails with weights that do not match,
# as if it were torn.
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
import gguf
import torch
import transformers
from transformers import AutoConfig, AutoModel, Qwen3Config, Qwen3Model

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__)
SHAPE = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def write(path, family, head, weights):
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(64)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name('model.' + module)}.{kind}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ids = torch.arange(40)[None]
for head in (32, 128):
    model = Qwen3Model(Qwen3Config(**SHAPE, head_dim=head)).eval()
    write("dense.gguf", "qwen3", head, model.state_dict())
    write("experts.gguf", "qwen3moe", head, {})
    dense = AutoConfig.from_pretrained(".", gguf_file="dense.gguf").head_dim
    experts = AutoConfig.from_pretrained(".", gguf_file="experts.gguf").head_dim
    print(f"heads of {head}: read as {dense} from qwen3, as {experts} from qwen3moe")
    assert (dense, experts) == (128, head), "changed: other head sizes are read"
    try:
        loaded = AutoModel.from_pretrained(".", gguf_file="dense.gguf", dtype=torch.float32)
    except RuntimeError as error:
        assert head == 32, error
        print(f"  loading fails: {error}")
    else:
        assert head == 128, "changed: a file with heads of 32 is loaded"
        with torch.no_grad():
            assert torch.equal(loaded(ids)[0], model(ids)[0])
        print("  loading works, outputs are those of the model that was written")
PY
