"""What people see of registered models, and ``stillhouse models``, ``promote`` and ``rollback``."""

import getpass
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from compression.errors import InputError
from compression.statistics import Interval
from export.comparison import show
from export.promotion import PromotionDecision, VersionFacts
from tasks import registry, tracking
from tasks.feedback import running_on
from tasks.promotion import decide, facts_of
from tasks.registry import Version

NONE = "-"
DEVICES_SHOWN = 12


def describe(version: Version, decision: PromotionDecision) -> str:
    """What a promotion would change, why a person is asked, and where the evidence is, as Markdown."""
    champion = registry.champion(version.name)
    over = f"instead of version {champion.version}" if champion else "as the first champion"
    lines = [f"### {version.name}: version {version.version} {over}", ""]
    lines += [f"- {reason}" for reason in decision.reasons]
    if champion is not None:  # lists, since the dialog cuts wide tables off
        lines += ["", "**This version, the champion, the difference**", ""]
        rows = comparison_rows(version, champion, decision)
        lines += [f"- {what}: {now}, {then}: {difference}" for what, now, then, difference in rows]
    if decision.checks:
        lines += ["", "**Checks**", ""]
        lines += [
            f"- {each.name}: {each.outcome}; {each.found} (expected: {each.expected})" for each in decision.checks
        ]
    lines += ["", *evidence_of(version)]
    return "\n".join(lines)


def comparison_rows(version: Version, champion: Version, decision: PromotionDecision) -> list[tuple[str, ...]]:
    """(what, this version's, the champion's, the difference with its interval)."""
    now, then, found = facts_of(version), facts_of(champion), decision.comparison
    drop, ratio = (found.accuracy_drop, found.latency_ratio) if found else (None, None)
    gain = None if drop is None else Interval(estimate=-drop.estimate, low=-drop.high, high=-drop.low)
    how = "" if found is None or found.paired else ", not on the same images"
    ece = found.ece_increase if found else None
    size = found.size_ratio if found else None
    return [
        (
            "accuracy",
            show(now.accuracy, "share"),
            show(then.accuracy, "share"),
            "not comparable" if gain is None else f"{_between(gain, '{:+.2f}', 100)} points{how}",
        ),
        (
            "latency p50",
            show(now.latency_p50_ms, "ms"),
            show(then.latency_p50_ms, "ms"),
            "not comparable" if ratio is None else f"{_between(ratio, '{:.3f}')} of its time",
        ),
        (
            "size",
            show(now.size_bytes, "bytes"),
            show(then.size_bytes, "bytes"),
            "not comparable" if size is None else f"{size:.3f} of its size",
        ),
        ("ECE", _ece(now), _ece(then), "not comparable" if ece is None else f"{ece:+.4f}"),
        ("file", now.file, then.file, "the same" if now.sha256 == then.sha256 else "other weights"),
    ]


def evidence_of(version: Version) -> list[str]:
    """Where the report and the run are."""
    run = version.tags.get("mlflow_run") or version.run_id
    url = tracking.Run(run).url if run else ""
    found = [f"Run: [{run}]({url})" if url.startswith("http") else f"Run: `{run}` in MLflow"]
    folder = version.tags.get("run_folder")
    return [*found, *([f"Report: `{folder}/report.html`"] if folder else [])]


def show_models(console: Console, name: str | None = None) -> None:
    """Every version of a model, or of all, with what was measured and who made it champion; of one also its devices.

    Raises:
        InputError: there is no such model.
    """
    models = [name] if name is not None else registry.names()
    if name is not None:
        registry.find(name, registry.versions(name)[0].version if registry.versions(name) else 0)
    if not models:
        console.print("No model is registered. An accepted file is: stillhouse compress recipes/digits.yaml")
    for model in models:
        table = Table(title=model, box=SIMPLE_HEAD)  # without lines it fits a terminal of 80 columns
        for column in ("version", "alias", "accuracy", "p50", "size", "registered", "promoted"):
            table.add_column(column, no_wrap=column != "promoted")
        for version in registry.versions(model):
            table.add_row(*_cells(version))
        console.print(table)
        for number, devices in running_on(model).items() if name is not None else ():
            named = ", ".join(devices[:DEVICES_SHOWN])
            more = f" and {len(devices) - DEVICES_SHOWN} more" if len(devices) > DEVICES_SHOWN else ""
            console.print(f"version {number} runs on {named}{more}", markup=False, highlight=False)
        for row in registry.history(model) if name is not None else ():
            text = f"{row['at'][:16]}  version {row['version']} {row['event']} by {row['by']}: {row['because']}"
            console.print(text, markup=False, highlight=False)


def _cells(version: Version) -> tuple[str, ...]:
    facts, tags = facts_of(version), version.tags
    at, by = tags.get("promoted_at", ""), tags.get("promoted_by", "")
    past = f"{at[:10]} by {by}" if at else NONE
    if tags.get("verdict", "accept") != "accept":
        past = f"{tags['verdict']}, {past}"
    for mark, said in (("rolled_back", "rolled back"), ("declined", "declined")):
        if f"{mark}_because" in tags:
            past = f"{said} {tags.get(f'{mark}_at', '')[:10]}: {tags[f'{mark}_because']}"
    return (
        str(version.version),
        "\n".join(version.aliases) or NONE,
        show(facts.accuracy, "share"),
        show(facts.latency_p50_ms, "ms"),
        show(facts.size_bytes, "bytes"),
        f"{version.created:%Y-%m-%d}",
        past,
    )


def promote_model(
    console: Console, name: str, *, version: int | None = None, reason: str = "", yes: bool = False
) -> dict[str, Any] | None:
    """Show what would change, ask, and make the version the champion; None when the answer was no.

    Args:
        console: Where to show and to ask.
        name: The model.
        version: Which one; None: the candidate.
        reason: Kept with the version.
        yes: Do not ask.

    Raises:
        InputError: no such version; anomalies without ``yes`` and a reason; nobody there to be asked.
    """
    found = registry.find(name, version)
    if registry.CHAMPION in found.aliases:
        console.print(f"Version {found.version} of {name} is the champion already.")
        return promoted(found, found)
    decision = decide(found)
    _show_comparison(console, found, decision)
    if decision.anomalies and not (yes and reason.strip()):
        raise InputError(
            f"Version '{found.version}' of {name} has anomalies, expected a reason to take it all the same. "
            "Look at the report, then: --yes --reason TEXT."
        )
    if not yes and not sys.stdin.isatty():
        raise InputError(f"Promotion of '{name}' has nobody to ask here, expected a terminal. Give --yes.")
    if not yes and not Confirm.ask(f"Make version {found.version} the champion?", console=console, default=False):
        console.print("Nothing was changed.")
        return None
    before = registry.champion(name)
    after = registry.promote(name, found.version, by=person(), reason=reason or decision.reasons[0])
    console.print(f"Version {after.version} of {name} is the champion.")
    return promoted(after, before)


def rollback_model(console: Console, name: str, *, reason: str = "") -> dict[str, Any]:
    """Make the previous champion the champion again.

    Raises:
        InputError: there is no previous one.
    """
    bad = registry.champion(name)
    after = registry.rollback(name, by=person(), reason=reason)
    console.print(f"Version {after.version} of {name} is the champion again; policy does not promote the other again.")
    return {"model": name, "version": after.version, "rolled_back": bad.version if bad else None, "reason": reason}


def promoted(after: Version, before: Version | None) -> dict[str, Any]:
    """What happened, as events and flow results say it."""
    return {
        "model": after.name,
        "version": after.version,
        "replaced": before.version if before else None,
        "by": after.tags.get("promoted_by", ""),
        "reason": after.tags.get("promoted_because", ""),
    }


def person() -> str:
    """Who types here."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        name = f"user {os.getuid()}"
    return f"{name}@{os.uname().nodename}"


def _show_comparison(console: Console, version: Version, decision: PromotionDecision) -> None:
    champion = registry.champion(version.name)
    if champion is not None:
        table = Table("", f"version {version.version}", f"champion ({champion.version})", "difference")
        for row in comparison_rows(version, champion, decision):
            table.add_row(*row)
        console.print(table)
    said: Mapping[str, str] = {"promote": "promote it", "ask": "ask a person", "hold": "keep the champion"}
    console.print(f"The policy would {said[decision.action]}:")
    for reason in decision.reasons:
        console.print(f"  - {reason}", markup=False, highlight=False)


def _ece(facts: VersionFacts) -> str:
    return show(facts.ece, "number")


def _between(found: Interval, form: str, factor: float = 1.0) -> str:
    values = (form.format(factor * value) for value in (found.estimate, found.low, found.high))
    return "{}, between {} and {}".format(*values)
