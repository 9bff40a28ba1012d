"""m2mKD: module by module, inside a small frozen network that both teacher and student fit into.

Legend: B batch, C classes, L modules; T_l, S_l and m_l are the l-th module of teacher, student and meta model, and
boundary l is the output of module l. With y the labels and w the weight of the teacher's module:

    meta model     m_L ... m_1, trained on CE, then frozen
    t              = m_L ... m_(l+1) T_l m_(l-1) ... m_1 (images), with a copy of T_l trained there on CE(t, y)
    s              = m_L ... m_(l+1) out_l S_l in_l m_(l-1) ... m_1 (images)
    module l       (1 - w) CE(s, y) + w temperature^2 KL(softmax(t / temperature) || softmax(s / temperature))
    the whole      the configured losses on S_L ... S_1

in_l and out_l are stitch layers between the student's boundaries and the meta model's, which are the teacher's.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.losses.kd import kd
from compression.distill.procedures.training import ProcedureFn, Training, joined
from compression.distill.types import widened
from compression.errors import CompressionError, ShapeError
from compression.features import frozen, image_of, tokens_of
from compression.train import History, StepFn
from compression.types import Batch, Frozen, Outputs, TeacherOutputs
from compression.zoo.convolution import conv_bn_relu

Shape = tuple[int, ...]
"""Of a boundary, without the batch: (D,H,W) of an image, (N,D) of tokens."""

# ---------------------------------------------------------------- cutting a network


class _Whole(nn.Module):
    """A network whose forward pass takes images alone, so that its other arguments are their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class _Outline(fx.Tracer):
    """Follows the forward pass of the network itself and of its sequences, and looks no deeper."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        depth = module_qualified_name.count(".")
        return depth > 1 or (depth == 1 and not isinstance(m, nn.Sequential))


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.shapes[n] = tuple(value.shape) if isinstance(value, Tensor) else ()
        return value


class _Chain:
    """The forward pass of a network as a list of operations, and where it can be cut."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.root = _Whole(model)
        try:
            self.graph = _Outline().trace(self.root)
            runner = _Shapes(fx.GraphModule(self.root, self.graph))
            with frozen(model), torch.no_grad():
                runner.run(images)
        except Exception as error:  # whatever the tracer trips over, it means the same to the caller
            raise CompressionError(
                f"Model '{type(model).__name__}' has a forward pass that cannot be followed ({error!r}), expected a "
                "chain of modules. Use another procedure."
            ) from error
        self.nodes, self.shapes = list(self.graph.nodes), runner.shapes
        self.ends, self.by_size = self._ends()

    def _ends(self) -> tuple[list[fx.Node], bool]:
        """Nodes after which a module may end, but the last of all; and whether the resolution changes after each."""
        cuts = self._cuts()
        images = [node for node in cuts if len(self.shapes[node]) == 4]
        by_size = [a for a, b in pairwise(images) if self.shapes[a][2:] != self.shapes[b][2:]]
        blocks = [node for node in cuts if self._is_block(node)][:-1]
        learns = [self._learns(node) for node in self.nodes]
        kept, start = [], 0
        for node in by_size or blocks:
            end = self.nodes.index(node) + 1
            if any(learns[start:end]) and any(learns[end:]):
                kept.append(node)
                start = end
        return kept, bool(by_size)

    def _cuts(self) -> list[fx.Node]:
        """Nodes with more than one position whose value alone is all that the rest of the forward pass needs."""
        place = {node: number for number, node in enumerate(self.nodes)}
        found: list[fx.Node] = []
        reach = -1  # the last use of a value made before the node at hand
        for number, node in enumerate(self.nodes):
            alone = reach <= number
            reach = max([reach, *(place[user] for user in node.users)])
            shape = self.shapes[node]
            positions = math.prod(shape[2:]) if len(shape) == 4 else shape[1] if len(shape) == 3 else 0
            if alone and positions > 1 and node.op != "placeholder":
                found.append(node)
        return found

    def _is_block(self, node: fx.Node) -> bool:
        """Whether the node is a numbered module made of others, as the blocks of a transformer are."""
        target = str(node.target)
        if node.op != "call_module" or not target.rpartition(".")[2].isdigit():
            return False
        return any(True for _ in self.root.get_submodule(target).children())

    def _learns(self, node: fx.Node) -> bool:
        """Whether the node is a module with weights."""
        if node.op != "call_module":
            return False
        return any(True for _ in self.root.get_submodule(str(node.target)).parameters())

    def cut(self, count: int) -> list[nn.Module]:
        """``count`` modules in order; late changes of resolution come first, blocks are shared out evenly."""
        wanted, blocks = count - 1, len(self.ends) + 1
        if self.by_size:
            chosen = self.ends[len(self.ends) - wanted :]
        else:
            chosen = [self.ends[(number + 1) * blocks // count - 1] for number in range(wanted)]
        output = self.nodes[-1].args[0]
        parts: list[nn.Module] = []
        start: fx.Node | None = None
        for end in (*chosen, output):
            assert isinstance(end, fx.Node)
            parts.append(self._between(start, end))
            start = end
        return parts

    def _between(self, start: fx.Node | None, end: fx.Node) -> nn.Module:
        """What the forward pass does after ``start`` up to ``end``; it shares the network's modules."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        first = 0
        if start is not None:
            copies[start] = graph.placeholder("values")
            first = self.nodes.index(start) + 1
        for node in self.nodes[first : self.nodes.index(end) + 1]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[end])
        return fx.GraphModule(self.root, graph)


def most_segments(model: nn.Module, images: Tensor) -> int:
    """Return into how many modules :func:`segments` can cut the network.

    Raises:
        CompressionError: its forward pass cannot be followed.
    """
    return len(_Chain(model, images).ends) + 1


def segments(model: nn.Module, images: Tensor, count: int) -> list[nn.Module]:
    """Return ``count`` modules that give the network's forward pass one after another and share its weights.

    Cut is where one value is all that the rest of the network needs: a convolutional network before the last
    ``count - 1`` changes of resolution, one of a single resolution (tokens) between its blocks, evenly. The
    last module holds the classifier, and each one something to learn.

    Args:
        model: any network whose own forward pass, and that of its sequences, is without branches on values.
        images: a sample [B,C,H,W], B > 1, on which the modules must give what the network gives in training and in
            inference mode.
        count: 1 to :func:`most_segments`.

    Raises:
        CompressionError: the forward pass cannot be followed, or the modules give something else.
        ShapeError: the network has fewer modules.
    """
    chain = _Chain(model, images)
    most = len(chain.ends) + 1
    if not 1 <= count <= most:
        raise ShapeError(
            f"Model '{type(model).__name__}' has {most} modules, expected {count} or more. Ask for 1 to {most}."
        )
    _check_composition(model, images, count)
    return chain.cut(count)


def _check_composition(model: nn.Module, images: Tensor, count: int) -> None:
    """Compare network and modules on a copy of both, in both modes."""
    twin = copy.deepcopy(model)
    parts = _Chain(twin, images).cut(count)
    for training in (False, True):
        found: list[Tensor] = []
        for modules in ([twin], parts):
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                values = images
                for module in modules:
                    values = module.train(training)(values)
                found.append(values)
        if not torch.allclose(*found, rtol=1e-4, atol=1e-5):
            raise CompressionError(
                f"Model '{type(model).__name__}' has other outputs in {count} modules than in one piece, by "
                f"{float((found[0] - found[1]).abs().max()):.2g}, expected the same, because its forward pass "
                f"depends on more than its input. Use another procedure."
            )


def sample_images(model: nn.Module, input_shape: tuple[int, int, int]) -> Tensor:
    """Return two images of noise [2,C,H,W] where the model is, the same every time."""
    images = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters(), images).device)


def common_count(teacher: nn.Module, student: nn.Module, input_shape: tuple[int, int, int], wanted: int) -> int:
    """Return the number of modules both networks can be cut into, at most ``wanted``.

    Raises:
        CompressionError: a forward pass cannot be followed.
        ShapeError: one of them is a single module.
    """
    found = [most_segments(model, sample_images(model, input_shape)) for model in (teacher, student)]
    for role, model, most in zip(("Teacher", "Student"), (teacher, student), found, strict=True):
        if most < 2:
            raise ShapeError(
                f"{role} '{type(model).__name__}' has {most} module, expected 2 at least. Take a network that changes "
                "resolution or is made of blocks, or another procedure."
            )
    return min(wanted, *found)


def boundaries(parts: Sequence[nn.Module], images: Tensor) -> list[Shape]:
    """Return the shapes of what the modules give, without the batch; of the last one, (C,)."""
    shapes: list[Shape] = []
    values = images
    for part in parts:
        with frozen(part), torch.no_grad():
            values = part(values)
        shapes.append(tuple(values.shape[1:]))
    return shapes


# ---------------------------------------------------------------- the meta model and its stitches


class Fitted(nn.Module):
    """[B,*before] -> [B,*after]: a layer on images, and adaptive pooling before or after it.

    Tokens are read as a square image, row by row.
    """

    def __init__(self, layer: nn.Module, after: Shape, *, pool_first: bool) -> None:
        super().__init__()
        _, height, width = _grid(after)
        self.layer, self.size, self.as_tokens, self.pool_first = layer, (height, width), len(after) == 2, pool_first

    def forward(self, values: Tensor) -> Tensor:
        image = image_of(values)
        if self.pool_first:
            image = self.layer(F.adaptive_avg_pool2d(image, self.size))
        else:
            image = F.adaptive_avg_pool2d(self.layer(image), self.size)
        return tokens_of(image) if self.as_tokens else image


def stitch(before: Shape, after: Shape) -> nn.Module:
    """Return what turns one boundary into another: pooling and a 1x1 convolution; the identity between equal ones.

    Raises:
        ShapeError: tokens that are no square grid.
    """
    if before == after:
        return nn.Identity()
    return Fitted(nn.Conv2d(_grid(before)[0], _grid(after)[0], 1), after, pool_first=True)


def meta_layer(before: Shape, after: Shape) -> nn.Module:
    """Return one module of the meta model: a convolution with batch norm and ReLU, its stride that of the boundaries.

    To logits (C,) a mean over positions and a linear layer follow; to tokens a 1x1 convolution, since they have both
    signs.

    Raises:
        ShapeError: tokens that are no square grid.
    """
    width, height, _ = _grid(before)
    if len(after) == 1:
        return nn.Sequential(
            Fitted(conv_bn_relu(width, width, kernel=3), (width, 1, 1), pool_first=False),
            nn.Flatten(),
            nn.Linear(width, after[0]),
        )
    new_width, new_height, _ = _grid(after)
    stride = max(1, height // new_height)
    layer = conv_bn_relu(width, new_width, kernel=max(3, stride | 1), stride=stride)
    if len(after) == 2:
        layer.append(nn.Conv2d(new_width, new_width, 1))
    return Fitted(layer, after, pool_first=False)


def _grid(shape: Shape) -> tuple[int, int, int]:
    """(D,H,W) of a boundary."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    count, width = shape
    side = math.isqrt(count)
    if side * side != count:
        raise ShapeError(
            f"Boundary between modules has {count} tokens, expected a square number, because class tokens and oblong "
            "images have no place in a square grid. Use another procedure."
        )
    return width, side, side


class Still(nn.Sequential):
    """Modules in inference mode for good: they get no gradient, but pass it on."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.train(False).requires_grad_(False)

    def train(self, mode: bool = True) -> "Still":
        """Stay in inference mode, whatever ``mode`` says."""
        del mode
        return super().train(False)


class Hybrid(nn.Sequential):
    """The meta model with a module of its place taken by another, between stitches; only these three learn."""

    def __init__(
        self,
        meta: Sequence[nn.Module],
        place: int,
        module: nn.Module,
        *,
        into: nn.Module | None = None,
        out: nn.Module | None = None,
    ) -> None:
        into, out = (nn.Identity() if each is None else each for each in (into, out))
        super().__init__(Still(*meta[:place]), into, module, out, Still(*meta[place + 1 :]))


# ---------------------------------------------------------------- steps


def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy in nats, summed over samples with a label (not -1) and divided by the batch."""
    return F.cross_entropy(widened(logits), labels, ignore_index=-1, reduction="sum") / len(labels)


def hard_step(name: str) -> StepFn:
    """Return a step on labels alone, for meta model and teacher modules; its one term is ``name``."""

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {name: labelled_cross_entropy(model(batch.images), batch.labels)}

    return step


class ModuleStep:
    """A step that trains the student's module inside the meta model on what the teacher's gives there."""

    def __init__(self, teacher: nn.Module, *, kd_weight: float, temperature: float) -> None:
        """``teacher`` is the meta model with the teacher's module in it."""
        self.teacher, self.kd_weight, self.temperature = Still(teacher), kd_weight, temperature

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Terms ``module_cross_entropy`` and ``module_kd``, weighted."""
        with torch.no_grad():
            target = self.teacher.to(batch.images.device)(batch.images)
        logits = widened(model(batch.images))
        weights = torch.ones(1, len(target), device=target.device)
        teachers = TeacherOutputs(target.unsqueeze(0), weights)
        divergence = kd(Outputs(logits), teachers, batch.labels, temperature=self.temperature)
        return {
            "module_cross_entropy": (1 - self.kd_weight) * labelled_cross_entropy(logits, batch.labels),
            "module_kd": self.kd_weight * divergence,
        }


# ---------------------------------------------------------------- the procedure


def shared_out(
    epochs: int, modules: int, *, meta_share: float, teacher_share: float, module_share: float
) -> tuple[int, int, int, int]:
    """Return the epochs of the meta model, of each teacher module, of each student module, and of the whole student.

    Each is 1 at least, and with L modules ``meta + L * (theirs + ours) + whole`` is ``epochs``.

    Raises:
        CompressionError: there are not enough.
    """
    if epochs < 2 * modules + 2:
        raise CompressionError(
            f"Procedure 'module_to_module' has {epochs} epochs, expected at least {2 * modules + 2}: one for the meta "
            f"model, two for each of {modules} modules, one for the whole. Raise train.epochs, or lower modules."
        )
    meta, theirs, ours = (
        max(1, int(each * epochs + 1e-9)) for each in (meta_share, teacher_share / modules, module_share / modules)
    )
    while meta + modules * (theirs + ours) >= epochs:
        if meta > 1:
            meta -= 1
        elif theirs > 1:
            theirs -= 1
        else:
            ours -= 1
    return meta, theirs, ours, epochs - meta - modules * (theirs + ours)


def module_to_module(training: Training, config: "ModuleToModule") -> History:
    """Train meta model, teacher modules, student modules and the whole student, in this order.

    Only the rows of the last part measure the student; those before measure the meta model, as it is or with a
    module in it.

    Raises:
        CompressionError: there are too few epochs, no labels, no such teacher, or a network cannot be cut.
        ShapeError: teacher or student is a single module.
    """
    dataset, train = training.dataset, training.config.train
    if not bool((dataset.train.labels >= 0).any()):
        raise CompressionError(
            "Procedure 'module_to_module' has 0 samples with a label, expected some, because its meta model learns "
            "from them. Set distill.labels to all, or use another procedure."
        )
    if config.teacher >= len(training.teachers):
        raise CompressionError(
            f"Procedure 'module_to_module' has {len(training.teachers)} teachers, expected number {config.teacher} "
            "(from 0). Lower procedure.teacher."
        )
    student, teacher = training.student, training.teachers[config.teacher]
    count = common_count(teacher, student, dataset.input_shape, config.modules)
    epochs = shared_out(
        train.epochs,
        count,
        meta_share=config.meta_share,
        teacher_share=config.teacher_share,
        module_share=config.module_share,
    )
    for_meta, for_theirs, for_ours, for_whole = (train.model_copy(update={"epochs": each}) for each in epochs)
    sample = sample_images(teacher, dataset.input_shape)
    theirs = [copy.deepcopy(part).requires_grad_(True) for part in segments(teacher, sample, count)]
    interfaces = boundaries(theirs, sample)
    sample = sample_images(student, dataset.input_shape)
    ours = segments(student, sample, count)
    edges = boundaries(ours, sample)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        befores = [dataset.input_shape, *interfaces[:-1]]
        meta = [meta_layer(a, b) for a, b in zip(befores, interfaces, strict=True)]
        into = [nn.Identity(), *(stitch(a, b) for a, b in zip(interfaces[:-1], edges[:-1], strict=True))]
        out = [*(stitch(a, b) for a, b in zip(edges[:-1], interfaces[:-1], strict=True)), nn.Identity()]

    run = partial(training.run, monitored=False)
    parts = [run(nn.Sequential(*meta), name="meta", train=for_meta, step=hard_step("meta_cross_entropy"))]
    for place in range(count):
        number = place + 1
        taught = Hybrid(meta, place, theirs[place])
        incubation = hard_step("teacher_module_cross_entropy")
        parts.append(run(taught, name=f"teacher-{number}", train=for_theirs, step=incubation))
        step = ModuleStep(taught, kd_weight=config.kd_weight, temperature=config.temperature)
        hybrid = Hybrid(meta, place, ours[place], into=into[place], out=out[place])
        parts.append(run(hybrid, name=f"module-{number}", train=for_ours, step=step))
    return joined(*parts, training.run(name="assembled", train=for_whole))


class ModuleToModule(Frozen):
    """Modules of the student learn from those of a teacher, each inside a small network; then the whole does.

    Lo et al. 2024 (arXiv:2402.16918). As there, a copy of each teacher module first learns to work inside the meta
    model: as it comes out of the teacher it meets features it has never seen, and on scikit-learn's digits guessed at
    random. Where ours differs: the divergence is divided by the batch alone, the authors' also by the classes, which
    makes it small beside the cross entropy; the teacher's modules start from its weights; the student is a network of
    one piece, not of routed modules; and modules are trained one after another.
    """

    kind: Literal["module_to_module"] = "module_to_module"
    modules: Annotated[int, Field(ge=2, le=8)] = 4
    """Parts of each network; fewer where teacher or student has fewer resolutions (or blocks of tokens)."""
    teacher: Annotated[int, Field(ge=0)] = 0
    """Which of the panel is cut, from 0; the losses at the end see them all."""
    meta_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the epochs for the meta model."""
    teacher_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the epochs in which the teacher's modules get used to the meta model, all together."""
    module_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the epochs for the student's modules, all together; what is left is for the whole student."""
    kd_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the teacher's module beside the labels, which get the rest."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softening of both sides while modules are trained."""

    needs_teachers: ClassVar[bool] = True
    card: ClassVar[MethodCard] = MethodCard(
        name="Module to module (m2mKD)",
        paper="Lo et al. 2024, m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers, "
        "arXiv:2402.16918",
        summary="Research: cuts teacher and student into modules and trains each of the student's inside a small "
        "frozen network, to do there what the teacher's does; then trains the assembled student as usual.",
        needs="A teacher and a student whose forward pass is a chain with changes of resolution, or of blocks on a "
        "square grid of tokens; labels; two epochs for each module and two more.",
        cost="No more epochs than configured, but a share of them trains copies of the teacher's modules, and those "
        "of the student's modules run the teacher's too. Nothing afterwards.",
        evidence="The paper's abstract reports up to 5.6 points on Tiny-ImageNet and 3.5 on ImageNet for modular "
        "transformers. Measured on our data: see `measured`.",
    )

    @model_validator(mode="after")
    def _some_epochs_left(self) -> "ModuleToModule":
        total = self.meta_share + self.teacher_share + self.module_share
        if total >= 1:
            raise ValueError(
                f"meta_share, teacher_share and module_share have a sum of {total:g}, expected less than 1, because "
                "the whole student is trained in what is left. Lower one of them."
            )
        return self

    def build(self) -> ProcedureFn:
        """Return the procedure."""
        return partial(module_to_module, config=self)
