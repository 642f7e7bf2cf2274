#!/usr/bin/env bash
# ranx 0.3.21: CondorcetFuse takes a run that found neither of two documents for a vote, and so reverses pairs.
#
# Expected: a run that has neither x nor y says nothing of the two, so where the only run that found
# them ranks x above y, x comes before y in the fused run, in every process.
# Seen: of three runs, one has x above y and two have neither: y comes first in about half the queries,
# and in which of them changes with PYTHONHASHSEED. _compare counts the runs with x before y and gives all
# the others to y, those too where both have the placeholder rank; so x against y and y against x are
# both lost, and the order is that of the set in which get_candidates gathers the documents.
#
# Exits 0 while that is so, 1 when it has changed. Numba's compiler is off only to save its minutes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  ranx==0.3.21 numba==0.68.1 numpy==1.26.4 pandas==2.3.3
cat >"$work/look.py" <<'PY'
from ranx import Run, fuse

QUERIES = range(200)


def run(*ranked):
    """Rank these documents in this order, under a name of its own in each query."""
    scores = {name: float(len(ranked) - place) for place, name in enumerate(ranked)}
    return Run({f"q{n:03}": {f"{name}{n}": score for name, score in scores.items()} for n in QUERIES})


fused = fuse([run("x", "y"), run("p", "r"), run("s", "t")], norm=None, method="condorcet").to_dict()
print(*(n for n in QUERIES if fused[f"q{n:03}"][f"y{n}"] > fused[f"q{n:03}"][f"x{n}"]))
PY
export NUMBA_DISABLE_JIT=1
first=$(PYTHONHASHSEED=0 "$work/venv/bin/python" "$work/look.py")
second=$(PYTHONHASHSEED=1 "$work/venv/bin/python" "$work/look.py")
echo "ranx 0.3.21: 200 queries, the one run that found x and y has x above y; fused, y is above x in"
echo "$(wc -w <<<"$first") of them with PYTHONHASHSEED=0, in $(wc -w <<<"$second") with 1"
if [[ -z $first || -z $second || $first == "$second" ]]; then
  echo "changed"
  exit 1
fi
