"""Channel pruning by measured sensitivity, through NVIDIA's Model Optimizer (an optional package)."""

import copy
import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module, metadata
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compression.card import MethodCard
from compression.checkpoint import SPEC_FILE, load_checkpoint, save_checkpoint
from compression.distill.merging.batch_norm import reestimate_batch_norm
from compression.errors import CompressionError
from compression.models import ModelSpec, diff_edits
from compression.search.prune import rebuilt_copy
from compression.search.space import Choices, Genes, Space, Workshop

logger = logging.getLogger(__name__)

TORCHPROFILE = "0.0.4"
"""The one version that counts FLOPs for the library: later ones lack what it calls."""
NORM_BATCHES = 50
"""What the library waits for before it takes batch-norm statistics anew for each sub-network."""
SCORED_AT_ONCE = 512

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class FastNas(Space):
    """Pruned copies of one teacher, each with about a given share of its FLOPs.

    Channels are ranked by magnitude. For each layer by itself the library measures how accuracy falls with its width,
    batch-norm statistics taken anew each time, and then bisects for the largest fall that all layers may share so that
    the network keeps within the FLOPs. Both looks are at the calibration split. What it returns is written as a spec
    with edits and loads without the library; its batch-norm statistics are taken from train images.
    """

    kind: Literal["fastnas"] = "fastnas"
    parent: str = Field(min_length=1)
    """Name of the teacher that is pruned."""
    shares: tuple[Share, ...] = Field(default=(0.25, 0.4, 0.6), min_length=1)
    """Most FLOPs to keep, as shares of the teacher's; each is a choice of the search."""
    channel_divisor: int = Field(default=8, ge=1, le=256)
    """Channel counts to choose from are multiples of this; narrow networks leave no choice for large ones."""

    card: ClassVar[MethodCard] = MethodCard(
        name="FastNAS pruning",
        paper="NVIDIA Model Optimizer 0.47 (library), mode fastnas; no paper",
        summary="Measures how much accuracy each layer loses as it gets narrower, and cuts all layers to one common "
        "loss that meets a FLOPs budget.",
        needs="A trained teacher, labelled calibration images, and pip install 'stillhouse[modelopt]'.",
        cost="A pass over the calibration images for every width of every layer, about 20 in a small network, and as "
        "many forward passes for batch norm; once for each share.",
        evidence="Not measured on our data yet.",
    )

    @field_validator("shares")
    @classmethod
    def _ascending(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(shares)))

    @property
    def label(self) -> str:
        return f"fastnas-{self.parent}"

    def genes(self, shop: Workshop) -> Genes:
        check_installed()
        shop.parent(self.parent)
        return {"flops": self.shares}

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        share = float(choices["flops"])
        folder = shop.folder / f"{self.label}-{self.channel_divisor}" / f"{share:g}"
        if not (folder / SPEC_FILE).exists():
            parent, spec = shop.parent(self.parent)
            model, spec = fastnas(
                parent,
                spec,
                share=share,
                channel_divisor=self.channel_divisor,
                calibration=shop.calibration(),
                seed=shop.seed,
            )
            reestimate_batch_norm(model, shop.dataset, seed=shop.seed)
            save_checkpoint(model, spec, folder)
        return load_checkpoint(folder)


def check_installed() -> None:
    """Refuse to go on without the optional packages; imports nothing.

    Raises:
        CompressionError: one is missing, or torchprofile has a version the library cannot use.
    """
    for package, version in (("nvidia-modelopt", None), ("torchprofile", TORCHPROFILE)):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or version not in (None, found):
            raise CompressionError(
                f"Package '{package}' has {'no installation' if found is None else f'version {found}'}, expected "
                f"{version or 'one'} for kind 'fastnas'. Run pip install 'stillhouse[modelopt]', or search by kind "
                "'prune'."
            )


def fastnas(
    model: nn.Module,
    spec: ModelSpec,
    *,
    share: float,
    channel_divisor: int,
    calibration: tuple[Tensor, Tensor],
    seed: int = 0,
) -> tuple[nn.Module, ModelSpec]:
    """A copy of ``model`` with at most ``share`` of its FLOPs, eval mode, all weights trainable, and its spec.

    Args:
        model: not changed.
        spec: rebuilds it.
        share: above 0 and below 1.
        channel_divisor: channel counts to choose from are multiples of it.
        calibration: normalised images [N,C,H,W] and labels [N], for scores and batch norm.
        seed: of whatever the library may draw.

    Raises:
        CompressionError: the library is missing, cannot follow the network, or finds nothing within the budget.
        ShapeError: the pruned network cannot be rebuilt from its spec.
    """
    check_installed()
    images, labels = calibration
    work = copy.deepcopy(model).cpu().eval().requires_grad_(True)

    def accuracy(candidate: nn.Module) -> float:
        candidate.eval()  # it is in eval mode, but this call is where the library takes batch-norm statistics anew
        with torch.no_grad():
            parts = zip(images.split(SCORED_AT_ONCE), labels.split(SCORED_AT_ONCE), strict=True)
            return sum(int((candidate(x).argmax(dim=1) == y).sum()) for x, y in parts) / len(labels)

    said = io.StringIO()
    with (
        torch.random.fork_rng(devices=[]),
        redirect_stdout(said),
        redirect_stderr(said),
        warnings.catch_warnings(action="ignore"),
    ):
        torch.manual_seed(seed)
        try:
            pruned, _ = import_module("modelopt.torch.prune").prune(
                work,
                _mode(channel_divisor),
                constraints={"flops": f"{100 * share:g}%"},
                dummy_input=images[:1],
                config={
                    "data_loader": norm_batches(images),
                    "collect_func": lambda batch: batch,
                    "score_func": accuracy,
                    "max_iter_data_loader": NORM_BATCHES,
                    "verbose": False,
                },
            )
        except Exception as error:  # whatever the library trips over, it means the same to the caller
            reason = (str(error).strip() or repr(error)).splitlines()[-1]  # tables come before it
            raise CompressionError(
                f"Model '{type(model).__name__}' has no pruned form with {share:g} of its FLOPs that the library can "
                f"find ({reason}), expected one. Raise the share, lower channel_divisor ({channel_divisor}), or search "
                "by kind 'prune'."
            ) from error
        finally:
            logger.debug("modelopt: %s", said.getvalue())
    pruned.eval().zero_grad(set_to_none=True)
    new_spec = spec.model_copy(update={"edits": (*spec.edits, *diff_edits(model, pruned))})
    return rebuilt_copy(pruned, new_spec, images[:2]), new_spec


def norm_batches(images: Tensor, *, smallest: int = 8) -> Sequence[Tensor]:
    """``NORM_BATCHES`` batches that together show every image at least once, taken in turn from the start."""
    size = max(min(smallest, len(images)), -(-len(images) // NORM_BATCHES))
    return [images[torch.arange(start, start + size) % len(images)] for start in range(0, NORM_BATCHES * size, size)]


def _mode(divisor: int) -> list[tuple[str, dict[str, Any]]]:
    rules = {"nn.Conv2d": "channel_divisor", "nn.BatchNorm2d": "feature_divisor"}
    rules |= {"nn.Linear": "feature_divisor", "nn.LayerNorm": "feature_divisor"}
    return [("fastnas", {layer: {"*": {name: divisor}} for layer, name in rules.items()})]
