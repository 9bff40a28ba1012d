"""``make demo-deploy``: a compressed model to three devices on this machine, then a bad bundle, and what becomes of it.

Everything is real but the distance: keys, signed bundles, an SSH server, a device server, agents that were installed
from their kits, the rollout flow with a Prefect server. All of it lies in ``<home>/demo-deploy``, begun anew each time.
"""

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tasks.settings import prepare_prefect, settings

console = Console()
RECIPE = "recipes/digits.yaml"
NAMES = ("demo-lab", "demo-gate-1", "demo-gate-2")
"""The first one is reached over SSH, and is the canary. No others' names: what they run is written down in MLflow."""


def main(recipe: Path | None = None) -> int:
    """Run the demo; 0 when everything came as it must.

    Args:
        recipe: Of digits; default the recipe of ``make demo``, whose stages are then kept.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    place = _fresh_place()
    prepare_prefect()
    from flows.server import prefect_server

    with prefect_server(console, "demo-deploy"), ExitStack() as stack:
        run = _compressed(recipe or settings().root / RECIPE)
        good, bad = _bundles(place, run)
        devices = _devices(place, stack)
        _say("Rolling out", f"canary {NAMES[0]}, then the other two, one after the other")
        first = _roll_out(good)
        answers = _asked(devices)
        _say("Rolling out a bad bundle", "right for every golden input, it fails on a black image")
        second = _roll_out(bad)
        after = _asked(devices)
    return _conclude(first, second, answers, after)


def _fresh_place() -> Path:
    """An empty folder for this demo; its keys and devices are no others'."""
    place = settings().home_dir / "demo-deploy"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    os.environ |= {"STILLHOUSE_KEYS": str(place / "keys"), "STILLHOUSE_FLEET": str(place / "fleet")}
    os.environ.pop("STILLHOUSE_DEVICE_REGISTRY", None)
    settings.cache_clear()
    return place


def _say(what: str, how: str) -> None:
    console.print(f"\n[bold]{what}[/]: {how}.", highlight=False)


def _compressed(recipe: Path) -> Path:
    """The run folder of the recipe; done already if it was run before."""
    from flows.compress import compress
    from flows.progress import terminal_progress
    from flows.recipe import load_recipe

    with terminal_progress(console):
        summary: Any = compress(load_recipe(recipe, []))
    if summary["outcome"] != "accept":
        console.print(f"The gate has rejected the model: {summary['summary']}", markup=False, highlight=False)
        sys.exit(1)
    return Path(summary["folder"])


def _bundles(place: Path, run: Path) -> tuple[Path, Path]:
    """A good bundle of the run, and one whose model fails on a black image; both signed by a trusted key."""
    from export.bundle.build import Order, accepted_run, build_bundle
    from export.bundle.content import describe, measure
    from export.bundle.package import open_package, write_package
    from flows import fleet
    from flows.bundling import engine_sources, golden_images, new_keys, now, show_bundle, signing_keys

    _say("Keys", "one that signs bundles, one for each role of the repository, one for SSH; unencrypted, for this demo")
    new_keys(console, settings().keys_dir, ["demo"], threshold=1, unencrypted=True)
    fleet.set_up(unencrypted=True)
    keys, _ = signing_keys([], None, None)
    accepted = accepted_run(run)
    order = Order(seq=1, created=now(), keys=keys)
    good, _ = build_bundle(accepted, place / "bundles", order, golden_images(accepted), engine_sources(accepted))
    _say("Bundle", str(good.relative_to(settings().root) if good.is_relative_to(settings().root) else good))
    show_bundle(console, good, fleet.open_trust())
    old = open_package(good, fleet.open_trust())
    broken = {each.file for each in old.statement.variants if each.runtime == "onnxruntime"}
    members: dict[str, Any] = {each.path: old.piece(each.path) for each in old.statement.files}
    members |= {name: failing_on_black(old.read(name)) for name in broken}
    measured = measure(members)
    update = {"seq": 2, "created": now(), "content": describe(measured)}
    update |= {"files": tuple(each.member for each in measured)}
    bad = place / "bundles" / good.name.replace("-1.", "-2.")
    write_package(bad, old.statement.model_copy(update=update), measured, keys)
    return good, bad


def failing_on_black(data: bytes) -> bytes:
    """An ONNX file that answers as before, and fails when no pixel is above the mean: an index is out of range."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_model_from_string(data)
    graph = model.graph
    images, logits = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        node.output[:] = ["sound" if name == logits else name for name in node.output]
    for name, kind, value in (("nought", TensorProto.FLOAT, 0.0), ("far", TensorProto.INT64, 1000)):
        graph.initializer.append(helper.make_tensor(name, kind, [], [value]))
    graph.initializer.append(helper.make_tensor("one_entry", TensorProto.FLOAT, [1], [0.0]))
    graph.node.extend(
        [
            helper.make_node("ReduceMax", [images], ["brightest"], keepdims=0),
            helper.make_node("Less", ["brightest", "nought"], ["is_dark"]),
            helper.make_node("Cast", ["is_dark"], ["dark"], to=TensorProto.INT64),
            helper.make_node("Mul", ["dark", "far"], ["place"]),
            helper.make_node("Gather", ["one_entry", "place"], ["entry"]),
            helper.make_node("Add", ["sound", "entry"], [logits]),
        ]
    )
    return model.SerializeToString()


def _devices(place: Path, stack: ExitStack) -> dict[str, Any]:
    """Three devices that run, entered in the registry, with the server that two of them talk to."""
    from flows import fleet
    from flows.demo_devices import HOST, LocalDevice, any_port, device_server, new_host_key, ssh_server
    from flows.devices import add_device

    address = stack.enter_context(device_server(place / "server"))
    devices = {name: LocalDevice(name, place / "devices" / name) for name in NAMES}
    port, ssh = any_port(), place / "devices" / NAMES[0] / "ssh"
    host_key = new_host_key(ssh)
    for name, device in devices.items():
        by_ssh = name == NAMES[0]
        device.folder.mkdir(parents=True, exist_ok=True)
        kit = add_device(
            name,
            ssh=f"{HOST}:{port}" if by_ssh else None,
            user=os.environ.get("USER") or _user(),
            host_key=host_key if by_ssh else "",
            first=by_ssh,
            server=address,
            kit=place / "kits" / f"{name}.tar.gz",
        )
        device.install(kit)
        stack.callback(device.end)
        device.start("serve", "--port", "0")
        if not by_ssh:
            device.start("poll", "--every", "1")
    program = stack.enter_context(ssh_server(ssh, port, devices[NAMES[0]].agent, fleet.operator_public()))
    _say("Devices", f"{NAMES[0]} over SSH ({program}), {NAMES[1]} and {NAMES[2]} pull from {address}")
    return devices


def _user() -> str:
    import getpass

    return getpass.getuser()


def _roll_out(bundle: Path) -> dict[str, Any]:
    from export.devices.rollout import RolloutPolicy
    from flows.devices import opened
    from flows.progress import terminal_progress
    from flows.rollout import rollout
    from flows.rollouts import show_rollout

    policy = RolloutPolicy(canary=1, shares=(0.6, 1.0), concurrency=1, deadline_minutes=5)
    with terminal_progress(console):
        done: Any = rollout(bundle=str(bundle), policy=policy)
    with opened() as registry:
        show_rollout(console, registry, registry.rollout(done["rollout"]))
    return done


def _asked(devices: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each device answers to a real image of a digit, over HTTP."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    image, truth = digits.images[7], int(digits.target[7])
    table = Table(title=f"Every device is shown a {truth}", box=SIMPLE_HEAD)
    for title in ("device", "answers", "probability", "by"):
        table.add_column(title)
    answers = {}
    for name, device in devices.items():
        found = device.ask("/predict", {"inputs": [[np.asarray(image).tolist()]]})
        answers[name] = found
        share = max(found["probabilities"][0])
        model = found["model"]
        table.add_row(name, found["labels"][0], f"{share:.2f}", f"{model['name']} {model['seq']}")
    console.print(table)
    return answers


def _conclude(
    first: dict[str, Any],
    second: dict[str, Any],
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
) -> int:
    good = first["outcome"] == "done" and all(row["outcome"] == "committed" for row in first["rows"])
    outcomes = {row["device"]: row["outcome"] for row in second["rows"]}
    stopped = second["outcome"] == "aborted" and outcomes == {
        name: "rolled back" if name == NAMES[0] else "withdrawn" for name in NAMES
    }
    kept = all(each["model"]["seq"] == 1 for each in [*before.values(), *after.values()])
    for right, text in (
        (good, "the good bundle reached every device, ring by ring"),
        (stopped, "the bad one was tried by the canary alone, which went back by itself"),
        (kept, "every device answered with the good model, before and after"),
    ):
        console.print(f"[{'green]yes' if right else 'red]NO'}[/] {text}", highlight=False)
    console.print(
        "\nYour own devices: stillhouse keys new release; stillhouse devices setup; stillhouse devices add NAME. "
        "See docs/devices.md."
    )
    return 0 if good and stopped and kept else 1


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
