from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from scipy.stats import spearmanr

from compression.errors import CompressionError
from compression.select import AnySelector, Nll, SelectConfig, SelectionReport, Tmi, agreement, rank_teachers
from compression.select.nll import nll_score
from compression.select.tmi import tmi_score


def tmi(features: torch.Tensor, labels: torch.Tensor) -> float:
    return tmi_score(features, torch.zeros(len(labels), 2), labels, neighbours=3, max_per_class=300)


def cloud(spread: float, width: int = 16, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes far apart, with some spread within each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    centres = torch.zeros(2, width)
    centres[1] = 10.0
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels


def test_tmi_does_not_see_where_the_features_are_or_how_large() -> None:
    features, labels = cloud(1.0)
    assert tmi(features + 5.0, labels) == pytest.approx(tmi(features, labels), abs=1e-5)
    assert tmi(features * 7.0, labels) == pytest.approx(tmi(features, labels), abs=1e-5)


def test_tmi_grows_with_the_spread_within_classes() -> None:
    scores = [tmi(*cloud(spread)) for spread in (0.1, 0.5, 1.0, 2.0)]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1] - 0.5


def test_tmi_hardly_depends_on_the_width() -> None:
    scores = [
        tmi(torch.randn(300, width, generator=torch.Generator().manual_seed(1)), torch.arange(300) % 3)
        for width in (8, 16, 32, 64)
    ]
    assert max(scores) - min(scores) < 0.5


def test_tmi_leaves_out_classes_too_small_to_say_anything() -> None:
    features, labels = cloud(1.0)
    lonely = torch.cat([features, torch.full((2, 16), 3.0)])
    assert torch.isfinite(torch.tensor(tmi(lonely, torch.cat([labels, torch.tensor([5, 5])]))))


def test_collapsed_features_give_a_finite_score() -> None:
    assert torch.isfinite(torch.tensor(tmi(torch.zeros(40, 8), torch.arange(40) % 2)))


def test_nll_prefers_the_better_and_the_better_calibrated() -> None:
    labels = torch.arange(30) % 3
    right = torch.nn.functional.one_hot(labels, 3).float()
    wrong = right.roll(1, dims=1)
    good = nll_score(torch.zeros(1), right * 4, labels)
    overconfident = torch.where(torch.arange(30).unsqueeze(1) < 3, wrong, right)
    assert (
        good
        > nll_score(torch.zeros(1), overconfident * 4, labels)
        > nll_score(torch.zeros(1), overconfident * 40, labels)
    )


def teachers() -> tuple[dict, torch.Tensor]:
    labels = torch.arange(60) % 3
    right = torch.nn.functional.one_hot(labels, 3).float()
    made = {}
    for name, strength in (("weak", 0.5), ("strong", 5.0), ("middle", 2.0)):
        features = torch.randn(60, 8, generator=torch.Generator().manual_seed(len(name)))
        made[name] = SimpleNamespace(validation_logits=right * strength, validation_features=features)
    return made, labels


def test_the_panel_is_the_best_by_the_deciding_score_and_all_scores_are_shown() -> None:
    made, labels = teachers()
    report = rank_teachers(made, labels, SelectConfig(panel_size=2, rank_by="nll"))
    assert report.panel == ("strong", "middle")
    assert set(report.scores) == {"nll", "tmi"}
    assert report.ranks["nll"] == {"strong": 1, "middle": 2, "weak": 3}
    assert all(set(row) == set(made) for row in report.scores.values())
    by_tmi = rank_teachers(made, labels, SelectConfig(panel_size=1, rank_by="tmi"))
    assert by_tmi.panel[0] == max(report.scores["tmi"], key=lambda name: report.scores["tmi"][name])


def test_a_panel_larger_than_the_field_and_an_absent_score_are_refused() -> None:
    made, labels = teachers()
    with pytest.raises(CompressionError, match="at most 3"):
        rank_teachers(made, labels, SelectConfig(panel_size=4))
    with pytest.raises(CompressionError, match="tmi"):
        rank_teachers(made, labels, SelectConfig(rank_by="tmi", selectors=(Nll(),)))
    assert Tmi().build()(torch.randn(20, 4), torch.randn(20, 2), torch.arange(20) % 2)


def test_agreement_is_the_rank_correlation_of_every_two_selectors() -> None:
    rows = {
        "a": {"x": 1.0, "y": 2.0, "z": 3.0, "w": 4.0},
        "same": {"x": 10.0, "y": 20.0, "z": 21.0, "w": 400.0},
        "back": {"x": 4.0, "y": 3.0, "z": 2.0, "w": 1.0},
        "tied": {"x": 1.0, "y": 1.0, "z": 3.0, "w": 2.0},
    }
    found = agreement(rows)
    assert found["a"]["same"] == pytest.approx(1)
    assert found["a"]["back"] == pytest.approx(-1)
    expected = spearmanr(list(rows["a"].values()), list(rows["tied"].values())).statistic
    assert found["a"]["tied"] == pytest.approx(float(expected))
    assert all(found[one][other] == found[other][one] for one in found for other in found[one])
    assert all(set(row) == set(rows) - {one} for one, row in found.items())


def test_agreement_leaves_out_what_cannot_be_said() -> None:
    assert agreement({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 1.0, "y": 2.0}}) == {}
    two, flat = {"x": 1.0, "y": 2.0, "z": 3.0}, {"x": 1.0, "y": 1.0, "z": 1.0}
    assert agreement({"a": two, "flat": flat}) == {}
    assert set(agreement({"a": two, "b": two, "flat": flat})) == {"a", "b"}


def test_every_selector_ranks_every_teacher_and_the_report_survives_json() -> None:
    made, labels = teachers()
    selectors = tuple(member() for member in get_args(AnySelector))
    for selector in selectors:
        config = SelectConfig(panel_size=2, rank_by=selector.kind, selectors=selectors)
        report = rank_teachers(made, labels, config)
        assert set(report.scores) == set(report.ranks) == {each.kind for each in selectors}
        for kind, row in report.scores.items():
            assert list(row) == list(made)
            assert sorted(report.ranks[kind].values()) == [1, 2, 3]
            assert torch.isfinite(torch.tensor(list(row.values()))).all()
            best = min(report.ranks[kind], key=report.ranks[kind].__getitem__)
            assert row[best] == max(row.values())
        assert report.ranks[selector.kind][report.panel[0]] == 1
        assert SelectionReport.model_validate_json(report.model_dump_json()) == report
        assert report.agreement["nll"]["black_box"] == pytest.approx(1)


def test_only_cheap_scores_are_computed_unless_asked() -> None:
    assert [selector.kind for selector in SelectConfig().selectors] == ["nll", "tmi"]
    assert set(get_args(SelectConfig.model_fields["rank_by"].annotation)) == {
        member.model_fields["kind"].default for member in get_args(AnySelector)
    }
