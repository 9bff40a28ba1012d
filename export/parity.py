"""Whether a model still says the same after each hop: torch, ONNX, INT8, engine.

Tolerances per element are no test for INT8: one value at a rounding boundary shifts what follows by whole
steps. Measured on a random ResNet-18, an INT8 model differs from itself under input noise of 1e-7 as much as
from its exported graph. So parity is counted in changed predictions, and the largest difference is read
beside that noise floor.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compression.errors import ShapeError
from compression.types import Frozen

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
    """Largest logit change of the reference under input noise of 1e-7: a difference near it is rounding."""
    file: str | None = None
    """Name of the file this rung ran, if it is one."""
    note: str = ""
    """What else a reader should know."""


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
