"""G2SD: a vision transformer first learns its teacher's tokens behind a mask, without labels, and then the task.

Legend: B batch, N tokens of the student, M of the teacher, D width of the student's tokens, Dt of the teacher's.

    stage 1   mask     round(mask_ratio * N) of each image's N tokens, at random
              target   layer norm, without weights, of the teacher's last block for the whole image, [B,N,Dt]
              student  last block for tokens of which the masked ones are one learned vector, [B,N,D]
              loss     mean over B, N and Dt of smooth_l1(mlp(decoder(student)), target, beta)
    stage 2   the configured losses

with smooth_l1(a, b, beta) = (a - b)^2 / (2 beta) where |a - b| < beta, and |a - b| - beta / 2 elsewhere.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.procedures.training import ProcedureFn, Training, joined
from compression.distill.step import sample_of
from compression.distill.types import widened
from compression.errors import CompressionError, ShapeError
from compression.features import frozen, image_of, tokens_of
from compression.train import History
from compression.types import Batch, Frozen
from compression.zoo.vision_transformer import TransformerBlock

HEAD_WIDTH = 32
"""Width of an attention head of the decoder."""


@dataclass(frozen=True)
class TokenNetwork:
    """A network of tokens, and where they come in and go out."""

    model: nn.Module
    embedding: nn.Module
    """[B,C,H,W] -> [B,N,D]."""
    last_block: nn.Module
    """Its output is [B,prefix+N,D]."""
    prefix: int
    """Class tokens and registers before those of the image."""
    num_tokens: int
    """N."""
    width: int
    """D."""

    @classmethod
    def of(cls, model: nn.Module, sample: Tensor) -> "TokenNetwork":
        """Find the parts of a network in its ``tokens`` (``patch_embed`` in timm) and ``blocks``.

        Args:
            model: put back into its mode afterwards.
            sample: one image [1,C,H,W].

        Raises:
            ShapeError: it has no such parts, or they give no sequence of two tokens or more.
        """
        name = type(model).__name__
        embedding, blocks = (
            getattr(model, "tokens", getattr(model, "patch_embed", None)),
            getattr(model, "blocks", None),
        )
        if not isinstance(embedding, nn.Module) or not isinstance(blocks, nn.Sequential | nn.ModuleList) or not blocks:
            raise ShapeError(
                f"Model '{name}' has no modules 'tokens' (or 'patch_embed') and 'blocks', expected those of a vision "
                "transformer, because procedure 'g2sd' masks tokens. Take transformers as student and teacher, or "
                "another procedure."
            )
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        with frozen(model), torch.no_grad(), _outputs_of(embedding) as first, _outputs_of(blocks[-1]) as last:
            model(sample)
        into, out = (list(values[-1].shape) if values else [] for values in (first, last))
        if len(into) != 3 or into[1] < 2 or out != [1, prefix + into[1], into[2]]:
            raise ShapeError(
                f"Model '{name}' has tokens of shape {into} that leave its blocks as {out}, expected two or more "
                "[1, tokens, width] that keep number and width. Take another transformer, or another procedure."
            )
        return cls(model, embedding, blocks[-1], prefix, num_tokens=into[1], width=into[2])

    def __call__(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        token: Tensor | None = None,
        *,
        through: nn.Module | None = None,
    ) -> Tensor:
        """Return the image's tokens after the last block, [B,N,D].

        Args:
            images: [B,C,H,W].
            mask: bool [B,N]; where it is set, ``token`` [D] takes the place of the embedded patch, before positions
                are added. None masks nothing.
            token: see ``mask``.
            through: the network as the trainer wraps it; the network itself when None.
        """
        with _replaced(self.embedding, mask, token), _outputs_of(self.last_block) as outputs:
            (self.model if through is None else through)(images)
        return outputs[-1][:, self.prefix :]


def random_mask(batch: int, num_tokens: int, ratio: float) -> Tensor:
    """Return a mask bool [B,N] with round(ratio * N) set in each row, at least 1 and at most N - 1.

    Drawn from the random state of the process, on the CPU, so that every device sees the same.
    """
    count = min(max(round(ratio * num_tokens), 1), num_tokens - 1)
    return torch.rand(batch, num_tokens).argsort(dim=1) < count


def generic_target(tokens: Tensor, num_tokens: int) -> Tensor:
    """Return the teacher's tokens [B,M,Dt] on N places, each with zero mean and unit variance, [B,N,Dt] float32.

    Where M is not N both are taken for square grids and the teacher's is pooled. No gradient reaches the teacher.

    Raises:
        ShapeError: numbers differ, and one of them is no square.
    """
    values = widened(tokens.detach())
    if values.shape[1] != num_tokens:
        sides = [math.isqrt(count) for count in (num_tokens, values.shape[1])]
        if [side * side for side in sides] != [num_tokens, values.shape[1]]:
            raise ShapeError(
                f"Student has {num_tokens} tokens and the teacher {values.shape[1]}, expected the same number, or two "
                "square ones. Choose another patch_size."
            )
        values = tokens_of(F.adaptive_avg_pool2d(image_of(values), sides[0]))
    return F.layer_norm(values, values.shape[-1:])


def generic_loss(prediction: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Return the smooth L1 distance, mean over everything; both [B,N,Dt]."""
    return F.smooth_l1_loss(prediction, target, beta=beta)


class Decoder(nn.Module):
    """[B,N,D] -> [B,N,Dt]: a few transformer blocks and an MLP; holds the mask token. Dropped after stage 1."""

    def __init__(self, width: int, teacher_width: int, *, decoder_width: int, depth: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.enter = nn.Linear(width, decoder_width)
        self.blocks = nn.Sequential(
            *(TransformerBlock(decoder_width, decoder_width // HEAD_WIDTH, 4 * decoder_width) for _ in range(depth))
        )
        self.leave = nn.Sequential(
            nn.LayerNorm(decoder_width),
            nn.Linear(decoder_width, teacher_width),
            nn.GELU(),
            nn.Linear(teacher_width, teacher_width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the student says of the teacher's tokens, in float32 under autocast too."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.leave(self.blocks(self.enter(widened(tokens))))


class GenericStep:
    """A step of stage 1; of a batch it looks at the images alone."""

    def __init__(
        self, student: TokenNetwork, teacher: TokenNetwork, decoder: Decoder, *, mask_ratio: float, beta: float
    ) -> None:
        self.student, self.teacher, self.decoder = student, teacher, decoder
        self.mask_ratio, self.beta = mask_ratio, beta

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The one term ``generic``."""
        device = batch.images.device
        with torch.no_grad():
            self.teacher.model.to(device).eval()
            target = generic_target(self.teacher(batch.images), self.student.num_tokens)
        mask = random_mask(len(batch.images), self.student.num_tokens, self.mask_ratio).to(device)
        tokens = self.student(batch.images, mask, self.decoder.mask_token, through=model)
        return {"generic": generic_loss(self.decoder(tokens), target, beta=self.beta)}


def g2sd(training: Training, config: "G2sd") -> History:
    """Train the student on the teacher's tokens, then on the configured losses.

    In the rows of stage 1 the student's accuracy is that of a classifier nobody has trained yet.

    Raises:
        CompressionError: there is one epoch only, or no such teacher.
        ShapeError: student or teacher is no network of tokens, or their grids do not fit.
    """
    train = training.config.train
    if train.epochs < 2:
        raise CompressionError(
            f"Procedure 'g2sd' has {train.epochs} epoch, expected at least 2, one for each stage. Raise train.epochs."
        )
    if config.teacher >= len(training.teachers):
        raise CompressionError(
            f"Procedure 'g2sd' has {len(training.teachers)} teachers, expected number {config.teacher} (from 0). "
            "Lower procedure.teacher."
        )
    student, teacher = (
        TokenNetwork.of(model, sample_of(model, training.dataset))
        for model in (training.student, training.teachers[config.teacher])
    )
    generic_target(torch.zeros(1, teacher.num_tokens, teacher.width), student.num_tokens)  # refuses what cannot fit
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        decoder = Decoder(student.width, teacher.width, decoder_width=config.decoder_width, depth=config.decoder_depth)
    epochs = min(max(1, int(config.generic_share * train.epochs + 1e-9)), train.epochs - 1)
    generic = training.run(
        name="generic",
        train=train.model_copy(update={"epochs": epochs}),
        step=GenericStep(student, teacher, decoder, mask_ratio=config.mask_ratio, beta=config.beta),
        helpers=decoder,
        monitored=False,
    )
    specific = training.run(name="specific", train=train.model_copy(update={"epochs": train.epochs - epochs}))
    return joined(generic, specific)


class G2sd(Frozen):
    """Generic, then specific: the student learns its teacher's tokens of masked images, and afterwards the task.

    Huang et al. 2023, "Generic-to-Specific Distillation of Masked Autoencoders" (arXiv:2302.14771). Where ours differs:

    - Masked tokens are replaced by a learned vector, as in SimMIM (Xie et al. 2022, arXiv:2111.09886), and not left
      out: a pruned or exported network, and one that mixes positions by a matrix, takes a fixed number of tokens.
      The encoder then sees mask tokens itself, and one decoder block is the default instead of four.
    - The teacher is a classifier and no masked autoencoder: it has never seen a mask, so it looks at the whole image,
      and what the student must say of a masked token is what the teacher saw there. The target is the teacher's last
      block and not that of a decoder, which it does not have.
    - Stage 2 has no distillation token: the deployed student classifies the mean of its tokens, and a second head
      would be thrown away, or paid for at every inference.
    """

    kind: Literal["g2sd"] = "g2sd"
    generic_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the epochs for stage 1, without labels; each stage has one at least."""
    teacher: Annotated[int, Field(ge=0)] = 0
    """Which of the panel teaches stage 1, from 0; the losses of stage 2 see them all."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of an image's tokens that the student does not see."""
    decoder_depth: Annotated[int, Field(ge=1, le=4)] = 1
    """Transformer blocks between student and target in stage 1."""
    decoder_width: Annotated[int, Field(ge=HEAD_WIDTH, le=1024, multiple_of=HEAD_WIDTH)] = 128
    """Width of these blocks."""
    beta: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Distance from which on the loss grows linearly, in standard deviations of a teacher's token."""

    needs_teachers: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="Generic to specific (G2SD)",
        paper="Huang et al. 2023, Generic-to-Specific Distillation of Masked Autoencoders, arXiv:2302.14771",
        summary="Research: a vision transformer first predicts the tokens its teacher has after the last block while "
        "three quarters of its own are masked, without labels, and then learns the task on the configured losses.",
        needs="Student and teacher that are networks of tokens, ours or timm's; no labels in the first stage; much "
        "data, as it is a pre-training.",
        cost="No more epochs than configured; those of the first stage run the teacher and a small decoder too. "
        "Nothing afterwards.",
        evidence="The paper's abstract reports that a ViT-S keeps 98.7 % of its ViT-B teacher's performance in "
        "classification, 98.1 % in detection and 99.3 % in segmentation. Measured on our data: see `measured`.",
    )

    def build(self) -> ProcedureFn:
        """Return the procedure."""
        return partial(g2sd, config=self)


@contextmanager
def _replaced(embedding: nn.Module, mask: Tensor | None, token: Tensor | None) -> Iterator[None]:
    """Put the token where the mask is set into what the module gives."""
    if mask is None or token is None:
        yield
        return

    def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(-1), token.to(output.dtype), output)

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the module gives while the block runs."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
