"""The greedy pick, its heuristic score, and why the bound of the paper does not hold for it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compression.select import Osborn, RanksSets, SelectConfig, rank_teachers
from compression.select.osborn import conditional_entropy, greedy_order, osborn_order


def instance(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of random models on random labels, as costs."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, 60)
    choices = [np.where(random.random(60) < random.random(), labels, random.integers(0, 4, 60)) for _ in range(size)]
    own = np.array([conditional_entropy(labels, choice) for choice in choices])
    return own, np.array([[conditional_entropy(a, b) for b in choices] for a in choices])


def value(members: tuple[int, ...], own: np.ndarray, pairs: np.ndarray) -> float:
    """f(S), from its definition."""
    return -float(sum(own[a] for a in members) + sum(pairs[a, b] for a, b in itertools.permutations(members, 2)))


# ---------------------------------------------------------------- entropies


def test_conditional_entropy_is_the_one_of_the_joint():
    values, given = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    assert conditional_entropy(values, given) == pytest.approx(-0.75 * (2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    even = np.arange(8)
    assert conditional_entropy(even % 4, np.zeros(8, dtype=int)) == pytest.approx(np.log(4))


def test_conditional_entropy_is_never_negative_and_zero_when_told():
    for seed in range(20):
        random = np.random.default_rng(seed)
        a, b = random.integers(0, 5, 50), random.integers(0, 5, 50)
        assert 0 <= conditional_entropy(a, b) <= np.log(5) + 1e-12
        assert conditional_entropy(a, a) == 0
        assert conditional_entropy(a, 10 - 2 * a) == 0
    assert conditional_entropy(np.array([], dtype=int), np.array([], dtype=int)) == 0


def test_equal_models_do_not_disagree():
    choice = np.random.default_rng(0).integers(0, 4, 60)
    assert conditional_entropy(choice, choice) + conditional_entropy(choice, choice) == 0


# ---------------------------------------------------------------- the set function


@pytest.mark.parametrize("seed", range(5))
def test_returns_diminish_for_every_nested_pair(seed):
    own, pairs = instance(5, seed)
    sets = [subset for size in range(6) for subset in itertools.combinations(range(5), size)]
    for small, large in itertools.product(sets, sets):
        if not set(small) <= set(large):
            continue
        for member in set(range(5)) - set(large):
            gains = [value((*each, member), own, pairs) - value(each, own, pairs) for each in (small, large)]
            assert gains[0] >= gains[1] - 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_no_teacher_ever_raises_the_score_so_it_is_not_monotone(seed):
    """The best set without a size is the empty one; only a teacher that is never wrong costs nothing."""
    own, pairs = instance(5, seed)
    for size in range(5):
        for members in itertools.combinations(range(5), size):
            for member in set(range(5)) - set(members):
                loss = value(members, own, pairs) - value((*members, member), own, pairs)
                assert loss >= 0
                assert loss > 0 or own[member] == 0
    assert value(tuple(range(5)), own, pairs) < value((), own, pairs) == 0


@pytest.mark.parametrize("seed", range(5))
def test_gains_are_marginal_and_fall_along_the_order(seed):
    own, pairs = instance(6, seed)
    order = greedy_order(own, pairs)
    taken: tuple[int, ...] = ()
    for member, gain in order:
        gains = {
            other: value((*taken, other), own, pairs) - value(taken, own, pairs) for other in set(range(6)) - set(taken)
        }
        assert gain == pytest.approx(gains[member])
        assert gains[member] == pytest.approx(max(gains.values()))
        taken = (*taken, member)
    assert [gain for _, gain in order] == sorted((gain for _, gain in order), reverse=True)


def test_one_teacher_is_the_one_that_tells_most_about_the_labels():
    for seed in range(20):
        own, pairs = instance(6, seed)
        assert greedy_order(own, pairs)[0][0] == own.argmin()


def test_greedy_is_often_but_not_always_the_best_set():
    hits = 0
    for seed in range(40):
        own, pairs = instance(6, seed)
        greedy = value(tuple(member for member, _ in greedy_order(own, pairs)[:3]), own, pairs)
        best = max(value(each, own, pairs) for each in itertools.combinations(range(6), 3))
        assert greedy <= best + 1e-12
        hits += greedy == pytest.approx(best)
    assert 20 <= hits < 40


# ---------------------------------------------------------------- the selector


def teachers() -> tuple[dict, torch.Tensor]:
    """The best; one that errs as it does; one slightly better than that, but with errors of its own."""
    labels = torch.arange(240) % 4
    places = torch.arange(240) // 4

    def wrong_at(where: torch.Tensor, shift: int) -> torch.Tensor:
        return torch.where(where, (labels + shift) % 4, labels)

    choices = {
        "loner": wrong_at((places >= 30) & (places < 40), 2),
        "best": wrong_at(places < 8, 1),
        "akin": wrong_at(places < 11, 1),
    }
    made = {
        name: SimpleNamespace(
            validation_logits=3.0 * torch.nn.functional.one_hot(choice, 4).float(),
            validation_features=torch.zeros(240, 2),
        )
        for name, choice in choices.items()
    }
    return made, labels


def test_the_panel_is_a_team_and_scores_are_gains():
    made, labels = teachers()
    report = rank_teachers(made, labels, SelectConfig(panel_size=2, rank_by="osborn", selectors=(Osborn(),)))
    assert report.panel == ("best", "akin")
    assert report.ranks["osborn"] == {"loner": 3, "best": 1, "akin": 2}
    assert list(report.scores["osborn"]) == list(made)
    scores = report.scores["osborn"]
    assert scores["best"] > scores["akin"] > scores["loner"]
    alone = rank_teachers(made, labels, SelectConfig(panel_size=2))
    assert alone.panel == ("best", "loner")


def test_the_order_of_the_recipe_changes_nothing_but_ties():
    made, labels = teachers()
    choices = {name: each.validation_logits.argmax(1) for name, each in made.items()}
    backwards = dict(reversed(choices.items()))
    assert osborn_order(choices, labels) == pytest.approx(osborn_order(backwards, labels))
    twins = {"b": choices["best"], "a": choices["best"]}
    assert list(osborn_order(twins, labels)) == ["b", "a"]


def test_one_teacher_and_perfect_teachers_have_finite_scores():
    labels = torch.arange(12) % 4
    assert osborn_order({"only": labels.roll(1)}, labels) == {"only": pytest.approx(0.0)}
    assert osborn_order({"x": labels, "y": labels, "z": labels}, labels) == {"x": 0.0, "y": 0.0, "z": 0.0}


def test_only_it_ranks_sets():
    assert isinstance(Osborn(), RanksSets)
    assert sum(isinstance(selector, RanksSets) for selector in SelectConfig().selectors) == 0
