"""Lines and quotes of separated text, counted while it is read.

A parser that meets a stray quote takes all lines up to the next one for a single cell, and says
nothing. So the bytes that it reads are looked at on the way: where quotes open and close, and how
many lines they hold. Blocks without a quote cost a search for one byte.
"""

from __future__ import annotations

import io
import re
import threading
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from l2rec.data.formats.files import Rewritten

Places = npt.NDArray[np.int64]
QUOTE, LINE_FEED, RETURN = b'"'[0], b"\n"[0], b"\r"[0]
PIECE_BYTES = 1 << 16
"""Bytes whose quotes are looked at together: few enough to stay in the processor's cache."""
A_TIME = re.compile(rb"\s*(-?\d+(\.\d*)?([eE][+-]?\d+)?|\d{4}-\d\d-\d\d([T ].*)?)\s*")


@dataclass(frozen=True)
class BrokenQuote:
    """A quote that does not pair up. ``opened``, ``at``: offsets in the text; ``what``: the fault.

    ``escaped``: whether the quote at ``at`` follows a backslash.
    """

    opened: int
    at: int
    what: str
    escaped: bool = False


class Doubled(Rewritten):
    r"""A stream of separated text in which backslashes escape quotes, with doubled quotes instead:
    ``\"`` becomes ``""`` and ``\\`` a single backslash; all others stay.
    """

    def __init__(self, rest: BinaryIO) -> None:
        super().__init__(rest)
        self._waiting = b""  # a backslash at the end of a block, until the next character

    def rewrite(self, block: bytes) -> bytes:
        text = self._waiting + block
        ends = len(text) - len(text.rstrip(b"\\"))
        cut = len(text) - ends % 2 if block else len(text)
        self._waiting = text[cut:]
        return _ESCAPED.sub(_doubled, text[:cut])


_ESCAPED = re.compile(rb'\\(["\\])')


def _doubled(escaped: re.Match[bytes]) -> bytes:
    return b'""' if escaped[1] == b'"' else b"\\"


class Watched(io.RawIOBase):
    """A stream of separated text whose lines and quotes are counted.

    ``head``: bytes of the stream that were read already and are put back. ``cells``: columns.
    ``time``: which of them is the time; a line inside quotes that has all cells and a number or
    date in this one is a row that a stray quote swallowed. None: any line with all cells is.

    ``lines``: line feeds so far. ``inside``: those of them that stand inside quotes.
    ``first_inside``: offset of the cell with the first of these. ``broken``: the first fault.
    ``swallowed``: offsets of the first cell that holds a whole row, and of that row.
    """

    def __init__(
        self,
        head: bytes,
        rest: BinaryIO,
        separator: str,
        cells: int,
        *,
        quotes: bool,
        time: int | None = None,
    ) -> None:
        self._head, self._rest = head, rest
        self._separator, self._cells, self._time = separator.encode()[0], cells, time
        self._quotes = quotes
        self._lock = threading.Lock()  # Arrow reads ahead on a thread of its own
        # The last two bytes: the first is looked at already, the second waits for the next one.
        self._carry = b"\n\n"
        self._read = -2  # offset of the carry
        self._open = False
        self._opened = 0
        self._ends = b"\n"
        self.lines = self.inside = 0
        self.first_inside: int | None = None
        self.broken: BrokenQuote | None = None
        self.swallowed: tuple[int, int] | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            block, self._head = self._head, b""
            if size < 0:
                block += self._rest.read()
            elif len(block) < size:
                block += self._rest.read(size - len(block))
            else:
                block, self._head = block[:size], block[size:]
            if block:
                self._see(block)
            return block

    def finish(self) -> None:
        """Read to the end, unless a fault is known; after it the counts are final."""
        while self.broken is None and self.read(1 << 20):
            pass
        if self._ends != b"\n":
            self.lines += 1
        if not self._quotes or self.broken is not None:
            return
        self._look(self._carry + b"\n")
        if self._open and self.broken is None:
            self.broken = BrokenQuote(self._opened, self._read, "is not closed")

    def _see(self, block: bytes) -> None:
        self.lines += block.count(b"\n")
        self._ends = block[-1:]
        if not self._quotes or self.broken is not None:
            return
        if not self._open and self._carry[1] != QUOTE and b'"' not in block:
            self._read += len(block)
            self._carry = (self._carry + block[-2:])[-2:]
            return
        for at in range(0, len(block), PIECE_BYTES):
            if self.broken is None:
                self._look(self._carry + block[at : at + PIECE_BYTES])

    def _look(self, text: bytes) -> None:
        """Follow the quotes of ``text`` but for its first and last byte, which are context."""
        bytes_ = np.frombuffer(text, np.uint8)
        at = np.flatnonzero(bytes_[1:-1] == QUOTE) + 1
        opens = (np.arange(len(at)) + self._open) % 2 == 0
        before, after = bytes_[at - 1], bytes_[at + 1]
        # A doubled quote is one that closes and one that opens again at once.
        again = opens & (before == QUOTE)
        starts = opens & self._edge(before)
        if np.all(starts | again | (~opens & (self._edge(after) | (after == QUOTE)))):
            literal = False
        else:
            at, starts, literal = self._one_by_one(text, at)
        if self.broken is None:
            self._lines_inside(bytes_, at, starts)
            if len(at):
                self._open ^= bool(len(at) % 2)
            if starts.any():
                self._opened = self._read + int(at[starts][-1])
        self._read += len(text) - 2
        self._carry = (b"x" if literal else text[-2:-1]) + text[-1:]

    def _edge(self, bytes_: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Tell which bytes end a cell."""
        edges: npt.NDArray[np.bool_] = bytes_ == self._separator
        edges |= bytes_ == LINE_FEED
        edges |= bytes_ == RETURN
        return edges

    def _one_by_one(self, text: bytes, at: Places) -> tuple[Places, npt.NDArray[np.bool_], bool]:
        """Find the quotes that count, where some stand within a cell, and the first fault.

        Returns them, whether each opens a cell, and whether the last but one byte is a quote that
        does not count.
        """
        edges = (self._separator, LINE_FEED, RETURN)
        is_open, opened, closed = self._open, self._opened, 0 if text[0] == QUOTE else -2
        count, starts = [], []
        for i in at.tolist():
            if is_open:
                if text[i + 1] not in edges and text[i + 1] != QUOTE:
                    self.broken = BrokenQuote(
                        opened, self._read + i, "goes on after it closed", text[i - 1 : i] == b"\\"
                    )
                    break
                is_open, closed = False, i
            elif text[i - 1] in edges:
                is_open, opened = True, self._read + i
            elif closed == i - 1:
                is_open = True
            else:
                continue
            count.append(i)
            starts.append(is_open and closed != i - 1)
        last = len(text) - 2
        literal = text[last] == QUOTE and (not count or count[-1] != last)
        return np.array(count, np.int64), np.array(starts, np.bool_), literal

    def _lines_inside(self, bytes_: npt.NDArray[np.uint8], at: Places, starts: Any) -> None:
        """Count the line feeds inside quotes; look for a line among them that is a whole row."""
        feeds = np.flatnonzero(bytes_[1:-1] == LINE_FEED) + 1
        quote = np.searchsorted(at, feeds)  # quotes before each line feed
        within = (quote + self._open) % 2 == 1
        feeds, quote = feeds[within], quote[within]
        if not len(feeds):
            return
        self.inside += len(feeds)
        cell_starts = at[starts]

        def opened(place: int) -> int:
            before = int(np.searchsorted(cell_starts, place))
            return self._read + int(cell_starts[before - 1]) if before else self._opened

        if self.first_inside is None:
            self.first_inside = opened(int(feeds[0]))
        if self.swallowed is not None:
            return
        # Each line from a line feed to the next one, or to the quote after it.
        closing = np.append(at, len(bytes_) - 1)[quote]
        following = np.append(feeds[1:], len(bytes_) - 1)
        ends = np.minimum(following, closing)
        separators = np.flatnonzero(bytes_ == self._separator)
        many = np.searchsorted(separators, ends) - np.searchsorted(separators, feeds)
        for place in np.flatnonzero(many == self._cells - 1).tolist():
            line = bytes_[feeds[place] + 1 : ends[place]].tobytes()
            cells = line.split(bytes([self._separator]))
            if self._time is None or A_TIME.fullmatch(cells[self._time]):
                self.swallowed = opened(int(feeds[place])), self._read + int(feeds[place]) + 1
                return
