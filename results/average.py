"""The mean of several runs' scores, as the control for whatever joins two models.

    python results/average.py RUN RUN [RUN ...] [--against RUN [RUN ...]] [--json FILE]

Two seeds of one recipe, averaged, score better than either. A method with two parts has to beat
that, not one of its parts alone. Scores are averaged as the runs give them (of one recipe they are
on one scale). ``--against``: finished runs of the same data, or what is kept of them, as a rule the
seeds of one recipe; each user's mean over them is tested against the average (paired t-test over
users, two-sided).
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from l2rec.data.ragged import Ragged
from l2rec.evaluation.ranking import evaluate
from l2rec.evaluation.significance import paired_values_test
from l2rec.protocols import Scorer
from l2rec.runs.folder import load_run_config, open_run_dataset, training_split
from l2rec.runs.predictor import load
from l2rec.studies.compare import read_run

METRICS = ("recall@10", "ndcg@10")
MASKED = "_masked"


class Average:
    """Several recommenders of one catalog as one: the mean of their scores."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = [load(run) for run in runs]
        self.n_items = len(self._runs[0].ids)

    def scorer(self) -> Scorer:
        """Return histories -> mean scores [B, N]."""
        scorers = [run.scorer() for run in self._runs]

        def mean(histories: Ragged) -> Any:
            return sum(scorer(histories) for scorer in scorers) / len(scorers)

        return mean


def main() -> None:
    """Print the average and what it is tested against."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--against", nargs="+", type=Path, default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    dataset = open_run_dataset(args.runs[0], None)
    cases = training_split(load_run_config(args.runs[0])[0], dataset).test

    model = Average(args.runs)
    average = evaluate(model, cases.histories, cases.targets, users=cases.users)
    others = [read_run(run, dataset).ranks for run in args.against]  # in the order of the cases
    found: dict[str, Any] = {
        "runs": [run.name for run in args.runs],
        "fingerprint": dataset.fingerprint,
        "scores": {},
        "against": [run.name for run in args.against],
        "against_scores": {},
        "p": {},
    }
    for metric, masked in product(METRICS, (True, False)):
        name = metric + MASKED * masked
        ours = average.values(metric, masked=masked)
        found["scores"][name] = float(ours.mean())
        if others:
            theirs = np.mean([other.values(metric, masked=masked) for other in others], axis=0)
            test = paired_values_test(theirs, ours, cases.users)
            found["against_scores"][name], found["p"][name] = test.mean_a, test.p
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
