"""``l2rec demo``: every step on MovieLens-100K, in minutes, on two cores."""

from __future__ import annotations

__all__ = ["RECIPE", "run_demo"]

import filecmp
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from l2rec.config import load_recipe
from l2rec.console import Console, print_new_items, print_recommendations
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.sources import SOURCES, fetch
from l2rec.disk import beside
from l2rec.errors import DataError
from l2rec.runs.folder import MODEL, finished_report, read_report
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.train import train_run
from l2rec.studies.blend import blend_run

RECIPE = "movielens-100k/l2rec-plus"
RIVAL = "movielens-100k/sasrec"
"""What the same minutes make of the ids alone."""
SOURCE = "movielens-100k"
USERS = 3
SHOWN = 5
NEW_FILM = ("Solaris", "Solaris (1972), Sci-Fi")
"""A film that MovieLens-100K does not have."""


def run_demo(out: Path, data: Path, minutes: float) -> None:
    """Prepare MovieLens-100K, train L2Rec's behavioural view and SASRec for at most ``minutes``
    each, put co-occurrence and repeats beside both, and show scores and recommendations, and where
    a film stands that nobody has seen.

    SASRec and the blended runs are in folders beside ``out``. A second call reuses the data set
    and the finished runs, or resumes a run that was killed.

    Raises:
        DataError: a run is of another data set, or a blended run is of another run.
    """
    rival = beside(out, "sasrec")
    command = f"l2rec demo --out {out} --data {data} --minutes {minutes:g}"
    with Console() as console:
        dataset = _dataset(data, console)
        for recipe, run in ((RECIPE, out), (RIVAL, rival)):
            _train(recipe, dataset, run, minutes, command, console)
        blended, rival_blended = (_blend(run, dataset, console) for run in (out, rival))
    ours, theirs = read_report(blended), read_report(rival_blended)
    console.scores({**ours, "scores": _side_by_side(ours["scores"], theirs["scores"])})
    predictor, by_text = load(blended), load(out).with_items(dict([NEW_FILM]))
    for number in range(USERS):
        _show(dataset, predictor, by_text, number * dataset.n_users // USERS)
    user = dataset.user_ids[0].as_py()
    called = sys.argv[0]  # as make does it, by a path, where l2rec is not on PATH
    program = called if Path(called).name == "l2rec" and not shutil.which("l2rec") else "l2rec"
    history = ",".join(_history(dataset, 0)[-3:])
    print(
        f"\nreport       {blended}/report.html  (open it in a browser)"
        f"\nrun folder   {out}"
        f"\nblended      {blended}"
        f"\nSASRec       {rival}, {rival_blended}"
        f"\ndata set     {data}  ({dataset.fingerprint})"
        "\n\nnext"
        f"\n  {program} recommend {blended} --user {user}"
        f"\n  {program} recommend {blended} --history {history} -k 5"
        f"\n  {program} recommend {out} --history {history}"
        f' --new-item "{NEW_FILM[0]}={NEW_FILM[1]}"'
        f"\n  {program} compare {out} {rival}"
        f"\n  {program} embed {blended} --out {blended}/vectors"
        f"\n  {program} prepare YOUR_FILES --out data/mine"
        f"\n  {program} train l2rec-plus --data data/mine --out runs/mine"
        f"\n  {program} blend runs/mine --out runs/mine-blended"
    )


def _train(
    recipe: str, dataset: Dataset, run: Path, minutes: float, command: str, console: Console
) -> None:
    """Train a recipe, or go on with it, unless it is trained already."""
    report = finished_report(run)
    if report is not None and report["dataset"]["fingerprint"] != dataset.fingerprint:
        raise DataError(f"{run} was made on other data than {dataset.path}; choose another --out")
    if report is not None:
        console.line(f"{run} is trained already: showing it (choose another --out to train)")
        return
    config = load_recipe(recipe, [f"training.max_minutes={minutes}"])
    resume = (run / "config.yaml").is_file()
    train_run(
        config,
        dataset.path,
        run,
        progress=console,
        resume=resume,
        recipe=recipe,
        command=command,
    )


def _blend(run: Path, dataset: Dataset, console: Console) -> Path:
    """Put co-occurrence and repeats beside a run, unless it is done; return the blended run."""
    blended = beside(run, "blended")
    if not blended.exists():
        console.line(f"blending {run} with co-occurrence and repeats into {blended}")
        blend_run(run, blended, progress=console, data=dataset.path)
    elif not _same_model(run, blended):
        raise DataError(f"{blended} was not made of {run}; delete it, or choose another --out")
    return blended


def _side_by_side(
    ours: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]]
) -> dict[str, Mapping[str, float]]:
    """Return one table of two blended runs' scores: what needs no training, both methods as they
    are, and both with co-occurrence and repeats.
    """
    (our_blend, our_method, *floors), (their_blend, their_method, *_) = ours, theirs
    return {
        **{name: ours[name] for name in floors},
        our_method: ours[our_method],
        their_method: theirs[their_method],
        our_blend: ours[our_blend],
        their_blend: theirs[their_blend],
    }


def _same_model(run: Path, blended: Path) -> bool:
    files = run / MODEL, blended / MODEL
    return all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False)


def _dataset(data: Path, console: Console) -> Dataset:
    if (data / "dataset.json").is_file():
        console.line(f"using the data set at {data}")
        return open_dataset(data)
    console.line("fetching MovieLens-100K")
    source = fetch(SOURCE, Path("~/.cache/l2rec").expanduser())
    return prepare(source, data, PrepareConfig(text=SOURCES[SOURCE].text))


def _history(dataset: Dataset, user: int) -> list[str]:
    return [dataset.item_ids[int(i)].as_py() for i in dataset.sequences[user]]


def _show(dataset: Dataset, predictor: Predictor, by_text: Predictor, user: int) -> None:
    """Print the last films of a user, the ten recommended ones, and the rank of the new one."""
    history = _history(dataset, user)
    print(f"\nuser {dataset.user_ids[user].as_py()}, {len(history)} films, the last {SHOWN}:")
    result = predictor.recommend(history, 10)
    print_recommendations([(i, predictor.text_of(i)) for i in history[-SHOWN:]], result)
    ranking = by_text.recommend(history, by_text.n_items)
    print_new_items([item["id"] for item in ranking.items], [NEW_FILM[0]])
