"""Keep the reports of finished runs here and write their table into the README.

    python results/collect.py NAME=RUN [NAME=RUN ...]     copy report.json and metrics.jsonl of runs
    python results/collect.py                             write the table again from what is here

Only scores and counts are kept: nothing of the data set, no texts, no ids.
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
COLUMNS = ["recall@10", "ndcg@10", "mrr", "recall@10_masked", "ndcg@10_masked"]


def keep(name: str, run: Path) -> None:
    """Copy the two files of a run that hold its numbers."""
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("report.json", "metrics.jsonl"):
        shutil.copyfile(run / file, folder / file)


def section(folder: Path) -> str:
    """One run as Markdown: scores beside the floors, and how they were made."""
    report = json.loads((folder / "report.json").read_text())
    data, backbone = report["dataset"], report["backbone"]
    head = " | ".join(c.replace("_masked", " masked") for c in COLUMNS)
    lines = [
        f"**{folder.relative_to(HERE).as_posix()}**, {data['users']:,} users, {data['items']:,} "
        f"items, {data['events']:,} events, fingerprint `{data['fingerprint']}`, test:",
        "",
        f"| | {head} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, scores in report["scores"].items():
        shown = f"**{name}**" if name == report["method"] else name
        lines.append(f"| {shown} | " + " | ".join(f"{scores[c]:.4f}" for c in COLUMNS) + " |")
    lines += [
        "",
        f"`{report['command']}`: seed {report['seed']}, {backbone['name']} in {backbone['dtype']}, "
        f"{backbone['trained_parameters']:,} trained parameters, best step "
        f"{report['best_step']} of {report['steps']} (stopped: {report['stopped']}), "
        f"{report['training_seconds'] / 60:.0f} minutes of training and "
        f"{report['validation_seconds'] / 60:.0f} of validation, "
        f"{report['tokens_seen'] / 1e6:.1f}M tokens, peak memory "
        f"{report['peak_memory_mb'] / 1000:.1f} GB, {report['hardware']}, {report['date']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Copy what is named, then write the table."""
    for argument in sys.argv[1:]:
        name, _, run = argument.partition("=")
        keep(name, Path(run))
    sections = [section(path.parent) for path in sorted(HERE.rglob("report.json"))]
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if END in rest else rest
    README.write_text(before + BEGIN + "\n" + "\n\n".join(sections) + "\n" + END + after)


if __name__ == "__main__":
    main()
