#!/usr/bin/env bash
# pyarrow.array() and pyarrow.scalar() import pandas, if pandas is installed.
#
# Expected: a list of strings becomes an Arrow array without any other library; pandas is optional to
# pyarrow and nothing of it is involved. The same for the fill value of pyarrow.compute.fill_null.
# Seen: the first array or scalar that is made of a Python value imports the whole of pandas (to ask
# whether the value is a pandas object), also where a type is given; reading, casting and to_pylist do
# not. It costs the start of a service or of a command line tool more than importing pyarrow itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 pandas==3.1.1
"$work/venv/bin/python" - <<'PY'
import sys
import time

import pyarrow as pa

print("pyarrow", pa.__version__)
column = pa.chunked_array([pa.nulls(2, pa.string())]).cast(pa.large_string())
assert column.to_pylist() == [None, None]
assert "pandas" not in sys.modules, "changed: other calls import pandas too"
started = time.process_time()
pa.array(["a", "b"], pa.string())
seconds = time.process_time() - started
assert "pandas" in sys.modules, "changed: pyarrow.array of a list no longer imports pandas"
print(f"pyarrow.array of two strings: pandas imported, {seconds:.2f} s of processor time")
assert seconds > 0.02, "changed: it is no longer slow"
PY
