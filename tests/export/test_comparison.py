import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from compression.errors import InputError
from export.comparing.view import (
    VIEW,
    Champion,
    Filters,
    column_named,
    gather,
    mark_champions,
    mark_fronts,
    parse_where,
    sort_rows,
    told_apart_by,
)
from export.comparison import (
    COLUMNS,
    NOT_MEASURED,
    console_table,
    hypervolume,
    knee,
    marginal_gains,
    pareto_flags,
    read_comparison,
    show,
    write_comparison,
)

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=14)


def test_column_names_and_titles_are_unique_and_explained():
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)
    assert all(column.meaning for column in COLUMNS)


def test_the_csv_reads_back_with_types_and_marks_what_is_missing(tmp_path):
    rows = [
        {"id": "a", "accuracy": 0.5, "macs": 1_000_000_000_000, "pareto": True, "nll": float("nan"), "brier": None},
        {"id": "b, with a comma", "accuracy": 1.0, "pareto": False, "batch": 32},
    ]  # fmt: skip
    path = tmp_path / "comparison.csv"
    write_comparison(rows, path)
    first, second = read_comparison(path)
    assert list(first) == [column.name for column in COLUMNS]
    assert (first["accuracy"], first["macs"], first["pareto"]) == (0.5, 10**12, True)
    assert first["nll"] is None
    assert (second["id"], second["batch"], second["pareto"]) == ("b, with a comma", 32, False)
    assert path.read_text().splitlines()[1].count(NOT_MEASURED) > 10
    write_comparison([first, second], tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == path.read_text()


def test_a_column_nobody_declared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Row 'a' has unknown columns \['acuracy'\]"):
        write_comparison([{"id": "a", "acuracy": 1.0}], tmp_path / "comparison.csv")


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (0.9123, "share", "91.23 %"),
        (-0.0123, "points", "-1.23"),
        (0.0, "points", "+0.00"),
        (1024, "bytes", "1 KiB"),
        (131_000, "bytes", "128 KiB"),
        (929_280, "count", "929 k"),
        (32, "count", "32"),
        (0.0621, "ms", "0.062 ms"),
        (1234.5, "ms", "1,234.5 ms"),
        (212.4, "seconds", "212 s"),
        (0.155, "ratio", "0.155×"),
        (0.0, "number", "0"),
        (16130.31, "number", "16,130"),
        (True, "text", "yes"),
        (None, "share", NOT_MEASURED),
        (math.nan, "ms", NOT_MEASURED),
        ("", "text", NOT_MEASURED),
        ("residual", "text", "residual"),
    ],
)
def test_cells_read_well(value, kind, shown):
    assert show(value, kind) == shown


def test_the_terminal_table_shows_units_and_gaps_at_any_width():
    name = "student-0.rtx-float16-sm86"
    measured = {"batch": 32, "latency_p50_ms": 12.5, "ratio_to_reference": 0.1625, "verdict": "ships"}
    rows = [{"id": "student", "accuracy": 0.9, **measured}, {"id": name}, {"id": "teacher"}]
    for width in (80, 220):
        out = io.StringIO()
        Console(file=out, width=width, color_system=None).print(console_table(rows, title="t", width=width))
        text = " ".join(out.getvalue().split())
        assert "student" in text
        assert "90.00 %" in text
        for shown in (name, "ships", "12.5", "p50 ms"):
            assert shown in text
        assert "…" not in text, "nothing is cut off"
        assert text.split("teacher")[1].strip(), "an empty cell shows that it is empty"


def test_marginal_gains_compare_each_candidate_once_with_its_control():
    rows = [
        {"id": "plain", "accuracy": 0.80, "ece": 0.02, "seconds": 10.0, "batch": 1},
        {"id": "kd", "control": "plain", "accuracy": 0.82, "ece": 0.01, "seconds": 12.0, "batch": 1},
        {"id": "kd", "control": "plain", "accuracy": 0.82, "ece": 0.01, "seconds": 12.0, "batch": 32},
        {"id": "qat", "control": "ptq", "accuracy": 0.81},
    ]
    kd, qat = marginal_gains(rows)
    assert kd["gain"] == pytest.approx(0.02)
    assert kd["ece_change"] == pytest.approx(-0.01)
    assert kd["seconds"] == pytest.approx(2.0)
    assert (qat["id"], qat["gain"], qat["seconds"]) == ("qat", None, None)


@given(POINTS)
def test_the_front_is_exactly_what_nothing_beats(points):
    flags = pareto_flags(points)
    for point, on_front in zip(points, flags, strict=True):
        beaten = any(c <= point[0] and v >= point[1] and (c, v) != point for c, v in points)
        assert on_front != beaten


@given(POINTS, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    flags = pareto_flags(points)
    assert pareto_flags([points[i] for i in order]) == [flags[i] for i in order]


def test_a_point_that_was_not_measured_is_never_on_the_front():
    assert pareto_flags([(math.nan, 9.0), (1.0, math.inf), (2.0, 1.0)]) == [False, False, True]


@given(POINTS, st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_hypervolume_counts_the_unit_squares_it_dominates_and_never_shrinks(points, extra):
    area = hypervolume(points, reference=(10, 0))
    squares = sum(any(c <= x and v >= y + 1 for c, v in points) for x in range(10) for y in range(10))
    assert area == squares
    assert hypervolume([*points, extra], reference=(10, 0)) >= area


@given(POINTS)
def test_the_knee_is_on_the_front(points):
    chosen = knee(points)
    if not points:
        assert chosen is None
    else:
        assert chosen is not None
        assert pareto_flags(points)[chosen]


def test_the_knee_is_where_more_time_stops_paying():
    assert knee([(1, 0.50), (2, 0.88), (3, 0.90), (10, 0.92)]) == 1
    assert knee([(1, 0.5), (2, 0.6)]) == 1


def view_rows():
    base = {"recipe": "digits", "role": "student", "provider": "CPU", "isa": "avx2", "target": "cpu, cpu-int8"}
    return [
        {**base, "run": "night-1", "id": "a", "batch": 1, "accuracy": 0.90, "latency_p50_ms": 1.0},
        {**base, "run": "night-1", "id": "b", "batch": 1, "accuracy": 0.95, "latency_p50_ms": 2.0},
        {**base, "run": "night-2", "id": "a", "batch": 1, "accuracy": 0.96, "latency_p50_ms": 1.5},
        {**base, "run": "night-2", "id": "a", "batch": 32, "accuracy": 0.96, "latency_p50_ms": 9.0},
        {**base, "run": "night-2", "id": "engine", "role": "engine", "target": "rtx"},
        {**base, "recipe": "clothes", "run": "night-3", "id": "a", "batch": 1, "accuracy": 0.5, "latency_p50_ms": 5.0},
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("accuracy>=0.95", ["b", "a", "a"]),
        ("p50<2", ["a", "a"]),
        ("batch==32", ["a"]),
        ("role=engine", ["engine"]),
        ("role != student", ["engine"]),
        ("run=night-1", ["a", "b"]),
    ],
)
def test_a_condition_keeps_what_meets_it_and_never_what_was_not_measured(text, kept):
    condition = parse_where(text)
    assert [row["id"] for row in view_rows() if condition(row)] == kept


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("acuracy>0.9", "Did you mean 'accuracy'"),
        ("accuracy", "has no sign"),
        ("accuracy>much", "shares from 0 to 1"),
        ("role>student", "expected = or !="),
    ],
)
def test_a_condition_that_means_nothing_is_refused_with_a_way_out(text, said):
    with pytest.raises(InputError, match=said):
        parse_where(text)


def test_truth_values_are_conditions_too():
    rows = mark_fronts(view_rows())
    assert [row["id"] for row in rows if parse_where("pareto=yes")(row)] == ["a", "a", "a", "a"]
    assert [row["id"] for row in rows if parse_where("pareto=no")(row)] == ["b"]


def test_the_front_is_over_all_runs_of_a_recipe_and_never_over_several_recipes():
    flags = [(row["run"], row["id"], row.get("pareto")) for row in mark_fronts(view_rows())]
    assert flags == [
        ("night-1", "a", True), ("night-1", "b", False), ("night-2", "a", True), ("night-2", "a", True),
        ("night-2", "engine", None), ("night-3", "a", True),
    ]  # fmt: skip


def test_rows_pass_filters_of_any_column_and_a_cell_may_list_several_targets():
    rows = mark_fronts(view_rows())
    chosen = Filters(recipes=["digits"], targets=["cpu-int8"], batches=[1], front=True)
    assert [(row["run"], row["id"]) for row in rows if chosen(row)] == [("night-1", "a"), ("night-2", "a")]
    assert all(Filters()(row) for row in rows)


def test_sorting_puts_what_was_not_measured_last_in_both_directions():
    for name in ("accuracy", "-accuracy"):
        values = [row.get("accuracy") for row in sort_rows(view_rows(), name)]
        assert values[-1] is None
        assert values[:-1] == sorted(values[:-1], reverse=name.startswith("-"))


def test_columns_are_found_by_name_and_title_and_rows_told_apart_by_what_differs():
    assert column_named("p50") is column_named("latency_p50_ms")
    assert {column.name for column in COLUMNS} < {column.name for column in VIEW}
    assert told_apart_by(view_rows()) == ["recipe", "run"]
    assert told_apart_by(view_rows()[:2]) == []
    assert told_apart_by([view_rows()[0], view_rows()[5]]) == ["recipe"]


def test_a_champion_of_another_night_is_added_and_marked(tmp_path):
    folder = tmp_path / "runs" / "digits" / "night-0"
    folder.mkdir(parents=True)
    write_comparison(
        [{"id": name, "recipe": "digits", "accuracy": 0.9, "batch": 1} for name in ("a", "b")],
        folder / "comparison.csv",
    )
    rows = mark_champions(view_rows(), [Champion("digits", "7", "b", folder)])
    assert len(rows) == len(view_rows()) + 1
    assert [(row["run"], row["id"], row["champion"]) for row in rows if row.get("champion")] == [
        ("night-0", "b", "version 7")
    ]
    here = mark_champions(gather([folder]), [Champion("digits", "7", "b", folder)])
    assert [row["id"] for row in here if row.get("champion")] == ["b"]
    assert mark_champions(view_rows(), [Champion("digits", "7", "b", tmp_path / "gone")]) == view_rows()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no comparison\.csv"):
        gather([tmp_path])
