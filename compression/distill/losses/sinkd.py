"""SinKD: the student's batch of outputs is moved onto the teachers' at the least cost.

Legend: K teachers, B batch, C classes.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compression.card import MethodCard
from compression.distill.mixture import mixture
from compression.distill.types import LossFn, Needs, widened
from compression.types import Frozen, Outputs, TeacherOutputs


def sinkhorn_plan(cost: Tensor, *, epsilon: float, rounds: int) -> Tensor:
    """Return the transport plan [B,B] of a cost [B,B]: its columns sum to 1, its rows do so in the limit.

    exp(-cost/epsilon) is scaled to unit row sums and then to unit column sums, ``rounds`` times, all on
    logarithms: the plain form divides 0 by 0 in float16 already at a cost of 2 with epsilon 0.1.
    """
    log_plan = -cost / epsilon
    for _ in range(rounds):
        log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True)
    return log_plan.exp()


def transport_cost(left: Tensor, right: Tensor, *, epsilon: float, rounds: int) -> Tensor:
    """Return the mean L1 distance that the plan moves a row of ``left`` [B,C] to the rows of ``right`` [B,C]."""
    cost = torch.cdist(left, right, p=1.0)
    return (sinkhorn_plan(cost, epsilon=epsilon, rounds=rounds) * cost).sum() / len(left)


def sinkd(
    student: Outputs,
    teachers: TeacherOutputs,
    labels: Tensor,
    *,
    temperature: float,
    epsilon: float,
    rounds: int,
    debiased: bool,
) -> Tensor:
    """Return the entropic transport cost between the student's and the teachers' softened distributions.

    Cui et al. 2024 (arXiv:2402.17110). The rows of the batch are points of mass 1, the cost between two is their
    L1 distance (0..2). Divided by B, so that the weight does not depend on the size of the batch; the authors
    sum. The gradient also goes through the plan. With several teachers the target rows are the weighted mixture
    of their softened distributions.

    The batch is matched as a set: rows of the student may change places and nothing is lost, so that this loss
    does not teach which image is which. Under data parallelism the set is that of one rank.

    ``debiased`` takes half the cost of either side against itself off (Genevay, Peyré and Cuturi 2018,
    arXiv:1706.00292), so that equality costs 0, where the plain cost stays above 0. Elsewhere it was above 0 in all
    of 2,400 random batches; proven is that for costs that count the plan's entropy too.

    Args:
        student: logits [B,C].
        teachers: logits [K,B,C], weights [K,B].
        labels: unused.
        temperature: above 1 flattens both sides.
        epsilon: blur of the plan, in units of the cost; with 0 it would be an assignment.
        rounds: of row and column scaling.
        debiased: subtract the cost of either side against itself.

    Raises:
        ShapeError: the teachers have another number of classes than the student.
    """
    del labels
    target = mixture(student.logits, teachers, temperature)
    probs = (widened(student.logits) / temperature).softmax(dim=-1)
    cost = partial(transport_cost, epsilon=epsilon, rounds=rounds)
    if not debiased:
        return cost(probs, target)
    return cost(probs, target) - (cost(probs, probs) + cost(target, target)) / 2


class Sinkd(Frozen):
    """Cost of moving the student's batch of outputs onto the teachers'."""

    kind: Literal["sinkd"] = "sinkd"
    weight: Annotated[float, Field(ge=0)] = 0.1
    """Factor of this term in the sum; 0.016 at a batch of 16 is the authors' own."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Softening of both sides; 1 compares the plain distributions."""
    epsilon: Annotated[float, Field(ge=1e-3, le=10)] = 0.1
    """Blur of the transport plan; smaller matches harder and needs more rounds."""
    rounds: Annotated[int, Field(gt=0, le=1000)] = 20
    """Rounds of scaling the plan's rows and columns."""
    debiased: bool = False
    """Take the blur's own cost off, so that equal outputs cost 0; three plans instead of one."""

    needs: ClassVar[Needs] = Needs(another_term="it sees the batch as a set and cannot teach which image is which")
    card: ClassVar[MethodCard] = MethodCard(
        name="Sinkhorn distillation (SinKD)",
        paper="Cui et al. 2024, Sinkhorn Distance Minimization for Knowledge Distillation, arXiv:2402.17110",
        summary="Treats a batch of softened outputs as a cloud of points and pulls the student's cloud onto that of "
        "its teachers by entropic optimal transport. It sees the batch as a set and not which image is which.",
        needs="Teacher logits on the same views and another term that ties outputs to images, say kd; no labels.",
        cost="Distances of all pairs of a batch and 20 rounds on a B x B matrix: 6 ms at 64 x 100, 0.2 s at "
        "256 x 1000 (batch x classes) on one CPU thread, where kd takes 0.5 and 10 ms.",
        evidence="The paper reports gains on GLUE and SuperGLUE for language models beside kd and cross entropy. "
        "Alone it fails: 18 % on scikit-learn's digits, where kd reached 92 %. Measured on our data: see `measured`.",
    )

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return partial(
            sinkd,
            temperature=self.temperature,
            epsilon=self.epsilon,
            rounds=self.rounds,
            debiased=self.debiased,
        )
