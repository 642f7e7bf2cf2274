"""What stands in examples/, run as a reader would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.glob("*.py") if p.name != "shop.py")
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
WRITTEN = {
    "your_csv": "recommendations.csv",
    "compare_methods": "comparison.md",
    "embed_and_index": "index/index.json",
    "cold_items": "run/report.html",
    "own_method": "run/report.html",
}
"""A file that each script writes in the end."""


def test_there_are_five_scripts_and_two_notebooks_and_the_page_names_all() -> None:
    assert {p.stem for p in SCRIPTS} == WRITTEN.keys()
    page = (EXAMPLES / "README.md").read_text()
    for path in (*SCRIPTS, *NOTEBOOKS):
        assert path.name in page
    assert len(NOTEBOOKS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(script: Path, tmp_path: Path) -> None:
    for _ in ("anew", "again"):
        done = subprocess.run(
            [sys.executable, script, tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / WRITTEN[script.stem]).is_file()
        assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "it writes where it was told to"


@pytest.mark.slow
def test_a_new_item_comes_before_most_others_by_its_text(tmp_path: Path) -> None:
    script = EXAMPLES / "cold_items.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=True
    )
    ranks = [int(line.split()[-3]) for line in done.stdout.splitlines() if " rank " in line]
    of = int(done.stdout.split()[-1])
    assert len(ranks) == 15
    assert sum(ranks) / len(ranks) < of / 4, "by chance it is a half"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    source = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", source)
    cells = nbformat.read(notebook, as_version=4)
    nbformat.validate(cells)
    client = nbclient.NotebookClient(
        cells, timeout=600, resources={"metadata": {"path": str(notebook.parent)}}
    )
    client.execute()  # raises where a cell does
    assert any(cell.get("outputs") for cell in cells.cells)
