#!/usr/bin/env bash
# RecTools 0.19.0, FlatSASRecNet of two blocks: states of padded rows are NaN as soon as it is evaluated.
#
# Expected: a network that trains without NaN gives numbers in eval() under no_grad too, where dropout
# alone is gone. Seen: with gradients on the states are finite; without them every row that has padding on
# its left is NaN at its items as well, and a row that fills the window is not. PyTorch's fused attention
# gives NaN to a place that sees nothing; the mask that should take it away multiplies NaN by zero.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "rectools[torch]==0.19.0"
cat >"$work/look.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from rectools.fast_transformers import FlatSASRecNet

torch.manual_seed(0)
net = FlatSASRecNet(n_items=9, n_factors=16, n_blocks=2, n_heads=2, session_max_len=5, dropout=0.0)
net.eval()
padded, full = torch.tensor([[0, 0, 1, 2, 3]]), torch.tensor([[4, 5, 1, 2, 3]])
with_gradients = net.encode_last(padded).isfinite().all().item()
with torch.no_grad():
    seen = {
        "full row": net.encode_last(full).isfinite().all().item(),
        "padded row": net.encode_last(padded).isfinite().all().item(),
    }
    torch.backends.mha.set_fastpath_enabled(False)
    seen["padded row, no fused attention"] = net.encode_last(padded).isfinite().all().item()
print(f"RecTools {version('rectools')}, torch {torch.__version__}")
print(f"padded row with gradients: finite {with_gradients}")
for name, finite in seen.items():
    print(f"{name} without gradients: finite {finite}")
sys.exit(not (with_gradients and list(seen.values()) == [True, False, True]))
PY
"$work/venv/bin/python" "$work/look.py"
