"""What can be chosen in a convolutional network, and what every combination costs.

Legend: O options of a choice. The choices of a network are numbered: first the widths, then the depth of each stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.edits import ResizeModule
from compression.errors import CompressionError
from compression.models import ModelSpec
from compression.search.space import Operator
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn

CostOf = Callable[[Sequence[Operator]], list[float]]
"""What each operator costs by itself: milliseconds or multiply-accumulates."""

ROUNDING = 1e-9
"""Share by which a sum of costs may be off."""


@dataclass(frozen=True)
class Block:
    """One block of the largest network."""

    out: int
    """Number of the choice of its output width."""
    inner: int | None
    """That of the width between its two convolutions; None in a plain network, where it is one convolution."""
    stride: int
    projected: bool
    """Whether the skip path of the largest network is a 1x1 convolution."""
    height: int
    """Of its output."""
    width: int


@dataclass(frozen=True)
class Plan:
    """The largest network, and what may be chosen in it."""

    base: ResidualCnn | PlainCnn
    in_channels: int
    num_classes: int
    size: tuple[int, int]
    """Height and width of the image after the stem."""
    widths: tuple[tuple[int, ...], ...]
    """For each width choice: channel counts, ascending, the full one last; choice 0 is the stem's."""
    depths: tuple[tuple[int, ...], ...]
    """For each stage: numbers of blocks, ascending, the full one last."""
    stages: tuple[tuple[Block, ...], ...]

    @property
    def options(self) -> tuple[tuple[int, ...], ...]:
        """Of all choices."""
        return (*self.widths, *self.depths)

    @property
    def sizes(self) -> list[int]:
        """How many options each choice has."""
        return [len(options) for options in self.options]


@dataclass(frozen=True)
class Placed:
    """One convolution of a derived network, batch norm included."""

    name: str
    """In the derived network."""
    shared: str
    """In the supernet."""
    inputs: int
    """Channels."""
    outputs: int
    option: int
    """Place of ``outputs`` among the options."""


def width_options(full: int, ratios: Sequence[float], round_to: int) -> tuple[int, ...]:
    """Shares of ``full`` channels as multiples of ``round_to``, at least that many, ascending; ``full`` is the last."""
    rounded = {max(round_to, round(full * ratio / round_to) * round_to) for ratio in ratios}
    return (*sorted(width for width in rounded if width < full), full)


def depth_options(full: int) -> tuple[int, ...]:
    """1, 3, 5, ... blocks, and ``full``."""
    return tuple(sorted({*range(1, full + 1, 2), full}))


def plan_of(
    base: ResidualCnn | PlainCnn,
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    ratios: Sequence[float],
    round_to: int,
) -> Plan:
    """What may be chosen in ``base``.

    A plain network has a width choice for every convolution. In a residual one the blocks of a stage share that of
    their outputs, because their skip paths add them up, and each has one more for its inside; a stage whose first
    skip path is an identity too shares that of the stage before.
    """
    in_channels, *image = input_shape
    widths: list[tuple[int, ...]] = []

    def choice(full: int) -> int:
        widths.append(width_options(full, ratios, round_to))
        return len(widths) - 1

    size = _shrunk((image[0], image[1]), base.stem_stride)
    stem_size = size
    before, channels = choice(base.stem_width), base.stem_width
    stages: list[tuple[Block, ...]] = []
    for width, depth, first_stride in zip(base.widths, base.depths, base.strides, strict=True):
        blocks: list[Block] = []
        for stride in (first_stride, *[1] * (depth - 1)):
            size = _shrunk(size, stride)
            projected, inner = False, None
            if isinstance(base, PlainCnn):
                out = choice(width)
            else:
                projected = stride != 1 or width != channels
                out = choice(width) if projected else before
                inner = choice(width)
            blocks.append(Block(out, inner, stride, projected, *size))
            before, channels = out, width
        stages.append(tuple(blocks))
    depths = tuple(depth_options(depth) for depth in base.depths)
    return Plan(base, in_channels, num_classes, stem_size, tuple(widths), depths, tuple(stages))


def _shrunk(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """After a convolution with an odd kernel and half of it as padding."""
    return -(-size[0] // stride), -(-size[1] // stride)


# --- cost


def macs_of(operators: Sequence[Operator]) -> list[float]:
    """Multiply-accumulates of each operator for one image; 0 of what is no product."""
    return [
        float(each.height * each.width * each.kernel**2 * each.in_channels // each.groups * each.out_channels)
        if each.kind in ("Conv", "Gemm")
        else 0.0
        for each in operators
    ]


def cost_tables(plan: Plan, cost_of: CostOf) -> list[Tensor]:
    """Costs float64 [O of the input, O of the output] of each part of the network, as shares of the largest network.

    The parts are, in this order: the stem; of each plain block its convolution; of each residual block the first
    convolution, the second, and the skip path with the addition; the classifier.

    Raises:
        CompressionError: a cost is no number, or below 0, or all are 0.
    """
    base = plan.base
    parts: list[list[list[list[Operator]]]] = []  # for each part, input and output option: its operators

    def conv(inputs: int, outputs: int, block: Block, *, kernel: int, stride: int = 1) -> Operator:
        return Operator("Conv", inputs, outputs, block.height, block.width, kernel, stride)

    height, width = plan.size
    stem = [
        [Operator("Conv", plan.in_channels, outputs, height, width, base.stem_kernel, base.stem_stride)]
        for outputs in plan.widths[0]
    ]
    parts.append([stem])
    before = plan.widths[0]
    for block in (block for blocks in plan.stages for block in blocks):
        out, stride = plan.widths[block.out], block.stride
        inner = out if block.inner is None else plan.widths[block.inner]
        parts.append([[[conv(i, o, block, kernel=base.kernel, stride=stride)] for o in inner] for i in before])
        if block.inner is not None:
            parts.append([[[conv(i, o, block, kernel=base.kernel)] for o in out] for i in inner])
            skips = []
            for i in before:
                for o in out:
                    skip = [conv(i, o, block, kernel=1, stride=stride)] if _is_projected(block, i, o) else []
                    skips.append([*skip, Operator("Add", o, o, block.height, block.width)])
            parts.append([skips[start : start + len(out)] for start in range(0, len(skips), len(out))])
        before = out
    parts.append([[[Operator("Gemm", i, plan.num_classes, 1, 1)]] for i in before])
    tables = _filled(parts, cost_of)
    whole = float(cost_of_choices(plan, tables, [count - 1 for count in plan.sizes]))
    return [table / whole for table in tables]


def _is_projected(block: Block, inputs: int, outputs: int) -> bool:
    """Whether a derived network of these widths has a 1x1 convolution in the skip path."""
    return block.projected and (block.stride != 1 or inputs != outputs)


def _filled(parts: list[list[list[list[Operator]]]], cost_of: CostOf) -> list[Tensor]:
    cells = [cell for part in parts for row in part for cell in row]
    costs = torch.tensor(cost_of([each for cell in cells for each in cell]), dtype=torch.float64)
    if not bool(torch.isfinite(costs).all()) or bool((costs < 0).any()) or not bool(costs.any()):
        raise CompressionError(
            f"Cost of operators has values from {float(costs.min())} to {float(costs.max())}, expected numbers of at "
            "least 0 and not all 0. Fit the latency model again, or count macs."
        )
    sums = iter([part.sum() for part in costs.split([len(cell) for cell in cells])])
    return [torch.stack([torch.stack([next(sums) for _ in row]) for row in part]) for part in parts]


def keep_probabilities(depth: Tensor, options: Sequence[int]) -> Tensor:
    """P(the stage has at least k blocks) for k = 1 .. the largest option; ``depth`` [O] are probabilities."""
    at_least = [
        sum((p for p, option in zip(depth, options, strict=True) if option >= k), depth.new_zeros(()))
        for k in range(1, options[-1] + 1)
    ]
    return torch.stack(at_least)


def expected_cost(plan: Plan, tables: Sequence[Tensor], choices: Sequence[Tensor]) -> Tensor:
    """The mean cost of a network whose choices are drawn independently, as a share of the largest network's.

    Args:
        plan: of the network.
        tables: of :func:`cost_tables`.
        choices: for each choice the probabilities float64 [O], differentiable; one 1 among 0 for a certain one.
    """
    widths, depths = choices[: len(plan.widths)], choices[len(plan.widths) :]
    one = tables[0].new_ones(1)
    parts: list[tuple[Tensor, Tensor, Tensor]] = [(one[0], one, widths[0])]  # (share, inputs, outputs)
    before = widths[0]
    for blocks, depth, options in zip(plan.stages, depths, plan.depths, strict=True):
        for share, block in zip(keep_probabilities(depth, options), blocks, strict=True):
            out = widths[block.out]
            if block.inner is None:
                parts.append((share, before, out))
            else:
                inner = widths[block.inner]
                parts += [(share, before, inner), (share, inner, out), (share, before, out)]
            before = out
        ends = [widths[blocks[option - 1].out] for option in options]
        before = torch.stack([p * end for p, end in zip(depth, ends, strict=True)]).sum(dim=0)
    parts.append((one[0], before, one))
    costs = [share * (left @ table @ right) for (share, left, right), table in zip(parts, tables, strict=True)]
    return torch.stack(costs).sum()


def cost_of_choices(plan: Plan, tables: Sequence[Tensor], chosen: Sequence[int]) -> float:
    """The cost of one network, by the place of each choice among its options, as a share of the largest network's."""
    certain = [
        torch.zeros(count, dtype=torch.float64).index_fill_(0, torch.tensor(place), 1.0)
        for count, place in zip(plan.sizes, chosen, strict=True)
    ]
    return float(expected_cost(plan, tables, certain))


def cost_loss(expected: Tensor, found: float, *, target: float, slack: float) -> Tensor:
    """log(expected) above the target, -log(expected) more than ``slack`` below it, else 0.

    Args:
        expected: cost of the choices as they are likely, a scalar above 0.
        found: cost of the likeliest network.
        target: the most it may cost.
        slack: how far below is near enough.
    """
    if on_target(found, target=target, slack=slack):
        return 0.0 * expected
    return expected.log() if found > target else -expected.log()


def on_target(found: float, *, target: float, slack: float) -> bool:
    """Whether a cost is at most ``target``, and at most ``slack`` below it."""
    return target - slack <= found <= target * (1 + ROUNDING)


def walk_down(
    chosen: Sequence[int], log_probabilities: Sequence[Tensor], cost: Callable[[Sequence[int]], float], target: float
) -> list[int]:
    """``chosen``, with one option after the other exchanged for the next smaller one until the target is met.

    Next comes the exchange that loses least log-probability among those that lower the cost, else among all. Those
    that were not needed in the end, the last one first, are taken back.

    Raises:
        CompressionError: the smallest network costs more.
    """
    limit = target * (1 + ROUNDING)
    places, exchanged = list(chosen), list[int]()
    while (now := cost(places)) > limit:
        moves: list[tuple[bool, float, int]] = []
        for row, place in enumerate(places):
            if place:
                smaller = [*places[:row], place - 1, *places[row + 1 :]]
                loss = float(log_probabilities[row][place] - log_probabilities[row][place - 1])
                moves.append((cost(smaller) >= now, loss, row))
        if not moves:
            raise CompressionError(
                f"Target has {target:g} of the cost of the largest network, expected at least {now:.3g}, the cost of "
                "the smallest one. Raise the target, or allow smaller ratios."
            )
        exchanged.append(min(moves)[2])
        places[exchanged[-1]] -= 1
    for row in reversed(exchanged):
        larger = [*places[:row], places[row] + 1, *places[row + 1 :]]
        if cost(larger) <= limit:
            places = larger
    return places


# --- the derived network


def convolutions(plan: Plan, chosen: Sequence[int]) -> list[Placed]:
    """The convolutions of the network that was chosen, input first."""
    widths = [options[place] for options, place in zip(plan.widths, chosen, strict=False)]
    found = [Placed("stem", "stem", plan.in_channels, widths[0], chosen[0])]
    before, number = widths[0], 0
    for stage, (blocks, depth) in enumerate(zip(plan.stages, _depths(plan, chosen), strict=True)):
        for place, block in enumerate(blocks[:depth]):
            name, shared, out = f"blocks.{number}", f"stages.{stage}.{place}", block.out
            if block.inner is None:
                found.append(Placed(name, f"{shared}.first", before, widths[out], chosen[out]))
            else:
                inner = block.inner
                found += [
                    Placed(f"{name}.first", f"{shared}.first", before, widths[inner], chosen[inner]),
                    Placed(f"{name}.second", f"{shared}.second", widths[inner], widths[out], chosen[out]),
                ]
                if _is_projected(block, before, widths[out]):
                    found.append(Placed(f"{name}.shortcut", f"{shared}.shortcut", before, widths[out], chosen[out]))
            before, number = widths[out], number + 1
    return found


def derived_spec(plan: Plan, chosen: Sequence[int], template: ModelSpec) -> ModelSpec:
    """The network that was chosen: stage widths and depths in the zoo's config, all other widths as edits."""
    depths = _depths(plan, chosen)
    last = [blocks[depth - 1].out for blocks, depth in zip(plan.stages, depths, strict=True)]
    changes = {
        "stem_width": plan.widths[0][chosen[0]],
        "widths": tuple(plan.widths[out][chosen[out]] for out in last),
        "depths": depths,
    }
    model = type(plan.base).model_validate(plan.base.model_dump() | changes)
    with torch.device("meta"):
        built = model.build(template.num_classes, template.input_shape)
    edits: list[ResizeModule] = []
    for each in convolutions(plan, chosen):
        outputs, inputs = built.get_submodule(f"{each.name}.0").get_parameter("weight").shape[:2]
        if (inputs, outputs) != (each.inputs, each.outputs):
            edits.append(
                ResizeModule(module=f"{each.name}.0", in_features=each.inputs, out_features=each.outputs, groups=1)
            )
        if outputs != each.outputs:
            edits.append(ResizeModule(module=f"{each.name}.1", in_features=each.outputs, out_features=each.outputs))
    return template.model_copy(update={"model": model, "edits": tuple(edits)})


def _depths(plan: Plan, chosen: Sequence[int]) -> tuple[int, ...]:
    places = chosen[len(plan.widths) :]
    return tuple(options[place] for options, place in zip(plan.depths, places, strict=True))
