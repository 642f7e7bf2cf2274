"""Every route with no key, a wrong key, a read key and a write key; and what the log says of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient
from tests.support.service import READ_KEY, WRITE_KEY, Serve, error

READ, WRITE, WRONG = READ_KEY, WRITE_KEY, "wrong-key-5555555555"
KEYS = {
    "read_keys": (SecretStr("another-key-111111"), SecretStr(READ)),
    "write_keys": (SecretStr(WRITE),),
}
PUBLIC = {("GET", "/"), ("GET", "/livez"), ("GET", "/readyz"), ("GET", "/openapi.json")}
READING = {("POST", f"/v1/{name}") for name in ("recommend", "embed/users", "embed/items")}
READING |= {("POST", "/v1/explain"), ("POST", "/v1/recommend/batch")}


def routes(client: TestClient) -> list[tuple[str, str]]:
    """Every method and path that is described, and the page's."""
    paths = client.get("/openapi.json").json()["paths"]
    described = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    return [*described, ("GET", "/"), ("GET", "/static/x"), ("GET", "/openapi.json")]


def test_every_route_with_every_key(serve: Serve) -> None:
    client = serve(**KEYS)
    every = routes(client)
    assert {("POST", "/v1/recommend"), ("PUT", "/v1/items"), ("DELETE", "/v1/items")} <= set(every)
    assert {("POST", "/v1/events"), ("GET", "/v1/experiments/{name}")} <= set(every)
    assert {("PUT", "/v1/users"), *READING} <= set(every)
    for method, path in every:
        concrete = path.replace("{name}", "exp").replace("{id}", "i1")
        public = (method, path) in PUBLIC or path.startswith("/static")
        writes = method != "GET" and (method, path) not in READING

        def ask(
            key: str | None, scheme: str = "Bearer", method: str = method, at: str = concrete
        ) -> Any:
            headers = {} if key is None else {"Authorization": f"{scheme} {key}"}
            return client.request(method, at, headers=headers)

        if public:
            assert ask(None).status_code in (200, 404), path
            continue
        for refused in (
            ask(None),
            ask(WRONG),
            ask(""),
            ask(READ, scheme="Basic"),
            ask(READ[:-1]),
            ask(READ + "x"),
        ):
            assert error(refused, 401) in (
                "give a key: Authorization: Bearer KEY",
                "unknown key",
            ), (method, path)
            assert refused.headers["www-authenticate"] == "Bearer"
        if writes:
            assert error(ask(READ), 403).startswith("a read key: "), (method, path)
        else:
            assert ask(READ).status_code not in (401, 403), (method, path)
        assert ask(WRITE).status_code not in (401, 403), (method, path)


def test_a_key_in_the_query_is_none(serve: Serve) -> None:
    client = serve(**KEYS)
    assert client.get("/metrics", params={"key": READ, "token": READ}).status_code == 401


def test_a_route_that_is_added_is_closed(serve: Serve) -> None:
    client = serve(**KEYS)
    client.app.add_api_route("/v1/new", lambda: {}, methods=["GET", "POST"])  # type: ignore[attr-defined]
    assert client.get("/v1/new").status_code == 401
    headers = {"Authorization": f"Bearer {READ}"}
    assert client.get("/v1/new", headers=headers).status_code == 200
    assert client.post("/v1/new", headers=headers).status_code == 403


def test_without_write_keys_nobody_writes(serve: Serve) -> None:
    client = serve(read_keys=KEYS["read_keys"])
    headers = {"Authorization": f"Bearer {READ}"}
    assert client.delete("/v1/items?id=i1", headers=headers).status_code == 403


def test_who_is_refused_is_refused_before_the_body_is_read(serve: Serve) -> None:
    client = serve(**KEYS)

    def never() -> Any:
        yield b"{"
        raise AssertionError("read")

    headers = {"content-type": "application/json"}
    answer = client.post("/v1/events", content=iter([b"x" * 5_000_000]), headers=headers)
    assert answer.status_code == 401


def test_no_secret_is_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = serve(**KEYS)
    for key in (READ, WRITE, WRONG, None):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        client.get("/metrics", headers=headers)
        client.post("/v1/recommend", headers=headers, json={"history": ["i1"]})
        client.post("/v1/recommend", headers=headers, content=b"{")
        client.post("/v1/recommend", headers=headers, params={"key": key}, json={"user": key})
        client.put("/v1/items", headers=headers, json={"items": [{"id": "n", "text": " "}]})
    said = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith("l2rec")
    )
    assert said.count("POST /v1/recommend 200") == 2 and " 401 " in said and " 403 " in said
    everything = (
        caplog.text + client.get("/metrics", headers={"Authorization": f"Bearer {READ}"}).text
    )
    for key in (READ, WRITE, WRONG, "another-key-111111"):
        # The client of the test logs the addresses that it asks for, and only with their queries.
        assert key not in "\n".join(
            line for line in everything.splitlines() if "HTTP Request" not in line
        )
        assert key not in said


def test_other_names_of_a_server_without_keys(serve: Serve) -> None:
    """A web page whose name points to this machine is not answered."""
    client = serve()
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80", "LOCALHOST:1"):
        assert client.get("/livez", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        answer = client.get("/livez", headers={"host": host})
        assert error(answer, 400).startswith("a server without keys answers to localhost alone")
    assert serve(**KEYS).get("/livez", headers={"host": "x.example"}).status_code == 200
