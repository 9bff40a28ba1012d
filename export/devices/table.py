"""A rollout as a table: one row for each device, the same in the terminal, in Prefect and in MLflow."""

from collections.abc import Mapping, Sequence
from typing import Any

from export.devices.registry import DeviceEntry, Rollout
from export.devices.rollout import Placement

MEASURED = {"p50_ms": "p50", "p95_ms": "p95"}


def rows_of(
    rollout: Rollout,
    placements: Sequence[Placement],
    reports: Sequence[Mapping[str, Any]],
    devices: Sequence[DeviceEntry],
    problems: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """Device, ring, outcome, what it runs now, p50 and p95 in ms, memory in MiB, and why, all as text.

    Args:
        rollout: Which one.
        placements: Its devices, in the order of the rows.
        reports: What settled them.
        devices: What the registry knows of them now; one that was removed has no row of its own.
        problems: Device -> why it could not be reached.
    """
    said = {str(report["device"]): report for report in reports}
    known = {device.id: device for device in devices}
    rows = []
    for each in placements:
        report, device = said.get(each.device, {}), known.get(each.device)
        active = device.active if device else {}
        why = str(report.get("text") or "") or (problems or {}).get(each.device, "")
        rows.append(
            {
                "device": each.device,
                "ring": str(each.ring),
                "outcome": each.outcome,
                "runs": f"{active['name']} {active['seq']}" if active.get("name") else "-",
                **{title: _ms(report.get(field)) for field, title in MEASURED.items()},
                "memory": f"{report['memory_mib']:.0f} MiB" if "memory_mib" in report else "-",
                "why": f"{report['code']}: {why}" if report.get("code") else why,
            }
        )
    return rows


def _ms(value: Any) -> str:
    return f"{value:.3f} ms" if isinstance(value, int | float) else "-"
