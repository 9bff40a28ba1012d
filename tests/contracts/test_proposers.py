"""What every sampler and every filter of a search promises; a new one is a row here."""

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch

from compression import profile
from compression.card import MethodCard
from compression.search import AnyFilter, AnySampler
from compression.search.candidate import digest_of, labels_of
from compression.search.filters import Diswot, Filter, Inherited, Predictor
from compression.search.ledger import opened
from compression.search.samplers import N2n, Nsga2, RandomSearch, Sampler, Situation, Tpe, TrainingFree
from compression.search.space import Workshop
from compression.search.spaces import Design, Scale, Shrink
from compression.search.trials import OBJECTIVES, TrialResult
from compression.zoo import PlainCnn
from tests.compression.losses.short_training import stored
from tests.compression.tiny_data import tiny_dataset
from tests.contracts.search_cases import workshop

BASE = PlainCnn(widths=(16, 16), depths=(1, 1), strides=(2, 2), stem_width=8)
NETWORKS = (
    Scale(base=BASE, widths=(0.5, 1.0, 2.0)),
    Design(base=BASE, widths=((8, 16, 24), (8, 16, 24, 32)), depths=((1, 2), (1, 2))),
)
SAMPLERS: dict[str, tuple[Sampler, tuple]] = {
    "nsga2": (Nsga2(population=4), NETWORKS),
    "tpe": (Tpe(warm_up_trials=4), NETWORKS),
    "random": (RandomSearch(), NETWORKS),
    "training_free": (TrainingFree(population=4, cycles=4, tournament=2), NETWORKS),
    "n2n": (N2n(removal_trials=4), (Shrink(parent="residual"),)),
}
FILTERS: dict[str, Filter] = {"diswot": Diswot(seeds=1), "inherited": Inherited(), "predictor": Predictor()}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    data = tiny_dataset()
    panel = [stored(data, tmp_path_factory.mktemp("panel"), width=8, seed=1)]
    return workshop(data, panel, tmp_path_factory.mktemp("shop"))


def test_every_sampler_and_filter_has_a_row():
    assert {type(each) for each, _ in SAMPLERS.values()} == set(get_args(AnySampler))
    assert {type(each) for each in FILTERS.values()} == set(get_args(AnyFilter))


@pytest.mark.parametrize("method", [*(each for each, _ in SAMPLERS.values()), *FILTERS.values()], ids=lambda m: m.kind)
def test_card_and_json(method):
    assert isinstance(method.card, MethodCard)
    assert all(len(text) > 5 for text in method.card.model_dump().values())
    assert type(method).model_validate_json(method.model_dump_json()) == method


def outcome(number: int, space: str, choices: dict) -> TrialResult:
    """A made-up outcome: more is better and slower."""
    worth = sum(float(value) for value in choices.values())
    return TrialResult(
        number,
        space,
        choices,
        "complete",
        accuracy=1 - 1 / (2 + worth),
        latency_p50_ms=1 + worth,
        size_bytes=int(1000 * (1 + worth)),
        macs=1000,
        params=int(100 * (1 + worth)),
    )


def proposals(sampler: Sampler, spaces: tuple, shop: Workshop, folder, *, count: int = 10, stop: int = 0) -> list:
    """What is proposed in a study of made-up outcomes; it is closed and opened again after ``stop`` of them."""
    named = labels_of(spaces)
    genes = {label: space.genes(shop) for label, space in named.items()}
    settings = {"sampler": sampler, "objectives": OBJECTIVES, "seed": 3, "fingerprint": "x"}
    found = []
    for limit in (stop, count):
        with opened(folder / "study.db", genes, **settings) as ledger:
            rows = ledger.rows(folder)
            while len(rows) < limit:

                def situation(number: int, seed: int, rows: list = rows) -> Situation:
                    return Situation(named, genes, rows, number, seed, shop)

                proposal = ledger.ask(situation)
                found.append((proposal.space, proposal.choices))
                ledger.tell(outcome(proposal.number, proposal.space, proposal.choices))
                rows = ledger.rows(folder)
    return found


@pytest.mark.parametrize("name", SAMPLERS)
def test_proposes_what_is_on_offer_and_the_same_after_a_break(name, shop, tmp_path):
    sampler, spaces = SAMPLERS[name]
    whole = proposals(sampler, spaces, shop, tmp_path / "whole")
    named = labels_of(spaces)
    for label, choices in whole:
        genes = named[label].genes(shop)
        assert choices.keys() == genes.keys()
        assert all(choices[gene] in values for gene, values in genes.items())
    assert proposals(sampler, spaces, shop, tmp_path / "cut", stop=5) == whole
    assert len({str(each) for each in whole}) > 1


@pytest.mark.parametrize("name", FILTERS)
def test_scores_alike_and_leaves_the_candidate_alone(name, shop):
    look = FILTERS[name]
    space = NETWORKS[1]
    rng = random.Random(0)
    for _ in range(2):
        choices = {gene: rng.choice(values) for gene, values in space.genes(shop).items()}
        model, spec = space.build(choices, shop)
        row = replace(outcome(0, space.label, choices), state="failed", macs=profile.macs(model, spec.input_shape))
        before, state = digest_of(model, spec), torch.get_rng_state()
        first = look.score(model, spec, row, (), shop)
        shop.memory.clear()
        assert look.score(model, spec, row, (), shop) == first
        assert first is None or isinstance(first, float)
        assert digest_of(model, spec) == before
        assert not model.training
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("keep", "first", "trained"), [(0.5, 2, 5), (0.25, 1, 4), (1.0, 1, 8)])
def test_keeps_its_share_of_scored_candidates(keep, first, trained):
    look = FILTERS["inherited"].model_copy(update={"keep": keep, "first": first})
    scores = [0.3, 0.9, 0.1, 0.5, 0.8, 0.2, 0.95, 0.4]
    kept = [look.passes(score, scores[:place]) for place, score in enumerate(scores)]
    assert sum(kept) == trained
    assert all(kept[:first])
    assert kept[6], "the best so far always passes"
