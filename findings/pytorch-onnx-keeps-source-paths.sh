#!/usr/bin/env bash
# PyTorch 2.13.0 with onnxscript 0.7.2: an exported ONNX file tells where on the exporting machine the code lay.
#
# Expected: a file that is made to be handed on holds the graph and its weights. Seen: with dynamo=True every
# node carries the Python stack trace of the call that made it (metadata key pkg.torch.onnx.stack_trace), with
# the absolute path of every source file on the way; of a small model that is most of the file. The exporter has no
# option against it; onnx_ir's ClearMetadataAndDocStringPass takes it out.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0 numpy
mkdir "$work/private-folder"
cat >"$work/private-folder/look.py" <<'PY'
import sys
from pathlib import Path

import onnx_ir
import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return nn.functional.normalize(self.inner(x).mean(1), dim=-1)


folder = Path(sys.argv[1])
program = torch.onnx.export(
    Encoder().eval(), (torch.zeros(2, 3, 16),), dynamo=True, input_names=["x"], verbose=False
)
program.save(folder / "as-it-is.onnx")
onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
program.save(folder / "cleared.onnx")
told = {p.name: b"private-folder" in p.read_bytes() for p in sorted(folder.glob("*.onnx"))}
for name, says in told.items():
    print(f"{name}: {(folder / name).stat().st_size:,} bytes, names the folder of the source: {says}")
print(f"torch {torch.__version__}")
sys.exit(told != {"as-it-is.onnx": True, "cleared.onnx": False})
PY
"$work/venv/bin/python" "$work/private-folder/look.py" "$work" 2>/dev/null
