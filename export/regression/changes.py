"""What differs around two runs: dependencies, machine, data, recipe."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from compression.types import Frozen
from export.regression.night import Night

ABSENT = "absent"


class Change(Frozen):
    """One value that is not what it was."""

    kind: Literal["dependency", "machine", "data", "recipe"]
    name: str
    before: str
    now: str

    @property
    def words(self) -> str:
        return f"{self.name} went from {self.before} to {self.now}"


def changes_between(now: Night, before: Night) -> list[Change]:
    """Everything that differs, in the order people ask: dependencies, machine, data, recipe."""
    old, new = before.folder.env, now.folder.env
    plain = [{"python": env.get("python"), "code (commit)": str(env.get("commit"))[:12]} for env in (old, new)]
    machine = [
        {"processor": env.get("cpu", {}), "cores": env.get("cores"), "platform": env.get("platform")}
        for env in (old, new)
    ]
    return [
        *values_of(old, new, "packages"),
        *_differing("dependency", *plain),
        *_differing("machine", *machine),
        *data_changes(now, before),
        *recipe_changes(now, before),
    ]


def values_of(old: Mapping[str, Any], new: Mapping[str, Any], section: str) -> list[Change]:
    """Changed packages of two ``env.json``."""
    return list(_differing("dependency", old.get(section, {}), new.get(section, {})))


def data_changes(now: Night, before: Night) -> list[Change]:
    """Changed digest and sizes of the prepared data."""
    rows = [dict(night.row("data") or {}) for night in (before, now)]
    facts = [
        {"digest": str(row.get("output"))[:12], **{k: round(v) for k, v in row.get("metrics", {}).items()}}
        for row in rows
    ]
    return list(_differing("data", *facts))


def recipe_changes(now: Night, before: Night) -> list[Change]:
    """Changed values of the resolved recipes, by dotted key; list entries that have a name go by it."""
    return list(_differing("recipe", before.recipe, now.recipe))


def _differing(kind: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    a, b = dict(_flat(old)), dict(_flat(new))
    for name in dict.fromkeys([*b, *a]):
        before, now = a.get(name, ABSENT), b.get(name, ABSENT)
        if before != now:
            yield Change(kind=kind, name=name, before=_shown(before), now=_shown(now))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    entries: Any = None
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        entries = [
            (item.get("name", number) if isinstance(item, Mapping) else number, item)
            for number, item in enumerate(value)
        ]
    if entries is None:
        yield prefix, value
        return
    for key, item in entries:
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
