"""The device's state on disk, and how a bundle becomes the active model: verified, tried, committed or rolled back.

Below the root: ``slots/a`` and ``slots/b``, of which ``current`` points to one; ``state.json``, the journal, written
before each act that cannot be undone; ``floor.json``, below which no bundle is taken; ``trust.json``; ``config.json``;
``refused.json``; ``reports/``. ``recover`` decides from the journal alone, so a kill or a power cut at any moment
leaves the old or the new model active, never half of one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from . import durable, facts, model, package, selftest
from .envelope import Trust
from .errors import Failed, Refused

SLOTS = ("a", "b")
TRIES = 2
"""A trial that was cut short this often is not made again."""
SPARE_BYTES = 8 << 20
"""Room that must be left on the disk."""
CRASHES, CRASH_SECONDS = 3, 60.0
"""So many starts of the server within so long mean that the model does not work."""
MAX_REPORTS = 1000


class Device:
    """One device, by its root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.current = root / "current"
        self.config: dict[str, Any] = {
            **{"device": "", "threads": 1, "probe_s": 20.0, "repository": "", "ring": "all", "report_to": ""},
            **durable.read_json(root / "config.json", {}),
        }

    @contextmanager
    def locked(self, name: str = "lock") -> Iterator[None]:
        """One installation at a time; the kernel takes the lock back however this process ends."""
        with open(self.root / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # --- what is there ---

    @property
    def trust(self) -> Trust:
        """The keys whose signatures count."""
        try:
            value = durable.read_json(self.root / "trust.json", None)
        except ValueError:
            value = None
        if value is None:
            raise Refused("trust", f"'{self.root / 'trust.json'}' cannot be read, expected the keys to trust.")
        return Trust(value)

    @property
    def journal(self) -> dict[str, Any]:
        """What was under way."""
        return durable.read_json(self.root / "state.json", {"state": "idle"})

    @property
    def floor(self) -> dict[str, Any]:
        """``seq`` by model name, and the latest signed moment seen."""
        return durable.read_json(self.root / "floor.json", {"seq": {}, "time": 0.0, "repository": {}})

    @property
    def active(self) -> Optional[str]:
        """The slot that ``current`` points to."""
        try:
            name = os.path.basename(os.readlink(self.current))
        except FileNotFoundError:
            return None
        return name if name in SLOTS else None

    def slot(self, name: str) -> Path:
        """The folder of a slot."""
        return self.root / "slots" / name

    def statement(self, slot: Optional[str]) -> Optional[dict[str, Any]]:
        """What was signed about the model of a slot."""
        return durable.read_json(self.slot(slot) / package.STATEMENT, None) if slot else None

    def status(self) -> dict[str, Any]:
        """What the device says of itself."""
        statement, journal = self.statement(self.active), self.journal
        names = ("name", "version", "seq")
        shown = statement and {**{name: statement[name] for name in names}, "sha256": statement["content"]["sha256"]}
        return {
            "device": self.config["device"],
            "active": {**shown, "slot": self.active} if shown else None,
            "state": journal["state"],
            "last": journal.get("last"),
            "floor": self.floor,
            "trust": self.trust.version,
            "refused": durable.read_json(self.root / "refused.json", {}),
            "reports_waiting": len(self.reports()),
            "facts": facts.facts(),
            "clock_skew_s": max(0.0, round(self.floor["time"] - time.time(), 1)),
        }

    # --- install ---

    def install(self, path: Path, again: bool = False) -> dict[str, Any]:
        """Make the model of a bundle the active one, if it proves itself; the report of that.

        Raises:
            Refused: nothing was changed.
            Failed: the model from before is active, and this bundle is not tried again unless ``again``.
        """
        with self.locked():
            self._recover()
            bundle = package.read(path, self.trust)
            statement = bundle.statement
            name, seq = statement["name"], statement["seq"]
            here = self.statement(self.active)
            if here == statement:
                return self._report(statement, "committed", {"note": "It is the active one."}, queue=False)
            try:
                choice = self._acceptable(bundle, again)
            except Refused as error:
                known = error.code == "refused before"  # and reported then
                self._report(statement, "refused", {"code": error.code, "text": str(error)}, queue=not known)
                raise
            slot = SLOTS[1] if self.active == SLOTS[0] else SLOTS[0]
            self._journal("staging", slot=slot)
            durable.erase(self.slot(slot))
            self._need_room(statement)
            try:
                package.unpack(bundle, self.slot(slot))
                self._choose(slot, choice)
                found = selftest.try_out(self.slot(slot), self.config["threads"])
            except (Refused, Failed, OSError, RuntimeError) as error:
                code = getattr(error, "code", "disk" if isinstance(error, OSError) else "engine")
                durable.erase(self.slot(slot))
                if not isinstance(error, OSError):
                    self._never_again(bundle.digest, f"{code}: {error}")
                self._idle(self._report(statement, "refused", {"code": code, "text": str(error)}))
                if isinstance(error, OSError):
                    raise Refused("disk", f"The bundle cannot be written: {error}. Free some space.") from error
                raise
            trial = {"slot": slot, "before": self.active, "digest": bundle.digest, "name": name, "seq": seq}
            self._journal("trial", tries=1, found=found, **trial)
            return self._trial(self.journal)

    def _acceptable(self, bundle: package.Bundle, again: bool) -> facts.Choice:
        statement, floor = bundle.statement, self.floor
        lowest = floor["seq"].get(statement["name"], 0)
        if statement["seq"] <= lowest:
            raise Refused(
                "floor", f"Bundle of {statement['name']} has number {statement['seq']}, expected more than {lowest}."
            )
        refused = durable.read_json(self.root / "refused.json", {}).get(bundle.digest)
        if refused and not again:
            raise Refused("refused before", f"This bundle was refused before: {refused} Try again with --again.")
        last = statement["not_after"]
        now = max(time.time(), floor["time"], package.moment(statement["created"]))
        if last is not None and package.moment(last) < now:
            raise Refused("expired", f"Bundle of {statement['name']} was to be installed until {last}.")
        return facts.choose(statement, {**facts.facts(), **self.config.get("facts", {})})

    def _need_room(self, statement: dict[str, Any]) -> None:
        wanted = sum(each["length"] for each in statement["files"]) + SPARE_BYTES
        free = shutil.disk_usage(self.root).free
        if free < wanted:
            self._idle(self._report(statement, "refused", {"code": "disk", "text": "no room"}))
            raise Refused("disk", f"The disk has {free >> 20} MiB free, expected {wanted >> 20}. Free some space.")

    def _choose(self, slot: str, choice: facts.Choice) -> None:
        """Write down which variant is used; build its engine where the bundle has none for this device."""
        file = choice.variant["file"]
        if choice.rebuild:
            file = "built.engine"
            onnx = self.slot(slot) / choice.variant["rebuild_from"]
            model.build_engine(onnx, self.slot(slot) / file, choice.variant["runtime"])
        durable.write_json(self.slot(slot) / model.CHOICE, {"variant": choice.variant["id"], "file": file})

    def _trial(self, journal: dict[str, Any]) -> dict[str, Any]:
        """Swap, test in place, then commit or roll back."""
        durable.point(self.current, f"slots/{journal['slot']}")
        try:
            found = selftest.try_out(self.current, self.config["threads"])
            found.update(self._probe(journal["digest"]))
        except Failed as error:
            raise self._roll_back(journal, error.code, str(error)) from None
        self._journal("commit", **{key: journal[key] for key in journal if key not in ("state", "found")}, found=found)
        return self._commit(self.journal)

    def _probe(self, digest: str) -> dict[str, Any]:
        """Wait until the server, if one runs here, answers with the new model.

        Raises:
            Failed: it does not, in time.
        """
        from . import serving

        deadline = time.monotonic() + float(self.config["probe_s"])
        while (health := serving.ask(self.root)) is not None:
            if health.get("sha256") == digest:
                return {"serving": True}
            if health.get("failed") == digest or time.monotonic() > deadline:
                raise Failed("serving", f"The server does not serve it: {health.get('reason') or 'no change in time'}.")
            time.sleep(0.05)
        return {"serving": False}

    def _commit(self, journal: dict[str, Any]) -> dict[str, Any]:
        statement = self.statement(journal["slot"])
        assert statement is not None
        floor = self.floor
        floor["seq"][statement["name"]] = max(statement["seq"], floor["seq"].get(statement["name"], 0))
        floor["time"] = max(floor["time"], package.moment(statement["created"]))
        durable.write_json(self.root / "floor.json", floor)
        report = self._report(statement, "committed", journal.get("found") or {})
        self._idle(report)
        return report

    def _roll_back(self, journal: dict[str, Any], code: str, text: str) -> Failed:
        self._journal("rolling back", code=code, text=text, **{k: v for k, v in journal.items() if k != "state"})
        return self._finish_roll_back(self.journal)

    def _finish_roll_back(self, journal: dict[str, Any]) -> Failed:
        """Point back, remember why, and say so."""
        started = time.monotonic()
        statement = self.statement(journal["slot"])
        if journal["before"] is None:
            if os.path.lexists(self.current):
                os.unlink(self.current)
                durable.flush_folder(self.root)
        else:
            durable.point(self.current, f"slots/{journal['before']}")
        self._never_again(journal["digest"], f"{journal['code']}: {journal['text']}")
        details = {"code": journal["code"], "text": journal["text"], "rollback_s": round(time.monotonic() - started, 4)}
        self._idle(self._report(statement or {**journal, "version": ""}, "rolled back", details))
        return Failed(journal["code"], journal["text"])

    def roll_back(self, reason: str) -> dict[str, Any]:
        """Make the model in the other slot active again; it was verified and committed before.

        Raises:
            Refused: there is none.
        """
        with self.locked():
            self._recover()
            active = self.active
            other = SLOTS[1] if active == SLOTS[0] else SLOTS[0]
            bad, good = self.statement(active), self.statement(other)
            if bad is None or good is None:
                raise Refused("no other", "There is no model in the other slot, expected one to go back to.")
            package.verify(self.slot(other), good)
            trial = {"slot": active, "before": other, "digest": bad["content"]["sha256"]}
            self._roll_back({**trial, "name": bad["name"], "seq": bad["seq"]}, "asked", reason)
            return self.status()

    # --- after a kill or a power cut ---

    def recover(self) -> None:
        """Bring what was under way to its end; called at every start."""
        with self.locked():
            self._recover()

    def _recover(self) -> None:
        journal = self.journal
        state = journal["state"]
        for name in (".current.new",):
            if os.path.lexists(self.root / name):
                os.unlink(self.root / name)
        if state == "staging":
            if journal["slot"] != self.active:
                durable.erase(self.slot(journal["slot"]))
            self._idle(journal.get("last"))
        elif state == "trial" and journal["tries"] >= TRIES:
            self._roll_back(journal, "cut short", f"Its trial was cut short {journal['tries']} times.")
        elif state == "trial":
            journal = {**journal, "tries": journal["tries"] + 1}
            self._journal(**journal)
            with suppress(Failed):  # it is rolled back, and reported
                self._trial(journal)
        elif state == "commit":
            self._commit(journal)
        elif state == "rolling back":
            self._finish_roll_back(journal)

    def crashed(self) -> bool:
        """Called when the server starts: after too many starts in a row the model before is taken; whether it was."""
        now, active = time.time(), self.active
        starts = durable.read_json(self.root / "starts.json", [])
        recent = [each for each in starts if each[0] == active and 0 <= now - each[1] < CRASH_SECONDS]
        with suppress(OSError):  # a full disk must not keep a model from answering
            durable.write_json(self.root / "starts.json", [*recent, [active, now]])
        if len(recent) < CRASHES:
            return False
        try:
            self.roll_back(f"The server was started {len(recent) + 1} times within {CRASH_SECONDS:.0f} s.")
        except Refused:
            return False
        durable.write_json(self.root / "starts.json", [])
        return True

    def ran_well(self) -> None:
        """Called by the server at an end that was asked for: no crash."""
        with suppress(OSError):
            durable.write_json(self.root / "starts.json", [])

    # --- words ---

    def _journal(self, state: str, **more: Any) -> None:
        durable.write_json(self.root / "state.json", {"state": state, "last": self.journal.get("last"), **more})

    def _idle(self, last: Any) -> None:
        durable.write_json(self.root / "state.json", {"state": "idle", "last": last})

    def _never_again(self, digest: str, reason: str) -> None:
        refused = durable.read_json(self.root / "refused.json", {})
        durable.write_json(self.root / "refused.json", {**refused, digest: reason[:1000]})

    def _report(
        self, statement: dict[str, Any], phase: str, details: dict[str, Any], queue: bool = True
    ) -> dict[str, Any]:
        """What happened, kept until it is sent. Its key is the same when it is written twice."""
        digest = statement.get("digest") or statement["content"]["sha256"]
        report = {
            "key": f"{self.config['device']}/{statement['name']}/{statement['seq']}/{phase}",
            "device": self.config["device"],
            "phase": phase,
            **{name: statement.get(name) for name in ("name", "version", "seq")},
            "sha256": digest,
            "at": time.time(),
            **details,
        }
        if queue:
            folder = self.root / "reports"
            folder.mkdir(exist_ok=True)
            durable.write_json(folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json", report)
            for path in self.reports()[:-MAX_REPORTS]:  # the newest says most
                path.unlink()
        return report

    def reports(self) -> list[Path]:
        """What waits to be sent, oldest first."""
        return sorted((self.root / "reports").glob("[0-9]*.json"))

    def send(self, deliver: Callable[[dict[str, Any]], None]) -> int:
        """Hand every waiting report on and forget it; how many. What cannot be delivered stays, in order."""
        sent = 0
        for path in self.reports():
            try:
                report = durable.read_json(path, None)
            except ValueError:  # a damaged one says nothing to anybody
                report = None
            if report is not None:
                deliver(report)
                sent += 1
            path.unlink(missing_ok=True)
        return sent
