"""A smaller network as part of a larger one of its family: leading channels, and the first blocks of each stage."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from compression.zoo.depthwise_cnn import DepthwiseCnn
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn
from compression.zoo.vision_transformer import VisionTransformer

Cnn = ResidualCnn | PlainCnn | DepthwiseCnn
Family = Cnn | VisionTransformer
QKV = "attn.qkv."


def leading(tensor: Tensor, shape: Sequence[int], *, parts: int = 1) -> Tensor:
    """The leading part of ``tensor`` that has ``shape``; gradients reach that part alone.

    With ``parts`` the first dimension is that many stacked tensors (queries, keys and values), and the leading rows of
    each are taken.
    """
    if parts > 1:
        rows = (parts, shape[0] // parts, *shape[1:])
        return leading(tensor.unflatten(0, (parts, -1)), rows).flatten(0, 1)
    return tensor[tuple(slice(size) for size in shape)]


def block_roles(config: Family) -> list[tuple[int, int, str]]:
    """(stage, place in the stage, what it is) of each child of a network's ``blocks``, in order."""
    if isinstance(config, VisionTransformer):
        return [(0, index, "block") for index in range(config.depth)]
    roles: list[tuple[int, int, str]] = []
    plan = iter(config.block_plan())
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            before, after, stride = next(plan)
            if isinstance(config, DepthwiseCnn) and (stride != 1 or before != after):
                roles.append((stage, index, "entry"))
            roles.append((stage, index, "block"))
    return roles


def borrowed(
    shapes: Mapping[str, Sequence[int]],
    small: Family,
    tensors: Mapping[str, Tensor],
    large: Family,
) -> dict[str, Tensor]:
    """What a network of ``small`` takes from the tensors of a ``large`` one, by its own names.

    Blocks are matched by stage and place. Left out is what the large one lacks or holds in a smaller size.
    """
    number_of = {role: number for number, role in enumerate(block_roles(large))}
    roles = block_roles(small)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        source: str | None = name
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            theirs = number_of.get(roles[int(number)])
            source = None if theirs is None else f"blocks.{theirs}.{rest}"
        tensor = None if source is None else tensors.get(source)
        if tensor is None or tensor.ndim != len(shape):
            continue
        if all(have >= want for have, want in zip(tensor.shape, shape, strict=True)):
            found[name] = leading(tensor, shape, parts=3 if QKV in name else 1)
    return found
