"""Schemas of requests and answers; every list, text and number has its limit here."""

from __future__ import annotations

__all__ = [
    "MAX_HISTORY",
    "MAX_ITEMS",
    "MAX_K",
    "Changed",
    "EmbedItems",
    "EmbedUsers",
    "Embedded",
    "Error",
    "EventIn",
    "Events",
    "ItemIn",
    "Items",
    "Recommend",
    "Recommended",
    "Status",
    "Stored",
    "Summary",
]

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_K = 500
MAX_HISTORY = 500
MAX_LIST = 10_000
MAX_HISTORIES = 64
MAX_TEXTS = 64
MAX_ITEMS = 100
MAX_EVENTS = 1000
MAX_TEXT = 10_000
MAX_ID = 256
MAX_VALUES = 100
MAX_ATTRIBUTES = 32

# No control characters: ids go into logs, URLs and databases.
Id = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_ID, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Name = Annotated[
    str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Value = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*$")]
_VISIBLE = r"^[^\x00]*[^\x00\s][^\x00]*$"
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT, pattern=_VISIBLE)]
# Without it, the schema of a mapping with a pattern for names would also allow any other name.
_NO_OTHER_NAMES: dict[str, Any] = {"additionalProperties": False}
History = Annotated[list[Id], Field(min_length=1, max_length=MAX_HISTORY)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Error(BaseModel):
    """An error: one line that says what was given, what is allowed and what to do."""

    error: str


class Recommend(_Closed):
    """A user whose history is read from the event log, or a history."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "anyOf": [
                {"required": ["user"], "properties": {"user": {"type": "string"}}},
                {"required": ["history"], "properties": {"history": {"type": "array"}}},
            ],
            "examples": [
                {"history": ["50", "172", "181"], "k": 5},
                {"user": "u42", "k": 10, "deny": ["50"]},
                {
                    "user": "u42",
                    "history": ["50", "172"],
                    "filters": {"genres": ["Comedy", "Drama"]},
                },
            ],
        },
    )

    user: Id | None = None
    """User whose history is read, unless one is given, and who is assigned to an arm."""
    history: History | None = None
    """Item ids, oldest first."""
    k: int = Field(10, ge=1, le=MAX_K)
    exclude_seen: bool = True
    """Leave out the items of the history."""
    allow: Annotated[list[Id], Field(max_length=MAX_LIST)] | None = None
    """Ids outside which nothing is recommended; unknown ids are ignored."""
    deny: Annotated[list[Id], Field(max_length=MAX_LIST)] = []
    """Ids that are not recommended."""
    filters: Annotated[
        dict[Name, Annotated[list[Value], Field(min_length=1, max_length=MAX_VALUES)]],
        Field(max_length=MAX_ATTRIBUTES, json_schema_extra=_NO_OTHER_NAMES),
    ] = {}
    """Attribute -> values: an item must have one of the values of every attribute."""
    experiment: Name | None = None
    """The experiment to take part in; the one that runs, if left out."""

    @model_validator(mode="after")
    def _somebody(self) -> Recommend:
        if self.user is None and self.history is None:
            raise ValueError("give a user or a history")
        return self


class Recommendation(BaseModel):
    """One recommended item."""

    id: str
    score: float
    text: str


class Arm(BaseModel):
    """The experiment and the arm that the user is in."""

    name: str
    arm: Literal["treatment", "control"]


class Recommended(BaseModel):
    """Recommended items, best first. ``gate``: 1 all behavioural, 0 all semantic."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [{"id": "7", "score": 0.71, "text": "Solaris (1972), Sci-Fi"}],
                    "gate": 0.55,
                    "version": "0f3a6d1c2b4e5f60",
                    "experiment": None,
                    "request": "9f0c8b7a6d5e4f3a2b1c0d9e8f7a6b5c",
                }
            ]
        }
    )

    items: list[Recommendation]
    gate: float | None
    version: str
    experiment: Arm | None
    request: str


class EmbedUsers(_Closed):
    """Histories of item ids, oldest first."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"histories": [["50", "172"], ["181"]]}]},
    )
    histories: Annotated[list[History], Field(min_length=1, max_length=MAX_HISTORIES)]


class EmbedItems(_Closed):
    """Raw texts; they need not be in the catalog, and are not added to it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"texts": ["Solaris (1972), Sci-Fi"]}]},
    )
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class Embedded(BaseModel):
    """Vectors, in the order of the request; scores are inner products."""

    vectors: list[list[float]]
    version: str


class ItemIn(_Closed):
    """An item to add or change."""

    id: Id
    text: Text
    attributes: Annotated[
        dict[Name, Value], Field(max_length=MAX_ATTRIBUTES, json_schema_extra=_NO_OTHER_NAMES)
    ] = {}


class Items(_Closed):
    """Items to add, or to replace those of the same id."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {
                            "id": "n1",
                            "text": "Solaris (1972), Sci-Fi",
                            "attributes": {"genres": "Sci-Fi|Drama"},
                        }
                    ]
                }
            ]
        },
    )
    items: Annotated[list[ItemIn], Field(min_length=1, max_length=MAX_ITEMS)]

    @model_validator(mode="after")
    def _distinct(self) -> Items:
        ids = [item.id for item in self.items]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"item {twice!r} is given twice")
        return self


class EventIn(_Closed):
    """An event. An ``id`` that is stored already is ignored, so that events can be sent again."""

    id: Id
    user: Id
    item: Id
    type: Literal["exposure", "click", "reply"]
    timestamp: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)] | None = None
    """Unix seconds; now, if left out."""
    request: Id | None = None
    """``request`` of the answer that the event is about."""
    experiment: Name | None = None
    arm: Literal["treatment", "control"] | None = None


class Events(_Closed):
    """Events to store."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {
                            "id": "e-1",
                            "user": "u42",
                            "item": "50",
                            "type": "click",
                            "timestamp": 1767225600.0,
                        }
                    ]
                }
            ]
        },
    )
    events: Annotated[list[EventIn], Field(min_length=1, max_length=MAX_EVENTS)]


class Stored(BaseModel):
    """Number of events stored, on disk when this is answered. ``ignored``: stored before."""

    stored: int
    ignored: int


class Changed(BaseModel):
    """Number of items changed, and the version that serves them."""

    items: int
    version: str


class Status(BaseModel):
    """Answer of a probe."""

    status: str
    version: str


class Summary(BaseModel):
    """State of an experiment. ``result``: that of `l2rec abtest`. ``treatment``: planned share of
    the users, null where the log does not know it. ``served``: what served the arms, and from when.
    """

    name: str
    running: bool
    treatment: float | None
    served: list[dict[str, Any]]
    events: int
    result: dict[str, Any] | None
    reason: str | None
