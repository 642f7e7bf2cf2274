"""What the distribution promises: one version, closed pins, files that ship."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import l2rec

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ("help", "demo", "test", "check", "fix", "bench", "clean", "dist")
TARGETS += ("check-slow", "check-lowest", "check-newest")
EXACT_PIN = re.compile(r"^[A-Za-z0-9_.-]+==[A-Za-z0-9.]+$")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(text) for texts in lists for text in texts]
    return [each for each in found if each.name != PROJECT["name"]]


def test_version_is_the_top_of_the_changelog() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == PROJECT["version"]


def test_the_package_says_the_version() -> None:
    assert l2rec.__version__ == PROJECT["version"]


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["references"][0]["doi"] == "10.1145/3805712.3809943"


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_pin_satisfies_requirement(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_constraints_are_exact_and_free_of_cuda() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pinned if not EXACT_PIN.match(line)] == []
    assert [name for name in pins() if name.startswith(("nvidia", "triton", "cuda"))] == []


def test_pins_are_for_the_oldest_python_too() -> None:
    """Debian 12's is 3.11.2: what asks for a later 3.11 cannot be installed there."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    needed = {
        each.metadata["Name"]: each.metadata["Requires-Python"]
        for each in metadata.distributions()
        if pins().get(canonicalize_name(each.metadata["Name"])) == each.version
    }
    assert len(needed) > 50
    assert [
        n for n, spec in needed.items() if spec and not SpecifierSet(spec).contains(oldest)
    ] == []


def test_package_data_ships() -> None:
    package = resources.files("l2rec")
    assert package.joinpath("py.typed").is_file()
    for name in ("report.html.j2", "parts.html.j2", "style.css.j2", "card.md.j2"):
        assert package.joinpath("runs", name).is_file()
    assert package.joinpath("studies", "page.html.j2").is_file()
    assert package.joinpath("experiments", "l2rec-table2.yaml").is_file()


def test_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    made = subprocess.run(
        ["make", "venv", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode != 0
    assert "older than 3.11; set another: make PYTHON=python3.11" in made.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("name", ["check", "weekly", "release"])
def test_a_workflow_calls_targets_that_exist(name: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = [step["run"] for step in steps if step.get("run", "").startswith("make ")]
    assert called
    for command in called:
        subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "page", ["SECURITY.md", "GOVERNANCE.md", "CONTRIBUTING.md", "CITATION.cff"]
)
def test_page_of_the_project_exists_and_its_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / link).exists(), link
