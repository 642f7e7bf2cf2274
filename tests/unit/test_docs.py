"""What the documents promise of the code, held to it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from tests.support import experiments

from l2rec.methods.l2rec import L2RecConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_option_of_l2rec_is_in_the_table_with_its_default() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (paper|ablation|ours) \| (.+) \|$", text, re.M)
    documented = {name: yaml.safe_load(default) for name, default, _, _ in rows}
    defaults = L2RecConfig().model_dump(mode="json")
    assert documented == defaults
    assert list(documented) == list(defaults), "in the order of the code"
    assert len(defaults) <= 33, "options that no kept result needs go"


def test_the_floors_in_the_document_are_those_that_were_measured() -> None:
    assert experiments.collector().floors_table() in (ROOT / "docs" / "ties.md").read_text()


def test_a_blend_was_untrained_what_its_run_was() -> None:
    score = {"ndcg@10": 0.2}
    blended = {"M + co-occurrence": score, "M": score, "popularity": score}
    report = {"method": "M + co-occurrence", "scores": {**blended, "untrained": {"ndcg@10": 0.1}}}
    assert experiments.collector().untrained(report) == 0.1


def test_the_pictures_of_the_readme_are_there_in_both_themes_and_small() -> None:
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', (ROOT / "README.md").read_text())
    files = [ROOT / path for path in shown]
    assert {path.stem for path in files} == {
        f"{name}-{theme}" for name in ("demo", "report", "page") for theme in ("light", "dark")
    }
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        if path.suffix == ".svg":
            text = path.read_text()
            assert "$ l2rec demo" in text.replace("&#160;", " ")
            assert "@font-face" not in text and "url(http" not in text, "it fetches nothing"


def test_files_that_documents_name_exist() -> None:
    missing = []
    for document in DOCUMENTS:
        for path in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]+)`", document.read_text()):
            if not (ROOT / path).exists():
                missing.append(f"{document.name}: {path}")
    assert not missing


def test_modules_that_documents_name_exist() -> None:
    missing = []
    for document in DOCUMENTS:
        for name in re.findall(r"`(l2rec(?:\.\w+)+)", document.read_text()):
            parts = name.split(".")
            folder = ROOT / "src"
            while parts and (folder / parts[0]).is_dir():
                folder /= parts.pop(0)
            if parts and not (folder / f"{parts[0]}.py").is_file() and folder.name != "l2rec":
                missing.append(f"{document.name}: {name}")
    assert not missing
