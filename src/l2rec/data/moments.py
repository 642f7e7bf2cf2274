"""Points in time, written as a date or as a number."""

from __future__ import annotations

__all__ = ["moment", "shown"]

import datetime
import math

from l2rec.errors import DataError


def moment(text: str, per_second: float = 1.0) -> float:
    """Parse a number, or a date such as 2023-11-28 (midnight UTC).

    ``per_second``: how many of the unit of numbers are a second; a date is returned in this unit.

    Raises:
        DataError: it is neither, or not finite.
    """
    try:
        number = float(text)
    except ValueError:
        return _seconds(text) * per_second
    if not math.isfinite(number):
        raise _no_time(text)
    return number


def _seconds(text: str) -> float:
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise _no_time(text) from None
    return date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp()


def _no_time(text: str) -> DataError:
    return DataError(f"{text!r} is no time; write a date such as 2023-11-28, or seconds")


def shown(seconds: float) -> str:
    """Write seconds since 1970 as a date, with the time of the day unless it is midnight (UTC);
    as a number where there is no such date.
    """
    try:
        at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.15g}"
    if at.time() == datetime.time():
        return f"{at:%Y-%m-%d}"
    return f"{at:%Y-%m-%dT%H:%M:%S}{f'.{at:%f}'.rstrip('0').rstrip('.')}Z"
