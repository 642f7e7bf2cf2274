"""A real browser, and servers of runs for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.support.service import in_thread

from l2rec.runs.predictor import load
from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.server import load_live
from l2rec.service.settings import Settings

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LAPTOP = {"viewport": {"width": 1280, "height": 800}}
TABLET = {"viewport": {"width": 900, "height": 800}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
Open = Callable[..., Any]


class Server:
    """A real server of a run or a deployment, in a thread; `reference` is another copy of its
    model.
    """

    def __init__(self, target: Path, log: EventLog, **options: Any) -> None:
        settings = Settings(**{"rate": 0, "poll": 0.1, **options})
        live, follow = load_live(target, log, settings, None)
        self.app = create_app(settings, live, log, follow=follow)
        # For what is expected: the served model belongs to the server's thread.
        assert live.version.run is not None
        self.reference = load(live.version.run)
        self._stack = ExitStack()
        self.url = self._stack.enter_context(in_thread(self.app))

    def close(self) -> None:
        self._stack.close()


WATCH = """
window.shifts = 0;
window.broken = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts += entry.value;
}).observe({ type: "layout-shift", buffered: true });
document.addEventListener("securitypolicyviolation", (event) => {
  window.broken.push(event.violatedDirective);
});
"""


def aborted(request: Any) -> bool:
    """Whether a request failed otherwise than by being given up."""
    return "ERR_ABORTED" not in str(request.failure)


def contrast(page: Any, selector: str) -> float:
    """Return that of the first visible match and what lies behind it, as WCAG counts it."""
    return float(
        page.evaluate(
            """selector => {
              const made = document.createElement("canvas");
              const canvas = made.getContext("2d", { willReadFrequently: true });
              const of = (colour) => {
                canvas.clearRect(0, 0, 1, 1);
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data];
              };
              const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
                .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
                .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
              const node = [...document.querySelectorAll(selector)].find((n) => n.offsetWidth);
              const ground = (other) => of(getComputedStyle(other).backgroundColor);
              let behind = node;
              while (ground(behind)[3] < 255) behind = behind.parentElement;
              const pair = [light(of(getComputedStyle(node).color)), light(ground(behind))];
              return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            }""",
            selector,
        )
    )
