"""Charts of lines as coordinates; the macros of ``parts.html.j2`` draw them as inline SVG."""

from __future__ import annotations

__all__ = [
    "Chart",
    "Frame",
    "Line",
    "Mark",
    "Point",
    "Tick",
    "axes",
    "padded",
    "placed",
    "rendered",
    "scaled",
    "ticks",
    "y_axis",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

Point = tuple[float, float]


def rendered(template: str, page: Any) -> str:
    """Render a template of the package, such as ``runs/report.html.j2``, with a ``page``."""
    environment = Environment(
        autoescape=True,
        loader=PackageLoader("l2rec", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(page=page)


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in the units of the drawing."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A path in SVG notation; ``style`` is its class in the template."""

    path: str
    style: str
    name: str


@dataclass(frozen=True)
class Mark:
    """A dot of the validation curve; the model of step 0 and the best step have a label."""

    x: float
    y: float
    label_y: float
    anchor: str
    text: str
    style: str


@dataclass(frozen=True)
class Frame:
    """The rectangle that data are drawn into, and the ranges of its axes."""

    x_range: Point
    y_range: Point
    width: float = 480
    height: float = 260
    left: float = 52
    right: float = 466
    top: float = 16
    bottom: float = 222

    def x(self, value: float) -> float:
        return round(scaled(value, self.x_range, (self.left, self.right)), 1)

    def y(self, value: float) -> float:
        return round(scaled(value, self.y_range, (self.bottom, self.top)), 1)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x):g} {self.y(y):g}" for x, y in points)


@dataclass(frozen=True)
class Chart:
    """Lines over an axis."""

    title: str
    summary: str
    note: str
    x_label: str
    frame: Frame
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    marks: list[Mark]


def scaled(value: float, source: Point, target: Point) -> float:
    """Map a value of one range to the same place in another."""
    span = source[1] - source[0]
    share = (value - source[0]) / span if span else 0.5
    return target[0] + share * (target[1] - target[0])


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about ``count`` round numbers (1, 2 or 5 times 10^n) between ``low`` and ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def padded(values: Sequence[float]) -> Point:
    """Return the range of an axis that shows all values, with some room around them."""
    low, high = min(values), max(values)
    room = (high - low) or 0.5 * abs(high) or 1.0
    return low - 0.16 * room, high + 0.1 * room


def axes(frame: Frame) -> tuple[list[Tick], list[Tick]]:
    """Label whole numbers of steps, and values with the digits they need."""
    steps = [t for t in ticks(*frame.x_range) if t == int(t)]
    return [Tick(frame.x(t), f"{t:,.0f}") for t in steps], y_axis(frame)


def y_axis(frame: Frame) -> list[Tick]:
    """Label values with the digits they need."""
    values = ticks(*frame.y_range)
    digits = max((len(f"{v:g}".partition(".")[2]) for v in values), default=0)
    return [Tick(frame.y(v), f"{v:.{digits}f}") for v in values]


def placed(frame: Frame, point: Point, text: str, style: str) -> Mark:
    """Place a mark so that its label stays inside the frame."""
    x, y = frame.x(point[0]), frame.y(point[1])
    share = (x - frame.left) / (frame.right - frame.left)
    anchor = "start" if share < 0.2 else "end" if share > 0.8 else "middle"
    below = style == "start" and y < frame.bottom - 24
    return Mark(x, y, y + 19 if below else max(y - 11, frame.top), anchor, text, style)
