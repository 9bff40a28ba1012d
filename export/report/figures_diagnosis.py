"""The report's section on speed: did each file get faster than its parent, why not, and where its time goes.

``diagnosis.json`` of a run is an ``export.diagnosis.DiagnosisReport``, written by :mod:`tasks.diagnose`.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from export.comparison import NONE, Column
from export.diagnosis import DiagnosisReport, FileDiagnosis
from export.operator_profile import OperatorProfile
from export.report.plots import INK, MUTED, SERIES, SIZE, canvas
from export.report.tables import table

KINDS = {"integer": SERIES[2], "float": SERIES[1], "conversion": MUTED}
"""Kind of operator -> colour, in the order of the bars."""

BADGES = {"yes": "pass", "no": "fail", "cannot tell": "inconclusive", "not measured": "skipped"}
TONES = {"high": "fail", "medium": "inconclusive", "low": "skipped"}
POINTS_PER_LETTER = 5.4

OPERATORS = (
    Column("operator", "operator", "of the ONNX standard, or of ONNX Runtime's own set"),
    Column("stored", "in the file", "nodes of this kind as the file is stored", "count"),
    Column("optimised", "as it runs", "nodes of this kind after ONNX Runtime's optimisation", "count"),
    Column("time", "time", "share of the time of all operators", "share", missing=NONE),
)
LAYERS = (
    Column("layer", "layer", "module path of a convolution or linear layer"),
    Column("macs", "multiplications", "in one call", "count"),
    Column("macs_share", "share of them", "of the multiplications of all layers", "share"),
    Column("time_share", "share of time", "of the time of all operators", "share"),
)


def section(diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """What ``sections/diagnosis.*.jinja`` show besides the plot; of an empty mapping, nothing."""
    if not diagnosis:
        return {"diagnosis": {"reference": None, "files": [], "failures": {}}}
    report = DiagnosisReport.model_validate(diagnosis)
    files = [_file(name, row) for name, row in report.files.items() if row.facts is not None]
    failures = {name: row.failure for name, row in report.files.items() if row.failure is not None}
    return {"diagnosis": {"reference": report.reference, "files": files, "failures": failures}}


def figures(diagnosis: Mapping[str, Any]) -> dict[str, tuple[Figure | None, str]]:
    """Plot name -> figure and its description."""
    profiles: dict[str, OperatorProfile] = {}
    if diagnosis:
        report = DiagnosisReport.model_validate(diagnosis)
        profiles = {name: row.facts.operators.profile for name, row in report.files.items() if row.facts is not None}
    return {"operator_time": (operator_time(profiles), "share of the time per operator type, one bar per file")}


def operator_time(profiles: Mapping[str, OperatorProfile]) -> Figure | None:
    """Stacked bar per file: share of the time of each operator type, coloured by what it works with."""
    drawn = {name: profile for name, profile in profiles.items() if profile.nodes}
    if not drawn:
        return None
    with canvas((SIZE[0], 1.0 + 0.52 * len(drawn))) as (figure, axes):
        for place, (name, profile) in enumerate(reversed(drawn.items())):
            left = 0.0
            for kind, colour in KINDS.items():
                for row in (each for each in profile.by_operator() if each.kind == kind):
                    axes.barh(place, max(row.share - 0.004, 0.001), left=left, height=0.5, color=colour, alpha=0.6)
                    if row.share * (SIZE[0] - 0.4) * 72 > POINTS_PER_LETTER * (len(row.operator) + 1):
                        axes.text(left + row.share / 2, place, row.operator, ha="center", va="center", fontsize=8.5)
                    left += row.share
            axes.text(0, place + 0.3, name, ha="left", va="bottom", fontsize=9.5, color=INK)
        axes.set(xlim=(0, 1), ylim=(-0.45, len(drawn) - 0.2), xlabel="share of the time of all operators")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_yticks([])
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        patches = [Patch(color=colour, alpha=0.6, label=kind) for kind, colour in KINDS.items()]
        figure.legend(handles=patches, loc="outside upper left", ncols=3, handletextpad=0.5, columnspacing=1.2)
    return figure


def _file(name: str, row: FileDiagnosis) -> dict[str, Any]:
    assert row.facts is not None
    operators, diagnosis = row.facts.operators, row.diagnosis
    weighted = len(operators.integer_layers) + len(operators.float_layers)
    shares: dict[str, float] = {}
    for each in operators.profile.by_operator():
        shares[each.operator] = shares.get(each.operator, 0.0) + each.share
    histogram = [
        {"operator": operator, "stored": stored, "optimised": optimised, "time": shares.get(operator)}
        for operator, stored, optimised in operators.histogram.rows()
    ]
    found = {
        "name": name,
        "quantized": row.facts.quantization != "none",
        "integer_layers": f"{len(operators.integer_layers)} of {weighted}",
        "operators": len(operators.profile.nodes),
        "histogram": table(histogram, OPERATORS),
        "answer": None,
    }
    if diagnosis is not None:
        found |= {
            "answer": diagnosis.faster,
            "badge": BADGES[diagnosis.faster],
            "parent": diagnosis.reference,
            "headline": diagnosis.headline,
            "conclusion": diagnosis.conclusion,
            "layers": table([layer.model_dump() for layer in diagnosis.layers], LAYERS),
            "findings": [
                finding.model_dump()
                | {
                    "tone": TONES[finding.severity],
                    "time": "" if finding.share_of_time is None else f"{finding.share_of_time:.0%} of the time",
                }
                for finding in diagnosis.findings
            ],
        }
    return found
