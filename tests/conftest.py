"""What every test shares: no network, few threads, an empty run folder, and the fixtures of
``tests/support``, where all that files share is at home.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch or transformers. Under xdist each worker gets one thread:
# two workers with two threads each fight over two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
# ranx, which metrics are compared with, compiles for longer than its tests take as plain Python.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

# One commit, one outcome: drawn examples are the same in every run of the gate. New ones are drawn
# with "--hypothesis-profile=explore", by hand and before a release.
settings.register_profile("explore", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

pytest.register_assert_rewrite("tests.support")
pytest_plugins = ["tests.support.fixtures"]


@pytest.fixture
def tmp_run(tmp_path: Path) -> Path:
    """Create an empty run folder."""
    run = tmp_path / "run"
    run.mkdir()
    return run
