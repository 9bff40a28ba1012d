"""DisWOT: the score and its invariances, as a filter of candidates and as what evolution goes by."""

import itertools
import json
import random
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from compression import profile
from compression.errors import CompressionError, ShapeError
from compression.features import penultimate
from compression.models import ModelSpec
from compression.search import Scale
from compression.search.filters.diswot import (
    SCORES_FILE,
    Diswot,
    agreement,
    classifier_gradient,
    diswot_score,
    gram,
)
from compression.search.samplers import Situation
from compression.search.samplers.training_free import RANKING_FILE, TrainingFree, aging_evolution, mutated
from compression.search.space import Workshop
from compression.search.trials import TrialResult
from compression.zoo import Group, PlainCnn, VisionTransformer
from tests.compression.test_study import BASE, SCALE, config_of, dataset_of, search, teacher_of

OTHER = Scale(base=PlainCnn(widths=(8, 8), depths=(1, 1), strides=(2, 1), stem_width=8), widths=(1.0, 2.0))


def shop_of(folder, seed: int = 0, **changes) -> Workshop:
    arguments = {"parents": {"teacher": teacher_of()}, "dataset": dataset_of(), "best_teacher": "teacher"}
    return Workshop(seed=seed, folder=folder, **(arguments | changes))


def spec_of(model) -> ModelSpec:
    return teacher_of()[1].model_copy(update={"model": model})


# --- the score


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.integers(1, 9))
def test_agreement_is_zero_for_equal_features_below_elsewhere_and_minds_neither_scale_nor_width(seed, scale, width):
    generator = torch.Generator().manual_seed(seed)
    ours = torch.randn(6, 5, 3, 3, generator=generator)
    theirs = torch.randn(6, width, 2, 2, generator=generator)
    assert agreement(gram(ours), gram(ours)) == 0.0
    found = agreement(gram(ours), gram(theirs))
    assert -4.0 / 6 <= found < 0.0
    assert agreement(gram(ours), gram(scale * theirs)) == pytest.approx(found, rel=1e-6)


def test_tiny_features_are_scaled_too_and_zeros_stay_finite():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gram(1e-18 * features), gram(features))
    assert torch.equal(gram(torch.zeros(4, 3)), torch.zeros(4, 4, dtype=torch.float64))


def test_different_batches_are_refused():
    with pytest.raises(ShapeError, match=r"Gram matrices \[4, 4\] and \[5, 5\]"):
        agreement(gram(torch.ones(4, 2)), gram(torch.ones(5, 2)))


def test_gradient_is_what_backward_leaves_in_the_classifier():
    model, _ = teacher_of()
    images = torch.randn(9, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 3
    logits, features = penultimate(model, images)
    F.cross_entropy(logits, labels).backward()
    found = classifier_gradient(logits.detach(), features.detach(), labels)
    assert torch.allclose(found.float(), model.head.weight.grad, atol=1e-7)


def test_the_teacher_scores_zero_and_everything_else_below(tmp_path):
    shop = shop_of(tmp_path)
    assert diswot_score(spec_of(BASE), shop) == 0.0
    for model in (
        BASE.scaled(width=0.5),
        BASE.scaled(depth_delta=1),
        VisionTransformer(width=16, depth=1, num_heads=2),
    ):
        assert diswot_score(spec_of(model), shop) < 0.0


def test_the_score_is_the_weighted_sum_of_its_parts(tmp_path):
    shop, spec = shop_of(tmp_path), spec_of(BASE.scaled(width=0.5))
    semantic = diswot_score(spec, shop, relation=0.0)
    relation = diswot_score(spec, shop, semantic=0.0)
    assert semantic < 0.0
    assert relation < 0.0
    assert diswot_score(spec, shop, semantic=2.0, relation=0.5) == pytest.approx(2.0 * semantic + 0.5 * relation)


def test_equal_seeds_score_alike_and_nothing_else_changes(tmp_path):
    teacher, teacher_spec = teacher_of()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    spec, state = spec_of(BASE.scaled(width=0.5)), torch.get_rng_state()
    parents = {"teacher": (teacher, teacher_spec)}
    scores = [diswot_score(spec, shop_of(tmp_path / name, parents=parents)) for name in "ab"]
    assert scores[0] == scores[1]
    assert scores[0] != diswot_score(spec, shop_of(tmp_path / "c", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training


def test_scores_outlive_the_process(tmp_path):
    spec = spec_of(BASE.scaled(width=0.5))
    first = diswot_score(spec, shop_of(tmp_path))
    assert diswot_score(spec, shop_of(tmp_path)) == first
    kept = json.loads((tmp_path / SCORES_FILE).read_text())
    (tmp_path / SCORES_FILE).write_text(json.dumps(dict.fromkeys(kept, (-1.0, -2.0))))
    assert diswot_score(spec, shop_of(tmp_path)) == -3.0, "read, not computed again"
    assert diswot_score(spec, shop_of(tmp_path), seeds=2) > -3.0, "another question"


def test_what_cannot_be_compared(tmp_path):
    assert diswot_score(spec_of(Group()), shop_of(tmp_path)) is None
    with pytest.raises(CompressionError, match="no best teacher"):
        diswot_score(spec_of(BASE), shop_of(tmp_path, best_teacher=None))
    with pytest.raises(CompressionError, match="'teacher' without a feature map"):
        diswot_score(spec_of(BASE), shop_of(tmp_path, parents={"teacher": (torch.nn.Identity(), spec_of(Group()))}))
    data = dataset_of()
    unlabelled = replace(data.calibration, labels=torch.full_like(data.calibration.labels, -1))
    with pytest.raises(CompressionError, match="0 labelled calibration images"):
        diswot_score(spec_of(BASE), shop_of(tmp_path, dataset=replace(data, calibration=unlabelled)))


# --- the filter


@pytest.mark.parametrize("config", [Diswot, TrainingFree])
def test_a_score_of_nothing_is_refused(config):
    with pytest.raises(ValidationError, match="semantic and relation are both 0"):
        config(semantic=0.0, relation=0.0)


def test_filtered_candidates_have_low_scores_and_were_never_trained(tmp_path):
    look = Diswot(keep=0.3, seeds=1)
    config = config_of(spaces=(SCALE,), trials=3, filter=look)
    result = search(tmp_path, config, best_teacher="teacher")
    filtered = [trial for trial in result.trials if trial.state == "filtered"]
    assert filtered
    assert all(trial.accuracy is None and "is low" in trial.reason for trial in filtered)
    trained = [trial for trial in result.trials if trial.state == "complete"]
    assert len(trained) >= look.first
    shop = shop_of(tmp_path / "other")
    for trial in (*filtered, *trained):
        _, spec = SCALE.build(trial.choices, shop)
        assert trial.score == diswot_score(spec, shop, seeds=1)
    assert max(trial.score for trial in trained) > max(trial.score for trial in filtered)


# --- evolution


def evolved(score, **changes):
    """Over five switches; a drawn candidate has none of them on."""
    arguments = {"population": 4, "cycles": 60, "tournament": 3}

    def mutate(candidate, rng):
        gene = rng.choice(list(candidate[1]))
        return "bits", candidate[1] | {gene: 1 - candidate[1][gene]}

    return aging_evolution(
        random.Random(0),
        draw=lambda _: ("bits", dict.fromkeys("abcde", 0)),
        **({"mutate": mutate, "score": score} | arguments | changes),
    )


def test_evolution_climbs_keeps_the_budget_and_repeats_itself():
    asked = []

    def score(candidate):
        asked.append(tuple(candidate[1].values()))
        return None if sum(candidate[1].values()) > 3 else float(sum(candidate[1].values()))

    found = evolved(score)
    sizes = [sum(choices.values()) for _, choices in found]
    assert sizes[0] == 3, "the best within the budget"
    assert sizes == sorted(sizes, reverse=True)
    assert any(sum(bits) > 3 for bits in asked), "the budget was tried"
    assert len(asked) == len(set(asked)), "asked once per candidate"
    assert found == evolved(score)


def test_the_best_of_a_tournament_breeds_and_the_oldest_leaves():
    parents: list[int] = []
    count = itertools.count(1)

    def mutate(candidate, rng):
        parents.append(candidate[1]["n"])
        return "n", {"n": -next(count)}

    start = iter([5, 9, 7])
    aging_evolution(
        random.Random(0),
        draw=lambda _: ("n", {"n": next(start)}),
        mutate=mutate,
        score=lambda candidate: float(candidate[1]["n"]),
        population=3,
        cycles=6,
        tournament=3,
    )
    assert parents == [9, 9, 7, -1, -2, -3], "9 is the second oldest and leaves after two cycles"


def test_nothing_within_the_budget_is_an_empty_ranking():
    assert evolved(lambda _: None) == []


def situation_of(shop: Workshop, *, spaces=(SCALE, OTHER), rows=(), number=0, seed=0, max_macs=None) -> Situation:
    named = {f"space-{index}": space for index, space in enumerate(spaces)}
    genes = {label: space.genes(shop) for label, space in named.items()}
    return Situation(named, genes, rows, number, seed, shop, max_macs)


SAMPLER = TrainingFree(population=3, cycles=8, tournament=2, seeds=1)


def test_candidates_over_the_cap_are_neither_scored_nor_proposed(tmp_path):
    shop = shop_of(tmp_path)
    cap = profile.macs(SCALE.build({"width": 1.0, "depth": 0}, shop)[0], (1, 12, 12))
    situation = situation_of(shop, max_macs=cap)
    ranking = SAMPLER.ranking(situation)
    specs = []
    for label, choices in ranking:
        model, spec = situation.spaces[label].build(choices, shop)
        assert profile.macs(model, spec.input_shape) <= cap
        specs.append(spec)
    scores = [diswot_score(spec, shop, seeds=1) for spec in specs]
    assert len(ranking) >= 2
    assert scores == sorted(scores, reverse=True)
    assert len(json.loads((tmp_path / SCORES_FILE).read_text())) == len({spec.model_dump_json() for spec in specs})


def test_the_ranking_depends_on_the_studys_seed_not_on_the_proposals(tmp_path):
    first = SAMPLER.ranking(situation_of(shop_of(tmp_path / "a"), seed=1))
    assert SAMPLER.ranking(situation_of(shop_of(tmp_path / "b"), seed=2, number=7)) == first
    others = [SAMPLER.ranking(situation_of(shop_of(tmp_path / str(seed), seed=seed))) for seed in (1, 2)]
    assert any(other != first for other in others)


def test_the_ranking_outlives_the_process(tmp_path):
    first = SAMPLER.ranking(situation_of(shop_of(tmp_path)))
    kept = json.loads((tmp_path / RANKING_FILE).read_text())
    kept["ranking"].reverse()
    (tmp_path / RANKING_FILE).write_text(json.dumps(kept))
    assert SAMPLER.ranking(situation_of(shop_of(tmp_path))) == first[::-1], "read, not computed again"
    assert SAMPLER.ranking(situation_of(shop_of(tmp_path), spaces=(SCALE,))) != first[::-1], "other spaces"


def test_proposals_go_down_the_ranking_and_then_to_what_is_left(tmp_path):
    shop = shop_of(tmp_path)
    ranking = SAMPLER.ranking(situation_of(shop))
    rows: list[TrialResult] = []
    for number in range(8):  # all there are: 3 widths by 2 depths, and 2 widths
        label, choices = SAMPLER.propose(situation_of(shop, rows=rows, number=number, seed=number))
        if number < len(ranking):
            assert (label, choices) == ranking[number]
        assert all((row.space, row.choices) != (label, choices) for row in rows)
        rows.append(TrialResult(number, label, choices, "complete"))
    assert len(ranking) < 8
    SAMPLER.propose(situation_of(shop, rows=rows, number=8))


def test_mutants_differ_in_one_gene_or_in_their_space(tmp_path):
    situation = situation_of(shop_of(tmp_path))
    rng, parent, kinds = random.Random(0), ("space-0", {"width": 1.0, "depth": 0}), set()
    for _ in range(60):
        label, choices = mutated(parent, situation, rng)
        assert choices.keys() == situation.genes[label].keys()
        if label == parent[0]:
            changed = [gene for gene in choices if choices[gene] != parent[1][gene]]
            assert len(changed) == 1
            assert choices[changed[0]] in situation.genes[label][changed[0]]
            kinds |= set(changed)
        else:
            kinds.add(label)
    assert kinds == {"width", "depth", "space-1"}
    single = situation_of(situation.shop, spaces=(Scale(base=BASE, widths=(1.0,)),))
    assert mutated(("space-0", {"width": 1.0, "depth": 0}), single, rng) == ("space-0", {"width": 1.0, "depth": 0})


def test_a_space_that_trains_while_it_builds_is_refused(tmp_path):
    class Trains(Scale):
        trains_while_building: ClassVar[bool] = True

    with pytest.raises(CompressionError, match="'space-0', which trains while it builds"):
        SAMPLER.propose(situation_of(shop_of(tmp_path), spaces=(Trains(base=BASE),)))


def test_a_study_proposes_by_the_ranking_after_the_first_trials(tmp_path):
    config = config_of(spaces=(SCALE,), trials=4, sampler=SAMPLER)
    result = search(tmp_path, config, best_teacher="teacher")
    shop = shop_of(tmp_path / "other")
    ranking = SAMPLER.ranking(situation_of(shop, spaces=(SCALE,)))
    first = [trial.choices for trial in result.trials[:3]]
    rest = [choices for _, choices in ranking if choices not in first]
    assert rest
    assert result.trials[3].choices == rest[0]
