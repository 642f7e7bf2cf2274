"""Schemas of requests and answers; every list, text and number has its limit here."""

from __future__ import annotations

__all__ = [
    "MAX_HISTORY",
    "MAX_ITEMS",
    "MAX_K",
    "SOMEBODY",
    "Changed",
    "Closed",
    "EmbedItems",
    "EmbedUsers",
    "Embedded",
    "EmbeddedUsers",
    "EventIn",
    "Events",
    "ItemIn",
    "Items",
    "Problem",
    "Put",
    "Recommend",
    "RecommendMany",
    "Recommended",
    "RecommendedMany",
    "Somebody",
    "Status",
    "Stored",
    "Summary",
    "Unknown",
    "UsersIn",
    "UsersPut",
]

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

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


@dataclass(frozen=True)
class Matches:
    """A pattern that a text has to match; a sentence, not the pattern, says so to who breaks it."""

    pattern: str
    sentence: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        schema: CoreSchema = handler(source)
        return core_schema.no_info_after_validator_function(self._check, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {**handler(schema), "pattern": self.pattern}

    def _check(self, text: str) -> str:
        if re.fullmatch(self.pattern, text) is None:  # $ alone passes over a newline at the end
            raise ValueError(self.sentence)
        return text


# Ids go into logs, URLs and databases.
_PLAIN = Matches(r"^[^\x00-\x1f\x7f]+$", "a control character; leave it out")
Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID), _PLAIN]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64), _PLAIN]
Value = Annotated[
    str,
    StringConstraints(max_length=1000),
    Matches(r"^[^\x00]*$", "a NUL cannot be stored; leave it out"),
]
Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_TEXT),
    Matches(
        r"^[^\x00]*[^\x00\s][^\x00]*$", "a blank text, or one with a NUL: the model reads words"
    ),
]
# Without it, the schema of a mapping with a pattern for names would also allow any other name.
_NO_OTHER_NAMES: dict[str, Any] = {"additionalProperties": False}
History = Annotated[list[Id], Field(min_length=1, max_length=MAX_HISTORY)]


def _whole(value: Any) -> Any:
    """Read 5.0 as an integer, which it is in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Closed(BaseModel):
    """A body: no unknown fields, and every value of its own JSON type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Problem(BaseModel):
    """An error as in RFC 9457. detail: one line that says what was given, what is allowed and what
    to do. request: id of the request, as in the log of the server.
    """

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    request: str | None = None


Unknown = Literal["fail", "skip"]
SOMEBODY: dict[str, Any] = {
    "anyOf": [
        {"required": ["user"], "properties": {"user": {"type": "string"}}},
        {"required": ["history"], "properties": {"history": {"type": "array"}}},
    ]
}
"""What of a `Somebody` has to be there, as a JSON schema."""


class Somebody(Closed):
    """A user whose history is read from the data set and the event log, or a history."""

    user: Id | None = None
    """User whose history is read, unless one is given."""
    history: History | None = None
    """Item ids, oldest first."""
    unknown: Unknown = "fail"
    """What to do about ids of the history that the catalog does not have: refuse the request, or
    read the others. What a user's own events name is always skipped."""

    @model_validator(mode="after")
    def _somebody(self) -> Self:
        if self.user is None and self.history is None:
            raise ValueError("give a user or a history")
        return self


class Recommend(Somebody):
    """A user, who is also assigned to an arm, or a history."""

    model_config = ConfigDict(
        json_schema_extra={
            **SOMEBODY,
            "examples": [
                {"history": ["50", "172", "181"], "k": 5},
                {"user": "u42", "k": 10, "deny": ["50"]},
                {
                    "user": "u42",
                    "history": ["50", "172"],
                    "filters": {"genres": ["Comedy", "Drama"]},
                },
                {"history": ["50", "sold-out"], "unknown": "skip"},
                {"user": "new", "segment": "de"},
            ],
        },
    )

    segment: Name | None = None
    """Segment of the user, for one who is not known; that of `PUT /v1/users`, if left out."""
    k: Annotated[int, Field(ge=1, le=MAX_K), BeforeValidator(_whole)] = 10
    exclude_seen: bool = True
    """Leave out the items of the history; of a user, all items ever."""
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
    """Recommended items, best first.

    gate: 1 all behavioural, 0 all semantic. fallback: nothing is known of the user, or the method's
    search found nothing that may be listed, so these are the items with the most clicks and
    replies, by users of the segment, or by everybody where segment is null; a score is then their
    number. unknown: ids of the history that were skipped.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [{"id": "7", "score": 0.71, "text": "Solaris (1972), Sci-Fi"}],
                    "gate": 0.55,
                    "fallback": False,
                    "segment": None,
                    "unknown": [],
                    "version": "0f3a6d1c2b4e5f60",
                    "experiment": None,
                    "request": "9f0c8b7a6d5e4f3a2b1c0d9e8f7a6b5c",
                }
            ]
        }
    )

    items: list[Recommendation]
    gate: float | None
    fallback: bool
    segment: str | None
    unknown: list[str]
    version: str
    experiment: Arm | None
    request: str


class RecommendMany(Closed):
    """Several requests for recommendations."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"requests": [{"user": "u42"}, {"history": ["50", "172"], "k": 3}]}]
        }
    )
    requests: Annotated[list[Recommend], Field(min_length=1, max_length=MAX_HISTORIES)]


class RecommendedMany(BaseModel):
    """An answer, or what was wrong, for each request, in their order."""

    answers: list[Recommended | Problem]


class EmbedUsers(Closed):
    """Users whose histories are read from the data set and the event log, or histories of item ids,
    oldest first.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["users"], "properties": {"users": {"type": "array"}}},
                {"required": ["histories"], "properties": {"histories": {"type": "array"}}},
            ],
            "examples": [
                {"histories": [["50", "172"], ["181"]]},
                {"users": ["u42", "7"]},
                {"histories": [["50", "sold-out"]], "unknown": "skip"},
            ],
        },
    )
    users: Annotated[list[Id], Field(min_length=1, max_length=MAX_HISTORIES)] | None = None
    histories: Annotated[list[History], Field(min_length=1, max_length=MAX_HISTORIES)] | None = None
    unknown: Unknown = "fail"
    """What to do about ids of the histories that the catalog does not have, and about users of whom
    nothing is known: refuse the request, or read the others. What a user's own events name is
    always skipped."""

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.users is None) == (self.histories is None):
            raise ValueError("give either users or histories")
        return self


class EmbedItems(Closed):
    """Raw texts; they need not be in the catalog, and are not added to it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"texts": ["Solaris (1972), Sci-Fi"]}]},
    )
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class Embedded(BaseModel):
    """Vectors, in the order of the request; scores are inner products."""

    vectors: list[list[float]]
    version: str


class EmbeddedUsers(BaseModel):
    """Vectors of users, in the order of the request; null where none of a history is known, and
    that was to be skipped. unknown: ids of the histories that were skipped.
    """

    vectors: list[list[float] | None]
    unknown: list[str]
    version: str


class ItemIn(Closed):
    """An item to add or change."""

    id: Id
    text: Text
    attributes: Annotated[
        dict[Name, Value], Field(max_length=MAX_ATTRIBUTES, json_schema_extra=_NO_OTHER_NAMES)
    ] = {}

    @model_validator(mode="after")
    def _no_column(self) -> ItemIn:
        for name in ("item_id", "text"):
            if name in self.attributes:
                raise ValueError(f"an attribute {name!r}: this is a column of every catalog")
        return self


class Items(Closed):
    """Items to add, or to replace those of the same id."""

    model_config = ConfigDict(
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


class EventIn(Closed):
    """An event. An ``id`` that is stored already is ignored, so that events can be sent again."""

    id: Id
    user: Id
    item: Id
    type: Literal["exposure", "click", "reply"]
    timestamp: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)] | None = None
    """Unix seconds, at most a day ahead; now, if left out."""
    request: Id | None = None
    """``request`` of the answer that the event is about."""
    experiment: Name | None = None
    arm: Literal["treatment", "control"] | None = None

    @model_validator(mode="after")
    def _arm_of_what(self) -> EventIn:
        if self.arm is not None and self.experiment is None:
            raise ValueError("an arm without its experiment; give both, as the answer has them")
        if self.experiment is not None and self.arm is None:
            raise ValueError("an experiment without the arm; give both, as the answer has them")
        return self


class Events(Closed):
    """Events to store."""

    model_config = ConfigDict(
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


class Put(Changed):
    """Items that were put. changes: by id, kept (it has this text already, and keeps what was
    learned of it), updated (it has another text, and is read by the new one alone) or new.
    """

    changes: dict[str, Literal["kept", "updated", "new"]]


class UserIn(Closed):
    """A user and the segment that the user belongs to."""

    id: Id
    segment: Name


class UsersIn(Closed):
    """Users to put into segments; each has one, the last that was put."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"users": [{"id": "u42", "segment": "de"}]}]}
    )
    users: Annotated[list[UserIn], Field(min_length=1, max_length=MAX_EVENTS)]


class UsersPut(BaseModel):
    """Number of users that were put into segments."""

    users: int


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
