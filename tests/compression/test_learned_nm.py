"""Learnt masks: the arithmetic of the choice, and that gradients make it while the weights keep their bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from compression.data.dataset import Dataset
from compression.sparsify import LearnedNm
from compression.sparsify.learned_nm import NmChoice, first_logits, hard_masks, soft_masks
from compression.sparsify.mask_learning import learn_masks
from compression.sparsify.nm import candidates, follows, grouped, layers_of, magnitude_mask
from tests.compression.sparse_training import SPARSE, TRAIN, made_sparse, session, student
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = [(2, 4), (1, 4), (1, 2), (3, 6)]
FROZEN = LearnedNm(train=TRAIN, mask_share=1.0)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    seed=st.integers(0, 2**31 - 1),
    pattern=st.sampled_from(PATTERNS),
    tau=st.floats(0.05, 4.0),
    kappa=st.floats(1.0, 500.0),
)
def test_soft_masks_sum_to_n_and_hard_ones_follow_the_pattern(seed, pattern, tau, kappa):
    n, m = pattern
    choices = candidates(n, m)
    logits = torch.randn(40, len(choices), generator=generator(seed)) * 0.01
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        soft = soft_masks(logits, choices, kappa=kappa, tau=tau)
    assert soft.shape == (40, m)
    torch.testing.assert_close(soft.sum(dim=1), torch.full((40,), float(n)), atol=1e-5, rtol=0)
    assert soft.min() >= 0
    assert soft.max() <= 1 + 1e-6
    hard = hard_masks(logits, choices)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert (hard.sum(dim=1) == n).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("alpha", [0.1, 3.0])
def test_the_favoured_mask_is_the_first_choice(pattern, alpha):
    choices = candidates(*pattern)
    favoured = choices[torch.randint(0, len(choices), (500,), generator=generator(1))]
    logits = first_logits(favoured, choices, alpha=alpha, generator=generator())
    assert torch.equal(hard_masks(logits, choices), favoured)


def test_without_a_prior_nothing_is_favoured():
    choices = candidates(2, 4)
    favoured = choices[torch.zeros(3000, dtype=torch.long)]
    logits = first_logits(favoured, choices, alpha=0.0, generator=generator())
    share = (hard_masks(logits, choices) == favoured).all(dim=1).double().mean()
    assert 0.13 < share < 0.2  # one in six
    assert torch.equal(logits, torch.randn(3000, 6, generator=generator()) * 0.01)


def test_the_prior_lifts_candidates_by_what_they_have_in_common():
    choices = candidates(2, 4)
    favoured = choices[:1].repeat(20000, 1)
    logits = first_logits(favoured, choices, alpha=3.0, generator=generator())
    means = logits.mean(dim=0)
    common = choices @ choices[0]
    # 3 standard deviations of 0.01 for each place; the favoured one has the largest noise besides.
    torch.testing.assert_close(means[common == 0], torch.full((1,), -0.03), atol=4e-3, rtol=0)
    torch.testing.assert_close(means[common == 1], torch.zeros(4), atol=4e-3, rtol=0)
    assert means[common == 2] > 0.035


def test_annealing_makes_the_choice_hard():
    config = LearnedNm(train=TRAIN)
    choice = NmChoice(torch.randn(8, 16, generator=generator()), config, generator()).train()
    weight = torch.ones(8, 16)
    found = []
    for share in (0.0, 1.0):
        choice.share.fill_(share)
        torch.manual_seed(0)
        found.append(grouped(choice.soft(weight), 4).max(dim=1).values.mean().item())
    assert found[0] < 0.8
    assert found[1] > 0.99


def test_inference_uses_the_hard_mask_without_randomness():
    choice = NmChoice(torch.randn(8, 16, generator=generator()), LearnedNm(train=TRAIN), generator())
    weight = torch.randn(8, 16)
    before = torch.get_rng_state()
    assert torch.equal(choice(weight), weight * choice.hard(weight))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(choice.train()(weight), choice(weight))


def test_gradients_reach_the_logits_of_every_group_and_find_the_better_mask():
    """The target is made by the two weights of each group that magnitude would throw away."""
    weight = torch.tensor([[1.0, 1.0, 0.9, 0.9]])
    choice = NmChoice(weight, LearnedNm(train=TRAIN), generator()).train()
    assert choice.hard(weight).tolist() == [[True, True, False, False]]
    inputs = torch.randn(64, 4, generator=generator(2))
    target = inputs[:, 2:] @ weight[0, 2:]
    optimizer = torch.optim.Adam([choice.logits], lr=3e-3)
    torch.manual_seed(0)
    for step in range(150):
        choice.share.fill_(step / 150)
        loss = ((inputs @ choice(weight)[0] - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert (choice.logits.grad != 0).all()
        optimizer.step()
    assert choice.hard(weight).tolist() == [[False, False, True, True]]


def test_the_regulariser_asks_for_large_weights_and_fades():
    config = LearnedNm(train=TRAIN, regulariser=1e-2)
    choice = NmChoice(torch.tensor([[3.0, 0.1, 2.0, 0.2]]), config, generator()).train()
    weight = nn.Parameter(torch.tensor([[3.0, 0.1, 2.0, 0.2]]))
    choice(weight)
    expected = choice.penalty
    term = config.terms([choice])["masked_weights"]
    assert term.item() == pytest.approx(-1e-2 * expected.item())
    term.backward()
    assert weight.grad is None
    # Gradient descent raises the mask of the two largest weights.
    best = candidates(2, 4).tolist().index([1.0, 0.0, 1.0, 0.0])
    assert choice.logits.grad[0].argmin() == best
    choice.share.fill_(1.0)
    choice(weight)
    assert config.terms([choice])["masked_weights"].item() == 0.0


def test_frozen_weights_keep_their_bits_and_all_else_but_statistics(dataset):
    start, _ = student(dataset)
    model, history = made_sparse(FROZEN, dataset)
    assert len(history.rows) == 2
    for name, before in start.state_dict().items():
        after = model.state_dict()[name]
        if name in SPARSE:
            assert torch.equal(after, torch.where(after != 0, before, 0.0)), name
            assert not torch.equal(after, before)
        elif "running" not in name and "num_batches" not in name:
            assert torch.equal(after, before), name
        else:
            assert not torch.equal(after, before), name


def test_after_the_masks_weights_are_trained_in_them(dataset):
    model, history = made_sparse(LearnedNm(train=TRAIN), dataset)
    start, _ = student(dataset)
    assert "masked_weights" in history.rows[0]
    assert "masked_weights" not in history.rows[1]
    weight, before = model.get_parameter("head.weight"), start.get_parameter("head.weight")
    assert (weight != before)[weight != 0].all()
    assert follows(weight, 2, 4)


def test_training_moves_masks_away_from_magnitude(dataset):
    model, spec = student(dataset)
    layers = layers_of(model, multiple_of=4)
    first = {name: magnitude_mask(layer.weight, 2, 4) for name, layer in layers.items()}
    config = LearnedNm(train=TRAIN, mask_learning_rate=0.05)
    choices = {name: NmChoice(layer.weight, config, generator()) for name, layer in layers.items()}
    assert all(torch.equal(choices[name].hard(layer.weight), first[name]) for name, layer in layers.items())
    masks, history = learn_masks(session(model, spec, dataset), layers, choices, config.schedules()[0])
    assert any(not torch.equal(masks[name], first[name]) for name in masks)
    assert all(follows(masks[name].float(), 2, 4) for name in masks)
    assert len(history.rows) == 1


def test_a_failed_training_leaves_plain_modules(dataset):
    model, spec = student(dataset)
    layers = layers_of(model, multiple_of=4)
    choices = {name: NmChoice(layer.weight, FROZEN, generator()) for name, layer in layers.items()}

    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        learn_masks(session(model, spec, dataset), layers, choices, TRAIN, terms=fail)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("epochs", "share", "expected"), [(2, 0.5, (1, 1)), (4, 0.75, (3, 1)), (2, 0.9, (1, 1))])
def test_epochs_are_shared_out(epochs, share, expected):
    config = LearnedNm(train=TRAIN.model_copy(update={"epochs": epochs}), mask_share=share, mask_learning_rate=0.5)
    masks, weights = config.schedules()
    assert (masks.epochs, weights.epochs) == expected
    assert (masks.learning_rate, weights.learning_rate) == (0.5, TRAIN.learning_rate)


def test_candidates_grow_with_the_group():
    assert [len(candidates(n, m)) for n, m in PATTERNS] == [6, 4, 2, 20]
