"""Token pruning: a vision transformer that goes on with the tokens that matter most.

After Jiang et al. 2025, EET: "Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval"
(arXiv:2504.16691). The scores and the forward pass are in ``compression/zoo/vision_transformer.py``.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import nn

from compression.card import MethodCard
from compression.errors import CompressionError
from compression.models import ModelSpec, build_model
from compression.search.space import Choices, Genes, Space, Workshop
from compression.zoo.vision_transformer import VisionTransformer

Keep = Annotated[float, Field(gt=0.0, le=1.0)]
Points = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class Tokens(Space):
    """One vision transformer of the zoo that drops tokens on the way, with all weights it had.

    After the block of each pruning point the share ``keep`` of its tokens goes on, those with the highest scores
    ``S_j = sum_h A_hj n_hj``: the attention a token receives, weighted by how much of what attention gives it comes
    from each head. How many go on is fixed when the network is built, so that exported graphs have fixed shapes.

    Ours beyond the paper: our transformers have no class token and average all tokens, so that ``A_hj`` is the
    attention token j receives in head h, mean over all queries, where the paper takes the class token's row; tokens are
    dropped between attention and MLP of the block, which looks at each token alone, so that nothing but time changes;
    and the shares are chosen by the search, where the paper keeps 98, 49 and 12 of 196 tokens. The paper's training
    (hash codes, a teacher trained beside, images with the teacher's most attended patches masked) is left out: the
    recipe's distillation takes its place.
    """

    kind: Literal["tokens"] = "tokens"
    parent: str = Field(min_length=1)
    """Name of the teacher whose tokens are pruned: a ``vision_transformer`` of the zoo."""
    keeps: tuple[Keep, ...] = Field(default=(0.5, 0.7, 0.85), min_length=1)
    """Shares of the tokens that go on after each pruning point, each a choice of the search; 1 keeps all."""
    points: tuple[Points, ...] = ()
    """Sets of blocks, from 0, after which tokens are dropped, each a choice of the search; empty for one set, the first
    and the last block of the middle third."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Token pruning (EET)",
        paper="Jiang et al. 2025, Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval, "
        "arXiv:2504.16691",
        summary="Lets a vision transformer go on with the tokens that receive most attention, a fixed number after "
        "each of a few blocks; all weights stay.",
        needs="A trained vision_transformer of the zoo with two blocks at least. Losses that compare feature maps need "
        "token counts that make a square, or as many in student and teacher.",
        cost="Nothing before training.",
        evidence="For image retrieval the paper reports 42.7 % less latency of ViT-Small. Measured on Fashion-MNIST: "
        "with a quarter of the tokens 0.6 points below three quarters of them, at 0.62 of their latency.",
    )

    @field_validator("keeps")
    @classmethod
    def _ascending(cls, keeps: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(keeps)))

    @field_validator("points")
    @classmethod
    def _each_once(cls, points: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(dict.fromkeys(tuple(sorted(set(chosen))) for chosen in points))

    @property
    def label(self) -> str:
        return f"tokens-{self.parent}"

    def genes(self, shop: Workshop) -> Genes:
        parent, spec = shop.parent(self.parent)
        config = self._transformer(spec)
        points = self.points or (middle_points(config.depth),)
        for chosen in points:
            self._check(chosen, parent, config)
        return {"keep": self.keeps, "points": tuple("-".join(map(str, chosen)) for chosen in points)}

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        parent, spec = shop.parent(self.parent)
        config = self._transformer(spec)
        try:
            points = tuple(int(word) for word in str(choices["points"]).split("-"))
        except ValueError as error:
            raise CompressionError(
                f"Candidate of '{self.label}' has points '{choices['points']}', expected numbers of blocks, say 1-3. "
                "Correct them."
            ) from error
        self._check(points, parent, config)
        counts = tokens_after(config, _num_tokens(parent), points, float(choices["keep"]))
        smaller = spec.model_copy(
            update={"model": VisionTransformer.model_validate(config.model_dump() | {"keep_tokens": counts})}
        )
        with torch.random.fork_rng(devices=[]):
            model = build_model(smaller)
        model.load_state_dict(parent.state_dict())
        return model.to(next(parent.parameters()).device).eval().requires_grad_(True), smaller

    def _transformer(self, spec: ModelSpec) -> VisionTransformer:
        if not isinstance(spec.model, VisionTransformer):
            raise CompressionError(
                f"Parent '{self.parent}' has a model of kind '{spec.model.kind}', expected 'vision_transformer', whose "
                "blocks can drop tokens. Name another teacher."
            )
        if spec.model.depth < 2:
            raise CompressionError(
                f"Parent '{self.parent}' has {spec.model.depth} block, expected two at least, since tokens dropped "
                "after the last one save no time. Name a deeper teacher."
            )
        return spec.model

    def _check(self, points: Sequence[int], parent: nn.Module, config: VisionTransformer) -> None:
        """Refuse points at blocks that are not there, were left out, or are the last."""
        blocks = cast("nn.Sequential", parent.get_submodule("blocks"))
        for point in points:
            if not 0 <= point < config.depth - 1:
                raise CompressionError(
                    f"Space '{self.label}' has point {point}, expected blocks from 0 to {config.depth - 2} of the "
                    f"{config.depth} of parent '{self.parent}', since dropping tokens after the last one saves no "
                    "time. Correct points."
                )
            if isinstance(blocks[point], nn.Identity):
                raise CompressionError(
                    f"Space '{self.label}' has point {point}, a block that was left out of parent '{self.parent}', "
                    "expected one that computes attention. Name other blocks in points."
                )


def middle_points(depth: int) -> tuple[int, ...]:
    """The first and the last block of the middle third of ``depth`` blocks."""
    first = depth // 3
    return tuple(sorted({first, max(first, 2 * depth // 3 - 1)}))


def tokens_after(config: VisionTransformer, num_tokens: int, points: Sequence[int], keep: float) -> tuple[int, ...]:
    """How many tokens are left after each block when the share ``keep``, 1 token at least, goes on at each point.

    Counts of ``config`` are an upper bound; empty when all tokens stay.
    """
    counts = [num_tokens]
    for block in range(config.depth):
        count = min(counts[-1], config.keep_tokens[block] if config.keep_tokens else num_tokens)
        counts.append(max(1, round(keep * count)) if block in points else count)
    return tuple(counts[1:]) if any(after != before for before, after in pairwise(counts)) else ()


def _num_tokens(parent: nn.Module) -> int:
    return cast("int", parent.get_submodule("tokens").num_tokens)
