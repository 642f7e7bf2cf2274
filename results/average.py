"""The mean of several runs' scores, as the control for whatever joins two models.

    python results/average.py RUN RUN [RUN ...] [--against RUN [RUN ...]] [--json FILE]

As `l2rec average` has it, without writing a folder. ``--against``: finished runs of the same data,
or what is kept of them, as a rule the seeds of one recipe; each user's mean over them is tested
against the average (paired t-test over users, two-sided).
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from l2rec.evaluation.ranking import evaluate
from l2rec.evaluation.significance import paired_values_test
from l2rec.runs.folder import load_run_config, open_run_dataset, training_split
from l2rec.studies.average import Average
from l2rec.studies.compare import read_run

METRICS = ("recall@10", "ndcg@10")
MASKED = "_masked"


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
