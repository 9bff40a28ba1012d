"""Who is told what: real automations of a real server, a real web server and a real SMTP server at the other end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from rich.console import Console

from compression.errors import InputError
from flows import automations, blocks, deployments
from tests.flows.receivers import Mailbox, Receiver, Webhook
from tests.flows.running_up import RunningUp, wait_for

FLOWS = """
import os
import time
from pathlib import Path

from prefect import flow
from prefect.states import Completed


@flow(name="compress", flow_run_name="compress-{recipe[name]}")
def compress(recipe: dict, state: str, message: str = "done"):
    return Completed(name=state, message=message)


@flow(name="nightly")
def nightly(state: str, message: str = "done"):
    return Completed(name=state, message=message)


@flow(name="sleeper", flow_run_name="sleeper-{seconds}")
def sleeper(seconds: int = 600):
    Path("sleeper.pid").write_text(str(os.getpid()))
    time.sleep(seconds)


@flow(name="broken")
def broken():
    raise RuntimeError("part of something larger, which says so itself")


if __name__ == "__main__":
    import json
    import sys

    from prefect import tags

    with tags("stillhouse"):
        globals()[sys.argv[1]](**json.loads(sys.argv[2]))
"""

DEPLOYMENTS = """
name: test
deployments:
  - name: sleeper
    entrypoint: ends.py:sleeper
    tags: [stillhouse]
    work_pool: {name: stillhouse}
"""

VERDICT = 'student-0.int8 loses 3.1 % of accuracy, expected "at most" 2 % & no {{ more }}'


def run(up: RunningUp, flow: str, wait: bool = True, **parameters: Any) -> subprocess.Popen[bytes]:
    """A flow run without a worker, as `stillhouse compress` starts one."""
    environment = {
        **up.environment,
        "PREFECT_API_URL": up.state["prefect_api"],
        "PREFECT_HOME": str(up.folder / ".stillhouse" / "prefect"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, str(up.folder / "ends.py"), flow, json.dumps(parameters)]
    process = subprocess.Popen(command, cwd=up.folder, env=environment)
    if wait:
        assert process.wait(timeout=120) == 0
    return process


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    folder = tmp_path_factory.mktemp("automations")
    (folder / "ends.py").write_text(FLOWS)
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    started = RunningUp(folder, source=folder, deployments=folder / "prefect.yaml")
    yield started
    started.end()


@pytest.fixture(scope="module")
def client(up: RunningUp) -> Any:
    return deployments.connect(up.state["prefect_api"])


@pytest.fixture
def ends(client: Any) -> Iterator[tuple[Webhook, Mailbox]]:
    """Both kinds of receiver, saved as blocks, with the automations made for them."""
    with Webhook() as webhook, Mailbox() as mailbox:
        blocks.save(client, "webhook", webhook.url)
        blocks.save(client, "email", mailbox.url)
        automations.prepare(client)
        yield webhook, mailbox
    for channel in blocks.channels(client):
        blocks.remove(client, channel.name)
    automations.prepare(client)


def settle(client: Any, receivers: tuple[Receiver, ...]) -> None:
    """Return when everything that was sent before has arrived: a test message goes last."""
    before = [len(receiver.about("Stillhouse: test")) for receiver in receivers]
    time.sleep(5)
    assert [each.problem for each in automations.try_out(client, by="a test")] == [None, None]
    wait_for(
        lambda: all(len(each.about("Stillhouse: test")) > count for each, count in zip(receivers, before, strict=True)),
        30,
        "the test message",
    )


slow = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.timeout(900)]


class TestWithServer:
    pytestmark = slow

    def test_without_an_address_nobody_is_told_and_up_says_how(self, up: RunningUp, client: Any) -> None:
        assert automations.prepare(client) == [automations.HINT]
        assert [each.name for each in client.read_automations()] == [automations.GUARD]
        assert "stillhouse notify webhook" in up.log.read_text()

    def test_prepare_again_makes_no_duplicates_and_keeps_what_was_switched_off(
        self, client: Any, ends: tuple[Webhook, Mailbox]
    ) -> None:
        assert "team@example.com" in automations.prepare(client)[0]
        names = sorted(each.name for each in client.read_automations())
        assert len(names) == len(set(names)) == len(automations.notices()) + 1
        rejected = next(each for each in client.read_automations() if each.name.endswith("rejected"))
        client.pause_automation(rejected.id)
        automations.prepare(client)
        after = {each.name: each for each in client.read_automations()}
        assert sorted(each.name for each in client.read_automations()) == names
        assert after[rejected.name].enabled is False
        assert after[rejected.name].id == rejected.id

    def test_each_end_sends_one_message_with_the_right_words(
        self, up: RunningUp, client: Any, ends: tuple[Webhook, Mailbox]
    ) -> None:
        for automation in client.read_automations():
            client.resume_automation(automation.id)
        run(up, "compress", recipe={"name": "digits"}, state="Rejected", message=VERDICT)
        run(up, "compress", recipe={"name": "letters"}, state="Accepted")
        run(up, "compress", recipe={"name": "letters"}, state="Unchanged")
        run(up, "nightly", state="Regressed", message="digits: 2.1 % less accurate than yesterday; distill is to blame")
        run(up, "nightly", state="Unchanged")
        assert run(up, "broken", wait=False).wait(timeout=120) != 0
        for event, version in (("promoted", 7), ("rolled-back", 6)):
            body = {
                "id": str(uuid4()),
                "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "event": f"stillhouse.model.{event}",
                "resource": {"prefect.resource.id": "stillhouse.model.digits"},
                "payload": {"version": version, "reason": f"{event} for a reason", "by": "ada"},
            }
            up.api("/events", [body])
        started = up.api(f"/deployments/{up.deployment('sleeper')['id']}/create_flow_run", {})
        pid = int(wait_for(lambda: (up.folder / "sleeper.pid").is_file(), 120, "the run") and self._pid(up))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: ends[0].about("crashed"), 90, "the message about the crash")
        settle(client, ends)
        for receiver in ends:
            subjects = sorted(message.subject for message in receiver.messages if "test" not in message.subject)
            assert subjects == [
                "Stillhouse: digits version 7 is champion",
                "Stillhouse: digits was rejected by the gate",
                "Stillhouse: digits was rolled back to version 6",
                "Stillhouse: sleeper-600 crashed",
                "Stillhouse: the night got worse",
            ]
            (rejected,) = receiver.about("rejected by the gate")
            assert VERDICT in rejected.text
            assert "Recipe:   digits" in rejected.text
            assert f"{up.state['prefect_url']}/runs/flow-run/" in rejected.text
            (crashed,) = receiver.about("sleeper-600 crashed")
            assert started["id"] in crashed.text
            (regressed,) = receiver.about("got worse")
            assert "distill is to blame" in regressed.text
            (promoted,) = receiver.about("is champion")
            assert "promoted for a reason" in promoted.text
            assert "ada" in promoted.text
        assert {message.receiver for message in ends[1].messages} == {"team@example.com"}

    def _pid(self, up: RunningUp) -> str:
        return wait_for(lambda: (up.folder / "sleeper.pid").read_text(), 10, "its process id")

    def test_the_test_message_says_what_is_wrong(self, client: Any, ends: tuple[Webhook, Mailbox]) -> None:
        webhook, mailbox = ends
        webhook.answer = "403 Forbidden"
        deliveries = {each.channel.kind: each.problem for each in automations.try_out(client, by="ada")}
        assert "403" in str(deliveries["webhook"])
        assert deliveries["email"] is None
        assert "ada" in mailbox.messages[-1].text
        closed = mailbox.url.replace(str(mailbox.port), "9")
        blocks.save(client, "email", closed)
        deliveries = {each.channel.kind: each.problem for each in automations.try_out(client, by="ada")}
        assert "127.0.0.1" in str(deliveries["email"])

    def test_addresses_in_the_environment_become_blocks_and_are_shown_nowhere(
        self, up: RunningUp, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flows import notify

        monkeypatch.setenv("STILLHOUSE_NOTIFY_WEBHOOK", "https://hooks.example.com/T0/secret-part")
        monkeypatch.setenv("STILLHOUSE_NOTIFY_EMAIL", "mailtos://u:secret-part@smtp.example.com?to=team@example.com")
        monkeypatch.setenv("PREFECT_API_URL", up.state["prefect_api"])
        automations.prepare(client)
        assert not [variable for variable in blocks.VARIABLES.values() if variable in os.environ]
        monkeypatch.setattr(notify, "server", lambda: client)
        console = Console(record=True, width=200)
        notify.show(console)
        shown = console.export_text()
        assert "https://hooks.example.com" in shown
        assert "team@example.com by smtp.example.com" in shown
        assert "secret-part" not in shown + json.dumps(up.api("/block_documents/filter", {}))
        files = [path for path in (up.folder / ".stillhouse").rglob("*") if path.is_file() and ".db" not in path.name]
        assert not [path for path in files if b"secret-part" in path.read_bytes()]
        notify.remove(console, "webhook")
        notify.remove(console, "stillhouse-email")
        assert automations.prepare(client) == [automations.HINT]
        with pytest.raises(InputError, match="'webhook' does not exist"):
            notify.remove(console, "webhook")

    def test_the_guard_ends_a_run_whose_process_is_gone_and_no_other(self, up: RunningUp, client: Any) -> None:
        """Prefect's own heartbeats, at their shortest; nothing watches these runs but the guard."""
        made = client.create_automation(
            automations.guard(timedelta(seconds=40)).model_copy(update={"name": "stillhouse: quick guard"})
        )
        doomed = run(up, "sleeper", wait=False, seconds=601)
        living = run(up, "sleeper", wait=False, seconds=80)
        short = run(up, "compress", recipe={"name": "short"}, state="Accepted")
        wait_for(lambda: self._states(up).get("sleeper-601") == "Running", 60, "the start")
        time.sleep(3)  # its first sign of life
        doomed.kill()
        wait_for(lambda: self._states(up).get("sleeper-601") == "Crashed", 90, "the guard")
        assert living.wait(timeout=200) == 0
        assert short.returncode == 0
        time.sleep(10)
        assert self._states(up)["sleeper-80"] == "Completed"
        assert self._states(up)["compress-short"] == "Accepted"
        client.delete_automation(made)

    def _states(self, up: RunningUp) -> dict[str, str]:
        return {each["name"]: each["state_name"] for each in up.api("/flow_runs/filter", {})}


@pytest.mark.parametrize(
    ("kind", "url", "wanted"),
    [
        ("webhook", "hooks.example.com/secret", "http:// or https://"),
        ("webhook", "mailto://x", "http:// or https://"),
        ("email", "someone@example.com", "mailtos://USER:PASSWORD@HOST"),
        ("email", "mailtos://", "mailtos://USER:PASSWORD@HOST"),
    ],
)
def test_an_address_that_is_none_is_refused_and_not_repeated(kind: blocks.Kind, url: str, wanted: str) -> None:
    with pytest.raises(InputError) as caught:
        blocks.block_of(kind, url)
    assert wanted in str(caught.value)
    assert "secret" not in str(caught.value)


def test_without_a_server_notify_says_how_to_get_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import notify

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(InputError, match="stillhouse up"):
        notify.server()
