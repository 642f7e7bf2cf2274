"""Puts and deletes items and sends events to a server; prints what it recommends then as JSON."""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any


def call(base: str, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        base + path, data, {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def change(base: str) -> None:
    items = [
        {"id": "n1", "text": "red glass lamp", "attributes": {"colour": "red"}},
        {"id": "n2", "text": "old paper book"},
        {"id": "i3", "text": "white metal table small"},
    ]
    call(base, "PUT", "/v1/items", {"items": items})
    call(base, "DELETE", "/v1/items?id=i5")
    events = [
        {"id": f"e{n}", "user": "served", "item": item, "type": "click", "timestamp": 1e9 + n}
        for n, item in enumerate(("i1", "n1", "i2"))
    ]
    events.append({"id": "e9", "user": "other", "item": "i4", "type": "exposure"})
    call(base, "POST", "/v1/events", {"events": events})


def ask(base: str) -> dict[str, Any]:
    """Without what differs from start to start: the ids of requests."""
    found = {
        "user": call(base, "POST", "/v1/recommend", {"user": "served", "k": 24}),
        "history": call(base, "POST", "/v1/recommend", {"history": ["i7", "n2"], "k": 24}),
    }
    return {name: {"items": a["items"], "gate": a["gate"]} for name, a in found.items()}


if __name__ == "__main__":
    change(sys.argv[1])
    print(json.dumps(ask(sys.argv[1]), indent=1))
