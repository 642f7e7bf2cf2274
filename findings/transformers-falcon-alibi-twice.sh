#!/usr/bin/env bash
# Transformers 5.23.0: Falcon with ALiBi adds its bias twice, if attention is eager.
#
# Expected: eager and sdpa attention of one model differ by rounding; asking for the attention weights
# (which sdpa leaves to the eager code) does not change the output.
# Seen: with alibi=True, the bias is built into the mask, and the eager code adds it to the scores once
# more. Its outputs are those of a literal computation with twice the slopes, sdpa's those with the
# slopes of ALiBi.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import math
from copy import deepcopy

import torch
import transformers
from transformers import AutoModel, FalconConfig

print("transformers", transformers.__version__)
torch.manual_seed(0)
torch.set_grad_enabled(False)
HEADS, SIZE, LENGTH = 4, 16, 24
config = FalconConfig(
    vocab_size=50,
    hidden_size=HEADS * SIZE,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    alibi=True,
    multi_query=False,
    parallel_attn=False,
    bias=True,
    initializer_range=0.2,
)
ids = torch.randint(50, (1, LENGTH))
eager = AutoModel.from_config(deepcopy(config), attn_implementation="eager").eval()
sdpa = AutoModel.from_config(deepcopy(config), attn_implementation="sdpa").eval()
sdpa.load_state_dict(eager.state_dict())


def literal(times):
    """Compute the model's outputs [LENGTH, HEADS * SIZE] with `times` the bias of ALiBi."""
    block = eager.h[0]
    hidden = eager.word_embeddings(ids)[0]
    attention = block.self_attention
    states = attention.query_key_value(block.input_layernorm(hidden))
    query, key, value = states.view(LENGTH, HEADS, 3, SIZE).unbind(2)
    mixed = torch.empty(LENGTH, HEADS, SIZE)
    for head in range(HEADS):
        slope = times * 2.0 ** (-8 * (head + 1) / HEADS)
        for i in range(LENGTH):
            scores = [query[i, head] @ key[j, head] + slope * (j - i) for j in range(i + 1)]
            weights = (torch.stack(scores) / math.sqrt(SIZE)).softmax(0)
            mixed[i, head] = weights @ value[: i + 1, head]
    hidden = hidden + attention.dense(mixed.flatten(1))
    return eager.ln_f(hidden + block.mlp(block.post_attention_layernorm(hidden)))


once, twice = literal(1), literal(2)
for name, output, right in (
    ("sdpa", sdpa(ids)[0], True),
    ("eager", eager(ids)[0], False),
    ("sdpa, asked for its weights", sdpa(ids, output_attentions=True)[0], False),
):
    of_once, of_twice = ((output[0] - x).abs().max().item() for x in (once, twice))
    print(f"{name}: {of_once:.1e} from the bias once, {of_twice:.1e} from the bias twice")
    near, far = (of_once, of_twice) if right else (of_twice, of_once)
    assert near < 1e-5 and far > 1e-2, "changed"
PY
