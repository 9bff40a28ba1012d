"""Small vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929): mean-pooled, convolutional stem.

B batch, N tokens, D width.
"""

from typing import Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression.zoo.token_mixer import TokenMixer
from compression.zoo.tokens import Tokens


class VisionTransformer(TokenMixer):
    """Tokens, learned positions, pre-norm attention blocks, mean over tokens, linear head."""

    kind: Literal["vision_transformer"] = "vision_transformer"
    num_heads: PositiveInt = 4
    """Attention heads; they share ``width`` evenly."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width has {self.width}, expected a multiple of num_heads {self.num_heads}. "
                f"Use {self.width - self.width % self.num_heads or self.num_heads}."
            )
        return self

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes]."""
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
        batch, num_tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
            mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, self.num_heads * self.head_dim))


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each on a normalised copy that is added back."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
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
        self.blocks = nn.Sequential(*(TransformerBlock(width, config.num_heads, hidden) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.tokens(images) + self.positions)
        return self.head(self.norm(x).mean(1))
