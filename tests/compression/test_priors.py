"""What earlier studies say about where to start, and how tasks are compared."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compression import profile
from compression.data.dataset import Dataset, load_dataset
from compression.data.digits import Digits
from compression.search import Scale, Study, task_embedding
from compression.search.bank import PastTask, PastTrial, past_trials, task_of
from compression.search.priors import Neighbour, Prior, Priors, offered, ranked, weights_of
from compression.search.samplers import Nsga2
from compression.search.space import Workshop
from compression.search.study import StudyResult, run_study
from compression.search.task_embedding import (
    ANCHORS,
    CHANNELS,
    SIDE,
    anchor_images,
    embedding_of,
    fisher_diagonal,
    fit_head,
    unevenness,
)
from compression.search.trials import OBJECTIVES, Latency, Score
from compression.train import TrainConfig
from compression.zoo import PlainCnn
from tests.compression.tiny_data import tiny_dataset

DATA = tiny_dataset()
SPACE = Scale(
    base=PlainCnn(widths=(16,), depths=(1,), strides=(2,), stem_width=8), widths=(0.5, 1.0, 2.0), depths=(0, 1)
)
LABEL = SPACE.label
GENES = {LABEL: {"width": (0.5, 1.0, 2.0), "depth": (0, 1)}}
WORDS = {"w": {"criterion": ("magnitude", "taylor"), "ratio": (0.25, 0.5)}}
HERE = task_of(DATA)


def task(name: str, embedding: tuple[float, ...] = ()) -> PastTask:
    return PastTask(data=name, data_hash=name, classes=4, input_shape=(1, 8, 8), train_images=64, embedding=embedding)


def past(number: int, choices: dict, accuracy: float, **changes) -> PastTrial:
    settings = {"study": "s", "task": HERE, "space": LABEL, "kind": "scale", "macs": 1000, "latency_p50_ms": 1.0}
    settings |= {"objectives": OBJECTIVES, "features": {}, "epochs": 1, "steps": 1, "size_bytes": 1000}
    return PastTrial(number=number, choices=choices, accuracy=accuracy, **(settings | changes))


def look(folder: Path, trials: list[PastTrial], genes=GENES, **fields) -> Prior | None:
    return Priors(**fields).look(genes, {}, Workshop({}, DATA, seed=0, folder=folder, past=trials))


# --- weights


def test_weights_by_hand(tmp_path):
    """One task with one trial; then two, with weights 3/4 and 1/4, the second with a trial that lacks a gene."""
    here = [past(0, {"width": 1.0, "depth": 0}, 0.9)]
    assert look(tmp_path, here, mix=0.5).weights == {
        "space": {LABEL: pytest.approx(1.0)},
        f"{LABEL}.width": pytest.approx({0.5: 1 / 6, 1.0: 1 / 2 + 1 / 6, 2.0: 1 / 6}),
        f"{LABEL}.depth": pytest.approx({0: 1 / 2 + 1 / 4, 1: 1 / 4}),
    }
    there = Neighbour(0.25, [(LABEL, {"width": 0.5, "depth": 0})] * 3 + [(LABEL, {"width": 2.0})])
    found = weights_of([Neighbour(0.75, [(LABEL, {"width": 1.0, "depth": 1})]), there], GENES, mix=0.8)
    assert found[f"{LABEL}.width"] == pytest.approx(
        {0.5: 0.8 * 0.25 * 0.75 + 0.2 / 3, 1.0: 0.8 * 0.75 + 0.2 / 3, 2.0: 0.8 * 0.25 * 0.25 + 0.2 / 3}
    )
    assert found[f"{LABEL}.depth"] == pytest.approx({0: 0.8 * 0.25 + 0.1, 1: 0.8 * 0.75 + 0.1})


@pytest.mark.parametrize("mix", [0.0, 0.8, 0.99])
def test_weights_sum_to_one_and_none_is_zero(tmp_path, mix):
    trials = [past(number, {"width": 0.5, "depth": 1}, 0.5 + number / 100) for number in range(5)]
    genes = GENES | WORDS
    found = look(tmp_path, trials, genes, mix=mix)
    assert found.weights.keys() == {"space", f"{LABEL}.width", f"{LABEL}.depth", "w.criterion", "w.ratio"}
    for values in found.weights.values():
        assert math.fsum(values.values()) == pytest.approx(1.0, abs=1e-12)
        assert min(values.values()) > 0.0
    assert found.weights["w.ratio"] == {0.25: 0.5, 0.5: 0.5}, "even where nothing is known"
    label, choices = found.drawn(seed=3)
    assert choices.keys() == genes[label].keys()


def test_nearer_tasks_weigh_more_and_only_the_nearest_count(tmp_path, monkeypatch):
    monkeypatch.setattr("compression.search.priors.embedding_of", lambda *_args, **_kwargs: (1.0, 0.0))
    embeddings = {"near": (1.0, 0.1), "middle": (1.0, 0.3), "far": (1.0, 0.9), "twin": (1.0, 1e-9)}
    widths = {"near": 0.5, "middle": 1.0, "far": 2.0, "twin": 1.0}

    def trials(*names: str) -> list[PastTrial]:
        return [
            past(0, {"width": widths[name], "depth": 0}, 0.9, study=name, task=task(name, embeddings[name]))
            for name in names
        ]

    found = look(tmp_path, trials("far", "middle", "near"), tasks=2, mix=0.9).weights[f"{LABEL}.width"]
    assert found == pytest.approx({0.5: 0.9 * 0.75 + 0.1 / 3, 1.0: 0.9 * 0.25 + 0.1 / 3, 2.0: 0.1 / 3})
    twin = look(tmp_path, trials("near", "twin"), mix=0.9).weights[f"{LABEL}.width"]
    assert twin[1.0] == pytest.approx(0.9 * 1000 / 1010 + 0.1 / 3), "1 / distance is clipped at 1e-3"


# --- what counts


def test_an_empty_or_foreign_bank_says_nothing(tmp_path):
    assert look(tmp_path, []) is None
    choices = {"width": 1.0, "depth": 0}
    assert look(tmp_path, [past(0, choices, 0.9, space="prune-a-magnitude")]) is None, "no such space"
    assert look(tmp_path, [past(0, {"width": 1.0}, 0.9)]) is None, "other genes"
    assert look(tmp_path, [past(0, choices, 0.9, task=task("other"))]) is None, "not to be compared"
    assert not (tmp_path / "task.json").exists(), "nothing was computed"


def test_best_are_the_front_by_accuracy_then_the_dominated():
    small = past(0, {}, 0.7, latency_p50_ms=0.1, size_bytes=10)
    large = past(1, {}, 0.9, latency_p50_ms=2.0, size_bytes=2000)
    beaten = past(2, {}, 0.8, latency_p50_ms=3.0, size_bytes=3000)
    twice = past(3, {}, 0.65, latency_p50_ms=4.0, size_bytes=4000)
    other = past(0, {}, 0.75, latency_p50_ms=9.0, size_bytes=9000, study="r")
    assert ranked([twice, beaten, other, small, large]) == [large, other, small, beaten, twice]


def test_first_are_distinct_candidates_best_first(tmp_path):
    made = [(0.5, 0, 0.6), (1.0, 0, 0.9), (1.1, 0, 0.8), (2.0, 1, 0.7)]
    trials = [past(number, {"width": w, "depth": d}, accuracy) for number, (w, d, accuracy) in enumerate(made)]
    wanted = [(LABEL, {"width": 1.0, "depth": 0}), (LABEL, {"width": 2.0, "depth": 1})]
    assert look(tmp_path, trials).best == [*wanted, (LABEL, {"width": 0.5, "depth": 0})]
    assert look(tmp_path, trials, enqueue=2).best == wanted
    assert look(tmp_path, trials, best=1).best == wanted[:1]
    assert look(tmp_path, trials, enqueue=0).best == []


def test_values_that_are_not_on_offer_become_the_nearest_number_or_nothing(tmp_path):
    genes = {"ratio": (0.25, 0.5, 0.75), "criterion": ("magnitude", "taylor"), "flag": (False, True)}
    kept = {"ratio": 0.5, "criterion": "taylor", "flag": True}
    assert offered(kept, genes) == kept
    assert offered({"ratio": 0.4, "criterion": "bn_scale", "flag": 1}, genes) == {"ratio": 0.5}
    assert offered({"ratio": 9, "criterion": "taylor", "flag": False}, genes)["ratio"] == 0.75
    trials = [
        past(0, {"criterion": "bn_scale", "ratio": 0.2}, 0.9, space="w"),
        past(1, {"criterion": "taylor", "ratio": 0.5}, 0.8, space="w"),
    ]
    found = look(tmp_path, trials, WORDS, mix=0.5)
    assert found.best == [("w", {"criterion": "taylor", "ratio": 0.5})], "the other one does not exist here"
    assert found.weights["w.ratio"] == {0.25: 0.5, 0.5: 0.5}, "its ratio counts all the same"
    assert found.weights["w.criterion"] == {"magnitude": 0.25, "taylor": 0.75}


def test_a_share_of_one_is_refused_since_nothing_new_would_be_tried():
    with pytest.raises(ValueError, match="less than 1"):
        Priors(mix=1.0)


# --- in a study


def search(folder: Path, trials: list[PastTrial], priors: Priors | None, number: int = 3) -> StudyResult:
    def train(model: nn.Module, _number: int, _folder: Path, _on_epoch) -> Score:
        return Score(1.0 - 1.0 / math.log(profile.params(model)))

    return run_study(
        Study(spaces=(SPACE,), trials=number, train=TrainConfig(epochs=1), sampler=Nsga2(population=4), priors=priors),
        parents={},
        dataset=DATA,
        seed=0,
        latency=lambda model: Latency(profile.params(model) / 1e4),
        train_trial=train,
        storage=folder / "study.db",
        folder=folder / "trials",
        past=trials,
    )


def outline(result: StudyResult) -> list[tuple]:
    return [(t.number, t.space, t.choices, t.state, t.accuracy) for t in result.trials]


def test_with_an_empty_bank_a_study_proposes_what_it_would_without(tmp_path):
    assert outline(search(tmp_path / "a", [], None)) == outline(search(tmp_path / "b", [], Priors()))


def test_the_best_of_a_twin_comes_first(tmp_path):
    first = search(tmp_path / "a", [], None)
    trials = past_trials(
        first.trials,
        task=HERE,
        study="earlier",
        objectives=OBJECTIVES,
        kinds={LABEL: "scale"},
        train=TrainConfig(epochs=1),
    )
    best = max((t for t in first.trials if t.accuracy is not None), key=lambda trial: trial.accuracy)
    assert first.trials[0].choices != best.choices, "without the bank it would come later"
    second = search(tmp_path / "b", trials, Priors())
    assert (second.trials[0].space, second.trials[0].choices) == (best.space, best.choices)
    assert outline(second) == outline(search(tmp_path / "c", trials, Priors()))


# --- the embedding


@pytest.fixture
def quick(monkeypatch):
    """Fewer images, epochs and draws."""
    for name, value in (("IMAGES", 192), ("EPOCHS", 25), ("SEEDS", 1)):
        monkeypatch.setattr(task_embedding, name, value)


def two_classes(data: Dataset) -> Dataset:
    train = replace(data.train, labels=data.train.labels % 2)
    return replace(data, train=train, class_names=("even", "odd"), hashes={"train": "even or odd"})


@pytest.mark.usefixtures("quick")
def test_a_task_is_nearer_to_a_copy_of_itself_than_to_another_one():
    digits = load_dataset(Digits(), seed=0)
    noise = torch.randn(digits.train.images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (digits.train.images + noise).clamp(0, 16).to(torch.uint8)
    at = task_embedding.task_embedding(digits, seed=0)
    distances = [
        math.dist(at, task_embedding.task_embedding(other, seed=1))
        for other in (
            load_dataset(Digits(), seed=1),
            replace(digits, train=replace(digits.train, images=noisy)),
            two_classes(digits),
        )
    ]
    assert max(distances[:2]) < distances[2]
    assert task_embedding.task_embedding(digits, seed=0) == at
    assert len(at) == len(ANCHORS)
    assert math.hypot(*at) == pytest.approx(1.0)


def test_an_embedding_is_made_once_and_kept(tmp_path, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(task_embedding, "task_embedding", lambda data, *, seed: calls.append(seed) or (0.6, 0.8))
    assert embedding_of(DATA, seed=3, folder=tmp_path) == embedding_of(DATA, seed=3, folder=tmp_path) == (0.6, 0.8)
    assert calls == [3]
    assert json.loads((tmp_path / "task.json").read_text())["embedding"] == [0.6, 0.8]
    embedding_of(two_classes(DATA), seed=3, folder=tmp_path)
    assert len(calls) == 2, "other data"
    (tmp_path / "task.json").write_text('{"data_hash": ')
    assert embedding_of(DATA, seed=3, folder=tmp_path) == (0.6, 0.8)
    assert "is damaged and made again" in caplog.text


def test_a_task_without_labels_has_no_embedding():
    unlabelled = replace(DATA, train=replace(DATA.train, labels=torch.full_like(DATA.train.labels, -1)))
    assert task_embedding.task_embedding(unlabelled, seed=0) == ()


def test_the_random_state_stays_and_anchors_are_the_same_for_all_tasks(quick, monkeypatch):
    monkeypatch.setattr(task_embedding, "IMAGES", 16)
    state = torch.get_rng_state()
    found = task_embedding.task_embedding(DATA, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert found != task_embedding.task_embedding(DATA, seed=1)
    for place in range(len(ANCHORS)):
        few, many = (task_embedding._anchor(place, 0, classes).state_dict() for classes in (2, 10))
        body = [name for name in few if not name.startswith("head.")]
        assert len(body) == len(few) - 2
        assert all(torch.equal(few[name], many[name]) for name in body)


def test_unevenness_is_one_for_equal_squares_and_does_not_know_their_scale():
    squares = torch.tensor([1.0, 1.0, 4.0, 0.0])
    assert unevenness(torch.full((7,), 0.3)) == pytest.approx(1.0)
    assert unevenness(squares) == pytest.approx((18 / 4) / (6 / 4) ** 2)
    assert unevenness(1e-20 * squares) == pytest.approx(unevenness(squares))
    assert unevenness(torch.tensor([0.0, 0.0, 0.0, 5.0])) == pytest.approx(4.0)
    assert unevenness(torch.zeros(4)) == 1.0


def test_anchors_see_every_image_in_one_shape():
    grey = anchor_images(torch.full((2, 1, 8, 8), 0.5))
    assert grey.shape == (2, CHANNELS, SIDE, SIDE)
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5))
    colour = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(anchor_images(colour), colour)
    assert anchor_images(torch.zeros(2, 5, 40, 30)).shape == grey.shape


def test_a_fitted_head_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) * 0.1 + torch.eye(5)[labels] * 3
    weight, bias = fit_head(features, labels, 3)
    assert (weight.shape, bias.shape) == ((3, 5), (3,))
    assert ((features @ weight.T + bias).argmax(dim=1) == labels).all()


def test_fisher_of_a_linear_body_is_that_of_its_formula():
    """Logits are those of body then head; squared gradients of the body follow from the drawn labels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(images.flatten(1)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, images = Net(), torch.randn(70, 1, 2, 2)
    found = fisher_diagonal(net, images, torch.Generator().manual_seed(5))
    with torch.no_grad():
        probs = net(images).softmax(dim=1)
        labels = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(5)).squeeze(1)
        at_body = (probs - torch.eye(2)[labels]) @ net.head.weight
        expected = (at_body[:, :, None] * images.flatten(1)[:, None]).square().mean(dim=0)
    torch.testing.assert_close(found, expected.flatten())
    assert found.shape == (12,), "the head does not count"
