"""Do two models look at the same places? Grad-CAM for networks, occlusion for everything that answers.

Legend: N images, H, W their size, C classes, h, w the size of a feature map, K its width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.errors import CompressionError, ShapeError
from compression.features import captured, children_of, frozen
from compression.types import Frozen

TOP = 0.2
"""Share of the pixels whose overlap is counted."""
MOST_PREFIX_TOKENS = 5
"""Class and register tokens in front of the grid."""
FLAT = 1e-6
"""A map whose largest and smallest values differ by less than this share of its largest says nothing."""
NO_GRID = (0, 0, 0)
BATCH = 32


class AttentionConfig(Frozen):
    """Compare where teacher and students look, on images of the validation split."""

    kind: Literal["grad_cam"] = "grad_cam"
    images: PositiveInt = 64
    """How many images are compared."""
    pictures: Annotated[int, Field(ge=0, le=24)] = 6
    """How many of them the report shows."""
    patch: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Side of the patch that covers a place, as a share of the image's smaller side; for files without gradients."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Grad-CAM agreement",
        paper="Selvaraju et al. 2017, arXiv:1610.02391; occlusion after Zeiler and Fergus 2014, arXiv:1311.2901",
        summary="Draws which places of an image speak for the teacher's answer, in teacher and student, and counts how "
        "far the two drawings agree. INT8 files have no gradients: there a patch covers one place after the other.",
        needs="Images of the validation split, no labels.",
        cost="One forward and backward pass per image and model; for files one forward pass per place of the patch.",
        evidence="Measured in every run. On digits maps of a pruned student correlate at 0.93 with its teacher's, and "
        "its INT8 file's occlusion drops at 0.99 with its own.",
    )


class ImageAgreement(Frozen):
    """How alike two maps of one image are."""

    pearson: float
    """Correlation of the values, -1..1."""
    spearman: float
    """Correlation of their ranks, -1..1."""
    iou: float
    """Overlap of the highest fifth of the pixels over their union, 0..1."""


class Agreement(Frozen):
    """How alike the maps of two models are, mean over images."""

    pearson: float | None
    """Mean correlation of the values; none if every image was skipped."""
    spearman: float | None
    """Mean correlation of the ranks; none if every image was skipped."""
    iou: float | None
    """Mean overlap of the highest fifth of the pixels; none if every image was skipped."""
    num_images: int
    """Images looked at, skipped ones among them."""
    skipped: int
    """Images on which one of the maps is the same everywhere, mostly 0."""
    images: tuple[ImageAgreement | None, ...]
    """Each image, in order; none if it was skipped."""


def attention_layer(model: nn.Module, images: Tensor) -> str:
    """Name of the module that makes the last feature map with positions that the logits depend on.

    Looked at are the children of the network and, of those that are mere sequences, their children. Tokens count when
    they make a grid of the image's proportions behind at most five others (class token, registers), the same grid as
    the first of the network, since what is left of dropped tokens makes none. Where only the class token is read at
    the end, the grid that enters the last block is the last one the logits depend on.

    Args:
        model: Images -> logits.
        images: A few normalised images [N,channels,H,W].

    Raises:
        ShapeError: the network has no such module.
    """
    names = children_of(model)
    images = _leaf(model, images[:2])
    with frozen(model), torch.inference_mode(False), torch.enable_grad(), captured(model, names) as seen:
        logits = model(images)
        found = [(name, seen[name]) for name in names if _has_grid(seen.get(name), images)]
        grids = [_grid(each.shape[1], images) for _, each in found if each.ndim == 3]
        reached = [
            (name, each)
            for name, each in found
            if each.requires_grad and (each.ndim == 4 or _grid(each.shape[1], images)[1:] == grids[0][1:])
        ]
        top = logits.max(dim=1).values.sum()
        gradients = torch.autograd.grad(top, [each for _, each in reached], allow_unused=True) if reached else ()
    for (name, _), gradient in reversed(list(zip(reached, gradients, strict=True))):
        if gradient is not None and bool(_as_image(gradient, images).any()):
            return name
    raise ShapeError(
        f"Model '{type(model).__name__}' has no child module with an output of more than one place that its logits "
        "depend on, expected one for Grad-CAM. Use occlusion_drops."
    )


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, layer: str | None = None) -> Tensor:
    """Where the evidence for a class lies, [N,H,W], each map divided by its maximum; all 0 where nothing speaks for it.

    Selvaraju et al. 2017 (arXiv:1610.02391): ``M = relu(sum_k alpha_k A_k)`` with ``alpha_k`` the mean gradient of the
    class's logit in feature map k, resized bilinearly. Behind a mean over the image and a linear layer ``alpha_k`` is
    the weight of the class for k over h w. The model runs in eval mode and gets back its modes and flags; no gradient
    is left behind.

    Args:
        model: Images -> logits.
        images: Normalised images [N,channels,H,W].
        classes: int64 [N]; the same for all models that are compared.
        layer: See ``attention_layer``, which finds it for None.

    Raises:
        ShapeError: ``layer`` is no module, or its output has no places.
    """
    layer = layer or attention_layer(model, images)
    parts = []
    for chosen, wanted in zip(images.split(BATCH), classes.split(BATCH), strict=True):
        features, weights = class_gradients(model, chosen, wanted, layer)
        heat = torch.einsum("nkhw,nk->nhw", features, weights).relu()
        heat = F.interpolate(heat.unsqueeze(1), size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        peak = heat.flatten(1).amax(dim=1).reshape(-1, 1, 1)
        parts.append(torch.where(peak > 0, heat / peak.clamp_min(torch.finfo(heat.dtype).tiny), 0.0))
    return torch.cat(parts)


def class_gradients(model: nn.Module, images: Tensor, classes: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """The maps A [N,K,h,w] of a module, and alpha [N,K]: the mean over places of the class logit's gradient in them.

    Raises:
        ShapeError: ``layer`` is no module, or its output has no places.
    """
    images = _leaf(model, images)
    with frozen(model), torch.inference_mode(False), torch.enable_grad(), captured(model, [layer]) as seen:
        logits = model(images)
        output = seen.get(layer)
        if output is None or not _has_grid(output, images):
            raise ShapeError(
                f"Module '{layer}' of '{type(model).__name__}' has "
                f"{'no output' if output is None else f'an output of shape {list(output.shape)}'}, expected a map "
                "of more than one place. Leave the layer to attention_layer."
            )
        scores = logits.gather(1, classes.to(logits.device, copy=True).unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(scores, output)
    maps, gradient = _as_image(output.detach(), images), _as_image(gradient, images)
    return maps.float().cpu(), gradient.float().mean(dim=(2, 3)).cpu()


@torch.no_grad()
def occlusion_drops(
    predict: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor, *, patch: float = 0.25
) -> Tensor:
    """How much probability the class loses when a patch covers a place, [N,rows,columns]; negative where it gains.

    After Zeiler and Fergus 2014 (arXiv:1311.2901). The patch has the image's mean colour and moves by half its side,
    to the very edge. Works for anything that answers; a module should be in eval mode.

    Args:
        predict: Normalised images [N,channels,H,W] -> logits [N,C].
        images: Normalised images [N,channels,H,W].
        classes: int64 [N]; the same for all models that are compared.
        patch: Side of the patch as a share of the image's smaller side.
    """
    height, width = images.shape[2:]
    side = max(1, round(patch * min(height, width)))
    colour = images.mean(dim=(2, 3), keepdim=True)
    column = classes.unsqueeze(1)

    def confidence(shown: Tensor) -> Tensor:
        return predict(shown).detach().to("cpu", torch.float64).softmax(dim=1).gather(1, column)[:, 0]

    whole = confidence(images)
    rows = []
    for top in _starts(height, side):
        row = []
        for left in _starts(width, side):
            covered = images.clone()
            covered[:, :, top : top + side, left : left + side] = colour
            row.append(whole - confidence(covered))
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def compare_maps(first: Tensor, second: Tensor) -> Agreement:
    """How alike the maps [N,H,W] of two models on the same N images are.

    Pearson and Spearman (ties share their mean rank) over the pixels of an image, and the overlap of the highest fifth
    of each map; pixels of 0 or less are never among these.

    Raises:
        ShapeError: shapes differ, or there are no images.
    """
    if first.ndim != 3 or first.shape != second.shape or not len(first):
        raise ShapeError(
            f"Maps have shapes {list(first.shape)} and {list(second.shape)}, expected [N, H, W] twice with N of at "
            "least 1. Compare the same images at the same size."
        )
    images = [_compared(one, other) for one, other in zip(first.double(), second.double(), strict=True)]
    kept = [each for each in images if each is not None]

    def mean(values: Sequence[float]) -> float | None:
        return math.fsum(values) / len(values) if values else None

    return Agreement(
        pearson=mean([each.pearson for each in kept]),
        spearman=mean([each.spearman for each in kept]),
        iou=mean([each.iou for each in kept]),
        num_images=len(images),
        skipped=len(images) - len(kept),
        images=tuple(images),
    )


def _compared(first: Tensor, second: Tensor) -> ImageAgreement | None:
    first, second = first.flatten(), second.flatten()
    for each in (first, second):
        if not bool(torch.isfinite(each).all()):
            raise CompressionError(
                "Map has values that are not finite, expected finite numbers. The model overflowed: use float32."
            )
        if float(each.max() - each.min()) <= FLAT * float(each.abs().max()):
            return None
    one, other = _top(first), _top(second)
    union = float((one | other).sum())
    return ImageAgreement(
        pearson=_correlation(first, second),
        spearman=_correlation(_ranks(first), _ranks(second)),
        iou=float((one & other).sum()) / union if union else 0.0,
    )


def _correlation(first: Tensor, second: Tensor) -> float:
    first, second = first - first.mean(), second - second.mean()
    return max(-1.0, min(1.0, float((first @ second) / (first.norm() * second.norm()))))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    first = (sizes.cumsum(0) - sizes).double()
    return (first + (sizes - 1) / 2)[group]


def _top(values: Tensor) -> Tensor:
    count = max(1, round(TOP * len(values)))
    return (values >= values.topk(count).values[-1]) & (values > 0)


def _starts(length: int, side: int) -> list[int]:
    last = length - side
    return sorted({*range(0, last + 1, max(1, side // 2)), last})


def _leaf(model: nn.Module, images: Tensor) -> Tensor:
    """A copy of the images, where the model is, from which gradients flow though no weight asks for them."""
    device = next((each.device for each in model.parameters()), images.device)
    with torch.inference_mode(False):
        return images.detach().to(device, copy=True).requires_grad_()


def _has_grid(output: object, images: Tensor) -> bool:
    if not isinstance(output, Tensor) or not len(output):
        return False
    if output.ndim == 4:
        return output.shape[2] * output.shape[3] > 1
    return output.ndim == 3 and _grid(output.shape[1], images) != NO_GRID


def _grid(count: int, images: Tensor) -> tuple[int, int, int]:
    """(tokens in front, rows, columns) of ``count`` tokens; zeros if they make no grid of the image's proportions."""
    height, width = images.shape[2:]
    for prefix in range(min(count, MOST_PREFIX_TOKENS + 1)):
        rows = math.isqrt((count - prefix) * height // width)
        columns = (count - prefix) // rows if rows else 0
        if rows * columns == count - prefix and rows * width == columns * height and rows * columns > 1:
            return prefix, rows, columns
    return NO_GRID


def _as_image(output: Tensor, images: Tensor) -> Tensor:
    """A map that has a grid as an image [N,K,h,w], without the tokens in front."""
    if output.ndim == 4:
        return output
    prefix, rows, columns = _grid(output.shape[1], images)
    return output[:, prefix:].transpose(1, 2).reshape(len(output), -1, rows, columns)
