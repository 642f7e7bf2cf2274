#!/usr/bin/env bash
# Polars 2.1.0: a column divided by a number is multiplied by the number's reciprocal.
#
# Expected: milliseconds / 1000 is the nearest float of the quotient, as in Python, NumPy and
# PyArrow, and as Polars itself has it when it divides by a column of the same number.
# Seen: 59 / 1000 is 0.059000000000000004; of the whole numbers below 100,000, 13,328 quotients by
# 1000 are not the nearest float. Times that one program read from milliseconds and another from
# text in seconds are then different times, and events that tie in one do not tie in the other.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "polars==2.1.0" "numpy==2.4.1"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import polars as pl

n = np.arange(1, 100_000)
by_number = (pl.Series(n) / 1000).to_numpy()
by_column = (pl.Series(n) / pl.Series(np.full(len(n), 1000))).to_numpy()
wrong, right = int((by_number != n / 1000).sum()), int((by_column != n / 1000).sum())
print(f"polars {pl.__version__}: 59 / 1000 = {by_number[58]!r}; {wrong:,} of {len(n):,} quotients by")
print(f"a number are not the nearest float, {right:,} by a column")
raise SystemExit(0 if (wrong, right) == (13_328, 0) else 1)
PY
