#!/usr/bin/env bash
# Makes the folders beside this file with the `l2rec` on PATH, in a few minutes: what an earlier
# version wrote, for the test that later versions open it (tests/compat/test_earlier.py).
#   PATH=.venv/bin:$PATH bash tests/compat/make.sh NEW_FOLDER
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1" && cd "$1"
python "$here/ingredients.py" .
l2rec prepare events.csv --items items.csv --out data
rm events.csv items.csv

for recipe in recipes/*.yaml; do
  name=$(basename "$recipe" .yaml)
  l2rec train "$recipe" --data data --out "finished/$name"
  # The same training, killed in the middle: a state folder is written at every step.
  l2rec train "$recipe" --data data --out "killed/$name" >/dev/null &
  until compgen -G "killed/$name/state/step-0000001[2-9]" >/dev/null; do sleep 0.01; done
  kill -KILL $! && { wait $! || true; }
done

for name in l2rec sasrec; do
  l2rec embed "finished/$name" --out "vectors/$name" --data data
done
l2rec index vectors/l2rec/items.parquet --out index --kind flat --queries vectors/l2rec/users.parquet

# A service: a deployed run, items put and deleted, events.
l2rec deploy finished/l2rec --to serving
l2rec serve serving --port 18123 &
until curl -sf localhost:18123/readyz >/dev/null; do sleep 0.2; done
python "$here/traffic.py" http://localhost:18123 >answers.json
kill -TERM $! && wait $!

python "$here/answers.py" . >expected.json
rm -rf {finished,killed}/*/tensorboard data/cache
# To be kept small and free of this machine's paths.
rm -rf finished/*/state/step-* {finished,killed}/*/{report.html,cache}
for states in killed/*/state; do find "$states" -maxdepth 1 -name 'step-*' | sort | head -n -1 | xargs rm -rf; done
grep -rlI "$PWD" . | xargs sed -i "s#$PWD#/earlier#g"
