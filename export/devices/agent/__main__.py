"""The agent's commands. ``--root`` or ``STILLHOUSE_AGENT_ROOT`` is where it keeps everything.

agent init --device lab-1 --trust trust.json
agent install digits-7.edgepkg
agent serve --port 8080
agent status
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, Optional

from . import __version__, durable
from .device import Device
from .envelope import Trust
from .errors import Failed, Refused

REFUSED, ROLLED_BACK = 2, 3
"""Exit codes: nothing was changed; it was tried, and the model from before is active."""


def main(arguments: Optional[list[str]] = None) -> int:
    """Carry out one command; its exit code: 0 done, 2 refused, 3 rolled back."""
    options = _parser().parse_args(arguments)
    root = Path(options.root)
    try:
        if options.command == "init":
            return _say(_init(root, options))
        if not root.is_dir():
            raise Refused("no device", f"'{root}' is no device's folder, expected one made by `init`.")
        device = Device(root)
        return _say(options.act(device, options))
    except Refused as error:
        return _say({"phase": "refused", "code": error.code, "text": str(error)}, REFUSED)
    except Failed as error:
        return _say({"phase": "rolled back", "code": error.code, "text": str(error)}, ROLLED_BACK)
    except OSError as error:
        text = f"Files cannot be read or written ({error}). Free some space, or look at permissions."
        return _say({"phase": "refused", "code": "disk", "text": text}, REFUSED)


def _say(value: Any, code: int = 0) -> int:
    if value is not None:
        print(json.dumps(value, indent=1, sort_keys=True), flush=True)
    return code


def _init(root: Path, options: argparse.Namespace) -> Any:
    Trust(json.loads(Path(options.trust).read_bytes()))
    (root / "slots").mkdir(parents=True, exist_ok=True)
    if (root / "trust.json").exists():
        raise Refused("there", f"'{root}' is a device already. Its trust changes by `trust FILE` alone.")
    config = durable.read_json(Path(options.config), {}) if options.config else {}
    config.update({"device": options.device} if options.device else {}, **dict(options.set or []))
    if not config.get("device"):
        raise Refused("no name", "The device has no name, expected --device NAME, or a --config that says it.")
    if options.repository_root:
        durable.write(root / "root.json", Path(options.repository_root).read_bytes())
    durable.write_json(root / "config.json", config)
    durable.write(root / "trust.json", Path(options.trust).read_bytes())
    return {"device": config["device"], "root": str(root)}


def _trust(device: Device, options: argparse.Namespace) -> Any:
    with device.locked():
        after = device.trust.next(Path(options.file).read_bytes())
        durable.write_json(device.root / "trust.json", after.value)
    return {"trust": after.version, "keys": sorted(after.keys)}


def _serve(device: Device, options: argparse.Namespace) -> None:
    from . import serving

    device.recover()
    serving.serve(device, options.port)


def _poll(device: Device, options: argparse.Namespace) -> Any:
    """Once, or for ever: a device that is alone is not helped by an agent that gives up."""
    from . import pull

    while True:
        try:
            found = pull.poll(device)
        except (Refused, Failed, OSError) as error:
            if not options.every:
                pull.deliver(device)
                raise
            phase = "rolled back" if isinstance(error, Failed) else "refused"
            found = {"phase": phase, "code": getattr(error, "code", "disk"), "text": str(error)}
        pull.deliver(device)
        if not options.every:
            return found
        if found["phase"] != "nothing":
            _say(found)
        time.sleep(options.every * random.uniform(0.8, 1.2))  # a fleet does not ask all at once


def _ssh_entry(device: Device, options: argparse.Namespace) -> Any:
    from . import inbox

    return inbox.enter(device, os.environ.get("SSH_ORIGINAL_COMMAND", ""), sys.stdin.buffer)


def _recover(device: Device, options: argparse.Namespace) -> Any:
    device.recover()
    return device.status()


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__)
    default = os.environ.get("STILLHOUSE_AGENT_ROOT", "/var/lib/stillhouse-agent")
    parser.add_argument("--root", default=default, help=f"default: {default}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, help_: str, act: Any = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=help_)
        command.set_defaults(act=act)
        return command

    init = add("init", "make this machine a device")
    init.add_argument("--device", help="its name")
    init.add_argument("--config", metavar="FILE", help="its config.json, as a kit has it")
    init.add_argument("--repository-root", metavar="FILE", help="first root.json of the repository it pulls from")
    init.add_argument("--trust", required=True, help="file with the keys to trust")
    init.add_argument("--set", action="append", type=_setting, metavar="NAME=VALUE", help="a setting of config.json")
    install = add("install", "try a bundle and make its model the active one", lambda d, o: d.install(o.file, o.again))
    install.add_argument("file", type=Path)
    install.add_argument("--again", action="store_true", help="also when it was refused before")
    add("status", "what is active, what happened last, what this device is", lambda d, o: d.status())
    add("recover", "bring what was under way to its end; every command does it first", _recover)
    back = add("rollback", "make the model of the other slot active again", lambda d, o: d.roll_back(o.reason))
    back.add_argument("--reason", required=True)
    add("trust", "take new keys, signed by the old ones and the new ones", _trust).add_argument("file")
    poll = add("poll", "ask the repository what to run, install it, send reports", _poll)
    poll.add_argument("--every", type=float, default=0, metavar="SECONDS", help="again and again; default: once")
    add("ssh-entry", "for the forced command of an SSH key: hand in bundles, read the status", _ssh_entry)
    serve = add("serve", "answer inference over HTTP on loopback", _serve)
    serve.add_argument("--port", type=int, default=8080, help="0: a free one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
