"""Keep the results of finished runs here, and write them into the README, results/README.md and
docs/ties.md.

    python results/collect.py NAME=RUN [NAME=RUN ...]     copy what runs found
    python results/collect.py                             write the tables again from what is here
    l2rec compare results/scientific/* --data DATA        test them against each other

NAME is <data set>/<recipe>, and <data set>/<recipe>-s1, -s2 ... for its other seeds, which are one
row of means. results/README.md gets all rows, and how every run was made; the README, of each data
set, the best three methods as they are and blended, of each method its row of most seeds;
docs/ties.md gets the floors of results/floors, which `l2rec floors` wrote. Only the recipe, scores,
counts, ranks and validations are kept: nothing of the data set, no texts, no ids. Ranks are in the
order of the data set's test users, which only those who have the data can name.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from l2rec.data.dataset import open_dataset
from l2rec.runs.folder import cut_by_time, load_run_config, load_shown_config, split_of
from l2rec.runs.numbers import PRETRAINED, UNTRAINED
from l2rec.runs.remarks import LEAKY, is_leaky, remarks_of, together
from l2rec.runs.train import UNTRAINED_BACKBONE
from l2rec.studies.compare import FLOORS

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
DETAILS = HERE / "README.md"
TIES = HERE.parent / "docs" / "ties.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
WAYS = ("leave-one-out", "leave-one-out-hash", "tied-day", "time")
TIED, ORDERED = ("beauty", "games-days", "steam"), ("scientific", "games", "yelp")
"""Data sets with times, and those of which only the order is left."""
COLUMNS = ["recall@10", "ndcg@10", "mrr", "recall@10_masked", "ndcg@10_masked"]
MAIN = "ndcg@10_masked"
STARTS = (UNTRAINED, UNTRAINED_BACKBONE, PRETRAINED)
"""Names under which a report has the scores of the method before its first step."""
SHOWN = 3
"""Methods that the README shows as they are, and as many blended."""

Report = dict[str, Any]


def keep(name: str, run: Path) -> None:
    """Copy the files of a run that hold its numbers, without what belongs to the data set."""
    if not (run / "report.json").is_file():
        raise SystemExit(f"{run} is not a finished run: it has no report.json")
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "report.json", folder / "report.json")
    (folder / "metrics.jsonl").write_text(thinned((run / "metrics.jsonl").read_text()))
    identity = yaml.safe_load((run / "config.yaml").read_text())
    dataset = open_dataset(Path(identity["dataset"]["path"]))
    identity["dataset"]["path"] = f"data/{dataset.name}"
    if identity.get("init") is not None:  # of this machine, where its place says nothing to others
        identity["init"] = f"runs/{Path(identity['init']).name}"
    (folder / "config.yaml").write_text(yaml.safe_dump(identity, sort_keys=False))
    ranks = pq.ParquetFile(run / "ranks.parquet").read()
    users = split_of(load_run_config(run)[0], dataset).test.users
    if ranks["user"].to_pylist() != dataset.user_ids.take(pa.array(users)).to_pylist():
        raise SystemExit(f"{run} did not rank the test users of {dataset.path} in their order")
    # A rank is a half integer, which float32 holds exactly.
    half = pa.list_(pa.float32()) if pa.types.is_list(ranks["rank"].type) else pa.float32()
    columns = {name: ranks[name].cast(half) for name in ("rank", "rank_masked")}
    kept = pa.table(columns).replace_schema_metadata(ranks.schema.metadata)
    pq.write_table(kept, folder / "ranks.parquet", compression="zstd", compression_level=19)


def thinned(log: str) -> str:
    """Return a training's log with its validations, and the newest line of training before each."""
    kept, newest = [], ""
    for line in log.splitlines(keepends=True):
        if json.loads(line)["event"] == "train":
            newest = line
        else:
            kept += [newest, line]
            newest = ""
    return "".join([*kept, newest])


def collected() -> dict[str, dict[str, Report]]:
    """Read reports by fingerprint, then by name; the best by `MAIN` first."""
    found: dict[str, dict[str, Report]] = {}
    for path in sorted(HERE.glob("*/*/report.json")):
        report = json.loads(path.read_text())
        report["blended"] = "blend" in report
        config = load_shown_config(path.parent)[0]
        report |= {"leaky": is_leaky([config]), "remarks": remarks_of([config])}
        name = path.parent.relative_to(HERE).as_posix()
        found.setdefault(report["dataset"]["fingerprint"], {})[name] = report
    return {
        fingerprint: dict(sorted(runs.items(), key=lambda item: -own(item[1])[MAIN]))
        for fingerprint, runs in found.items()
    }


def own(report: Report) -> dict[str, float]:
    """Test scores of the trained method."""
    scores: dict[str, float] = report["scores"][report["method"]]
    return scores


def table(runs: dict[str, Report], shown: int | None = None) -> str:
    """Write the runs on one data set in two parts, methods as they are and those with
    co-occurrence and repeats beside them; the floors are the same for all.

    shown: most methods of a part, each with its row of most seeds; by default all rows.
    """
    reports = list(runs.values())
    data = reports[0]["dataset"]
    head = " | ".join(c.replace("_masked", " masked") for c in COLUMNS)
    lines = [
        f"**{data['name']}**, {data['users']:,} users, {data['items']:,} items, "
        f"{data['events']:,} events, fingerprint `{data['fingerprint']}`, test:",
        "",
        f"| | seeds | {head} | training, min |",
        "|---|" + "---:|" * (len(COLUMNS) + 2),
    ]

    def line(name: str, seeds: str, scores: dict[str, float], minutes: str) -> str:
        values = " | ".join(f"{scores[c]:.4f}" for c in COLUMNS)
        return f"| {name} | {seeds} | {values} | {minutes} |"

    parts: dict[bool, list[tuple[float, str]]] = {False: [], True: []}
    remarks: dict[str, list[str]] = {}
    recipes = of_recipes(runs)
    for name, seeds in (recipes if shown is None else of_methods(recipes)).items():
        scores = {c: mean(own(report)[c] for report in seeds) for c in COLUMNS}
        minutes = f"{mean(report['training_seconds'] for report in seeds) / 60:.0f}"
        marks = " †" * any(map(cut_by_time, seeds)) + " ‡" * any(map(selected_unmasked, seeds))
        label = f"`{name}`{LEAKY * seeds[0]['leaky']}{marks}"
        row = line(label, str(len(seeds)), scores, minutes)
        parts[seeds[0]["blended"]].append((scores[MAIN], row))
        remarks[label] = seeds[0]["remarks"]
    as_it_is, blended = (
        [row for _, row in sorted(rows, reverse=True)[:shown]] for rows in parts.values()
    )
    remarks = {n: r for n, r in remarks.items() if any(n in row for row in as_it_is + blended)}
    if as_it_is and blended:
        empty = " |" * (len(COLUMNS) + 2)
        as_it_is = [f"| *as it is* |{empty}", *as_it_is]
        blended = [f"| *blended: co-occurrence and repeats beside it* |{empty}", *blended]
    lines += as_it_is + blended
    # Reports from before a floor was known lack it; it is the same in all that have it.
    known = {n: r["scores"][n] for r in reports for n in FLOORS if n in r["scores"]}
    if known:
        lines.append(f"| *nothing trained* |{' |' * (len(COLUMNS) + 2)}")
    lines += [line(name, "–", known[name], "") for name in FLOORS if name in known]
    if any("†" in line for line in lines):
        lines += ["", "† cut by its time budget while it still got better"]
    if any("‡" in line for line in lines):
        lines += ["", "‡ its best step was chosen by an earlier rule, the history not masked"]
    for remark in together(remarks):
        lines += ["", remark]
    return "\n".join(lines)


def selected_unmasked(report: Report) -> bool:
    """Say whether validation chose by another score than that of today, which is masked."""
    return report.get("selected_by") != MAIN and report["steps"] > 0


def of_recipes(runs: dict[str, Report]) -> dict[str, list[Report]]:
    """Group the reports of all seeds by the name without its seed."""
    found: dict[str, list[Report]] = {}
    for name, report in runs.items():
        found.setdefault(re.sub(r"-s\d+$", "", name), []).append(report)
    return found


def of_methods(recipes: dict[str, list[Report]]) -> dict[str, list[Report]]:
    """Keep of each method, as it is and blended, the row of most seeds; the first among equals."""
    found: dict[tuple[str, bool], str] = {}
    for name, seeds in recipes.items():
        method = yaml.safe_load((HERE / _folder(name) / "config.yaml").read_text())["config"]
        key = method["method"], seeds[0]["blended"]
        if key not in found or len(seeds) > len(recipes[found[key]]):
            found[key] = name
    return {name: recipes[name] for name in found.values()}


def _folder(recipe: str) -> str:
    """Return the folder of a recipe's first seed that is here."""
    return next(
        p.relative_to(HERE).as_posix()
        for p in sorted(HERE.glob(f"{recipe}*"))
        if re.sub(r"-s\d+$", "", p.relative_to(HERE).as_posix()) == recipe
    )


def made(name: str, report: Report) -> str:
    """How one run was made."""
    backbone = report["backbone"]
    return (
        f"- **{name}**: `{report['command']}`: seed {report['seed']}, backbone "
        f"{backbone['name']} in {backbone['dtype']}, {backbone['trained_parameters']:,} trained "
        f"parameters, best step {report['best_step']} of {report['steps']} (stopped: "
        f"{report['stopped']}), {report['training_seconds'] / 60:.1f} minutes of training and "
        f"{report['validation_seconds'] / 60:.1f} of validation, "
        f"{report['tokens_seen'] / 1e6:.1f}M tokens, peak memory "
        f"{report['peak_memory_mb'] / 1000:.1f} GB, {report['hardware']}, {report['date']}, "
        f"commit {report['versions'].get('commit', 'unknown')}; untrained ndcg@10 "
        f"{untrained(report):.4f}."
    )


def untrained(report: Report) -> float:
    """Return what the method scores before its first step."""
    name = next(name for name in STARTS if name in report["scores"])
    score: float = report["scores"][name]["ndcg@10"]
    return score


def floors_table() -> str:
    """Return what needs no training, by the ways to split: recall@10 / ndcg@10, history masked."""
    lines = [
        "| data set | floor | leave-one-out, file | leave-one-out, hash | ndcg@10, file to hash "
        "| tied-day | time |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    reports = {path.stem: json.loads(path.read_text()) for path in (HERE / "floors").glob("*.json")}
    for data in (*TIED, *ORDERED):
        by_way = {way: reports.get(f"{data}-{way}") for way in WAYS}
        found = [by_way[way] and by_way[way]["scores"] for way in WAYS]
        for floor in found[0]:
            cells = [_pair(scores and scores[floor]) for scores in found]
            change = "–"
            if found[1]:
                file, hashed = (scores[floor]["ndcg@10_masked"] for scores in found[:2])
                change = f"{hashed / file - 1:+.0%}"
            lines.append(f"| {data} | {floor} | {' | '.join([*cells[:2], change, *cells[2:]])} |")
        users = [report and f"{report['users_tested']:,}" for report in by_way.values()]
        shown = [count or "–" for count in users]
        lines.append(
            f"| {data} | *users tested* | {shown[0]} | {shown[1]} |  | {shown[2]} | {shown[3]} |"
        )
    machines = {f"{r['hardware']}, {r['date']}" for r in reports.values()}
    return "\n".join([*lines, "", f"Measured on {'; '.join(sorted(machines))}."])


def _pair(scores: dict[str, float] | None) -> str:
    if not scores:
        return "–"
    return f"{scores['recall@10_masked']:.4f} / {scores['ndcg@10_masked']:.4f}"


def between_marks(path: Path, text: str) -> None:
    """Replace what stands between the marks of a document."""
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2] if END in rest else rest
    path.write_text(before + BEGIN + "\n" + text + "\n" + END + after)


def main() -> None:
    """Copy what is named, then write the tables."""
    for argument in sys.argv[1:]:
        name, _, run = argument.partition("=")
        if not run:
            raise SystemExit(__doc__)
        keep(name, Path(run))
    # Data sets with runs of L2Rec come first, then those whose runs were trained out.
    sets = sorted(
        collected().values(),
        key=lambda runs: (
            not any("l2rec" in name for name in runs),
            sum(map(cut_by_time, runs.values())),
        ),
    )
    between_marks(README, "\n\n".join(table(runs, SHOWN) for runs in sets))
    between_marks(TIES, floors_table())
    details = [
        f"{table(runs)}\n\n" + "\n".join(made(name, report) for name, report in runs.items())
        for runs in sets
    ]
    title = "# Results\n\nWritten by `python results/collect.py` from the reports of finished runs."
    DETAILS.write_text("\n\n".join([title, *details]) + "\n")


if __name__ == "__main__":
    main()
