"""The report's section about attention: where teacher, students and INT8 files look, and how far they agree.

``attention.json`` of a run is what :mod:`tasks.attention` writes: ``teacher``, ``rows`` (one per comparison),
``failures`` and ``pictures`` (images and maps as bytes in base64).
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from export.comparison import Column
from export.report.plots import INK, MUTED, SCREEN, SIZE
from export.report.tables import table

METHODS = {"grad_cam": "Grad-CAM", "occlusion": "occlusion"}

COLUMNS = (
    Column("model", "model", "student, or its INT8 file"),
    Column("method", "method", "gradients of the class (Grad-CAM), or its loss where a place is covered (occlusion)"),
    Column("against", "compared with", "whose map it is held against"),
    Column("pearson", "Pearson", "correlation of the values; 1 is the same map, 0 none of it", "number"),
    Column("spearman", "Spearman", "correlation of their ranks", "number"),
    Column("iou", "overlap", "of the highest fifth of the places, over their union", "share"),
    Column("num_images", "images", "images looked at", "count"),
    Column("skipped", "skipped", "of them, images on which a map is the same everywhere", "count"),
)


def section(attention: Mapping[str, Any]) -> dict[str, Any]:
    """What ``sections/attention.*.jinja`` show besides the plots; of an empty mapping, nothing."""
    rows = [{**row, "method": METHODS.get(row["method"], row["method"])} for row in attention.get("rows", ())]
    return {
        "attention": {
            "teacher": attention.get("teacher"),
            "table": table(rows, COLUMNS),
            "failures": dict(attention.get("failures", {})),
            "plots": [(f"attention_{model}", model) for model in students(attention)],
        }
    }


def figures(attention: Mapping[str, Any]) -> dict[str, tuple[Figure | None, str]]:
    """Plot name -> figure and its description, one per student."""
    return {
        f"attention_{model}": (
            pictures(attention, model),
            f"where the teacher and {model} look, one row per image: the image, then one map per model",
        )
        for model in students(attention)
    }


def students(attention: Mapping[str, Any]) -> list[str]:
    """Names of the students in the pictures, in order; an INT8 file belongs to its student."""
    names = [name for picture in attention.get("pictures", ()) for name in picture["models"]]
    return list(dict.fromkeys(name.removesuffix(".int8") for name in names))


def pictures(attention: Mapping[str, Any], student: str) -> Figure | None:
    """One row per image: the image, the teacher's map, the student's, and its INT8 file's where there is one.

    A map is drawn over the grey image, from clear to red; beside it stand the answer and the rank correlation with the
    teacher. Colours are the pictures' own, so they look the same on light and dark pages.
    """
    import matplotlib as mpl

    shown: Sequence[Mapping[str, Any]] = attention.get("pictures", ())
    columns = [
        ("teacher", None),
        *((name, name) for name in (student, f"{student}.int8") if any(name in each["models"] for each in shown)),
    ]
    if not shown or len(columns) < 2:
        return None
    width = SIZE[0]
    side = width / (len(columns) + 1)
    with mpl.rc_context(SCREEN.style() | {"axes.grid": False}):
        figure = Figure(figsize=(width, 0.28 + (side + 0.38) * len(shown)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr]
        grid = figure.subplots(len(shown), len(columns) + 1, squeeze=False)
        for axes, picture in zip(grid, shown, strict=True):
            image = _unpacked(picture["image"])
            _draw(axes[0], image, None)
            _below(axes[0], picture["label"], "label")
            for place, (_, name) in enumerate(columns, start=1):
                seen = picture["teacher"] if name is None else picture["models"].get(name)
                _draw(axes[place], image, (seen or {}).get("map"))
                _below(axes[place], *_words(seen, name is None))
        for axes, title in zip(grid[0], ("image", *(title for title, _ in columns)), strict=True):
            axes.set_title("INT8" if title.endswith(".int8") else title, fontsize=10, color=INK)
    return figure


def _words(seen: Mapping[str, Any] | None, is_teacher: bool) -> tuple[str, str]:
    """What stands below a map: the answer, and the agreement."""
    if seen is None:
        return "not run", ""
    if is_teacher:
        return seen["predicted"], ""
    if seen.get("map") is None:
        return seen["predicted"], "no map"
    found = seen.get("agreement")
    return seen["predicted"], "flat map" if found is None else f"ρ = {found['spearman']:.2f}"


def _draw(axes: Axes, image: NDArray[np.uint8], heat: Mapping[str, Any] | None) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    colour = image if image.shape[2] == 3 else image.repeat(3, axis=2)
    if heat is not None:
        share = _unpacked(heat)[:, :, :1] / 255.0
        grey = colour.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.75
        colour = (grey * (1 - 0.8 * share) + np.array([255.0, 60.0, 20.0]) * 0.8 * share).round().astype(np.uint8)
    axes.imshow(colour, interpolation="none")


def _below(axes: Axes, answer: str, note: str) -> None:
    answer = answer if len(answer) <= 11 else f"{answer[:10]}…"
    axes.annotate(answer, (0, 0), (0, -3), "axes fraction", "offset points", va="top", fontsize=10, color=INK)
    axes.annotate(note, (0, 0), (0, -16), "axes fraction", "offset points", va="top", fontsize=9, color=MUTED)


def _unpacked(packed: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Pixels [H,W,channels]."""
    return np.frombuffer(base64.b64decode(packed["data"]), np.uint8).reshape(packed["shape"])
