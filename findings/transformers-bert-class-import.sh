#!/usr/bin/env bash
# Importing one encoder class of Transformers imports the compiler and the distributed tensors of PyTorch.
#
# Expected: BertModel, a plain module of Linear layers, needs torch.nn; import time near that of torch.
# Seen (transformers 5.23.0): its module imports the hub kernels, these flash attention, that the
# continuous batching of generation, whose decorators import torch._dynamo; and the weight loader
# imports torch.distributed.tensor. A process that loads a 22M-parameter encoder spends more processor
# time on importing the class than on importing torch, before a weight is read. A fifth of it is
# garbage collection: with collections off while importing, as many modules come in less time.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat >"$work/seconds.py" <<'PY'
import gc
import sys
import time

if sys.argv[1] == "off":
    gc.disable()
import torch
import transformers

heavy = ("torch._dynamo", "torch.distributed.tensor", "transformers.generation.continuous_batching")
assert not [name for name in heavy if name in sys.modules], "changed: imported by torch itself"
started = time.process_time()
from transformers.models.bert.modeling_bert import BertModel

seconds = time.process_time() - started
missing = [name for name in heavy if name not in sys.modules]
assert not missing, f"changed: no longer imported: {missing}"
print(f"{seconds:.2f}")
PY
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/seconds.py" on >/dev/null # fills the bytecode cache
on=$("$work/venv/bin/python" "$work/seconds.py" on)
off=$("$work/venv/bin/python" "$work/seconds.py" off)
echo "transformers 5.23.0: importing BertModel takes $on s of processor time, $off s without collections"
"$work/venv/bin/python" -c "assert $on > 0.5 and $off < $on, 'changed: it is no longer slow'"
