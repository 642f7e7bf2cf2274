"""The documentation site: every page is found, and the tutorial's commands do what it says."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support import documents

from l2rec.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def _pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in _pages(part)]  # type: ignore[attr-defined]


def test_every_document_is_in_the_contents() -> None:
    listed = _pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.glob("*.md")}
    results = {p.relative_to(ROOT).as_posix() for p in (ROOT / "results").rglob("*.md")}
    assert set(listed) == written | results | {"index.md", "commands.md"}
    assert len(listed) == len(set(listed))


def test_the_page_of_the_commands_has_every_command_and_option() -> None:
    pages = _hooks()
    text = pages["commands"]()
    names = [c.name or c.callback.__name__ for c in app.registered_commands]  # type: ignore[union-attr]
    for name in names:
        assert f"\n## {name.replace('_', '-')}\n" in text
    assert "| `--resume` |" in text


def test_links_lead_to_pages_or_become_words(tmp_path: Path) -> None:
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", site],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    home = (site / "index.html").read_text()
    assert 'href="serving/"' in home and 'href="results/"' in home
    assert 'src="pictures/demo-light.svg"' in home and (site / "pictures/demo-light.svg").is_file()
    assert "dlrm.py" in (site / "downstream" / "index.html").read_text()
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:css|js|woff2?)[^"]*)"', home)
    assert not fetched, "a page fetches nothing from elsewhere"


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    """Run its commands in their order, but for the installation and the server."""
    bash = shutil.which("bash")
    assert bash is not None
    for language, code, _ in documents.blocks(DOCS / "tutorial.md"):
        if "pip install" in code or "curl" in code:
            continue
        command = [bash, "-euc", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, code + done.stderr
    same = [
        yaml.safe_load((tmp_path / "data" / name / "dataset.json").read_text())
        for name in ("ml-100k", "films")
    ]
    assert same[0]["fingerprint"] == same[1]["fingerprint"]
    assert (tmp_path / "runs" / "films-blended" / "report.html").is_file()


def test_the_terminal_of_the_pictures_shows_what_stood_in_the_end() -> None:
    made = _script("pictures")
    green, plain = "\x1b[32m", "\x1b[0m"
    written = (
        "first\r\n\x1b[?25lbar  0/2\r\n\x1b[2K\x1b[1A\x1b[2Kline\r\n"
        f"bar  1/2\r\x1b[2Kbar  {green}2/2{plain}\r\n\x1b[?25hlast"
    )
    lines = made["screen"](written)
    assert lines == ["first", "line", f"bar  {green}2/2{plain}", "last"]
    svg = made["draw"]([*lines, "x" * (made["COLUMNS"] + 1)], made["LIGHT"])
    rows = re.findall(r">([^<>]+)</text>", svg)
    assert [row.replace("&#160;", " ").strip() for row in rows if row.strip()] == [
        *("first", "line", "bar", "2/2", "last", "x" * made["COLUMNS"], "x"),
    ]
    assert "HEIGHT" not in svg and "BACKGROUND" not in svg and "@font-face" not in svg


def _hooks() -> dict[str, Any]:
    return _script("pages")


def _script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "site" / f"{name}.py"))
