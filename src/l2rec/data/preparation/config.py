"""Options of preparing a log."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from l2rec.data.formats.columns import Columns, Quotes
from l2rec.data.moments import moment
from l2rec.data.ties import Ties


class PrepareConfig(BaseModel):
    """Options of filtering a log and of making item texts; all are written to dataset.json.

    ``k_core``: drop users and items with fewer events, again and again, until none is left.
    ``min_history``: likewise for users alone. ``max_history``: keep each user's newest events.
    ``text``: a template over catalog fields, such as ``"{title}. {brand}"``, of which empty fields
    are left out with what joins them; by default all fields that are not empty, joined by ". ".
    ``drop_unknown_items``: drop events of items that the catalog does not have, instead of
    refusing. ``drop_textless``: drop items without text.
    ``keep_all_items``: keep catalog items without events. ``duplicate_items``: what to do about
    different catalog rows with one id. ``only``: keep events of these types alone. ``before``:
    keep earlier events (a time in the log's unit, or a date such as 2023-11-28, midnight UTC).
    ``splits``: keep the splits that a log comes with (``given``), or do not (``none``).
    ``ties``: order of a user's events with equal time: that of the file, by item id, or by a hash
    of user id, item id and occurrence that depends on ``ties_seed`` and not on the file.
    ``user`` to ``quotes``: see `Columns`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    k_core: int = Field(default=0, ge=0)
    min_history: int = Field(default=0, ge=0)
    max_history: int | None = Field(default=None, ge=1)
    text: str | None = None
    drop_unknown_items: bool = False
    drop_textless: bool = False
    keep_all_items: bool = False
    duplicate_items: Literal["error", "first"] = "error"
    only: tuple[str, ...] = ()
    before: float | None = None
    splits: Literal["given", "none"] = "given"
    ties: Ties = "file"
    ties_seed: int = Field(default=0, ge=0, lt=1 << 64)
    user: str = Columns.user
    item: str = Columns.item
    timestamp: str | None = Columns.timestamp
    event_type: str | None = Columns.event_type
    encoding: str = Columns.encoding
    quotes: Quotes = Columns.quotes

    @field_validator("timestamp", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        # On a command line, None is spelled as a word.
        return None if isinstance(value, str) and value.lower() in ("none", "null", "") else value

    @field_validator("before", mode="before")
    @classmethod
    def _seconds_of_a_date(cls, value: Any) -> Any:
        return moment(value) if isinstance(value, str) else value
