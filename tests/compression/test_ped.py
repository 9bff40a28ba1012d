"""Overlapping classes move apart as rigid bodies, and the evidence is the one a direct calculation gives."""

import numpy as np
import pytest
import torch

from compression.select.ped import Ped, log_evidence, push_apart

SETTINGS = {"reach": 0.6, "time_step": 0.1, "stiffness": 1.0, "max_steps": 6}


def classes(gap: float, count: int = 40, width: int = 6, number: int = 3, seed: int = 0) -> tuple:
    """Unit clouds around centres ``gap`` apart."""
    random = np.random.default_rng(seed)
    labels = np.arange(count * number) % number
    centres = gap * np.eye(number, width)
    return centres[labels] + random.standard_normal((count * number, width)), labels


def centres_of(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.stack([features[labels == label].mean(0) for label in np.unique(labels)])


def push(features: np.ndarray, labels: np.ndarray, **changes) -> np.ndarray:
    return push_apart(features, labels, **(SETTINGS | changes))


def distances(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    centres = centres_of(features, labels)
    scale = features.std(0) + 1e-3
    return np.linalg.norm((centres[:, None] - centres[None]) / scale, axis=-1)[np.triu_indices(len(centres), 1)]


# ---------------------------------------------------------------- the motion


def test_classes_move_as_rigid_bodies():
    features, labels = classes(0.5)
    moved = push(features, labels)
    assert np.abs(moved - features).max() > 1e-3
    for label in range(3):
        moves = (moved - features)[labels == label]
        np.testing.assert_allclose(moves, np.broadcast_to(moves[0], moves.shape), atol=1e-12)
        np.testing.assert_allclose(np.cov(moved[labels == label].T), np.cov(features[labels == label].T), atol=1e-10)


def test_total_momentum_is_zero():
    """Of classes of one mass, however many samples each has."""
    features, labels = classes(0.5)
    keep = (labels != 2) | (np.arange(len(labels)) < 30)
    moves = centres_of(push(features[keep], labels[keep]), labels[keep]) - centres_of(features[keep], labels[keep])
    assert np.abs(moves).max() > 1e-3
    np.testing.assert_allclose(moves.sum(0), 0, atol=1e-12)


@pytest.mark.parametrize("number", [2, 3, 6])
def test_overlapping_classes_are_farther_apart_afterwards(number):
    features, labels = classes(0.5, number=number)
    scale = features.std(0) + 1e-3

    def mean_distance(values: np.ndarray) -> float:
        return float(distances(values / scale * (values.std(0) + 1e-3), labels).mean())

    sizes = [mean_distance(push(features, labels, max_steps=steps)) for steps in (0, 1, 3, 6)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0] + 1e-3


def test_two_classes_move_by_the_formula():
    features, labels = classes(0.5, number=2)
    moved = push(features, labels, max_steps=1)
    scale = features.std(0) + 1e-3
    standard = (features - features.mean(0)) / scale
    first, second = centres_of(standard, labels)
    radii = [np.sqrt(standard[labels == label].var(0).sum()) for label in (0, 1)]
    distance = np.linalg.norm(first - second)
    overlap = 0.6 * sum(radii) - distance
    assert overlap > 0
    expected = (first - second) / distance * 0.5 * 0.1**2 * overlap * scale
    np.testing.assert_allclose((moved - features)[labels == 0][0], expected, rtol=1e-9)
    np.testing.assert_allclose((moved - features)[labels == 1][0], -expected, rtol=1e-9)


def test_a_strong_force_never_moves_farther_than_the_overlap():
    features, labels = classes(0.5, number=2)
    scale = features.std(0) + 1e-3
    moved = push(features, labels, max_steps=1, stiffness=100.0, time_step=10.0)
    size = np.linalg.norm(((moved - features) / scale)[0])
    standard = (features - features.mean(0)) / scale
    radii = sum(np.sqrt(standard[labels == label].var(0).sum()) for label in (0, 1))
    gap = np.linalg.norm(np.subtract(*centres_of(standard, labels)))
    assert size == pytest.approx(0.6 * radii - gap)


def test_without_overlap_nothing_moves():
    features, labels = classes(30.0)
    assert np.array_equal(push(features, labels), features)
    assert np.array_equal(push(features, labels, max_steps=0), features)


def test_one_class_and_classes_with_one_centre_do_not_move():
    features, labels = classes(0.5)
    assert np.array_equal(push(features, np.zeros_like(labels)), features)
    assert np.array_equal(push(np.zeros((12, 4)), np.arange(12) % 3), np.zeros((12, 4)))


def test_the_motion_does_not_see_where_the_features_are():
    features, labels = classes(0.5)
    np.testing.assert_allclose(push(features + 7.0, labels), push(features, labels) + 7.0, atol=1e-9)


def test_names_of_classes_do_not_matter():
    features, labels = classes(0.5)
    np.testing.assert_allclose(push(features, 10 * labels + 3), push(features, labels), atol=1e-12)


# ---------------------------------------------------------------- the evidence


def evidence(features: np.ndarray, target: np.ndarray, alpha: float, beta: float) -> float:
    """Log density of the target under N(0, I / beta + F F' / alpha), per sample: no shortcut."""
    cover = np.eye(len(target)) / beta + features @ features.T / alpha
    sign, logdet = np.linalg.slogdet(cover)
    assert sign > 0
    return float(
        -0.5 * (logdet + target @ np.linalg.solve(cover, target) + len(target) * np.log(2 * np.pi)) / len(target)
    )


@pytest.mark.parametrize(("count", "width"), [(40, 5), (30, 30), (20, 35)])
def test_the_evidence_is_the_largest_a_direct_search_finds(count, width):
    from scipy.optimize import minimize

    features, labels = classes(1.0, count=count // 2, width=width, number=2, seed=5)
    labels = np.where(np.random.default_rng(1).random(len(labels)) < 0.25, 1 - labels, labels)  # noisy: no exact fit
    best = []
    for label in (0, 1):
        target = (labels == label).astype(float)
        found = minimize(
            lambda logs, target=target: -evidence(features, target, *np.exp(logs)),
            [0.0, 0.0],
            method="Nelder-Mead",
            options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000},
        )
        best.append(-found.fun)
    assert log_evidence(features, labels) == pytest.approx(np.mean(best), abs=1e-4)


def test_the_evidence_prefers_features_that_tell_the_classes_apart():
    scores = [log_evidence(*classes(gap)) for gap in (0.0, 1.0, 3.0, 8.0)]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.5


@pytest.mark.parametrize("features", [np.zeros((12, 4)), np.eye(12), np.ones((12, 20)), 1e4 * np.eye(12, 3)])
def test_extreme_features_have_a_finite_evidence(features):
    assert np.isfinite(log_evidence(features, np.arange(12) % 3))
    assert np.isfinite(log_evidence(features, np.zeros(12, dtype=int)))


# ---------------------------------------------------------------- the selector


def score(features: np.ndarray, labels: np.ndarray, **settings) -> float:
    return Ped(**settings).build()(
        torch.from_numpy(features).float(), torch.zeros(len(labels), 3), torch.from_numpy(labels)
    )


def test_without_steps_it_is_plain_logme():
    features, labels = classes(0.5)
    assert score(features, labels, max_steps=0) == pytest.approx(log_evidence(features, labels), abs=1e-5)
    assert score(features, labels) > score(features, labels, max_steps=0)
    apart, labels = classes(30.0)
    assert score(apart, labels) == score(apart, labels, max_steps=0)


def test_it_ranks_by_separation_and_repeats_itself():
    scores = [score(*classes(gap)) for gap in (0.0, 1.0, 3.0)]
    assert scores == sorted(scores)
    assert scores == [score(*classes(gap)) for gap in (0.0, 1.0, 3.0)]


def test_only_the_first_samples_of_a_class_are_looked_at():
    features, labels = classes(1.0)
    assert score(features, labels, max_per_class=10) == score(features[:30], labels[:30])
