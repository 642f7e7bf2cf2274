#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: bfloat16 layers keep compiled code of every length in two caches.
#
# Expected: a Linear layer that sees batches of ever new lengths, as text has them, needs the memory of
# the largest; or ONEDNN_PRIMITIVE_CACHE_CAPACITY, oneDNN's variable, bounds the code that it compiles.
# Seen: 600 lengths through one 256 x 256 layer in bfloat16 add hundreds of MB to the process. That
# variable alone takes off a part, for PyTorch has a cache of its own before it, that LRU_CACHE_CAPACITY
# bounds. This one alone takes off next to nothing, the two together nearly all.
#
# Exits 0 while that is so, 1 when it has changed; says "not tried" on a processor without bfloat16.
set -euo pipefail
if ! grep -qwE "avx512_bf16|amx_bf16" /proc/cpuinfo; then
  echo "not tried: this processor has no instructions for bfloat16"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$work/growth.py" <<'PY'
from pathlib import Path

import torch


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


torch.set_num_threads(1)
layer = torch.nn.Linear(256, 256, dtype=torch.bfloat16).requires_grad_(False)
rows = torch.randn(608, 256, dtype=torch.bfloat16)
layer(rows)
before = resident()
for length in range(8, 608):
    layer(rows[:length])
print(round(resident() - before))
PY
unset ONEDNN_PRIMITIVE_CACHE_CAPACITY LRU_CACHE_CAPACITY
growth() { env "$@" "$work/venv/bin/python" "$work/growth.py"; }
neither=$(growth)
first=$(growth ONEDNN_PRIMITIVE_CACHE_CAPACITY=16)
second=$(growth LRU_CACHE_CAPACITY=16)
both=$(growth ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 LRU_CACHE_CAPACITY=16)
echo "torch 2.13.0: 600 lengths add $neither MB; with oneDNN's cache bounded $first MB,"
echo "with PyTorch's $second MB, with both $both MB"
if ((neither < 150 || 3 * first < neither || 3 * second < 2 * neither || 5 * both > neither)); then
  echo "changed"
  exit 1
fi
