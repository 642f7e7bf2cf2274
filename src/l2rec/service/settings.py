"""What a server is started with. Keys come from the environment alone, and are never shown."""

from __future__ import annotations

__all__ = ["Experiment", "Settings", "keys_from_environment"]

import ipaddress
import os
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from l2rec.errors import ConfigError

READ_KEYS, WRITE_KEYS = "L2REC_READ_KEYS", "L2REC_WRITE_KEYS"
SHORTEST_KEY = 16


class Experiment(BaseModel):
    """Users are split by a salted hash of their id; ``treatment`` is served the live version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    treatment: float = Field(0.06, gt=0, lt=1)
    salt: str = ""


class Settings(BaseModel):
    """Options of a server; the defaults suit two cores and a catalog of some ten thousand items."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    read_keys: tuple[SecretStr, ...] = ()
    write_keys: tuple[SecretStr, ...] = ()
    index: Literal["auto", "exact", "flat", "ivf", "hnsw"] = "auto"
    """auto: the one in the run folder, or one that fits the size of the catalog."""

    batch_tokens: int = Field(4096, ge=1)
    """A batch is closed when its histories have this many tokens ..."""
    batch_ms: float = Field(2.0, ge=0, le=1000)
    """... or when its first one has waited this long."""
    queue: int = Field(256, ge=1)
    """Histories that wait for the model; one more is refused at once."""
    inflight: int = Field(256, ge=1)
    """Requests that are being answered; one more is refused before its body is read, which is
    cheaper than by the queue."""
    timeout: float = Field(10.0, gt=0)
    """Seconds until a request is given up."""
    cache: int = Field(10_000, ge=0)
    """User vectors that are kept."""
    body_bytes: int = Field(1 << 20, ge=1024)
    rate: float = Field(200.0, ge=0)
    """Requests a second of one key; 0 for no limit."""
    burst: float = Field(400.0, ge=1)
    """Requests of one key at once."""
    new_items: int = Field(20_000, ge=0)
    """Rows that items added or changed while serving may take; a restart starts anew."""

    poll: float = Field(1.0, gt=0)
    """Seconds between looks at live.json."""
    sync: float = Field(5.0, ge=0)
    """Seconds between looks at the database for items of other servers; 0 for never."""
    shadow_queue: int = Field(64, ge=1)
    shutdown: int = Field(20, ge=1)
    """Seconds that requests in flight have when the server is told to stop."""

    access_log: bool = True
    """One line for each request."""

    experiment: Experiment | None = None

    @property
    def secured(self) -> bool:
        """Whether requests need a key."""
        return bool(self.read_keys or self.write_keys)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """ConfigError for an address that others can reach, where no request needs a key."""
        if not self.loopback and not self.secured:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no key; set "
                f"{READ_KEYS} and {WRITE_KEYS}, or serve 127.0.0.1"
            )


def keys_from_environment(
    environment: Mapping[str, str] | None = None,
) -> tuple[tuple[SecretStr, ...], tuple[SecretStr, ...]]:
    """Read keys and write keys of L2REC_READ_KEYS and L2REC_WRITE_KEYS, between commas.

    Raises:
        ConfigError: a key that can be guessed, is not ASCII, or is of both kinds. It is not shown.
    """
    environment = os.environ if environment is None else environment
    found: list[tuple[SecretStr, ...]] = []
    for name in (READ_KEYS, WRITE_KEYS):
        keys = [key.strip() for key in environment.get(name, "").split(",") if key.strip()]
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"{name}: key {number} has {len(key)} characters; use at least "
                    f"{SHORTEST_KEY}, printable ASCII, such as of `openssl rand -hex 32`"
                )
        found.append(tuple(SecretStr(key) for key in keys))
    shown = [{key.get_secret_value() for key in keys} for keys in found]
    if shown[0] & shown[1]:
        raise ConfigError(f"a key is in both {READ_KEYS} and {WRITE_KEYS}; keep it in one")
    return found[0], found[1]
