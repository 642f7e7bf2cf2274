"""What the schema promises is what the service does, asked by Schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis

# Now, not while a server's thread imports too: until 3.11.8, Python could not parse two at once.
import schemathesis.specs.openapi.schemas
from hypothesis import HealthCheck, given, settings
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from tests.support.runs import Finished
from tests.support.service import WRITE_KEY, in_thread

from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.live import Live
from l2rec.service.loading import load_version
from l2rec.service.settings import Settings

EXAMPLES = 20
NOT_IN_A_SCHEMA = (
    "unknown item id",
    "no attribute ",
    "experiment: arms are assigned to users",
    " is given twice",
    "this is a column of every catalog",
    "an arm without its experiment",
    "an experiment without the arm",
    "is more than a day ahead of this server's clock",
    " different attributes; items have at most",
)
HEADERS = {"Authorization": f"Bearer {WRITE_KEY}"}


@pytest.fixture(scope="module")
def api(catalog_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a server and read its schema."""
    log = EventLog(f"sqlite:///{tmp_path_factory.mktemp('log') / 'events.db'}")
    app = create_app(
        Settings(rate=0, write_keys=(SecretStr(WRITE_KEY),)),
        Live(load_version(catalog_run.run)),
        log,
    )
    with in_thread(app) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation(mode: GenerationMode, api: Any) -> None:
    """Requests that fit the schema, and some that do not: no 500, and nothing undocumented."""
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # there is nothing that could be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            answer = case.call(headers=HEADERS)
            if mode is GenerationMode.POSITIVE and answer.status_code == 422:
                assert any(part in answer.text for part in NOT_IN_A_SCHEMA), answer.text
            excluded = [positive_data_acceptance]
            unsent = [] in (case.query or {}).values()  # a name without values is in no address
            if unsent or answer.status_code == 413:  # which does not count as a rejection there
                excluded.append(negative_data_rejection)
            case.validate_response(answer, excluded_checks=excluded)

        check()


def test_every_route_is_described(api: Any) -> None:
    paths = api.raw_schema["paths"]
    assert {
        "/v1/recommend",
        "/v1/recommend/batch",
        "/v1/users",
        "/v1/embed/users",
        "/v1/embed/items",
        "/v1/items",
        "/v1/events",
        "/v1/experiments/{name}",
        "/livez",
        "/readyz",
        "/metrics",
    } <= set(paths)
    bodies = {
        name: model
        for name, model in api.raw_schema["components"]["schemas"].items()
        if name
        in ("Recommend", "RecommendMany", "EmbedUsers", "EmbedItems", "Items", "Events", "UsersIn")
    }
    assert len(bodies) == 7
    for model in bodies.values():
        assert model["examples"] and model["additionalProperties"] is False
