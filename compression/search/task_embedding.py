"""A task as a point: what networks that know nothing yet would have to change to learn it.

After AutoTransfer (Cao et al. 2023, arXiv:2303.07669): anchors are small networks with random weights. On each only
the head is fitted; then the diagonal of the Fisher information of the other weights is estimated, with labels drawn
from the network's own distribution. How unevenly it is spread over the weights is one number for each anchor.

Legend: N images, D features, C classes, P weights.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from compression.augment import normalise
from compression.data.dataset import Dataset
from compression.features import penultimate
from compression.zoo import DepthwiseCnn, Mixer, PlainCnn, ResidualCnn, VisionTransformer

logger = logging.getLogger(__name__)

IMAGES = 512
"""At most so many images of the train split are looked at."""
CHANNELS, SIDE = 3, 16
"""Anchors see every task in this shape, so that their weights are the same for all tasks."""
SEEDS = 2
"""Each anchor is drawn so often; its numbers are averaged."""
ANCHORS = (
    PlainCnn(widths=(8, 16), depths=(1, 1), strides=(2, 2), stem_width=8),
    PlainCnn(widths=(16, 16, 32), depths=(1, 1, 1), strides=(2, 2, 1), stem_width=8),
    ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(2, 2), stem_width=8),
    ResidualCnn(widths=(16, 16), depths=(1, 2), strides=(2, 1), stem_width=8, stem_stride=2),
    DepthwiseCnn(widths=(16, 32), depths=(1, 1), strides=(2, 2), stem_width=8),
    DepthwiseCnn(widths=(16, 16), depths=(2, 2), strides=(2, 2), stem_width=16, kernel=5),
    VisionTransformer(width=16, depth=2, num_heads=2, patch_size=4, stem="patch"),
    Mixer(width=16, depth=2, patch_size=4, stem="patch"),
)
"""Convolutions plain, residual and depthwise, attention, and mixing by linear layers."""
EPOCHS, PATIENCE, BATCH = 100, 10, 128
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-4
LEAST_GAIN = 1e-4  # an epoch counts as better when its loss is lower by this share
CHUNK = 64  # images whose gradients are held at once


def task_embedding(dataset: Dataset, *, seed: int) -> tuple[float, ...]:
    """One number for each of ``ANCHORS``, together of length 1; empty when no image of the train split has a label.

    ``seed`` draws the images and the labels for the Fisher information; the anchors are the same for all seeds and
    tasks. Differs from the paper: anchors have 2 draws of weights instead of 5, gradients are squared for each image
    rather than for each batch, batch norms take their statistics from the images, and the learned projection of the
    vector is left out, since it must be fitted to the rank correlations of many tasks.
    """
    generator = torch.Generator().manual_seed(seed)
    labelled = (dataset.train.labels >= 0).nonzero().squeeze(1)
    if not len(labelled):
        return ()
    chosen = labelled[torch.randperm(len(labelled), generator=generator)[:IMAGES]]
    images = anchor_images(normalise(dataset.train.images[chosen], dataset.preprocessing))
    labels = dataset.train.labels[chosen]
    numbers = []
    for place in range(len(ANCHORS)):
        drawn = [
            unevenness(fisher_diagonal(_fitted(place, draw, images, labels, dataset.num_classes), images, generator))
            for draw in range(SEEDS)
        ]
        numbers.append(sum(drawn) / SEEDS)
    return tuple(F.normalize(torch.tensor(numbers, dtype=torch.float64), dim=0).tolist())


def embedding_of(dataset: Dataset, *, seed: int, folder: Path) -> tuple[float, ...]:
    """The embedding of a dataset, made once and then read from ``folder / "task.json"``."""
    path, data = folder / "task.json", data_hash(dataset)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["data_hash"] == data and known["anchors"] == len(ANCHORS):
            return tuple(float(number) for number in known["embedding"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("the task embedding in '%s' is damaged and made again (%r)", path, error)
    embedding = task_embedding(dataset, seed=seed)
    write_json(path, {"data_hash": data, "anchors": len(ANCHORS), "embedding": embedding})
    return embedding


def data_hash(dataset: Dataset) -> str:
    """One hash over those of all splits: equal for studies on the same images, labels and splits."""
    return hashlib.sha256(json.dumps(dataset.hashes, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, content: object) -> None:
    """Replaces ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(path)


def anchor_images(images: Tensor) -> Tensor:
    """Images [N,C,H,W] in the one shape anchors see, [N,CHANNELS,SIDE,SIDE].

    Other than ``CHANNELS`` channels become their mean, repeated; pixels are averaged or interpolated.
    """
    if images.shape[1] != CHANNELS:
        images = images.mean(dim=1, keepdim=True).expand(-1, CHANNELS, -1, -1)
    return F.interpolate(images.contiguous(), size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def unevenness(squares: Tensor) -> float:
    """E[s^2] / E[s]^2 of squared gradients [P]: 1 when all weights matter alike, P when one alone does.

    Unchanged when all are multiplied by one number; 1 when all are 0.
    """
    squares = squares.double()
    mean = squares.mean()
    return float((squares / mean).square().mean()) if mean > 0 else 1.0


def fit_head(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weight [C,D] and bias [C] of a linear head for features [N,D], from zeros, by Adam on the cross entropy.

    Ends after ``PATIENCE`` epochs without a lower loss.
    """
    with torch.enable_grad():
        weight = torch.zeros(classes, features.shape[1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        best, waited = float("inf"), 0
        for _ in range(EPOCHS):
            total = 0.0
            for part, wanted in zip(features.split(BATCH), labels.split(BATCH), strict=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(F.linear(part, weight, bias), wanted, reduction="sum")
                (loss / len(wanted)).backward()
                optimizer.step()
                total += loss.item()
            waited = 0 if total < best * (1 - LEAST_GAIN) else waited + 1
            best = min(best, total)
            if waited >= PATIENCE:
                break
    return weight.detach(), bias.detach()


def fisher_diagonal(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared gradients [P] of the log probability of labels drawn from the model itself.

    Of all weights but those of ``model.head``; one label is drawn for each of the images [N,C,H,W].
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    body = {name: value for name, value in parameters.items() if not name.startswith("head.")}
    rest = {name: value for name, value in parameters.items() if name not in body} | dict(model.named_buffers())
    with torch.no_grad():
        labels = torch.multinomial(model(images).softmax(dim=1), 1, generator=generator).squeeze(1)

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights | rest, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(value) for name, value in body.items()}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be mapped over images
        for part, wanted in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
            for name, found in gradients(body, part, wanted).items():
                total[name] += found.detach().square().sum(dim=0)
    return torch.cat([squares.flatten() for squares in total.values()]) / len(images)


def _anchor(place: int, draw: int, classes: int) -> nn.Module:
    """The same body for all tasks; drawn from its place and the number of the draw alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place * SEEDS + draw)
        return ANCHORS[place].build(classes, (CHANNELS, SIDE, SIDE))


def _fitted(place: int, draw: int, images: Tensor, labels: Tensor, classes: int) -> nn.Module:
    """An anchor with the batch statistics of the images and a fitted head, eval mode."""
    model: Any = _anchor(place, draw, classes)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # statistics are those of the one batch it sees
    with torch.no_grad():
        model.train()(images)
        _, features = penultimate(model.eval(), images)
        weight, bias = fit_head(features, labels, classes)
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    return model
