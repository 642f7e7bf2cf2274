#!/usr/bin/env bash
# PyTorch 2.13.0 (oneDNN) on Intel processors with AVX512_BF16 but no AMX: bfloat16 is the slower dtype.
#
# Expected: where the processor has instructions for bfloat16, and oneDNN uses them, a product of two
# bfloat16 matrices takes about half the time of one in float32: half the bytes, twice the numbers in
# a register. On AMD's it does.
# Seen: it takes about twice the time. VDPBF16PS is issued every other cycle there, two float32 FMA in
# every cycle. Virtual machines often hide AMX and leave avx512_bf16, so that flag alone is no reason to
# choose bfloat16.
#
# Exits 0 while that is so, 1 when it has changed; says "not tried" on other processors.
set -euo pipefail
if ! grep -q GenuineIntel /proc/cpuinfo || ! grep -qw avx512_bf16 /proc/cpuinfo ||
  grep -qw amx_bf16 /proc/cpuinfo; then
  echo "not tried: this processor is not one of Intel with AVX512_BF16 and without AMX"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import time

import torch

torch.set_num_threads(1)


def fastest(dtype):
    a, b = torch.randn(2048, 384).to(dtype), torch.randn(384, 1536).to(dtype)
    a @ b
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return min(seconds)


ratio = fastest(torch.bfloat16) / fastest(torch.float32)
print(f"torch {torch.__version__}: bfloat16 takes {ratio:.2f} times float32's time")
if ratio < 1.3:
    raise SystemExit("changed")
PY
