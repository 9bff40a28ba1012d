"""Small vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929): mean-pooled, convolutional stem.

Blocks may drop the tokens that matter least (Jiang et al. 2025, EET, arXiv:2504.16691).

B batch, N tokens, D width, H heads, K tokens kept.
"""

from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression.errors import ShapeError
from compression.zoo.token_mixer import TokenMixer
from compression.zoo.tokens import Tokens


class VisionTransformer(TokenMixer):
    """Tokens, learned positions, pre-norm attention blocks, mean over tokens, linear head."""

    kind: Literal["vision_transformer"] = "vision_transformer"
    num_heads: PositiveInt = 4
    """Attention heads; they share ``width`` evenly."""
    keep_tokens: tuple[PositiveInt, ...] = ()
    """How many tokens are left after each block, one number a block, never more than before; empty keeps all."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width has {self.width}, expected a multiple of num_heads {self.num_heads}. "
                f"Use {self.width - self.width % self.num_heads or self.num_heads}."
            )
        return self

    @model_validator(mode="after")
    def _one_count_a_block(self) -> Self:
        counts = self.keep_tokens
        if counts and len(counts) != self.depth:
            raise ValueError(
                f"keep_tokens has {len(counts)} numbers, expected {self.depth}, one for each block. Give one a block, "
                "or none."
            )
        if any(after > before for before, after in pairwise(counts)):
            raise ValueError(
                f"keep_tokens has {', '.join(map(str, counts))}, expected no number above the one before it. Tokens "
                "that were dropped do not come back."
            )
        return self

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes].

        Raises:
            ShapeError: a block is to keep more tokens than the image has.
        """
        return TransformerNet(self, num_classes, input_shape)


class Attention(nn.Module):
    """Multi-head self-attention; [B,N,D] -> [B,N,D].

    ``num_heads``, ``head_dim`` and ``fused_attn`` carry the names timm gives them, so that pruning treats
    both alike. ``fused_attn = False`` spells the same function out in products a dependency graph can follow.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.fused_attn = True
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._heads(x)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = self._weights(query, key) @ value
        return self._joined(mixed)

    def scored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same output, spelt out, and the score of every token [B,N]; see :func:`token_scores`."""
        query, key, value = self._heads(x)
        weights = self._weights(query, key)
        mixed = weights @ value
        return self._joined(mixed), token_scores(weights, mixed)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [B,H,N,D/H] each."""
        batch, num_tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        return ((query * self.head_dim**-0.5) @ key.transpose(-2, -1)).softmax(dim=-1)

    def _joined(self, mixed: Tensor) -> Tensor:
        batch, _, num_tokens, _ = mixed.shape
        return self.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, self.num_heads * self.head_dim))


def token_scores(weights: Tensor, mixed: Tensor) -> Tensor:
    """How much each token matters, float32 [B,N]: ``S_j = sum_h A_hj n_hj``.

    After Jiang et al. 2025 (EET, arXiv:2504.16691). There ``A_hj`` is the row of the class token; here, where tokens
    are averaged and there is none, it is the attention token j receives in head h, mean over all queries. ``n_hj`` is
    the share of head h in the norms of what attention gives token j; with equal norms S is the mean over heads of A.

    Args:
        weights: attention after the softmax, [B,H,N,N], queries first.
        mixed: values so weighted, [B,H,N,D/H].
    """
    received = weights.float().mean(dim=2)
    norms = mixed.float().norm(dim=-1)
    return (received * (norms / norms.sum(dim=1, keepdim=True).clamp_min(1e-12))).sum(dim=1)


def kept_tokens(x: Tensor, scores: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of [B,N,D] with the highest scores [B,N], in the order they had; [B,count,D]."""
    kept = scores.topk(count, dim=1).indices.sort(dim=1).values
    return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]))


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each on a normalised copy that is added back; [B,N,D] -> [B,N,D], or [B,K,D].

    ``keep_tokens`` is how many tokens leave the block, 0 for all: chosen by the attention inside it, dropped after it.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, *, keep_tokens: int = 0) -> None:
        super().__init__()
        self.keep_tokens = keep_tokens
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.keep_tokens:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        attended, scores = self.attn.scored(self.norm1(x))
        # The MLP looks at each token alone: what is dropped does not need it.
        x = kept_tokens(x + attended, scores, self.keep_tokens)
        return x + self.mlp(self.norm2(x))


class TransformerNet(nn.Module):
    """The module behind :class:`VisionTransformer`."""

    def __init__(self, config: VisionTransformer, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        width = config.width
        self.tokens = Tokens(
            input_shape, width, patch_size=config.patch_size, stem=config.stem, stem_width=config.stem_width
        )
        self.positions = nn.Parameter(torch.randn(1, self.tokens.num_tokens, width) * 0.02)
        hidden = round(width * config.mlp_ratio)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(width, config.num_heads, hidden, keep_tokens=count)
                for count in _drops(config, self.tokens.num_tokens)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.tokens(images) + self.positions)
        return self.head(self.norm(x).mean(1))


def _drops(config: VisionTransformer, num_tokens: int) -> list[int]:
    """For each block how many tokens it keeps, 0 where it keeps all it gets."""
    counts = [num_tokens, *(config.keep_tokens or (num_tokens,) * config.depth)]
    if counts[1] > num_tokens:
        raise ShapeError(
            f"Model 'vision_transformer' has keep_tokens {counts[1]} for an image of {num_tokens} tokens, expected at "
            f"most {num_tokens}. Lower keep_tokens, or patch_size."
        )
    return [0 if after == before else after for before, after in pairwise(counts)]
