#!/usr/bin/env bash
# bitsandbytes 0.50.2, CPU with AVX-512: 4-bit matrices whose rows are no whole blocks come back wrong.
#
# Expected: quantize_4bit cuts the flat matrix into blocks of 64 and keeps one scale of each, so
# dequantize_4bit multiplies value i of the flat matrix by scale i // 64, as it does where the same
# values are laid out as rows of 64.
# Seen: where the row length is a multiple of 16 and not of 64, row r takes the scales from number
# r * (row length // 64) on: of rows of 32, all take the first. Codes and scales are right, and nothing
# warns. Where rows differ in size, as here, errors are several times those of right scales. Of the
# lengths tried, multiples of 8, those that 16 does not divide come back right.
#
# Exits 0 while that is so, 1 when it has changed; says "not tried" on a processor without AVX-512.
set -euo pipefail
if ! grep -qw avx512f /proc/cpuinfo; then
  echo "not tried: this processor has no AVX-512"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
"$work/venv/bin/python" - <<'PY'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print("bitsandbytes", bitsandbytes.__version__)
torch.manual_seed(0)
rows, wrong = 16, []
for length in range(16, 512, 8):
    matrix = torch.randn(rows, length) * torch.arange(1, rows + 1)[:, None]
    blocks = matrix.reshape(-1, 64)
    codes, state = quantize_4bit(matrix, quant_type="nf4")
    same_codes, same_state = quantize_4bit(blocks, quant_type="nf4")
    assert torch.equal(codes, same_codes) and torch.equal(state.absmax, same_state.absmax)

    as_matrix = dequantize_4bit(codes, state)
    as_blocks = dequantize_4bit(codes, same_state).reshape(matrix.shape)
    if not torch.equal(as_matrix, as_blocks):
        wrong.append(length)
    row, place = torch.arange(rows)[:, None], torch.arange(length)
    scales = state.absmax[(row * length + place) // 64]
    seen = state.absmax[row * (length // 64) + place // 64] if length % 16 == 0 else scales
    assert torch.allclose(as_matrix, as_blocks / scales * seen, rtol=1e-5), "changed: other scales"
    if length in (32, 80, 96):
        error, least = ((x - matrix).abs().max().item() for x in (as_matrix, as_blocks))
        print(f"{rows} x {length}: largest error {error:.1f}, as rows of 64 {least:.1f}")
assert wrong == [n for n in range(16, 512, 16) if n % 64], f"changed: wrong are rows of {wrong}"
print(f"wrong for {len(wrong)} row lengths below 512, all multiples of 16 and none of 64")
PY
