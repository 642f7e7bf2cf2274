"""Wheel and sdist: what is in them, and that they work where nothing else is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = (ROOT / "constraints.txt").read_text()
CPU = "https://download.pytorch.org/whl/cpu"
EVENTS = "\n".join(f"u{u},i{(u * 3 + n) % 20},{n}" for u in range(12) for n in range(6))

pytestmark = [pytest.mark.slow, pytest.mark.network]


def ran(*command: object, **options: object) -> str:
    """Run a command; return what it printed, or fail with what it said."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both; the wheel is built from the sdist, so that this has all that is needed."""
    out = tmp_path_factory.mktemp("dist")
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    ran(uv, "build", "--out-dir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel with what it depends on, and nothing else, into a new environment."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch = next(line for line in PINNED.splitlines() if line.startswith("torch=="))
    if sys.platform == "linux":  # the ordinary build brings gigabytes of CUDA
        asked = [*pip, "--no-deps", f"{torch}+cpu"]
        if subprocess.run([*map(str, asked)], capture_output=True).returncode:
            ran(*asked, "--index-url", CPU)
    ran(*pip, "-c", ROOT / "constraints.txt", wheel)
    return folder / "bin"


def test_the_wheel_has_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "l2rec",
        f"l2rec-{PROJECT['version']}.dist-info",
    }
    tracked = ran("git", "ls-files", "src/l2rec", cwd=ROOT).split()
    assert {f"src/{name}" for name in names if name.startswith("l2rec/")} == set(tracked)
    assert "l2rec/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_has_what_it_was_told_to(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "src/l2rec/__init__.py",
        "tests/conftest.py",
        "examples/own_method.py",
        "LICENSE",
        "README.md",
        "SECURITY.md",
        "CITATION.cff",
    } <= names
    assert not [name for name in names if name.startswith(("data/", "runs/", ".venv"))]


def test_a_clean_environment_trains_and_recommends(clean: Path, tmp_path: Path) -> None:
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\n{EVENTS}\n")

    def run(*command: object) -> str:
        return ran(clean / command[0], *command[1:], cwd=tmp_path, env=outside)  # type: ignore[operator]

    where = run("python", "-c", "import l2rec; print(l2rec.__file__, l2rec.__version__)")
    assert str(clean.parent) in where and where.split()[1] == PROJECT["version"]
    assert "l2rec-plus" in run("l2rec", "recipes")
    run("l2rec", "prepare", "log.csv", "--out", "data")
    run("l2rec", "train", "sasrec", "--data", "data", "--out", "run", "training.max_steps=3")
    assert '"items"' in run("l2rec", "recommend", "run", "--user", "u1", "--json")
    assert "items by popularity" in run("l2rec", "diagnose", "run")
    run("l2rec", "publish", "run", "--out", "published")
    loaded = "import l2rec; print(len(l2rec.load('published').recommend(['i1'], 3).items))"
    assert run("python", "-c", loaded).strip() == "3"
    refused = subprocess.run(
        [clean / "l2rec", "serve", "run"], capture_output=True, text=True, cwd=tmp_path, env=outside
    )
    assert refused.returncode == 2 and "pip install 'l2rec[serve]'" in refused.stderr


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_each_extra_alone_can_be_installed(extra: str, wheel: Path, tmp_path: Path) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    ran(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    asked = f"{PROJECT['name']}[{extra}] @ {wheel.as_uri()}"
    done = subprocess.run(
        [uv, "pip", "install", "--dry-run", "--python", python, asked],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "l2rec" in done.stderr
