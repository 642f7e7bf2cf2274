"""``l2rec demo``: every step on MovieLens-100K, in minutes, on two cores."""

from __future__ import annotations

__all__ = ["RECIPE", "run_demo"]

import filecmp
import shutil
import sys
from pathlib import Path

from l2rec.config import load_recipe
from l2rec.console import Console, print_recommendations
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.data.sources import SOURCES, fetch
from l2rec.errors import DataError
from l2rec.runs.folder import MODEL, finished_report, read_report
from l2rec.runs.predictor import Predictor, load
from l2rec.runs.train import train_run
from l2rec.studies.blend import blend_run

RECIPE = "movielens-100k/l2rec-plus"
SOURCE = "movielens-100k"
USERS = 3
SHOWN = 5


def run_demo(out: Path, data: Path, minutes: float) -> None:
    """Prepare MovieLens-100K, train L2Rec's behavioural view for at most ``minutes``, blend the run
    with co-occurrence and repeats into a folder beside it, and show scores and recommendations.

    A second call reuses the data set and the finished runs, or resumes a run that was killed.

    Raises:
        DataError: ``out`` has a run of another data set, or the folder beside it is of another run.
    """
    blended = out.with_name(f"{out.name}-blended")
    with Console() as console:
        dataset = _dataset(data, console)
        report = finished_report(out)
        if report is not None and report["dataset"]["fingerprint"] != dataset.fingerprint:
            raise DataError(f"{out} was made on other data than {data}; choose another --out")
        if report is not None:
            console.line(f"{out} is trained already: showing it (choose another --out to train)")
        else:
            config = load_recipe(RECIPE, [f"training.max_minutes={minutes}"])
            resume = (out / "config.yaml").is_file()
            train_run(
                config,
                data,
                out,
                progress=console,
                resume=resume,
                recipe=RECIPE,
                command=f"l2rec demo --out {out} --data {data} --minutes {minutes:g}",
            )
        if not blended.exists():
            console.line(f"blending it with co-occurrence and repeats into {blended}")
            blend_run(out, blended, progress=console, data=data)
        elif not _same_model(out, blended):
            raise DataError(f"{blended} was not made of {out}; delete it, or choose another --out")
    console.scores(read_report(blended))
    predictor = load(blended)
    for number in range(USERS):
        _show(dataset, predictor, number * dataset.n_users // USERS)
    user = dataset.user_ids[0].as_py()
    called = sys.argv[0]  # as make does it, by a path, where l2rec is not on PATH
    program = called if Path(called).name == "l2rec" and not shutil.which("l2rec") else "l2rec"
    history = ",".join(_history(dataset, 0)[-3:])
    print(
        f"\nreport       {blended}/report.html  (open it in a browser)"
        f"\nrun folder   {out}"
        f"\nblended      {blended}"
        f"\ndata set     {data}  ({dataset.fingerprint})"
        "\n\nnext"
        f"\n  {program} recommend {blended} --user {user}"
        f"\n  {program} recommend {blended} --history {history} -k 5"
        f"\n  {program} recommend {blended} --history {history}"
        ' --new-item "new1=Solaris (1972), Sci-Fi"'
        f"\n  {program} embed {blended} --out {blended}/vectors"
        f"\n  {program} prepare YOUR_FILES --out data/mine"
        f"\n  {program} train l2rec-plus --data data/mine --out runs/mine"
        f"\n  {program} blend runs/mine --out runs/mine-blended"
    )


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


def _show(dataset: Dataset, predictor: Predictor, user: int) -> None:
    """Print the last films of a user and the ten recommended ones."""
    history = _history(dataset, user)
    print(f"\nuser {dataset.user_ids[user].as_py()}, {len(history)} films, the last {SHOWN}:")
    result = predictor.recommend(history, 10)
    print_recommendations([(i, predictor.text_of(i)) for i in history[-SHOWN:]], result)
