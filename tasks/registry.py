"""The model registry: versions of each recipe's model, and who is ``candidate``, ``champion`` and ``previous``.

MLflow changes one alias or tag per call, and a process can be killed between any two. So a change is written down
first, as one tag of the model (``pending``), then carried out, then struck off. Whoever comes next finds what was left
and finishes it: every step sets a value, so that doing it twice changes nothing. There is a champion at every moment.
"""

import datetime as dt
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from filelock import FileLock

from compression.errors import InputError
from compression.types import Frozen
from tasks import tracking
from tasks.settings import settings

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
PENDING, HISTORY = "pending", "history."
REASON_LENGTH = 1000  # MLflow takes 5,000 characters per tag


class RegistryError(InputError):
    """A model, a version or a step back that the registry does not have."""


class Version(Frozen):
    """One registered version of a model."""

    name: str
    version: int
    run_id: str
    """The MLflow run that registered it."""
    created: dt.datetime
    tags: dict[str, str] = {}
    aliases: tuple[str, ...] = ()

    @property
    def was_rolled_back(self) -> bool:
        return "rolled_back_because" in self.tags


class Change(Frozen):
    """One change of the champion, complete enough to be carried out by anybody."""

    event: Literal["promoted", "rolled back"]
    version: int
    """The new champion, or the one that was taken back."""
    champion: int
    """Who is champion afterwards."""
    previous: int | None
    """Who is ``previous`` afterwards."""
    at: str
    by: str
    because: str


def names() -> list[str]:
    """Every registered model."""
    return sorted(model.name for model in tracking.client().search_registered_models())


def versions(name: str) -> list[Version]:
    """All versions of a model, newest first; none for a model that is not registered."""
    model = _model(name)
    if model is None:
        return []
    aliases: dict[int, list[str]] = {}
    for alias, version in model.aliases.items():
        aliases.setdefault(int(version), []).append(alias)
    found = [
        Version(
            name=name,
            version=int(each.version),
            run_id=each.run_id or "",
            created=dt.datetime.fromtimestamp(each.creation_timestamp / 1000, dt.UTC),
            tags=dict(each.tags),
            aliases=tuple(sorted(aliases.get(int(each.version), ()))),
        )
        for each in tracking.client().search_model_versions(f"name = '{name}'")
    ]
    return sorted(found, key=lambda each: -each.version)


def champion(name: str) -> Version | None:
    """The version in use, if there is one."""
    return _with_alias(name, CHAMPION)


def find(name: str, version: int | None = None) -> Version:
    """A version by number; without one, the candidate.

    Raises:
        RegistryError: there is no such model, version or candidate.
    """
    found = versions(name)
    if not found:
        known = ", ".join(names()) or "none"
        raise RegistryError(
            f"Model '{name}' has no versions, expected one of the registered models: {known}. "
            "Run its recipe; an accepted file is registered."
        )
    chosen = [each for each in found if each.version == version or (version is None and CANDIDATE in each.aliases)]
    if chosen:
        return chosen[0]
    known = ", ".join(str(each.version) for each in found)
    asked = f"no version {version}" if version is not None else "no candidate"
    raise RegistryError(f"Model '{name}' has {asked}, expected one of its versions: {known}. Name one of them.")


def promote(name: str, version: int, *, by: str, reason: str) -> Version:
    """Make a version the champion; the old champion becomes ``previous``. The new champion as it is then.

    A version that is the champion stays it, and nothing is written. One that was rolled back may be promoted again.

    Raises:
        RegistryError: there is no such version.
    """
    with locked(name):
        _finish(name)
        new, old = find(name, version), champion(name)
        if old is None or old.version != version:
            _begin(
                name,
                Change(
                    event="promoted",
                    version=new.version,
                    champion=new.version,
                    previous=old.version if old else None,
                    at=_now(),
                    by=by,
                    because=reason[:REASON_LENGTH],
                ),
            )
        return find(name, version)


def rollback(name: str, *, by: str, reason: str) -> Version:
    """Make ``previous`` the champion again; the bad version is marked and policy does not take it again.

    ``previous`` is then the version before that, if it was not rolled back itself. A rollback that was interrupted is
    finished, not followed by another.

    Raises:
        RegistryError: there is no champion, or no ``previous``.
    """
    with locked(name):
        finished = _finish(name)
        bad = champion(name)
        if bad is None:
            raise RegistryError(f"Model '{name}' has no champion, expected one to roll back. Promote a version first.")
        if finished is not None and finished.event == "rolled back":
            return bad
        back = _with_alias(name, PREVIOUS)
        if back is None:
            raise RegistryError(
                f"Model '{name}' has no previous champion, expected one to go back to: version {bad.version} is the "
                f"first. Promote another version: stillhouse promote {name} --version N."
            )
        _begin(
            name,
            Change(
                event="rolled back",
                version=bad.version,
                champion=back.version,
                previous=_before(back, bad),
                at=_now(),
                by=by,
                because=reason[:REASON_LENGTH],
            ),
        )
        return find(name, back.version)


def tag(version: Version, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    for key, value in tags.items():
        if version.tags.get(key) != value:
            tracking.client().set_model_version_tag(version.name, str(version.version), key, value)


def history(name: str) -> list[dict[str, Any]]:
    """Every change of the champion, oldest first: at, event, version, champion, by, because."""
    model = _model(name)
    found = {} if model is None else {k: v for k, v in model.tags.items() if k.startswith(HISTORY)}
    return [Change.model_validate_json(found[key]).model_dump() for key in sorted(found)]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One change of a model at a time, among the processes of this home."""
    folder = settings().home_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"model-{name}.lock"):
        yield


def _begin(name: str, change: Change) -> None:
    tracking.client().set_registered_model_tag(name, PENDING, change.model_dump_json())
    _finish(name)


def _finish(name: str) -> Change | None:
    """Carry out the change that is written down, if there is one."""
    model = _model(name)
    written = None if model is None else model.tags.get(PENDING)
    if model is None or not written:
        return None
    change, client = Change.model_validate_json(written), tracking.client()
    client.set_registered_model_alias(name, CHAMPION, str(change.champion))
    if change.previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(change.previous))
    elif PREVIOUS in model.aliases:
        client.delete_registered_model_alias(name, PREVIOUS)
    version = find(name, change.version)
    mark = change.event.replace(" ", "_")
    tags = {f"{mark}_at": change.at, f"{mark}_by": change.by, f"{mark}_because": change.because or "no reason given"}
    if change.event == "promoted":
        tags["replaced"] = "" if change.previous is None else str(change.previous)
        for key in [key for key in version.tags if key.startswith(("rolled_back_", "declined_"))]:
            client.delete_model_version_tag(name, str(version.version), key)
    tag(version, tags)
    client.set_registered_model_tag(name, f"{HISTORY}{change.at}", json.dumps(change.model_dump()))
    client.delete_registered_model_tag(name, PENDING)
    return change


def _before(back: Version, bad: Version) -> int | None:
    """Whom ``back`` replaced when it became champion, unless that one is no good either."""
    number = back.tags.get("replaced", "")
    earlier = next((each for each in versions(back.name) if str(each.version) == number), None)
    if earlier is None or earlier.version in (back.version, bad.version) or earlier.was_rolled_back:
        return None
    return earlier.version


def _with_alias(name: str, alias: str) -> Version | None:
    return next((each for each in versions(name) if alias in each.aliases), None)


def _model(name: str) -> Any | None:
    return next((model for model in tracking.client().search_registered_models() if model.name == name), None)


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")  # MLflow refuses a plus
