"""N2N: a policy that learns which blocks of a teacher can go and how narrow the rest may be.

Ashok et al. 2018, "N2N Learning: Network to Network Compression via Policy Gradient Reinforcement Learning"
(arXiv:1709.06030).

Legend: L layers of a teacher, M multipliers.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression import profile
from compression.card import MethodCard
from compression.checkpoint import load_weights
from compression.errors import CompressionError
from compression.metrics import evaluate
from compression.search.samplers.sampler import Sampler, Situation
from compression.search.shrink import Layer, Shrink
from compression.search.space import Choices, Space, Workshop
from compression.search.trials import TrialResult

Phase = Literal["removal", "shrinkage"]

FEATURES = 5
"""Numbers that describe a layer: kind, kernel, stride, channels, padding."""
HIDDEN = 30
"""Of the LSTMs."""
INVALID = -1.0
"""Reward of a candidate that failed, is over a budget, or is no smaller than its teacher."""
ATTEMPTS = 32
"""Candidates that a policy draws for one that is new."""
FOLDER = "n2n"


def reward(accuracy: float, teacher_accuracy: float, compression: float) -> float:
    """``accuracy / teacher_accuracy * C (2 - C)``: 0 for no compression, 1 for a student of no size that is as good.

    Args:
        accuracy: of the student, a share.
        teacher_accuracy: above 0.
        compression: C, the share of the teacher's parameters that is gone, 0..1.
    """
    return accuracy / teacher_accuracy * compression * (2.0 - compression)


@dataclass(frozen=True)
class Episode:
    """What was decided about one candidate in one phase, on its layers."""

    phase: Phase
    layers: Tensor
    """[L, FEATURES]."""
    free: tuple[int, ...]
    """Places at which there was something to decide; all other layers only tell the policy where it is."""
    actions: tuple[int, ...] = ()
    """One for each free place: 0 to remove and 1 to keep, or the number of a multiplier."""


class Policy(nn.Module):
    """Two networks over a sequence of layers of any length: one removes, one shrinks."""

    def __init__(self, multipliers: Sequence[float]) -> None:
        super().__init__()
        self.removal = nn.LSTM(FEATURES, HIDDEN, bidirectional=True)
        self.keep = nn.Linear(2 * HIDDEN, 2)
        self.shrinkage = nn.LSTM(FEATURES + 1, HIDDEN, num_layers=2)
        self.multiplier = nn.Linear(HIDDEN, len(multipliers))
        self.multipliers: Tensor
        self.register_buffer("multipliers", torch.tensor(multipliers, dtype=torch.float32))

    def parameters_of(self, phase: Phase) -> list[nn.Parameter]:
        """What is learnt in that phase."""
        parts = (self.removal, self.keep) if phase == "removal" else (self.shrinkage, self.multiplier)
        return [parameter for part in parts for parameter in part.parameters()]

    def log_probs(self, episode: Episode) -> Tensor:
        """Log-probabilities of all actions at every layer, [L, 2] or [L, M]; those of fixed layers mean nothing.

        In removal a layer sees all others; in shrinkage those before it, and the multiplier that
        was chosen last, 1 at the start.
        """
        if episode.phase == "removal":
            return self.keep(self.removal(episode.layers)[0]).log_softmax(dim=1)
        last = torch.ones(len(episode.layers), 1)
        for place, action in zip(episode.free, episode.actions, strict=False):
            last[place + 1 :] = self.multipliers[action]
        return self.multiplier(self.shrinkage(torch.cat([episode.layers, last], dim=1))[0]).log_softmax(dim=1)

    def log_prob(self, episode: Episode) -> Tensor:
        """Log-probability of the episode's actions, a scalar: the sum over its free layers."""
        return self.log_probs(episode)[list(episode.free), list(episode.actions)].sum()

    @torch.no_grad()
    def decided(self, episode: Episode, generator: torch.Generator) -> Episode:
        """The episode with actions drawn, one free layer after the other."""
        actions: tuple[int, ...] = ()
        for place in episode.free:
            so_far = Episode(episode.phase, episode.layers, episode.free, actions)
            probs = self.log_probs(so_far)[place].exp()
            actions += (int(torch.multinomial(probs, 1, generator=generator)),)
        return Episode(episode.phase, episode.layers, episode.free, actions)


def described(layers: Sequence[Layer]) -> Tensor:
    """Layers as numbers of about 1, [L, FEATURES]."""
    rows = [
        (
            float(layer.kind == "linear"),
            layer.kernel / 3,
            float(layer.stride),
            math.log2(layer.channels) / 8,
            float(layer.padding),
        )
        for layer in layers
    ]
    return torch.tensor(rows, dtype=torch.float32)


def removal_episode(layers: Sequence[Layer], choices: Choices | None = None) -> Episode:
    """Each block is decided at its first layer; without ``choices``, nothing is decided yet."""
    firsts = _firsts([layer.block for layer in layers])
    actions = () if choices is None else tuple(int(choices[f"keep_{block}"]) for block in firsts)
    return Episode("removal", described(layers), tuple(firsts.values()), actions)


def shrinkage_episode(
    layers: Sequence[Layer], keeps: Choices, multipliers: Sequence[float], choices: Choices | None = None
) -> Episode:
    """Layers of removed blocks are gone; each stage is decided at its first layer that is left."""
    left = remaining(layers, keeps)
    firsts = _firsts([layer.stage for layer in left])
    actions = () if choices is None else tuple(multipliers.index(choices[f"width_{stage}"]) for stage in firsts)
    return Episode("shrinkage", described(left), tuple(firsts.values()), actions)


def remaining(layers: Sequence[Layer], keeps: Choices) -> list[Layer]:
    """The layers outside removed blocks."""
    return [layer for layer in layers if layer.block is None or keeps[f"keep_{layer.block}"]]


class Learner:
    """A policy and what it learns from outcomes, in their order.

    REINFORCE: the roll-outs of a step share the advantage, their mean reward less the mean of the steps before.
    """

    def __init__(self, policy: Policy, *, rollouts: int, learning_rate: float) -> None:
        self.policy = policy
        self.seen: list[str] = []
        """What was learnt from, one entry an outcome."""
        self.best: dict[str, tuple[float, Choices]] = {}
        """By space: reward and choices of the best removal that gained something."""
        self._rollouts = rollouts
        self._optimisers = {phase: torch.optim.Adam(policy.parameters_of(phase), lr=learning_rate) for phase in _PHASES}
        self._waiting: dict[Phase, list[tuple[Episode, float]]] = {phase: [] for phase in _PHASES}
        self._means: dict[Phase, list[float]] = {phase: [] for phase in _PHASES}

    def learn(self, episode: Episode, gained: float) -> None:
        """One more outcome; every ``rollouts`` of a phase are a step."""
        if not episode.free:
            return
        waiting = self._waiting[episode.phase]
        waiting.append((episode, gained))
        if len(waiting) < self._rollouts:
            return
        mean = fmean(each for _, each in waiting)
        earlier = self._means[episode.phase]
        advantage = mean - (fmean(earlier) if earlier else 0.0)
        earlier.append(mean)
        with torch.enable_grad():
            chosen = torch.stack([self.policy.log_prob(each) for each, _ in waiting])
            loss = -advantage * chosen.mean()
            optimiser = self._optimisers[episode.phase]
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        waiting.clear()


class N2n(Sampler):
    """Proposes candidates of ``shrink`` spaces by a policy that is rewarded for accuracy and compression.

    First blocks are removed, then the best removal so far is shrunk. A policy keeps no state between processes: it is
    what one gets that starts from ``policy`` or the study's seed and learns from all rows, whoever proposed them, in
    their order. It sees layers, whatever their number, so one that was learnt on a small teacher can start on a deeper
    one: after each proposal the policy is in ``n2n/policy.safetensors`` in the study's shop.

    Where it differs from the paper: candidates that were proposed before, or take nothing away, are drawn again; 0.5 is
    offered once among the multipliers, not five times; the multiplier chosen last is an input of its own; a whole stage
    of the network is narrowed at once, decided at its first layer; trials train as the study says. As there, a
    candidate that repeats another one brings its reward. The released code adds up the log-probabilities of the fixed
    layers; here it is those of the free ones.
    """

    kind: Literal["n2n"] = "n2n"
    removal_trials: int = Field(default=6, ge=0)
    """Candidates of a space that only lose blocks before shrinking starts; those over budget or failed count."""
    rollouts: int = Field(default=3, ge=1, le=64)
    """Outcomes per step of learning."""
    learning_rate: float = Field(default=0.1, gt=0.0, le=1.0)
    """Of Adam."""
    policy: Path | None = None
    """A ``policy.safetensors`` of an earlier study to start from; fresh when None."""

    card: ClassVar[MethodCard] = MethodCard(
        name="N2N policy gradient",
        paper="Ashok et al. 2018, N2N, arXiv:1709.06030",
        summary="Research: a recurrent policy removes blocks of a teacher and then narrows its stages, and learns from "
        "accuracy and compression by REINFORCE.",
        needs="A space of kind 'shrink' and many trials; a policy of an earlier study helps.",
        cost="Under a second per proposal; one evaluation of the teacher.",
        evidence="The paper reports ResNet-34 compressed more than ten times at similar accuracy, after hundreds of "
        "trainings. Measured with one seed: see `measured`.",
    )

    def check(self, spaces: Mapping[str, Space], shop: Workshop) -> None:
        shrink_spaces(spaces)
        if self.policy is not None and not self.policy.is_file():
            raise CompressionError(
                f"Sampler 'n2n' has policy '{self.policy}', expected a file of an earlier study. Correct the path."
            )

    def propose(self, situation: Situation) -> tuple[str, Choices]:
        """A candidate of the ``shrink`` space with the fewest rows.

        Raises:
            CompressionError: there is no such space, their multipliers differ, or the policy does not fit them.
        """
        spaces = shrink_spaces(situation.spaces)
        learner = self._learnt(situation, spaces)
        counts = {label: sum(row.space == label for row in situation.rows) for label in spaces}
        label = min(counts, key=lambda each: counts[each])
        space, genes = spaces[label], situation.genes[label]
        layers = space.layers(situation.shop)
        whole: Choices = {gene: values[-1] for gene, values in genes.items()}
        seen = {_key(row.space, row.choices) for row in situation.rows} | {_key(label, whole)}
        removals = sum(
            row.space == label and row.choices != whole and not _narrowed(row.choices) for row in situation.rows
        )
        phases: list[Phase] = ["removal"] if removals < self.removal_trials else []
        phases = [*phases, "shrinkage", "removal"]
        phases = [phase for phase in phases if any(gene.startswith(_PREFIX[phase]) for gene in genes)]
        generator = torch.Generator().manual_seed(situation.seed)
        choices = whole
        for phase in phases:
            start = whole if phase == "removal" else learner.best.get(label, (0.0, whole))[1]
            for _ in range(ATTEMPTS):
                choices = start | _drawn(learner.policy, phase, layers, start, space.widths, generator)
                if _key(label, choices) not in seen:
                    return label, choices
        return label, choices

    def _learnt(self, situation: Situation, spaces: Mapping[str, Shrink]) -> Learner:
        """A learner that knows all rows; goes on from the one before where rows were only added."""
        shop = situation.shop
        rows = [row for row in situation.rows if row.space in spaces]
        tokens = [_token(row) for row in rows]
        told = [self.model_dump(mode="json"), {label: space.model_dump(mode="json") for label, space in spaces.items()}]
        place = f"{FOLDER}/{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"
        learner: Learner | None = shop.memory.get(place)
        if learner is None or learner.seen != tokens[: len(learner.seen)]:
            policy = self._start(next(iter(spaces.values())).widths, shop.seed)
            learner = Learner(policy, rollouts=self.rollouts, learning_rate=self.learning_rate)
            shop.memory[place] = learner
        if learner.seen == tokens and (shop.folder / FOLDER / "policy.safetensors").is_file():
            return learner
        gained = rewards(rows, spaces, shop)
        for row, token in list(zip(rows, tokens, strict=True))[len(learner.seen) :]:
            learner.seen.append(token)
            if (value := gained.get(row.number)) is None:
                continue
            space = spaces[row.space]
            layers = space.layers(shop)
            if _narrowed(row.choices):
                learner.learn(shrinkage_episode(layers, row.choices, space.widths, row.choices), value)
                continue
            learner.learn(removal_episode(layers, row.choices), value)
            if value > learner.best.get(row.space, (0.0, {}))[0]:
                learner.best[row.space] = (value, dict(row.choices))
        save_policy(learner.policy, shop.folder / FOLDER / "policy.safetensors")
        return learner

    def _start(self, multipliers: Sequence[float], seed: int) -> Policy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = Policy(multipliers)
        return fresh if self.policy is None else load_policy(self.policy, multipliers)


def shrink_spaces(spaces: Mapping[str, Space]) -> dict[str, Shrink]:
    """The spaces a policy can propose for, by label.

    Raises:
        CompressionError: there are none, or their multipliers differ.
    """
    found = {label: space for label, space in spaces.items() if isinstance(space, Shrink)}
    if not found:
        raise CompressionError(
            f"Sampler 'n2n' has spaces {', '.join(spaces)}, expected one of kind 'shrink' at least. Add "
            "{kind: shrink, parent: <teacher>} to search.spaces, or choose another sampler."
        )
    if len({space.widths for space in found.values()}) > 1:
        raise CompressionError(
            f"Sampler 'n2n' has spaces {', '.join(found)} with different widths, expected equal ones: one policy "
            "chooses for all. Give them the same widths."
        )
    return found


def rewards(rows: Sequence[TrialResult], spaces: Mapping[str, Shrink], shop: Workshop) -> dict[int, float]:
    """What each row gained, by number; nothing for those whose accuracy nobody knows.

    A trial that was stopped has the accuracy of its last epoch, a duplicate the reward of the row it repeats.
    """
    found: dict[int, float] = {}
    by_choices: dict[str, float] = {}
    by_digest: dict[str, float] = {}
    for row in rows:
        key = _key(row.space, row.choices)
        if row.state == "duplicate":
            value = by_choices.get(key, by_digest.get(row.digest))
        else:
            value = _reward_of(row, spaces[row.space], shop)
        if value is None:
            continue
        found[row.number] = value
        by_choices.setdefault(key, value)
        if row.digest:
            by_digest.setdefault(row.digest, value)
    return found


def save_policy(policy: Policy, path: Path) -> None:
    """Write the weights of a policy; a file appears whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in policy.state_dict().items()}, draft)
    draft.replace(path)


def load_policy(path: Path, multipliers: Sequence[float]) -> Policy:
    """A policy that was saved.

    Raises:
        CheckpointError: the file is missing or damaged.
        CompressionError: it chooses among other multipliers, or is no policy.
    """
    weights = load_weights(path)
    with torch.random.fork_rng(devices=[]):
        policy = Policy(multipliers)
    wanted = policy.state_dict()
    if {name: each.shape for name, each in weights.items()} != {name: each.shape for name, each in wanted.items()} or (
        not torch.equal(weights["multipliers"], wanted["multipliers"])
    ):
        found = weights.get("multipliers", torch.empty(0)).tolist()
        raise CompressionError(
            f"Policy '{path}' has multipliers {[round(each, 4) for each in found] or 'of no policy'}, expected "
            f"{list(multipliers)}. Set the widths of the 'shrink' spaces to those of the study it comes from."
        )
    policy.load_state_dict(weights)
    return policy


_PHASES: tuple[Phase, ...] = ("removal", "shrinkage")
_PREFIX: dict[Phase, str] = {"removal": "keep_", "shrinkage": "width_"}


def _drawn(
    policy: Policy,
    phase: Phase,
    layers: Sequence[Layer],
    start: Choices,
    multipliers: Sequence[float],
    generator: torch.Generator,
) -> Choices:
    """What the policy decides in that phase, by gene."""
    if phase == "removal":
        decided = policy.decided(removal_episode(layers), generator)
        names = _firsts([layer.block for layer in layers])
        return {f"keep_{block}": action for block, action in zip(names, decided.actions, strict=True)}
    decided = policy.decided(shrinkage_episode(layers, start, multipliers), generator)
    names = _firsts([layer.stage for layer in remaining(layers, start)])
    return {f"width_{stage}": multipliers[action] for stage, action in zip(names, decided.actions, strict=True)}


def _firsts(numbers: Sequence[int | None]) -> dict[int, int]:
    """Number -> the first place it stands at, in the order of places."""
    found: dict[int, int] = {}
    for place, number in enumerate(numbers):
        if number is not None:
            found.setdefault(number, place)
    return found


def _narrowed(choices: Choices) -> bool:
    return any(gene.startswith("width_") and value != 1.0 for gene, value in choices.items())


def _reward_of(row: TrialResult, space: Shrink, shop: Workshop) -> float | None:
    if row.state in ("failed", "infeasible"):
        return INVALID
    accuracy = row.accuracy if row.accuracy is not None or not row.curve else row.curve[-1]
    if accuracy is None or row.params is None:
        return None
    whole = profile.params(shop.parent(space.parent)[0])
    if row.params >= whole:
        return INVALID
    return reward(accuracy, _teacher_accuracy(space.parent, shop), 1.0 - row.params / whole)


def _teacher_accuracy(name: str, shop: Workshop) -> float:
    """On the validation split; measured once per study."""
    path = shop.folder / FOLDER / "teachers.json"
    place = f"{FOLDER}/teachers"
    if place not in shop.memory:
        shop.memory[place] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known: dict[str, float] = shop.memory[place]
    if name not in known:
        model, _ = shop.parent(name)
        known[name] = evaluate(model, shop.dataset.validation, shop.dataset.preprocessing).accuracy
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".part")
        draft.write_text(json.dumps(known), encoding="utf-8")
        draft.replace(path)
    if known[name] <= 0.0:
        raise CompressionError(
            f"Teacher '{name}' has accuracy 0 on the validation split, expected more: rewards are shares of it. Choose "
            "another sampler or parent."
        )
    return known[name]


def _key(space: str, choices: Choices) -> str:
    """Equal for candidates that ask for the same."""
    return json.dumps([space, choices], sort_keys=True)


def _token(row: TrialResult) -> str:
    """What a policy learns from in a row."""
    return json.dumps(
        [row.number, row.space, row.choices, row.state, row.accuracy, row.params, row.digest, row.curve], sort_keys=True
    )
