"""Settings of a server. Keys come from the environment alone, and are never shown."""

from __future__ import annotations

__all__ = [
    "Experiment",
    "Settings",
    "default_of",
    "keys_from_environment",
    "settings_from_options",
]

import ipaddress
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from l2rec.errors import ConfigError
from l2rec.studies.arms import SHARE

READ_KEYS, WRITE_KEYS = "L2REC_READ_KEYS", "L2REC_WRITE_KEYS"
SHORTEST_KEY = 16
IMAGES = r"^(https:|https?://[a-z0-9.-]+(:\d{1,5})?)$"
"""Where pictures may come from: it goes into a header, so nothing else may stand in it."""


class Experiment(BaseModel):
    """An A/B experiment. A salted hash of the user's id assigns the arm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    treatment: float = Field(SHARE, gt=0, lt=1)
    """Share of users that the live version serves."""
    salt: str = ""


class Settings(BaseModel):
    """Options of a server; the defaults suit two cores and a catalog of some ten thousand items."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    read_keys: tuple[SecretStr, ...] = ()
    write_keys: tuple[SecretStr, ...] = ()
    index: Literal["auto", "exact", "flat", "ivf", "hnsw"] = "auto"
    """Kind of the index; auto: the one in the run folder, else one for the catalog's size."""

    batch_tokens: int = Field(4096, ge=1)
    """Tokens of histories at which a batch is closed ..."""
    batch_ms: float = Field(2.0, ge=0, le=1000)
    """... or the milliseconds that its first history has waited."""
    slice_tokens: int = Field(256, ge=1)
    """Tokens of embeddings and explanations at which a slice of them is closed: recommendations
    come before the next one."""
    queue: float = Field(4.0, gt=0)
    """Seconds that a history may be expected to wait for the model; beyond, it is refused at
    once."""
    inflight: int = Field(256, ge=1)
    """Requests that may be in progress, half of them of one key where there are several; one more
    is refused before its body is read, which is cheaper than a refusal by the queue."""
    timeout: float = Field(10.0, gt=0)
    """Seconds until a request is given up."""
    cache: int = Field(10_000, ge=0)
    """User vectors in the cache; 0 for no cache."""
    body_bytes: int = Field(1 << 20, ge=1024)
    """Largest body of a request."""
    rate: float = Field(2e6, ge=0)
    """Tokens a minute of one key, of which a minute's worth may come at once; 0 for no limit."""
    new_items: int = Field(20_000, ge=0)
    """Rows for items added or changed while serving; a restart frees them."""

    poll: float = Field(1.0, gt=0)
    """Seconds between two looks at live.json."""
    sync: float = Field(5.0, ge=0)
    """Seconds between two looks at the event log for items of other servers; 0 for never."""
    shadow_queue: int = Field(64, ge=1)
    """Answers that may wait for the shadow; the oldest gives way to a newer one."""
    shutdown: int = Field(20, ge=1)
    """Seconds that requests in progress have when the server is told to stop."""

    access_log: bool = True
    """One log line for each request."""

    images: tuple[Annotated[str, Field(pattern=IMAGES)], ...] = ()
    """Hosts whose pictures the page shows, ``https://HOST``, or ``https:`` for all of them. The
    browser of whoever looks at the page asks these hosts for them."""

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
        """Refuse options that do not fit together.

        Raises:
            ConfigError: ``host`` can be reached from other machines, and no request needs a key; or
                a history may wait for longer than its request.
        """
        if self.queue >= self.timeout:
            raise ConfigError(
                f"--queue {self.queue:g}: seconds that a history may wait, fewer than --timeout "
                f"{self.timeout:g}"
            )
        if not self.loopback and not self.secured:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no key; set "
                f"{READ_KEYS} and {WRITE_KEYS}, or serve 127.0.0.1"
            )


def keys_from_environment(
    environment: Mapping[str, str] | None = None,
) -> tuple[tuple[SecretStr, ...], tuple[SecretStr, ...]]:
    """Read the read keys and the write keys, in this order, from the environment.

    L2REC_READ_KEYS and L2REC_WRITE_KEYS each hold one or several, between commas.

    Raises:
        ConfigError: a key is too short, not printable ASCII, or of both kinds. It is not shown.
    """
    environment = os.environ if environment is None else environment
    kinds: list[tuple[SecretStr, ...]] = []
    for name in (READ_KEYS, WRITE_KEYS):
        keys = [key.strip() for key in environment.get(name, "").split(",") if key.strip()]
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"{name}: key {number} has {len(key)} characters; use at least "
                    f"{SHORTEST_KEY}, printable ASCII, such as of `openssl rand -hex 32`"
                )
        kinds.append(tuple(SecretStr(key) for key in keys))
    read, write = ({key.get_secret_value() for key in keys} for keys in kinds)
    if read & write:
        raise ConfigError(f"a key is in both {READ_KEYS} and {WRITE_KEYS}; keep it in one")
    return kinds[0], kinds[1]


EXPERIMENT_OPTIONS = {"experiment": "name", "treatment_share": "treatment", "salt": "salt"}
"""Options of `l2rec serve` that give the fields of an `Experiment`."""


def default_of(option: str) -> Any:
    """Return the default of an option of `l2rec serve`, by its name in Python."""
    if option in Settings.model_fields:
        return Settings.model_fields[option].default
    return Experiment.model_fields[EXPERIMENT_OPTIONS[option]].default


def settings_from_options(
    *, experiment: str | None, treatment_share: float, salt: str, **options: Any
) -> Settings:
    """Build the settings from the options of `l2rec serve` and the keys of the environment.

    Args:
        experiment: name of the experiment; None for no experiment.
        options: fields of `Settings` by name.

    Raises:
        ConfigError: a value that is not allowed (the line names its option), an unusable key, or
            a public address without a key.
    """
    read_keys, write_keys = keys_from_environment()
    try:
        settings = Settings(
            read_keys=read_keys,
            write_keys=write_keys,
            experiment=None
            if experiment is None
            else Experiment(name=experiment, treatment=treatment_share, salt=salt),
            **options,
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = str(first["loc"][-1])
        if error.title == Experiment.__name__:
            field = next(option for option, name in EXPERIMENT_OPTIONS.items() if name == field)
        raise ConfigError(f"--{field.replace('_', '-')}: {first['msg']}") from None
    settings.check()
    return settings
