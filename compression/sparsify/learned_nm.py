"""MaskLLM (Fang et al. 2024, arXiv:2409.17481): N:M masks learnt by gradient, as a choice among all of a group's masks.

Legend: G groups of M weights; C candidate masks of a group, 6 for 2:4.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.procedures import joined
from compression.sparsify.config import MaskLearner, NmSparsifier
from compression.sparsify.mask_learning import Choice, learn_masks
from compression.sparsify.nm import apply_masks, candidates, grouped, layers_of, magnitude_mask, ungrouped
from compression.sparsify.session import Session, train_under
from compression.train import History

NOISE = 0.01
"""Standard deviation of the logits that a choice starts from."""


def first_logits(groups: Tensor, choices: Tensor, *, alpha: float, generator: torch.Generator) -> Tensor:
    """Logits [G,C] that a choice among ``choices`` [C,M] starts from; ``groups`` [G,M] is a mask that is favoured.

    Noise, and ``alpha`` of its standard deviations for each place that a candidate has in common with the favoured
    mask, less what a candidate has in common on average (1 for 2:4). The largest noise of a group goes to the favoured
    mask, so that it is the most likely one from the start; with ``alpha`` 0 nothing is favoured.
    """
    logits = torch.randn(len(groups), len(choices), generator=generator) * NOISE
    if alpha == 0:
        return logits
    common = groups.float().cpu() @ choices.T
    favoured, largest = common.argmax(dim=1, keepdim=True), logits.argmax(dim=1, keepdim=True)
    small, large = logits.gather(1, favoured), logits.gather(1, largest)
    logits = logits.scatter(1, largest, small).scatter(1, favoured, large)
    n, m = int(choices[0].sum()), choices.shape[1]
    return logits + alpha * logits.std() * (common - n * n / m)


def soft_masks(logits: Tensor, choices: Tensor, *, kappa: float, tau: float) -> Tensor:
    """Random masks [G,M] in [0, 1], each summing to N, with a gradient to the logits [G,C].

    The candidates ``choices`` [C,M] are averaged by softmax((kappa logits + Gumbel noise) / tau). Draws from the
    global random state.
    """
    return F.gumbel_softmax(logits * kappa, tau=tau, dim=1) @ choices


def hard_masks(logits: Tensor, choices: Tensor) -> Tensor:
    """The most likely mask of each group, [G,M] of zeros and ones."""
    return choices[logits.argmax(dim=1)]


class NmChoice(Choice):
    """A choice among the masks of each group: soft in training, hard in inference."""

    choices: Tensor

    def __init__(self, weight: Tensor, config: "LearnedNm", generator: torch.Generator) -> None:
        super().__init__()
        prior = grouped(magnitude_mask(weight, config.n, config.m), config.m)
        choices = candidates(config.n, config.m)
        logits = first_logits(prior, choices, alpha=config.alpha, generator=generator)
        self.config = config
        self.logits = nn.Parameter(logits.to(weight.device))
        self.register_buffer("choices", choices.to(weight.device))
        self.penalty: Tensor | None = None
        """Sum of the squared masked weights of the newest forward pass; no gradient to the weights."""

    def soft(self, weight: Tensor) -> Tensor:
        """See the base."""
        config, share = self.config, float(self.share)
        kappa = config.kappa_first + share * (config.kappa_last - config.kappa_first)
        tau = config.tau_first + share * (config.tau_last - config.tau_first)
        mask = ungrouped(soft_masks(self.logits, self.choices, kappa=kappa, tau=tau), weight.shape)
        self.penalty = (weight.detach() * mask).square().sum()
        return mask

    def hard(self, weight: Tensor) -> Tensor:
        """See the base."""
        return ungrouped(hard_masks(self.logits.detach(), self.choices) > 0, weight.shape)


class LearnedNm(NmSparsifier, MaskLearner):
    """Learn which weights of each group stay, then fine-tune those.

    While masks are learnt the weights are frozen; batch norm statistics follow the masked network. Ours are: the
    fine-tuning under the hard masks afterwards (``mask_share`` 1 leaves it out, as in the paper); the one-cycle
    schedule and its betas; the learning rate, for hundreds of steps and not 2000; a prior that is always by magnitude,
    and gets the largest noise of its group, since at 3 standard deviations noise alone overturns it in some.
    """

    kind: Literal["learned_nm"] = "learned_nm"
    mask_learning_rate: Annotated[float, Field(gt=0, le=10)] = 3e-3
    """Peak learning rate of the logits; the paper's is 5e-4 for 2000 steps."""
    alpha: Annotated[float, Field(ge=0, le=100)] = 3.0
    """How much the mask of the largest weights is favoured at the start, in standard deviations; 0: not at all."""
    kappa_first: Annotated[float, Field(gt=0, le=1e5)] = 100.0
    """Factor of the logits at the start; it grows linearly."""
    kappa_last: Annotated[float, Field(gt=0, le=1e5)] = 500.0
    """Factor of the logits at the end."""
    tau_first: Annotated[float, Field(gt=0, le=100)] = 4.0
    """Temperature at the start; it falls linearly."""
    tau_last: Annotated[float, Field(gt=0, le=100)] = 0.05
    """Temperature at the end."""
    regulariser: Annotated[float, Field(ge=0, le=1)] = 1e-5
    """Weight, at the start, of the sum of squared masked weights, which is made large; it falls to 0 linearly."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Learned N:M sparsity (MaskLLM)",
        paper="Fang et al. 2024, MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, "
        "arXiv:2409.17481",
        summary="Learns by gradient which two of every four consecutive weights stay, by Gumbel softmax over the six "
        "possible masks; then fine-tunes what is left.",
        needs="A trained student with layers of 4 inputs or more, better 16.",
        cost="One fine-tuning; six logits for every four weights in memory while masks are learnt.",
        evidence="The paper reports, for LLaMA-2 7B with frozen weights, a perplexity of 6.72 against 10.42 with "
        "SparseGPT and 5.12 dense. Not measured on our data yet.",
    )

    def run(self, session: Session) -> History:
        """See the base."""
        layers = layers_of(session.model, multiple_of=self.m, skip=self.skip)
        generator = torch.Generator().manual_seed(session.seed)
        choices = {name: NmChoice(layer.weight, self, generator) for name, layer in layers.items()}
        first, rest = self.schedules()
        masks, history = learn_masks(session, layers, choices, first, terms=lambda: self.terms(list(choices.values())))
        if rest is None:
            apply_masks(session.model, masks)
            return history
        return joined(history, train_under(session, masks, rest))

    def terms(self, choices: Sequence[NmChoice]) -> dict[str, Tensor]:
        """The regulariser of the forward pass that was just made."""
        penalties = [each.penalty for each in choices if each.penalty is not None]
        for each in choices:
            each.penalty = None
        weight = self.regulariser * (1 - float(choices[0].share))
        return {"masked_weights": -weight * torch.stack(penalties).sum()}
