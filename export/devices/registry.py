"""Which devices there are, what was rolled out to them and what they said: SQLite by default, PostgreSQL by URL.

Every change is one transaction. A report counts once, by its key. What was decided is kept in a chain of hashes, so
that a line that was changed or taken out later is noticed.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import insert as insert_in_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_in_sqlite

from compression.types import Frozen, Slug
from export.devices.errors import DeviceError
from export.devices.rollout import OPEN, Outcome, Placement, RolloutPolicy, rings_of

LEASE = timedelta(seconds=60)
"""A controller that has not renewed its lease for so long is dead."""
ADVISORY = 0x5711_4005E
"""Number of the lock that our transactions take in PostgreSQL."""
PHASES: dict[str, Outcome] = {"committed": "committed", "refused": "refused", "rolled back": "rolled back"}
"""What an agent calls the end of an installation -> the outcome of its device in a rollout."""

tables = sa.MetaData()
Time = sa.DateTime(timezone=True)
devices_table = sa.Table(
    "devices",
    tables,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("transport", sa.String(8), nullable=False),
    sa.Column("address", sa.String(255), nullable=False, default=""),
    sa.Column("user", sa.String(64), nullable=False, default=""),
    sa.Column("host_key", sa.Text, nullable=False, default=""),
    sa.Column("first", sa.Boolean, nullable=False, default=False),
    sa.Column("secret", sa.String(128), nullable=False, default=""),
    sa.Column("active", sa.JSON, nullable=False, default=dict),
    sa.Column("facts", sa.JSON, nullable=False, default=dict),
    sa.Column("last_seen", Time),
)
rollouts_table = sa.Table(
    "rollouts",
    tables,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("bundle", sa.Text, nullable=False),
    sa.Column("policy", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("approved", sa.Integer, nullable=False, default=0),
    sa.Column("created", Time, nullable=False),
    sa.Column("holder", sa.String(128), nullable=False, default=""),
    sa.Column("held_until", Time),
)
placements_table = sa.Table(
    "placements",
    tables,
    sa.Column("rollout", sa.String(32), sa.ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("device", sa.String(64), primary_key=True),
    sa.Column("ring", sa.Integer, nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("ordered_at", Time),
    sa.Column("reported_at", Time),
    sa.Column("report", sa.JSON),
)
reports_table = sa.Table(
    "reports",
    tables,
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("device", sa.String(64), nullable=False, index=True),
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("at", Time, nullable=False),
)
audit_table = sa.Table(
    "audit",
    tables,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", Time, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
)

State = Literal["running", "paused", "aborted", "done"]


class DeviceEntry(Frozen):
    """One device of the inventory."""

    id: Slug
    transport: Literal["ssh", "pull"]
    """ssh: bundles are handed in. pull: it asks the repository itself."""
    address: str = ""
    """``host:port`` for ssh."""
    user: str = ""
    host_key: str = ""
    """The only key that the host may have, as in known_hosts: ``ssh-ed25519 AAAA...``."""
    first: bool = False
    """Among the canaries of every rollout."""
    secret: str = ""
    """Proves reports that come over HTTP."""
    active: dict[str, Any] = {}
    """The model it runs, by its last word."""
    facts: dict[str, Any] = {}
    last_seen: datetime | None = None


class Rollout(Frozen):
    """One bundle on its way to some devices."""

    id: str
    model: str
    seq: int
    bundle: str
    """Path of the file."""
    policy: RolloutPolicy
    state: State
    reason: str
    approved: int
    """Rings up to this one may begin; where the policy asks nobody it means nothing."""
    created: datetime
    holder: str
    held_until: datetime | None


class Registry:
    """The database behind ``stillhouse devices`` and rollouts.

    Args:
        url: As SQLAlchemy writes it: ``sqlite:////srv/devices.db``, ``postgresql+psycopg://user@host/name``.
    """

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
        with self._begin() as connection:
            tables.create_all(connection)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    # --- devices ---

    def add(self, device: DeviceEntry) -> None:
        """Enter a device.

        Raises:
            DeviceError: there is one of that name.
        """
        with self._begin() as connection:
            if self._device(connection, device.id) is not None:
                raise DeviceError(f"Device '{device.id}' is in the registry, expected a new name. Remove it first.")
            connection.execute(sa.insert(devices_table).values(device.model_dump()))
            self._note(connection, {"event": "device added", "device": device.id, "transport": device.transport})

    def remove(self, name: str) -> None:
        """Take a device out, also of rollouts that have not reached it; what it reported stays."""
        with self._begin() as connection:
            self._require(connection, name)
            concerned = sa.update(placements_table).where(
                placements_table.c.device == name, placements_table.c.outcome.in_(OPEN)
            )
            connection.execute(concerned.values(outcome="withdrawn"))
            connection.execute(sa.delete(devices_table).where(devices_table.c.id == name))
            self._note(connection, {"event": "device removed", "device": name})

    def devices(self, names: Iterable[str] | None = None) -> list[DeviceEntry]:
        """Devices by name: all, or those of some names that are there."""
        wanted = sa.select(devices_table).order_by(devices_table.c.id)
        if names is not None:
            wanted = wanted.where(devices_table.c.id.in_(list(names)))
        with self._begin() as connection:
            return [DeviceEntry(**_aware(row)) for row in connection.execute(wanted).mappings()]

    def device(self, name: str) -> DeviceEntry:
        """One device.

        Raises:
            DeviceError: there is none of that name.
        """
        with self._begin() as connection:
            return self._require(connection, name)

    def seen(self, name: str, status: Mapping[str, Any], now: datetime | None = None) -> None:
        """Keep what a device says of itself."""
        with self._begin() as connection:
            values = {"active": status.get("active") or {}, "facts": status.get("facts") or {}}
            values["last_seen"] = now or datetime.now(UTC)
            connection.execute(sa.update(devices_table).where(devices_table.c.id == name).values(values))

    # --- reports ---

    def receive(self, report: Mapping[str, Any], now: datetime | None = None) -> bool:
        """Take an agent's report; whether it is a new one. The outcome of its device in a rollout follows from it."""
        at = now or datetime.now(UTC)
        with self._begin() as connection:
            device = self._require(connection, str(report["device"]))
            row = {"key": report["key"], "device": report["device"], "body": dict(report), "at": at}
            wanted = self._insert(reports_table).values(row).on_conflict_do_nothing()
            if connection.execute(wanted.returning(reports_table.c.key)).first() is None:
                return False
            values: dict[str, Any] = {"last_seen": at}
            runs = (device.active.get("name"), device.active.get("seq"))
            if report["phase"] == "rolled back" and runs == (report["name"], report["seq"]):
                values["active"] = {}  # until it says what it went back to
            if report["phase"] == "committed":
                values["active"] = {name: report.get(name) for name in ("name", "version", "seq", "sha256")}
            connection.execute(sa.update(devices_table).where(devices_table.c.id == report["device"]).values(values))
            outcome = PHASES.get(str(report["phase"]))
            if outcome is not None:
                self._settle(connection, report, outcome, at)
            return True

    def _settle(self, connection: sa.Connection, report: Mapping[str, Any], outcome: Outcome, at: datetime) -> None:
        concerned = sa.select(rollouts_table.c.id).where(
            rollouts_table.c.model == report["name"], rollouts_table.c.seq == report["seq"]
        )
        connection.execute(
            sa.update(placements_table)
            .where(
                placements_table.c.rollout.in_(concerned),
                placements_table.c.device == report["device"],
                placements_table.c.outcome.in_(("waiting", "ordered", "timed out", "withdrawn")),
            )
            .values(outcome=outcome, reported_at=at, report=dict(report))
        )
        noted = {"event": f"device {outcome}", "device": report["device"], "seq": report["seq"]}
        self._note(connection, {**noted, "text": str(report.get("text") or "")})

    def reports(self, device: str) -> list[dict[str, Any]]:
        """What a device reported, oldest first."""
        with self._begin() as connection:
            wanted = sa.select(reports_table.c.body).where(reports_table.c.device == device)
            return [dict(body) for body in connection.scalars(wanted.order_by(reports_table.c.at))]

    # --- rollouts ---

    def start(
        self,
        *,
        model: str,
        seq: int,
        bundle: str,
        policy: RolloutPolicy,
        devices: Iterable[str] | None = None,
        id: str | None = None,
    ) -> Rollout:
        """A new rollout to some devices, or to all; with an ``id`` that is there already, that one.

        Raises:
            DeviceError: another rollout of the model is under way, a device is not there, or there is none.
        """
        made = id or uuid.uuid4().hex
        with self._begin() as connection:
            if connection.execute(sa.select(rollouts_table.c.id).where(rollouts_table.c.id == made)).first():
                return self._rollout(connection, made)
            there = {each.id: each for each in self._all(connection)}
            names = list(there) if devices is None else list(devices)
            absent = [name for name in names if name not in there]
            if absent or not names:
                found = f"device '{absent[0]}'" if absent else "no device"
                raise DeviceError(f"Rollout of {model} {seq} has {found}, expected devices of the registry.")
            wanted = sa.select(rollouts_table).where(
                rollouts_table.c.model == model, rollouts_table.c.state.in_(("running", "paused"))
            )
            other = connection.execute(wanted).mappings().first()
            if other is not None:
                raise DeviceError(
                    f"Model '{model}' is being rolled out (number {other['seq']}, rollout {other['id'][:8]}), expected "
                    "no other rollout of it. Wait for it, or stop it."
                )
            now = datetime.now(UTC)
            row = {"id": made, "model": model, "seq": seq, "bundle": bundle, "policy": policy.model_dump(mode="json")}
            connection.execute(sa.insert(rollouts_table).values({**row, "state": "running", "created": now}))
            rings = rings_of(names, policy, seed=made, first=[name for name in names if there[name].first])
            rows = [{"rollout": made, "device": name, "ring": rings[name], "outcome": "waiting"} for name in names]
            connection.execute(sa.insert(placements_table), rows)
            self._note(connection, {"event": "rollout started", "rollout": made, "model": model, "seq": seq})
            return self._rollout(connection, made)

    def rollout(self, name: str) -> Rollout:
        """A rollout by its id, or the beginning of it.

        Raises:
            DeviceError: there is none, or several.
        """
        with self._begin() as connection:
            return self._rollout(connection, name)

    def rollouts(self) -> list[Rollout]:
        """All rollouts, newest first."""
        with self._begin() as connection:
            wanted = sa.select(rollouts_table).order_by(rollouts_table.c.created.desc())
            return [Rollout(**_aware(row)) for row in connection.execute(wanted).mappings()]

    def placements(self, rollout: str) -> list[Placement]:
        """Every device of a rollout, by ring and name."""
        with self._begin() as connection:
            wanted = sa.select(placements_table).where(placements_table.c.rollout == rollout)
            rows = connection.execute(wanted.order_by(placements_table.c.ring, placements_table.c.device)).mappings()
            return [Placement(**{key: row[key] for key in Placement.model_fields}) for row in map(_aware, rows)]

    def mark(self, rollout: str, devices: Sequence[str], outcome: Outcome, now: datetime | None = None) -> None:
        """Write down what was decided about devices, before it is done; one that has reported meanwhile stays."""
        if not devices:
            return
        values: dict[str, Any] = {"outcome": outcome}
        if outcome == "ordered":
            values["ordered_at"] = now or datetime.now(UTC)
        with self._begin() as connection:
            connection.execute(
                sa.update(placements_table)
                .where(
                    placements_table.c.rollout == rollout,
                    placements_table.c.device.in_(devices),
                    placements_table.c.outcome.in_(("waiting", "ordered")),
                )
                .values(values)
            )
            self._note(connection, {"event": outcome, "rollout": rollout, "devices": list(devices)})

    def set_state(self, rollout: str, state: State, reason: str = "", by: str = "") -> bool:
        """Pause, resume, abort or end a rollout; False when it has ended before and stays so."""
        with self._begin() as connection:
            wanted = sa.update(rollouts_table).where(
                rollouts_table.c.id == rollout, rollouts_table.c.state.in_(("running", "paused"))
            )
            if connection.execute(wanted.values(state=state, reason=reason)).rowcount == 0:
                return False
            self._note(connection, {"event": f"rollout {state}", "rollout": rollout, "reason": reason, "by": by})
            return True

    def resume(self, rollout: str, by: str = "") -> bool:
        """Let a paused rollout go on, into the ring that it was paused before; False when it is not paused."""
        with self._begin() as connection:
            wanted = sa.update(rollouts_table).where(rollouts_table.c.id == rollout, rollouts_table.c.state == "paused")
            open_ = sa.select(sa.func.min(placements_table.c.ring)).where(
                placements_table.c.rollout == rollout, placements_table.c.outcome.in_(OPEN)
            )
            ring = connection.execute(open_).scalar() or 0
            if connection.execute(wanted.values(state="running", reason="", approved=ring)).rowcount == 0:
                return False
            self._note(connection, {"event": "rollout resumed", "rollout": rollout, "ring": ring, "by": by})
            return True

    def outcomes(self, rollout: str) -> list[dict[str, Any]]:
        """The reports that settled the devices of a rollout."""
        with self._begin() as connection:
            wanted = sa.select(placements_table.c.report).where(placements_table.c.rollout == rollout)
            return [dict(body) for body in connection.scalars(wanted.order_by(placements_table.c.device)) if body]

    def hold(self, rollout: str, holder: str, now: datetime | None = None) -> bool:
        """Take or renew the lease of a rollout's one controller; False while another one holds it."""
        at = now or datetime.now(UTC)
        free = sa.or_(
            rollouts_table.c.holder.in_(("", holder)),
            rollouts_table.c.held_until.is_(None),
            rollouts_table.c.held_until < at,
        )
        with self._begin() as connection:
            wanted = sa.update(rollouts_table).where(rollouts_table.c.id == rollout, free)
            return connection.execute(wanted.values(holder=holder, held_until=at + LEASE)).rowcount == 1

    def let_go(self, rollout: str, holder: str) -> None:
        """Give the lease back."""
        with self._begin() as connection:
            wanted = sa.update(rollouts_table).where(rollouts_table.c.id == rollout, rollouts_table.c.holder == holder)
            connection.execute(wanted.values(holder="", held_until=None))

    # --- audit ---

    def audit(self) -> list[dict[str, Any]]:
        """Everything that was decided, oldest first.

        Raises:
            DeviceError: a line was changed or is missing.
        """
        before, found = "", []
        with self._begin() as connection:
            for row in connection.execute(sa.select(audit_table).order_by(audit_table.c.number)).mappings():
                wanted = _chained(before, row["event"])
                if row["digest"] != wanted or row["number"] != len(found) + 1:
                    raise DeviceError(
                        f"Line {row['number']} of the audit log was changed, or one before it is missing, expected an "
                        "unbroken chain. Look at a backup."
                    )
                before = row["digest"]
                found.append(json.loads(row["event"]))
        return found

    def _note(self, connection: sa.Connection, fact: Mapping[str, Any]) -> None:
        at = datetime.now(UTC)
        text = json.dumps({"at": at.isoformat(timespec="seconds"), **fact}, sort_keys=True)
        last = (
            connection.execute(sa.select(audit_table).order_by(audit_table.c.number.desc()).limit(1)).mappings().first()
        )
        number, before = (last["number"] + 1, last["digest"]) if last else (1, "")
        row = {"number": number, "at": at, "event": text, "digest": _chained(before, text)}
        connection.execute(sa.insert(audit_table).values(row))

    # --- helpers ---

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with self.engine.begin() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:  # one transaction at a time, as in SQLite: what was read stays true until it is written
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY)))
            yield connection

    def _insert(self, table: sa.Table) -> Any:
        return (insert_in_postgresql if self.engine.dialect.name == "postgresql" else insert_in_sqlite)(table)

    def _all(self, connection: sa.Connection) -> list[DeviceEntry]:
        return [DeviceEntry(**_aware(row)) for row in connection.execute(sa.select(devices_table)).mappings()]

    def _device(self, connection: sa.Connection, name: str) -> DeviceEntry | None:
        row = connection.execute(sa.select(devices_table).where(devices_table.c.id == name)).mappings().first()
        return None if row is None else DeviceEntry(**_aware(row))

    def _require(self, connection: sa.Connection, name: str) -> DeviceEntry:
        found = self._device(connection, name)
        if found is None:
            raise DeviceError(f"Device '{name}' is not in the registry, expected one that `stillhouse devices` shows.")
        return found

    def _rollout(self, connection: sa.Connection, name: str) -> Rollout:
        wanted = sa.select(rollouts_table).where(rollouts_table.c.id.startswith(name, autoescape=True))
        rows = connection.execute(wanted).mappings().all()
        if len(rows) != 1:
            found = "no" if not rows else f"{len(rows)}"
            raise DeviceError(f"Rollout '{name}' has {found} entries, expected one. `stillhouse rollouts` shows them.")
        return Rollout(**_aware(rows[0]))


def _chained(before: str, event: str) -> str:
    return hashlib.sha256(f"{before}\n{event}".encode()).hexdigest()


def _aware(row: sa.RowMapping) -> dict[str, Any]:
    """A row with its times in UTC; SQLite forgets the zone."""
    return {
        str(key): value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value
        for key, value in row.items()
    }


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=20000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
