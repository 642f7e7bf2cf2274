"""Times of events as seconds since 1970: numbers, Arrow's own times, and texts that are dates."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa

from l2rec.data.formats.files import Where
from l2rec.errors import DataError

_ISO = (
    r"^(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2})(:\d{2}(?:\.\d+)?)?)?"
    r" ?(Z|UTC|[+-]\d{2}(?::?\d{2})?)?$"
)
_ADVICE = (
    "give seconds since 1970 or, in all rows, dates such as 2023-11-28 or 2023-11-28T23:08:57Z (or "
    "pass --timestamp none if the events are in order and have no times)"
)


PLAIN_SECONDS = (9e8, 3e9)
"""Numbers that are seconds of 1998 to 2065, and finer units of no event: of January 1970."""
RUN_TOGETHER = (19700101000000, 21000101000000)
"""Numbers that are dates without separators: as milliseconds they are of the years 2594 to 2635."""
MILLISECONDS_FROM = 1e11
"""A time from which milliseconds are meant: in seconds it is the year 5138, in these 1973."""


def in_milliseconds(time: str) -> bool:
    """Tell whether a time is a number of milliseconds since 1970, by its size."""
    try:
        return float(time) >= MILLISECONDS_FROM
    except ValueError:
        return False


class Clock:
    """Reader of one column of times, batch after batch, which holds it to one form."""

    def __init__(self) -> None:
        self._form: str | None = None
        self._example = ""
        self._of_scale: dict[str, str] = {}

    def seconds(
        self, times: pa.Array, where: Where, unit: int = 1
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return seconds. ``unit``: how many of a number are a second; dates need none.

        Raises:
            DataError: a time is neither a number nor a date, or some are numbers and some dates,
                or some numbers are seconds and some of a finer unit.
        """
        if isinstance(times.type, pa.BaseExtensionType):  # whose numbers count something else
            raise DataError(f"{where(0)}: timestamps of type {times.type}; {_ADVICE}")
        column = cast(pl.Series, pl.from_arrow(times))
        if column.dtype in (pl.Categorical, pl.Enum):
            column = column.cast(pl.String)
        if column.dtype in (pl.Date, pl.Datetime):
            seconds = column.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
            self._check_form("a date", column, seconds, where)
        elif column.dtype.is_nested() or column.dtype.is_temporal() or column.dtype == pl.Binary:
            raise DataError(f"{where(0)}: timestamps of type {column.dtype}; {_ADVICE}")
        else:
            column = column.str.strip_chars() if column.dtype == pl.String else column
            seconds = column.cast(pl.Float64, strict=False)
            self._check_form("a number", column, seconds, where)
            if column.dtype == pl.String and seconds.null_count():
                dates = seconds_of_dates(column)
                self._check_form("a date", column, dates, where)
                seconds = seconds.fill_null(dates)
        wrong = ~seconds.is_finite().fill_null(False)
        if wrong.any():
            row = cast(int, wrong.arg_max())
            value = column[row]
            shown = "is missing" if value is None or value == "" else f"{value!r} is not a number"
            if self._form == "a date" and not shown.startswith("is"):
                shown = f"{value!r} is not a date"
            raise DataError(f"{where(row)}: timestamp {shown}; {_ADVICE}")
        if unit == 1 and self._form == "a number":
            self._check_scale(column, seconds.to_numpy(), where)
        # NumPy divides where Polars multiplies by a fraction: the nearest number, as others read
        # 0.288 from text.
        return seconds.to_numpy() / (unit if self._form == "a number" else 1)

    def _check_form(self, form: str, column: pl.Series, seconds: pl.Series, where: Where) -> None:
        """Raise DataError where times of this form follow others of the other form."""
        row = seconds.is_not_null().arg_max()
        if row is None or seconds[row] is None:
            return
        if self._form is None:
            self._form, self._example = form, f"{column[row]!r} ({where(row)})"
        elif self._form != form:
            raise DataError(
                f"{where(row)}: timestamp {column[row]!r} is {form}, but {self._example} is "
                f"{self._form}; write all times in one form, as seconds since 1970 or as dates"
            )

    def _check_scale(
        self, column: pl.Series, numbers: np.ndarray[Any, np.dtype[np.float64]], where: Where
    ) -> None:
        """Raise DataError where some numbers are seconds and some of a finer unit, or are dates
        without separators.
        """
        low, high = RUN_TOGETHER
        together = (numbers >= low) & (numbers < high) | _are_days(numbers)
        for at in np.flatnonzero(together)[:1]:
            raise DataError(
                f"{where(int(at))}: timestamp {column[int(at)]!r} looks like a date without "
                f"separators; {_ADVICE}"
            )
        for scale, found in (
            ("seconds", (numbers >= PLAIN_SECONDS[0]) & (numbers < PLAIN_SECONDS[1])),
            ("a finer unit", numbers >= MILLISECONDS_FROM),
        ):
            at = int(found.argmax()) if len(found) else 0
            if len(found) and found[at] and scale not in self._of_scale:
                self._of_scale[scale] = f"{column[at]!r} ({where(at)})"
        if len(self._of_scale) > 1:
            raise DataError(
                f"timestamps in two units: {self._of_scale['seconds']} looks like seconds, "
                f"{self._of_scale['a finer unit']} like milliseconds or finer; write all in one"
            )


def _are_days(numbers: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    """Tell whether all numbers are days such as 20231128.

    Alone, such a number may be a second of August 1970 or a count; a whole log of them is not.
    """
    years, months, days = numbers // 10_000, numbers // 100 % 100, numbers % 100
    of_days = (years >= 1970) & (years < 2100) & (months >= 1) & (months <= 12)
    of_days &= (days >= 1) & (days <= 31) & (numbers % 1 == 0)
    return bool(of_days.all())


def seconds_of_dates(texts: pl.Series) -> pl.Series:
    """Turn dates and times into seconds since 1970; UTC where no offset is given.

    ISO 8601, or else the form "Sun Jul 30 07:44:10 -0700 2017" (Goodreads, Twitter). Null where a
    text is neither.
    """
    seconds = _iso(texts)
    if seconds.null_count():
        plain = texts.str.replace_all(r"\s+", " ")
        moments = plain.str.to_datetime("%a %b %d %H:%M:%S %z %Y", time_unit="us", strict=False)
        seconds = seconds.fill_null(moments.dt.epoch("us") / 1e6)
    return seconds


def _iso(texts: pl.Series) -> pl.Series:
    parts = texts.to_frame("text").select(
        pl.col("text").str.extract(_ISO, group).alias(name)
        for group, name in enumerate(("day", "time", "second", "offset"), start=1)
    )
    offset = pl.col("offset").str.replace_all(r"[Z:UTC]", "")
    minutes = offset.str.slice(1, 2).cast(pl.Float64, strict=False) * 60
    minutes += offset.str.slice(3, 2).cast(pl.Float64, strict=False).fill_null(0.0)
    sign = pl.when(offset.str.starts_with("-")).then(-1.0).otherwise(1.0)
    moment = pl.concat_str(
        pl.col("day"),
        pl.lit(" "),
        pl.col("time").fill_null("00:00"),
        pl.col("second").fill_null(":00"),
    ).str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False)
    seconds = moment.dt.epoch("us") / 1e6 - (sign * minutes * 60).fill_null(0.0)
    return parts.select(seconds.alias("seconds")).to_series()
