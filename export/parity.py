"""Whether a model still says the same after each hop: torch, ONNX, INT8, engine.

Tolerances per element are no test for INT8: one value at a rounding boundary shifts what follows by whole
steps. Measured on a random ResNet-18, an INT8 model differs from itself under input noise of 1e-7 as much as
from its exported graph. So parity is counted in changed predictions, and the largest difference is read
beside that noise floor.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compression.errors import ShapeError
from compression.types import Frozen
from export.attribution import Attribution

ENGINE_NOT_RUN: Literal["built, not run here"] = "built, not run here"


class Parity(Frozen):
    """How far a candidate is from a reference on the same images."""

    top1: float
    """Accuracy of the candidate, 0..1."""
    reference_top1: float
    """Accuracy of the reference, 0..1."""
    flips: float
    """Share of images whose predicted class changed, 0..1."""
    kl: float
    """Mean KL divergence from the reference's distribution to the candidate's, in nats."""
    max_abs: float
    """Largest difference of a logit."""
    mean_abs: float
    """Mean difference of a logit."""
    num_samples: int
    """Number of images."""


class RungLimits(Frozen):
    """What one hop may cost. A single image never breaks a share: it proves nothing."""

    flips: Annotated[float, Field(ge=0, le=1)]
    """Largest share of images whose predicted class may change."""
    accuracy: Annotated[float, Field(ge=0, le=1)]
    """Largest difference of the accuracy, either way."""
    relative: Annotated[float, Field(gt=0)] | None = None
    """Largest difference of a logit, as a share of the reference's largest logit; none: not limited."""
    floor_factor: Annotated[float, Field(gt=0)] = 3.0
    """A difference up to this many times the self-perturbation floor is allowed in any case."""
    layer: Annotated[float, Field(gt=0)]
    """Largest relative error that one layer may add."""
    layer_decides: bool = False
    """Whether a layer above its limit breaks the rung by itself: where both forms should agree layer by layer."""


Hop = Literal["inputs", "float32", "float16", "fake-quant", "int8-symmetric", "int8-u8", "after-training"]

LIMITS: dict[Hop, RungLimits] = {
    "inputs": RungLimits(flips=0.0, accuracy=0.0, relative=1e-5, layer=1e-4),
    "float32": RungLimits(flips=0.001, accuracy=0.001, relative=1e-5, layer=1e-4, layer_decides=True),
    "float16": RungLimits(flips=0.005, accuracy=0.005, relative=1e-2, layer=1e-2, layer_decides=True),
    "fake-quant": RungLimits(flips=0.05, accuracy=0.01, layer=0.3),
    "int8-symmetric": RungLimits(flips=0.01, accuracy=0.01, relative=0.1, layer=0.02, layer_decides=True),
    "int8-u8": RungLimits(flips=0.01, accuracy=0.01, relative=0.1, layer=0.1, layer_decides=True),
    "after-training": RungLimits(flips=0.05, accuracy=0.01, layer=0.3),
}
"""By hop. Agreement of 99 % for INT8 files, 0.1 % flips for float32 and a relative tolerance of 1e-5 are usual;
rounding itself (fake-quant, after training) may change more, as long as accuracy stays. An INT8 file with uint8
activations no longer clips non-negative values, hence its wider limit per layer."""

Outcome = Literal["ok", "exceeded", "not run"]


class Rung(Frozen):
    """One hop of the parity ladder: a form of the model, and how it compares with the rung before."""

    name: str
    """This form of the model."""
    against: str | None
    """The rung it is compared with; none for the first one."""
    parity: Parity | None
    """The comparison; none if this form was not run."""
    status: Literal["measured", "built, not run here"] = "measured"
    """Whether this form was run."""
    floor: float | None = None
    """Largest logit change of the form that rounds, against itself, under input noise of 1e-7: a difference near it
    is rounding."""
    file: str | None = None
    """Name of the file this rung ran, if it is one."""
    note: str = ""
    """What else a reader should know."""
    limits: RungLimits | None = None
    """What this hop may cost; none for the first form and for what was not run."""
    exceeded: tuple[str, ...] = ()
    """Which limits are broken, in words."""
    attribution: Attribution | None = None
    """Where the difference comes from, layer by layer."""

    outcome: Outcome = Field(default_factory=lambda known: _outcome(known))
    """Whether the limits hold; a form that was not run is never ok."""


def _outcome(known: dict[str, Any]) -> Outcome:
    if known["status"] != "measured":
        return "not run"
    return "exceeded" if known["exceeded"] else "ok"


def compare(reference_logits: Tensor, candidate_logits: Tensor, labels: Tensor) -> Parity:
    """The parity of two sets of logits [N, classes] on the same N images with labels [N].

    Raises:
        ShapeError: the three don't fit together, or are empty.
    """
    shapes = [tuple(tensor.shape) for tensor in (reference_logits, candidate_logits, labels)]
    if reference_logits.dim() != 2 or shapes[0] != shapes[1] or shapes[2] != shapes[0][:1] or not shapes[0][0]:
        raise ShapeError(
            f"Logits and labels have shapes {shapes}, expected [N, C], [N, C] and [N] with N above 0."
            " Compare the same images."
        )
    reference = reference_logits.detach().cpu().double()
    candidate = candidate_logits.detach().cpu().double()
    labels = labels.cpu()
    log_reference, log_candidate = reference.log_softmax(1), candidate.log_softmax(1)
    divergence = (log_reference.exp() * (log_reference - log_candidate)).sum(dim=1)
    difference = (reference - candidate).abs()
    predicted, expected = candidate.argmax(1), reference.argmax(1)
    return Parity(
        top1=(predicted == labels).double().mean().item(),
        reference_top1=(expected == labels).double().mean().item(),
        flips=(predicted != expected).double().mean().item(),
        kl=max(divergence.mean().item(), 0.0),
        max_abs=difference.max().item(),
        mean_abs=difference.mean().item(),
        num_samples=len(labels),
    )


def broken_limits(
    parity: Parity, limits: RungLimits, *, largest_logit: float, floor: float | None, attribution: Attribution | None
) -> tuple[str, ...]:
    """Which limits a hop breaks, in words; none if it is within all of them.

    Args:
        parity: The comparison.
        limits: What the hop may cost.
        largest_logit: Largest magnitude of the reference's logits.
        floor: Self-perturbation floor, see :func:`self_perturbation_floor`.
        attribution: The hop layer by layer.
    """
    broken: list[str] = []
    one = 1.5 / parity.num_samples
    if parity.flips > max(limits.flips, one if limits.flips else 0.0):
        broken.append(f"{parity.flips:.2%} of the answers change, at most {limits.flips:.2%} may")
    change = parity.top1 - parity.reference_top1
    if abs(change) > max(limits.accuracy, one if limits.accuracy else 0.0):
        broken.append(f"accuracy changes by {change * 100:+.2f} points, at most {limits.accuracy * 100:g} may be")
    if limits.relative is not None:
        allowed = max(limits.relative * largest_logit, limits.floor_factor * (floor or 0.0))
        if not parity.max_abs <= allowed:
            broken.append(f"a logit differs by {parity.max_abs:.3g}, at most {allowed:.3g} may be")
    if limits.layer_decides and attribution is not None and (row := attribution.layer(attribution.first)):
        broken.append(f"layer '{row.layer}' adds a relative error of {row.added:.2g}, at most {limits.layer:g} may be")
    return tuple(broken)


def self_perturbation_floor(
    predict: Callable[[Tensor], Tensor], images: Tensor, *, noise: float = 1e-7, seed: int = 0
) -> float:
    """Largest logit change of a model against itself when its input moves by ``noise`` (relative to 1).

    Args:
        predict: From normalised images [N, C, H, W] to logits [N, classes].
        images: Normalised images.
        noise: Standard deviation of the normal noise.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = images + noise * torch.randn(images.shape, generator=generator).to(images)
    with torch.inference_mode():
        return (predict(images) - predict(moved)).abs().max().item()
