"""A person decides in the UI: the promote and rollback flows with a real server, worker, registry and form."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from export.promotion import Promotion
from flows.models import promote_model
from flows.promotion import promote_candidate
from tasks import registry, tracking
from tasks.settings import settings
from tests.flows.registered import add_version
from tests.flows.running_up import ROOT, RunningUp, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.timeout(900)]

DEPLOYMENTS = """
name: test
deployments:
  - name: promote
    entrypoint: flows/promotion.py:promote
    work_pool: {name: stillhouse}
  - name: rollback
    entrypoint: flows/promotion.py:rollback
    work_pool: {name: stillhouse}
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    """The servers; this process sees their store and their API, as a run on the same machine does."""
    folder = tmp_path_factory.mktemp("promotion")
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    started = RunningUp(folder, source=ROOT, deployments=folder / "prefect.yaml")
    caches = (settings, tracking.client, tracking.experiment_id)
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: started.state["prefect_api"]}):
        patch.setenv("STILLHOUSE_ROOT", str(folder))
        for cache in caches:
            cache.cache_clear()
        yield started
    for cache in caches:
        cache.cache_clear()
    started.end()


def decided(model: str, version: int, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """What becomes of a version at the end of the run that registered it."""
    folder = settings().runs_dir / model / f"run-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"registered": {"model": model, "version": version}}))
    return promote_candidate(model, Promotion(**config or {}), folder)


def candidate(model: str, config: dict[str, Any] | None = None, **evidence: Any) -> dict[str, Any]:
    """The same for a new version."""
    return decided(model, add_version(model, **evidence), config)


def champion(model: str) -> tuple[int, dict[str, str]]:
    found = registry.champion(model)
    assert found is not None
    return found.version, found.tags


def run(up: RunningUp, id_: str) -> dict[str, Any]:
    return up.api(f"/flow_runs/{id_}", method="GET")


def until(up: RunningUp, id_: str, *names: str, seconds: float = 180) -> dict[str, Any]:
    """The flow run, once its state has one of these names."""

    def arrived() -> dict[str, Any] | None:
        found = run(up, id_)
        unexpected = found["state"]["type"] in ("FAILED", "CRASHED") and found["state"]["name"] not in names
        assert not unexpected, found["state"]
        return found if found["state"]["name"] in names else None

    return wait_for(arrived, seconds, f"{id_} in {names}")


def answer(up: RunningUp, id_: str, **fields: Any) -> dict[str, Any]:
    """What the form of the UI sends."""
    return up.api(f"/flow_runs/{id_}/resume", {"run_input": fields})


def form(up: RunningUp, found: dict[str, Any], part: str) -> Any:
    """A part of the form as the UI reads it: schema or description."""
    key = found["state"]["state_details"]["run_input_keyset"][part]
    return up.api(f"/flow_runs/{found['id']}/input/{key}", method="GET")


def start(up: RunningUp, deployment: str, **parameters: Any) -> str:
    path = f"/deployments/{up.deployment(deployment)['id']}/create_flow_run"
    return up.api(path, {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"]


def events(up: RunningUp, model: str, name: str) -> list[dict[str, Any]]:
    wanted = {"event": {"name": [name]}, "resource": {"id": [f"stillhouse.model.{model}"]}}
    return up.api("/events/filter", {"filter": wanted})["events"]


def promotions(up: RunningUp, model: str, version: int) -> list[dict[str, Any]]:
    every = events(up, model, "stillhouse.model.promoted")
    return [event for event in every if event["payload"]["version"] == version]


def test_a_person_approves_in_the_form_and_the_champion_moves(up: RunningUp) -> None:
    first = candidate("approved")
    assert first["decision"] == "promote"
    assert champion("approved")[0] == 1
    asked = candidate("approved", latency_ratio=[0.4, 0.39, 0.41])
    assert asked["decision"] == "ask"
    assert any("80 % of the champion's time" in reason for reason in asked["reasons"])
    id_ = asked["approval"]["flow_run"]
    waiting = until(up, id_, "Suspended")
    schema = form(up, waiting, "schema")
    assert schema["properties"]["approve"]["type"] == "boolean"
    assert set(schema["properties"]) == {"approve", "reason", "by"}
    text = form(up, waiting, "description")
    for shown in ("version 2 instead of version 1", "95.00 %", "0.800, between", "ECE", "run-2/report.html"):
        assert shown in text, text
    assert champion("approved")[0] == 1

    refused = answer(up, id_, approve="perhaps")
    assert refused["status"] == "REJECT"
    assert "approve" in refused["details"]["reason"]
    assert answer(up, id_, approve=True, reason="seen the report", by="Ada")["status"] == "ACCEPT"
    until(up, id_, "Promoted")
    version, tags = champion("approved")
    assert version == 2
    assert (tags["promoted_by"], tags["promoted_because"]) == ("Ada", "seen the report")
    (event,) = wait_for(lambda: promotions(up, "approved", 2), 60, "the event")
    assert event["payload"] == {"version": 2, "replaced": 1, "reason": "seen the report", "by": "Ada"}

    back = start(up, "rollback", model="approved", reason="wrong in the field")
    until(up, back, "RolledBack")
    assert champion("approved")[0] == 1
    (event,) = wait_for(lambda: events(up, "approved", "stillhouse.model.rolled-back"), 60, "the event")
    assert event["payload"]["rolled_back"] == 2
    held = decided("approved", 2)
    assert held["decision"] == "hold"
    assert "wrong in the field" in held["reasons"][0]


def test_a_newer_candidate_supersedes_the_question_and_a_declined_one_is_not_asked_about_again(up: RunningUp) -> None:
    candidate("declined")
    older = candidate("declined", accuracy=0.951)["approval"]
    until(up, older["flow_run"], "Suspended")
    same = decided("declined", 2)
    assert same["approval"] == older | {"name": same["approval"]["name"]}
    newer = candidate("declined", accuracy=0.952)["approval"]
    assert newer["flow_run"] != older["flow_run"]
    superseded = until(up, older["flow_run"], "Superseded")
    assert "Version 3 is newer" in superseded["state"]["message"]
    assert answer(up, older["flow_run"], approve=True, reason="too late")["status"] == "ABORT"
    until(up, newer["flow_run"], "Suspended")
    answer(up, newer["flow_run"], approve=False, reason="odd errors on sevens", by="Ada")
    until(up, newer["flow_run"], "Declined")
    assert champion("declined")[0] == 1
    held = decided("declined", 3)
    assert held["decision"] == "hold"
    assert "declined by Ada: 'odd errors on sevens'" in held["reasons"][0]


def test_an_answer_about_another_champion_is_asked_for_anew(up: RunningUp) -> None:
    candidate("moved")
    asked = candidate("moved", accuracy=0.951)["approval"]["flow_run"]
    before = until(up, asked, "Suspended")["state"]["timestamp"]
    promote_model(Console(), "moved", version=add_version("moved"), reason="by hand", yes=True)
    answer(up, asked, approve=True, reason="better than version 1")
    wait_for(lambda: run(up, asked)["state"]["name"] != "Suspended", 60, "the answer")
    anew = until(up, asked, "Suspended")
    assert anew["state"]["timestamp"] > before
    assert "version 2 instead of version 3" in form(up, anew, "description")
    assert champion("moved")[0] == 3
    answer(up, asked, approve=True, reason="better than version 3 too")
    until(up, asked, "Promoted")
    assert champion("moved")[0] == 2


def test_without_an_answer_in_time_nothing_is_promoted(up: RunningUp) -> None:
    candidate("late")
    short = {"approval_hours": 4 / 3600}
    unanswered = candidate("late", short, accuracy=0.951)["approval"]
    closed = until(up, unanswered["flow_run"], "NotApproved")  # by the reconciler of `stillhouse up`
    history = up.api(f"/flow_run_states/?flow_run_id={unanswered['flow_run']}", method="GET")
    assert "Suspended" in [state["name"] for state in history]
    assert answer(up, unanswered["flow_run"], approve=True, reason="sorry, I was away")["status"] == "ABORT"
    assert closed["state"]["type"] == "CANCELLED"
    asked_again = decided("late", 2, short)["approval"]
    assert asked_again["flow_run"] != unanswered["flow_run"]
    until(up, asked_again["flow_run"], "NotApproved")
    assert champion("late")[0] == 1


def test_an_anomaly_needs_a_reason_in_the_form(up: RunningUp) -> None:
    asked = candidate("strange", {"champion": "when_better"}, accuracy=1.0)
    assert asked["decision"] == "ask"
    id_ = asked["approval"]["flow_run"]
    waiting = until(up, id_, "Suspended")
    assert "right on all 100000 images" in form(up, waiting, "description")
    for fields in ({}, {"reason": ""}):
        refused = answer(up, id_, approve=True, **fields)
        assert refused["status"] == "REJECT"
        assert "reason" in refused["details"]["reason"]
    answer(up, id_, approve=True, reason="the images are that easy")
    until(up, id_, "Promoted")
    assert champion("strange")[1]["promoted_because"] == "the images are that easy"


def test_approval_given_beforehand_promotes_at_once_but_an_anomaly_only_with_a_reason(up: RunningUp) -> None:
    candidate("given", {"champion": "never"}, accuracy=1.0)
    failed = until(up, start(up, "promote", model="given", approval="given"), "Failed")
    assert "has anomalies" in failed["state"]["message"]
    until(up, start(up, "promote", model="given", approval="given", reason="easy images"), "Promoted")
    assert champion("given")[0] == 1
    again_ = until(up, start(up, "promote", model="given", approval="given"), "Promoted")
    assert "is the champion" in again_["state"]["message"]
    assert len(events(up, "given", "stillhouse.model.promoted")) == 1


def test_wrong_parameters_are_refused_by_the_server_with_the_name_of_the_field(up: RunningUp) -> None:
    import urllib.error

    for wrong in ({"model": "x", "approval": "maybe"}, {"model": "x", "approval_hours": -1}):
        with pytest.raises(urllib.error.HTTPError) as caught:
            start(up, "promote", **wrong)
        assert caught.value.code in (409, 422)
        assert list(wrong)[-1] in caught.value.read().decode()


ALONE = """
import json, sys
from pathlib import Path
from export.promotion import Promotion
from flows.promotion import promote_candidate
print("ANSWER", json.dumps(promote_candidate(sys.argv[1], Promotion(), Path(sys.argv[2]))))
"""


def test_a_server_without_the_deployment_is_answered_with_the_command(up: RunningUp, tmp_path: Path) -> None:
    """As at the end of `stillhouse compress` without `stillhouse up`: a temporary server, no worker."""
    candidate("alone")
    add_version("alone", accuracy=1.0)
    (tmp_path / "summary.json").write_text(json.dumps({"registered": {"model": "alone", "version": 2}}))
    environment = {
        **up.environment,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "alone", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = next(json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    assert asked["decision"] == "ask"
    assert asked["command"] == "stillhouse promote alone --version 2 --yes --reason TEXT"
    assert "approval" not in asked
