"""Prints what the finished runs of a folder answer, as JSON: scores, recommendations, vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HISTORY = "i1,i2,i3"


def l2rec(*words: str) -> Any:
    done = subprocess.run(["l2rec", *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for run in sorted((folder / "finished").iterdir()):
        found[run.name] = {
            "valid": l2rec("evaluate", str(run), "--split", "valid", "--data", "data", "--json"),
            "test": l2rec("evaluate", str(run), "--data", "data", "--json"),
            "recommend": l2rec(
                "recommend", str(run), "--history", HISTORY, "-k", "24", "--include-seen", "--json"
            ),
            "report": json.loads((run / "report.json").read_text())["scores"],
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
