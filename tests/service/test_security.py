"""Keys, rates, sizes and depths: pure parts here, every route in `test_access`."""

from __future__ import annotations

import json

import pytest
from pydantic import SecretStr

from l2rec.errors import ConfigError
from l2rec.service.security import RateLimit, depth_of, is_public, may_write
from l2rec.service.settings import Settings, keys_from_environment

READ, WRITE = "r" * 16, "w" * 16


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        (b"", 0),
        (b"1", 0),
        (b"{}", 1),
        (b'{"a": [{"b": 1}, [2]]}', 3),
        (b'{"a": "[[[[[["}', 1),
        (rb'{"a": "\"[[[["}', 1),
        (rb'{"a\\": [[1]]}', 3),
        (b'["unclosed [[[[', 1),
        (b'["[", "]", "", "[[[[", {"a": ["b"]}]', 3),
        (b'[""[', 2),
        (b"[" * 100_000, 9),
    ],
)
def test_depth(body: bytes, depth: int) -> None:
    assert depth_of(body, 8) == depth


def test_rate() -> None:
    now = 0.0
    limit = RateLimit(60.0, clock=lambda: now)
    assert limit.wait(0) == 0
    limit.charge(0, 59)
    assert limit.wait(0) == 0  # something is left, so one more may pass, whatever it costs
    limit.charge(0, 11)
    assert limit.wait(0) == pytest.approx(11) and limit.wait(1) == 0
    now = 10.5
    assert limit.wait(0) == pytest.approx(0.5)
    now = 11.0
    assert limit.wait(0) == 0
    now = 10_000.0
    limit.charge(0, 60)
    assert limit.wait(0) == pytest.approx(1)  # a minute's worth is saved at most
    free = RateLimit(0)
    free.charge(0, 1e9)
    assert free.wait(0) == 0


@pytest.mark.parametrize(
    ("method", "path", "public", "write"),
    [
        ("GET", "/", True, False),
        ("GET", "/static/app.js", True, False),
        ("GET", "/livez", True, False),
        ("POST", "/livez", False, True),
        ("GET", "/metrics", False, False),
        ("POST", "/v1/recommend", False, False),
        ("PUT", "/v1/recommend", False, True),
        ("PUT", "/v1/items", False, True),
        ("GET", "/v1/items", False, False),
        ("POST", "/v1/anything/new", False, True),
    ],
)
def test_what_needs_which_key(method: str, path: str, public: bool, write: bool) -> None:
    assert is_public(method, path) == public and may_write(method, path) == write


def test_keys_of_the_environment() -> None:
    read, write = keys_from_environment(
        {"L2REC_READ_KEYS": f" {READ} ,{'q' * 32},", "L2REC_WRITE_KEYS": WRITE}
    )
    assert [key.get_secret_value() for key in read] == [READ, "q" * 32]
    assert [key.get_secret_value() for key in write] == [WRITE]
    assert keys_from_environment({}) == ((), ())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"L2REC_READ_KEYS": "hunter2"},
            "L2REC_READ_KEYS: key 1 has 7 characters; use at least 16",
        ),
        ({"L2REC_WRITE_KEYS": f"{WRITE},{'é' * 20}"}, "L2REC_WRITE_KEYS: key 2 has 20 characters"),
        ({"L2REC_READ_KEYS": READ, "L2REC_WRITE_KEYS": READ}, "a key is in both"),
    ],
)
def test_keys_that_are_refused_are_not_shown(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        keys_from_environment(environment)
    assert "hunter2" not in str(error.value) and READ not in str(error.value)


def test_settings_never_show_a_key() -> None:
    settings = Settings(read_keys=(SecretStr(READ),), write_keys=(SecretStr(WRITE),))
    shown = (
        repr(settings)
        + str(settings)
        + settings.model_dump_json()
        + json.dumps(settings.model_dump(mode="json"))
    )
    assert READ not in shown and WRITE not in shown


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", ""])
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="can be reached from other machines and there is no key"):
        Settings(host=host).check()
    Settings(host=host, read_keys=(SecretStr(READ),)).check()


def test_nobody_waits_longer_than_for_an_answer() -> None:
    with pytest.raises(ConfigError, match=r"--queue 256: seconds .* fewer than --timeout 10"):
        Settings(queue=256).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_none(host: str) -> None:
    Settings(host=host).check()
