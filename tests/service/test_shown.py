"""What people see of an item, what they can filter by, and where pictures may come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from tests.support.service import Serve, error

from l2rec.service.attributes import Attributes
from l2rec.service.settings import Settings
from l2rec.service.shown import facets, shown

HOST = "https://images.example.com"


def attributes(separators: dict[str, str] | None = None, **columns: list[str]) -> Attributes:
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    return Attributes(len(next(iter(columns.values()))), arrays, separators)


def test_title_and_labels_are_apart() -> None:
    some = attributes(
        {"class": " ", "movie_title": " "},
        movie_title=["Get Shorty", ""],
        release_year=["1995", ""],
        **{"class": ["Action Comedy", "Sci-Fi|New York|Sci-Fi"]},
        plot=["x" * 41, ""],
    )
    first = shown(some, 0, "Get Shorty (1995), Action Comedy", ())
    assert first.title == "Get Shorty"
    assert first.labels == [("release_year", "1995"), ("class", "Action"), ("class", "Comedy")]
    assert first.image is None and first.link is None
    second = shown(some, 1, "its text", ())
    assert second.title == "its text"
    assert second.labels == [("class", "Sci-Fi"), ("class", "New York")]


@pytest.mark.parametrize("name", ["title", "Title", "clean_title", "movieTitle", "item_title"])
def test_titles_by_name(name: str) -> None:
    some = attributes(**{name: ["A"], "subtitle": ["B"]})
    assert shown(some, 0, "text", ()).title == "A"
    assert shown(some, 0, "text", ()).labels == [("subtitle", "B")]


def test_lists_between_commas_where_a_column_has_several_values() -> None:
    some = attributes(
        {"genres": " ", "places": ";"},
        genres=["Action, Hack and Slash,Gore", "Action Gore", "A, b|Gore"],
        price=["1,000", "1,000", "7"],
        places=["Washington, D.C.;Paris", "Paris", ""],
    )
    assert some.parts("places", "Washington, D.C.;Paris") == ["Washington, D.C.", "Paris"]
    assert some.parts("genres", "Action, Hack and Slash,Gore") == [
        "Action",
        "Hack and Slash",
        "Gore",
    ]
    assert some.mask({"genres": ["Hack and Slash"]}).tolist() == [True, False, False]
    assert some.mask({"genres": ["Action"]}).tolist() == [True, True, False]
    assert some.mask({"genres": ["A, b"]}).tolist() == [False, False, True]
    assert some.mask({"price": ["1,000"]}).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("url", "images", "allowed"),
    [
        (f"{HOST}/a.jpg", (HOST,), True),
        (f"{HOST}/a.jpg", ("https:",), True),
        (f"{HOST}/a.jpg", (), False),
        (f"{HOST}.evil.example/a.jpg", (HOST,), False),
        (f"{HOST}@evil.example/a.jpg", (HOST,), False),
        ("http://images.example.com/a.jpg", (HOST, "https:"), False),
        ("HTTPS://IMAGES.example.com/a.jpg", (HOST,), True),
        ("//images.example.com/a.jpg", (HOST,), False),
        ("data:image/png;base64,AAAA", (HOST, "https:"), False),
        ("https://[bad/a.jpg", ("https:",), False),
    ],
)
def test_pictures_come_from_hosts_that_were_named(url: str, images: Any, allowed: bool) -> None:
    found = shown(attributes(image=[url], url=["x"]), 0, "text", images)
    assert found.image == (url if allowed else None)
    assert found.labels == []


@pytest.mark.parametrize(
    ("url", "linked"),
    [
        ("https://example.com/7", True),
        ("http://example.com/7", True),
        ("javascript:alert(1)", False),
        ("JavaScript:alert(1)//https://example.com", False),
        ("java\tscript:alert(1)", False),
        (" https://example.com", False),
        ("https://example.com/\n", False),
        ("data:text/html,<script>", False),
        ("vbscript:x", False),
        ("https:///no-host", False),
        ("example.com", False),
    ],
)
def test_links_are_addresses_of_the_web(url: str, linked: bool) -> None:
    assert shown(attributes(url=[url]), 0, "text", ()).link == (url if linked else None)


def test_what_can_be_filtered_by() -> None:
    some = attributes(
        {"genres": " "},
        title=["a", "b", "c"],
        genres=["War Drama", "Drama", "War"],
        plot=["y" * 50, "", "short"],
        url=["https://example.com"] * 3,
    )
    everything = np.ones(3, dtype=np.bool_)
    assert facets(some, everything, 10) == [
        ("genres", [("Drama", 2), ("War", 2)], 2),
        ("plot", [("short", 1)], 2),
    ]
    assert facets(some, np.array([False, False, True]), 10)[0] == ("genres", [("War", 1)], 1)
    assert facets(some, everything, 1)[0] == ("genres", [("Drama", 2)], 2)


def test_the_routes_of_the_page(serve: Serve) -> None:
    client = serve(images=(HOST,))
    item = {
        "id": "n1",
        "text": "heavy red hat",
        "attributes": {
            "title": "Red hat",
            "color": "red|blue",
            "image": f"{HOST}/n1.jpg",
            "url": "javascript:alert(1)",
        },
    }
    more = {"id": "n2", "text": "a blue hat", "attributes": {"color": "blue"}}
    assert client.put("/v1/items", json={"items": [item, more]}).status_code == 200
    found = client.get("/v1/items", params={"id": "n1"}).json()["items"][0]
    assert found == {
        "id": "n1",
        "text": "heavy red hat",
        "title": "Red hat",
        "labels": [{"name": "color", "value": "red"}, {"name": "color", "value": "blue"}],
        "image": f"{HOST}/n1.jpg",
        "link": None,
    }
    body = {"history": ["n1", "i3"], "item": "n2"}
    reasons = client.post("/v1/explain", json=body).json()
    assert reasons["history"][0] == found | {"score": reasons["history"][0]["score"]}
    assert reasons["item"]["title"] == "a blue hat"
    near = client.get("/v1/items/n2/neighbours?k=100").json()["items"]
    assert next(one for one in near if one["id"] == "n1")["title"] == "Red hat"

    def listed() -> Any:
        return client.get("/v1/attributes").json()["attributes"]

    values = [{"value": "blue", "items": 2}, {"value": "red", "items": 1}]
    assert listed() == [{"name": "color", "values": values, "total": 2}]
    client.request("DELETE", "/v1/items", params={"id": "n1"})
    assert listed() == [{"name": "color", "values": [{"value": "blue", "items": 1}], "total": 1}]
    assert client.get("/v1/attributes?limit=1").json()["attributes"][0]["total"] == 1
    error(client.get("/v1/attributes?limit=0"), 422)


def test_the_policy_names_the_hosts_of_pictures(serve: Serve) -> None:
    def sources(**options: Any) -> str:
        policy = serve(**options).get("/").headers["content-security-policy"]
        return next(part for part in policy.split("; ") if part.startswith("img-src"))

    assert sources() == "img-src 'self' data:"
    assert sources(images=(HOST, "https:")) == f"img-src 'self' data: {HOST} https:"


@pytest.mark.parametrize(
    "value",
    ["*", "http:", "example.com", f"{HOST}/path", f"{HOST}; script-src *", f"{HOST}\n", "data:"],
)
def test_hosts_of_pictures_are_hosts(value: str) -> None:
    with pytest.raises(ValidationError):
        Settings(images=(value,))
