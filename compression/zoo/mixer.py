"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601) with the transformer's stem; matrix products only.

B batch, N tokens, D width.
"""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from compression.zoo.token_mixer import TokenMixer
from compression.zoo.tokens import Tokens


class Mixer(TokenMixer):
    """Tokens, blocks that mix first over positions and then over channels, mean over tokens, linear head."""

    kind: Literal["mixer"] = "mixer"
    token_hidden: PositiveInt = 64
    """Width inside the MLP over positions."""

    def build(self, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A randomly initialised network for images [B,C,H,W]; logits [B,num_classes]."""
        return MixerNet(self, num_classes, input_shape)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MixerBlock(nn.Module):
    """[B,N,D] -> [B,N,D]: an MLP over N, then an MLP over D, each added back."""

    def __init__(self, num_tokens: int, width: int, *, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.over_tokens = _mlp(num_tokens, token_hidden)
        self.norm2 = nn.LayerNorm(width)
        self.over_channels = _mlp(width, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class MixerNet(nn.Module):
    """The module behind :class:`Mixer`."""

    def __init__(self, config: Mixer, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        width = config.width
        self.tokens = Tokens(
            input_shape, width, patch_size=config.patch_size, stem=config.stem, stem_width=config.stem_width
        )
        hidden = round(width * config.mlp_ratio)
        self.blocks = nn.Sequential(
            *(
                MixerBlock(self.tokens.num_tokens, width, token_hidden=config.token_hidden, channel_hidden=hidden)
                for _ in range(config.depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(images))).mean(1))
