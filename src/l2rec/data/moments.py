"""Points in time, written as a date or as a number."""

from __future__ import annotations

__all__ = ["moment", "shown"]

import datetime

from l2rec.errors import DataError


def moment(text: str) -> float:
    """Parse a number of seconds since 1970, or a date such as 2023-11-28 (midnight UTC).

    Raises:
        DataError: it is neither.
    """
    try:
        return float(text)
    except ValueError:
        pass
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise DataError(
            f"{text!r} is no time; write a date such as 2023-11-28, or seconds"
        ) from None
    return date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp()


def shown(seconds: float) -> str:
    """Write seconds since 1970 as a date, with the time of the day unless it is midnight (UTC)."""
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{at:%Y-%m-%d}" if at.time() == datetime.time() else f"{at:%Y-%m-%dT%H:%M:%SZ}"
