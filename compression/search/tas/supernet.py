"""The network that holds all widths and depths at once, and what trains its choices.

Legend: B batch, O options of a choice.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.search.tas.plan import Block, Placed, Plan, cost_loss, cost_of_choices, expected_cost, on_target

LEAST = 1e-20
"""Probability below which an option still can be drawn as the second."""

Mix = Sequence[tuple[int, Tensor | float]]
"""Options of a width choice that are run, and how much each counts; the weights sum to 1."""


@lru_cache(maxsize=256)
def _bins(channels: int, width: int, device: torch.device) -> Tensor:
    """Row i averages the channels floor(i c / w) to ceil((i + 1) c / w): float32 [width, channels, 1, 1]."""
    place = torch.arange(width).unsqueeze(1)
    start, end = place * channels // width, -(-(place + 1) * channels // width)
    column = torch.arange(channels)
    inside = ((column >= start) & (column < end)).float()
    return (inside / inside.sum(dim=1, keepdim=True))[:, :, None, None].to(device)


def interpolate_channels(images: Tensor, width: int) -> Tensor:
    """Images [B,C,H,W] with ``width`` channels: the mean over adaptive bins of channels (CWI)."""
    channels = images.shape[1]
    return images if channels == width else F.conv2d(images, _bins(channels, width, images.device).to(images.dtype))


def gumbel(count: int) -> Tensor:
    """Noise float32 [count], drawn on the CPU so that devices draw alike."""
    return -(-torch.rand(count).clamp(min=1e-20, max=1 - 1e-7).log()).log()


def sample_two(logits: Tensor, noise: Tensor, tau: float) -> tuple[list[int], Tensor]:
    """Two different options [2], drawn by their noisy probabilities, and their weights [2], which sum to 1.

    The gradient reaches ``logits`` through the weights alone. A single option comes alone, with weight 1.

    Args:
        logits: [O].
        noise: of :func:`gumbel` [O].
        tau: temperature; near 0 the likelier of the two takes all.
    """
    noisy = (logits.log_softmax(dim=0) + noise) / tau
    drawn = noisy.detach().softmax(dim=0).clamp(min=LEAST).cpu().multinomial(min(2, len(logits)))
    return drawn.tolist(), noisy[drawn.to(noisy.device)].softmax(dim=0)


class SharedConv(nn.Module):
    """One kernel for all widths of input and output, and a batch norm for each width of the output."""

    def __init__(self, inputs: int, options: Sequence[int], *, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, options[-1], kernel, stride, kernel // 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in options)
        self.options = tuple(options)

    def forward(self, images: Tensor, mix: Mix) -> Tensor:
        """[B,c,H,W] of any width c -> the weighted sum of the options in ``mix``, as wide as the widest of them.

        Only the part of the kernel that counts is run: inputs padded with zeros and a full-width output that is cut
        would give the same.
        """
        widest = max(self.options[option] for option, _ in mix)
        kernel = self.conv.weight[:widest, : images.shape[1]]
        whole = F.conv2d(images, kernel, stride=self.conv.stride, padding=self.conv.padding)
        return _blend([(self.norms[option](whole[:, : self.options[option]]), weight) for option, weight in mix])


def _blend(parts: Sequence[tuple[Tensor, Tensor | float]]) -> Tensor:
    """The weighted sum of images of different widths, as wide as the widest."""
    widest = max(images.shape[1] for images, _ in parts)
    first, *others = [weight * interpolate_channels(images, widest) for images, weight in parts]
    return sum(others, first)


class SharedBlock(nn.Module):
    """A block of the supernet: one convolution, or two with a skip path."""

    def __init__(self, plan: Plan, block: Block, inputs: int) -> None:
        super().__init__()
        self.block = block
        out = plan.widths[block.out]
        inner = out if block.inner is None else plan.widths[block.inner]
        kernel, stride = plan.base.kernel, block.stride
        self.first = SharedConv(inputs, inner, kernel=kernel, stride=stride)
        self.second = None if block.inner is None else SharedConv(inner[-1], out, kernel=kernel)
        self.shortcut = SharedConv(inputs, out, kernel=1, stride=stride) if block.projected else None

    def forward(self, images: Tensor, mixes: Sequence[Mix]) -> Tensor:
        """[B,c,H,W] -> [B,c',H',W'] for the mixes of all width choices."""
        block, out = self.block, mixes[self.block.out]
        if block.inner is None or self.second is None:
            return F.relu(self.first(images, out))
        found = self.second(F.relu(self.first(images, mixes[block.inner])), out)
        skip = images if self.shortcut is None or self._skips(images, found) else self.shortcut(images, out)
        return F.relu(found + skip)

    def _skips(self, images: Tensor, found: Tensor) -> bool:
        """Whether the derived network passes its input on: the zoo adds a projection only where shapes differ."""
        return not self.training and images.shape == found.shape


class Supernet(nn.Module):
    """All networks of a plan in shared weights; training mode runs a random mixture, inference mode the likeliest."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.tau = 1.0
        """Temperature of the draws."""
        self.choices = nn.Parameter(0.01 * torch.randn(sum(plan.sizes)))
        """Logits of all options of all choices, one after the other."""
        base = plan.base
        self.stem = SharedConv(plan.in_channels, plan.widths[0], kernel=base.stem_kernel, stride=base.stem_stride)
        before = base.stem_width
        self.stages = nn.ModuleList()
        for width, blocks in zip(base.widths, plan.stages, strict=True):
            stage = nn.ModuleList()
            for block in blocks:
                stage.append(SharedBlock(plan, block, before))
                before = width
            self.stages.append(stage)
        self.head = nn.Linear(before, plan.num_classes)

    def rows(self) -> list[Tensor]:
        """The logits [O] of each choice."""
        return list(self.choices.split(self.plan.sizes))

    def likeliest(self) -> list[int]:
        """Place of the likeliest option of each choice."""
        return [int(row.argmax()) for row in self.choices.detach().cpu().split(self.plan.sizes)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B,classes] of images [B,C,H,W]."""
        count = len(self.plan.widths)
        if self.training:
            noise = gumbel(len(self.choices)).to(self.choices.device).split(self.plan.sizes)
            rows = list(zip(self.rows(), noise, strict=True))
            drawn = [sample_two(row, each, self.tau) for row, each in rows[:count]]
            mixes: list[Mix] = [list(zip(options, weights, strict=True)) for options, weights in drawn]
            ends: list[Mix] = [
                list(enumerate(((row.log_softmax(dim=0) + each) / self.tau).softmax(dim=0)))
                for row, each in rows[count:]
            ]
        else:
            certain: list[Mix] = [[(place, 1.0)] for place in self.likeliest()]
            mixes, ends = certain[:count], certain[count:]
        found = F.relu(self.stem(images, mixes[0]))
        for stage, depths, end in zip(self.stages, self.plan.depths, ends, strict=True):
            found = self._through(stage, found, mixes, [(depths[place], weight) for place, weight in end])
        pooled = found.mean((2, 3))
        return self.head(F.pad(pooled, (0, self.head.in_features - pooled.shape[1])))

    @staticmethod
    def _through(stage: nn.Module, images: Tensor, mixes: Sequence[Mix], end: Mix) -> Tensor:
        """The weighted sum of what the stage gives after each number of blocks in ``end``."""
        outputs: list[Tensor] = []
        for block in list(stage.children())[: max(depth for depth, _ in end)]:
            images = block(images, mixes)
            outputs.append(images)
        return _blend([(outputs[depth - 1], weight) for depth, weight in end])


def hand_down(supernet: Supernet, model: nn.Module, parts: Sequence[Placed]) -> None:
    """Copy what the derived ``model`` has in common with the supernet into it: cut kernels and their batch norms."""
    with torch.no_grad():
        for part in parts:
            shared = supernet.get_submodule(part.shared)
            weight = shared.get_parameter("conv.weight")
            model.get_parameter(f"{part.name}.0.weight").copy_(weight[: part.outputs, : part.inputs])
            norm = shared.get_submodule(f"norms.{part.option}")
            model.get_submodule(f"{part.name}.1").load_state_dict(norm.state_dict())
        head = model.get_parameter("head.weight")
        head.copy_(supernet.head.weight[:, : head.shape[1]])
        model.get_parameter("head.bias").copy_(supernet.head.bias)


class Architect(nn.Module):
    """Trains the choices of a supernet by Adam; its state lives in buffers, so that step checkpoints have it."""

    def __init__(
        self,
        plan: Plan,
        tables: Sequence[Tensor],
        *,
        target: float,
        tolerance: float,
        cost_weight: float,
        rate: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.plan, self.tables = plan, tables
        self.target, self.tolerance, self.cost_weight = target, tolerance, cost_weight
        self.rate, self.weight_decay = rate, weight_decay
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))  # steps
        for name in ("exp_avg", "exp_avg_sq", "kept"):
            self.register_buffer(name, torch.zeros(sum(plan.sizes)))
        self.register_buffer("found", torch.tensor(False))  # whether any choices were kept

    def learn(self, supernet: Supernet, loss: Tensor) -> None:
        """One step down the gradient of ``loss`` and cost; choices that are on target before it are kept."""
        probabilities = [row.cpu().double().softmax(dim=0) for row in supernet.rows()]
        expected = expected_cost(self.plan, self.tables, probabilities)
        cost = cost_loss(expected, self.look(supernet), target=self.target, slack=self.tolerance)
        parameter, taken = supernet.choices, self.get_buffer("taken")
        (gradient,) = torch.autograd.grad(loss + self.cost_weight * cost.to(loss), [parameter])
        optimizer = torch.optim.Adam([parameter], lr=self.rate, betas=(0.5, 0.999), weight_decay=self.weight_decay)
        moments = {name: self.get_buffer(name) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(taken)), **moments}
        parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.add_(1)

    def look(self, supernet: Supernet) -> float:
        """The cost of the likeliest network; if it is on target, the choices are kept in place of earlier ones."""
        found = cost_of_choices(self.plan, self.tables, supernet.likeliest())
        if on_target(found, target=self.target, slack=self.tolerance):
            self.get_buffer("kept").copy_(supernet.choices.detach())
            self.get_buffer("found").fill_(True)
        return found

    def settle(self, supernet: Supernet) -> None:
        """Give the supernet the last choices on target, if there were any."""
        self.look(supernet)
        if bool(self.get_buffer("found")):
            with torch.no_grad():
                supernet.choices.copy_(self.get_buffer("kept"))
