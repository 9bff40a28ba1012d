"""The space whose candidates are the smaller networks inside one trained supernet."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from compression.card import MethodCard
from compression.checkpoint import SPEC_FILE, load_checkpoint, save_checkpoint
from compression.distill.merging.batch_norm import reestimate_batch_norm
from compression.errors import CompressionError
from compression.models import AnyEdit, ModelSpec, ResizeModule, SetAttributes
from compression.search.scale import fresh_model
from compression.search.space import Choices, Genes, Space, Workshop
from compression.search.subnets.slicing import Cnn, borrowed
from compression.search.subnets.supernet import SandwichStep, Supernet, logit_losses
from compression.train import TrainConfig
from compression.zoo.depthwise_cnn import DepthwiseCnn
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn
from compression.zoo.vision_transformer import VisionTransformer

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Depths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class Subnets(Space):
    """Every smaller network inside one supernet is a candidate, with the weights it has there.

    The supernet is trained once, when the first candidate is built. One space is one sub-space of AutoDistil: several
    entries in ``search.spaces``, each with a ``base`` for its own budget, are the paper's partition, which keeps sizes
    that lie far apart from disturbing each other.

    Where ours differs: the networks are image classifiers, so each size learns the trial's own losses from the stored
    outputs of the whole panel, and the paper's relation loss comes beside them where ``relations`` is above 0; losses
    that look at features are left out, since these have another width in every size. Terms are averaged over the
    sizes of a step. Batch norm uses the batch in training, and a candidate's statistics are taken anew from train
    images (Yu and Huang 2019). The paper searches by the held-out loss of the candidates as they are; here each one
    that passes the filter is trained a little, and filter ``inherited`` is that look.
    """

    kind: Literal["subnets"] = "subnets"
    base: ResidualCnn | PlainCnn | DepthwiseCnn | VisionTransformer
    """The largest network; its own sizes are always among those to choose from."""
    train: TrainConfig
    """The schedule of the supernet's training."""
    parent: Annotated[str, Field(min_length=1)] | None = None
    """A teacher of the family of ``base`` whose leading weights the supernet starts from; fresh without one."""
    widths: tuple[Share, ...] = (0.5, 0.75)
    """Shares of the channels of ``base`` to choose from, for every stage by itself (for a transformer: of the width of
    its tokens). A stage that begins with neither a stride nor another width than what is before shares its choice."""
    depths: tuple[Depths, ...] = ()
    """For every stage (a transformer has one) the numbers of blocks to choose from; the first ones stay. Empty keeps
    those of ``base``."""
    stem_widths: tuple[Share, ...] = ()
    """Shares of the stem's channels to choose from; empty keeps them."""
    heads: tuple[PositiveInt, ...] = ()
    """For a transformer: numbers of attention heads to choose from, each as wide as in ``base``; empty keeps them."""
    mlp_ratios: tuple[Annotated[float, Field(gt=0.0, le=8.0)], ...] = ()
    """For a transformer: widths inside the MLP to choose from, as multiples of the width; empty keeps that."""
    round_to: int = Field(default=8, ge=1, le=256)
    """Channel counts other than those of ``base`` are multiples of this."""
    random_subnets: int = Field(default=2, ge=0, le=16)
    """Random networks that each step trains beside the largest and the smallest."""
    relations: float = Field(default=0.0, ge=0.0)
    """Weight of the parent's relations between tokens, in its last block; transformers alone, and the parent runs at
    every step."""
    norm_images: int = Field(default=2048, ge=1)
    """Train images from which a candidate's batch-norm statistics are taken."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Supernets by weight sharing (AutoDistil)",
        paper="Xu et al. 2022, arXiv:2201.12507; sandwich rule and batch norm of Yu and Huang 2019, arXiv:1903.05134",
        summary="Research: trains one network whose leading channels, heads and blocks are networks too, all of them "
        "distilled together, and lets the search pick one with its weights.",
        needs="Stored teacher outputs; a teacher of the same family to start from, where there is one.",
        cost="One training of the largest network, at about 2 + random_subnets forward and backward passes a step, "
        "once for each space; then a few forward passes per candidate.",
        evidence="The paper reports up to 2.7 times less compute at negligible loss for language models. "
        "Measured on Fashion-MNIST: see `measured`.",
    )

    @model_validator(mode="after")
    def _fits_the_family(self) -> Self:
        transformer = isinstance(self.base, VisionTransformer)
        for field in ("heads", "mlp_ratios"):
            if getattr(self, field) and not transformer:
                raise ValueError(f"{field} is set and base is '{self.base.kind}', expected a vision_transformer.")
        if self.relations > 0 and (not transformer or self.parent is None):
            raise ValueError(
                "relations is above 0, expected a vision_transformer as base and a parent whose relations it learns. "
                "Name the parent, or set relations to 0."
            )
        base_depths = (self.base.depth,) if isinstance(self.base, VisionTransformer) else self.base.depths
        if self.depths and len(self.depths) != len(base_depths):
            raise ValueError(
                f"depths has {len(self.depths)} entries, expected {len(base_depths)}, one for each stage of base. "
                "Give a list of choices for each stage."
            )
        limits = [(f"depths[{i}]", d, n) for i, (d, n) in enumerate(zip(self.depths, base_depths, strict=False))]
        if isinstance(self.base, VisionTransformer):
            limits += [("heads", self.heads, self.base.num_heads), ("mlp_ratios", self.mlp_ratios, self.base.mlp_ratio)]
            if self.stem_widths and self.base.stem == "patch":
                raise ValueError("stem_widths is set and the stem of base is 'patch', expected 'conv'. Leave it out.")
        for name, values, limit in limits:
            if values and max(values) > limit:
                raise ValueError(f"{name} has {max(values)}, expected at most the {limit} of base. Enlarge base.")
        return self

    @property
    def label(self) -> str:
        return f"subnets-{self.base.kind}"

    @property
    def trains_while_building(self) -> bool:
        return True

    @property
    def options(self) -> Genes:
        """Gene -> values, ascending, the last one that of ``base``."""
        base, options = self.base, dict[str, tuple[Any, ...]]()
        if isinstance(base, VisionTransformer):
            options["width"] = self._widths(base.width, self.widths)
            options["depth"] = _up_to(base.depth, self.depths[0] if self.depths else ())
            options["heads"] = _up_to(base.num_heads, self.heads)
            options["mlp_ratio"] = _up_to(base.mlp_ratio, self.mlp_ratios)
            options["stem"] = self._widths(base.stem_width, self.stem_widths)
        else:
            for stage, (width, depth) in enumerate(zip(base.widths, base.depths, strict=True)):
                if not (stage and _is_tied(base, stage)):
                    options[f"width_{stage}"] = self._widths(width, self.widths)
                options[f"depth_{stage}"] = _up_to(depth, self.depths[stage] if self.depths else ())
            if not _is_tied(base, 0):
                options["stem"] = self._widths(base.stem_width, self.stem_widths)
        return {gene: values for gene, values in options.items() if len(values) > 1}

    def genes(self, shop: Workshop) -> Genes:
        if shop.start_training is None:
            raise CompressionError(
                f"Space '{self.label}' has no way to train its supernet, expected one. Give run_study start_training."
            )
        if self.parent is not None:
            self._check_parent(*shop.parent(self.parent), shop)
        if not self.options:
            raise CompressionError(
                f"Space '{self.label}' has 1 network, that of base, expected more to choose from. Give smaller widths "
                "or depths."
            )
        return self.options

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        options = self.options
        for gene in sorted(options.keys() | choices.keys()):
            if choices.get(gene) not in options.get(gene, ()):
                raise CompressionError(
                    f"Candidate of '{self.label}' has {gene} {choices.get(gene)}, expected one of "
                    f"{', '.join(map(str, options.get(gene, ()))) or 'no such gene'}. Choose each gene of the space."
                )
        model, spec = self._supernet(self._trained(shop), shop).extract(choices)
        reestimate_batch_norm(model, shop.dataset, images=self.norm_images, seed=shop.seed)
        return model.eval().requires_grad_(True), spec

    def spec(self, choices: Choices, template: ModelSpec) -> ModelSpec:
        """What builds the network of these choices; genes that are not named are as in ``base``."""
        base = self.base
        if isinstance(base, VisionTransformer):
            width, heads = choices.get("width", base.width), choices.get("heads", base.num_heads)
            changes = {
                "width": width,
                "depth": choices.get("depth", base.depth),
                "mlp_ratio": choices.get("mlp_ratio", base.mlp_ratio),
                "stem_width": choices.get("stem", base.stem_width),
            }
            inside = heads * (base.width // base.num_heads)
            changes["num_heads"] = heads if inside == width else 1
            edits = () if inside == width else _attention_edits(width, inside, heads, changes["depth"])
        else:
            widths = list(base.widths)
            for stage, width in enumerate(base.widths):
                tied = stage > 0 and _is_tied(base, stage)
                widths[stage] = widths[stage - 1] if tied else choices.get(f"width_{stage}", width)
            changes = {
                "widths": tuple(widths),
                "depths": tuple(choices.get(f"depth_{stage}", depth) for stage, depth in enumerate(base.depths)),
                "stem_width": widths[0] if _is_tied(base, 0) else choices.get("stem", base.stem_width),
            }
            edits = ()
        model = type(base).model_validate(base.model_dump() | changes)
        return template.model_copy(update={"model": model, "edits": edits})

    def _supernet(self, full: nn.Module, shop: Workshop) -> Supernet:
        return Supernet(full, partial(self.spec, template=shop.template()), keeps_qkv=self.relations > 0)

    def _widths(self, width: int, shares: Sequence[float]) -> tuple[int, ...]:
        rounded = (max(self.round_to, round(share * width / self.round_to) * self.round_to) for share in shares)
        return tuple(sorted({width, *(value for value in rounded if value < width)}))

    def _check_parent(self, parent: nn.Module, spec: ModelSpec, shop: Workshop) -> None:
        if spec.model.kind != self.base.kind:
            raise CompressionError(
                f"Parent '{self.parent}' has kind '{spec.model.kind}', expected '{self.base.kind}' as base has. Name a "
                "teacher of that family, or leave parent out."
            )
        if self.relations == 0:
            return
        base, teacher = cast("VisionTransformer", self.base), cast("Any", parent)
        tokens = math.prod(-(-side // base.patch_size) for side in shop.dataset.input_shape[1:])
        if teacher.tokens.num_tokens != tokens:
            raise CompressionError(
                f"Parent '{self.parent}' has {teacher.tokens.num_tokens} tokens, expected {tokens} as base has. "
                "Set its patch_size in base, or relations to 0."
            )
        wanted = teacher.blocks[-1].attn.num_heads
        for heads in self.options.get("heads", (base.num_heads,)):
            if heads * (base.width // base.num_heads) % wanted:
                raise CompressionError(
                    f"Parent '{self.parent}' has {wanted} heads, which do not divide the "
                    f"{heads * (base.width // base.num_heads)} queries of {heads} heads, expected a divisor. Leave out "
                    f"{heads} heads, or set relations to 0."
                )

    def _trained(self, shop: Workshop) -> nn.Module:
        """The trained supernet: from memory, from the workshop's folder, or made now."""
        content = json.dumps([self.model_dump(mode="json"), shop.seed], sort_keys=True)
        key = f"{self.label}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        if key not in shop.memory:
            if not (shop.folder / key / SPEC_FILE).exists():
                model, spec = self._start(shop)
                self._train(model, shop, key)
                save_checkpoint(model, spec, shop.folder / key)
                shutil.rmtree(shop.folder / "steps" / key, ignore_errors=True)
            shop.memory[key] = load_checkpoint(shop.folder / key)[0]
        return shop.memory[key]

    def _start(self, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        """The supernet before its training."""
        model, spec = fresh_model(self.spec({}, shop.template()), shop.seed)
        if self.parent is not None:
            parent, parent_spec = shop.parent(self.parent)
            state = model.state_dict()
            shapes = {name: tensor.shape for name, tensor in state.items()}
            theirs = borrowed(shapes, self.base, parent.state_dict(), cast("Any", parent_spec.model))
            model.load_state_dict(state | theirs)
        return model, spec

    def _train(self, model: nn.Module, shop: Workshop, name: str) -> None:
        supernet = self._supernet(model, shop)
        training = shop.training(supernet, self.train, name)
        losses = logit_losses(training.config.weighted_losses)
        inner = training.step(supernet, epochs=self.train.epochs, losses=losses)
        teacher = shop.parent(self.parent)[0] if self.parent is not None and self.relations > 0 else None
        step = SandwichStep(
            supernet,
            inner,
            self.options,
            count=self.random_subnets,
            seed=shop.seed,
            teacher=teacher,
            weight=self.relations,
        )
        training.run(step=step, helpers=inner.helpers, self_trained=inner.self_trained, monitored=False)


def _up_to(largest: float, values: Sequence[float]) -> tuple[Any, ...]:
    return tuple(sorted({*values, largest}))


def _is_tied(base: Cnn, stage: int) -> bool:
    """Whether a stage's width must be that of what is before, since ``base`` has no layer between them to change it."""
    before = base.widths[stage - 1] if stage else base.stem_width
    return not isinstance(base, PlainCnn) and base.strides[stage] == 1 and before == base.widths[stage]


def _attention_edits(width: int, inside: int, heads: int, depth: int) -> tuple[AnyEdit, ...]:
    """What gives attention ``heads`` heads that together are ``inside`` wide, beside tokens of another width."""
    edits: list[AnyEdit] = []
    for number in range(depth):
        name = f"blocks.{number}.attn"
        edits += [
            SetAttributes(module=name, values={"num_heads": heads, "head_dim": inside // heads}),
            ResizeModule(module=f"{name}.qkv", in_features=width, out_features=3 * inside),
            ResizeModule(module=f"{name}.proj", in_features=inside, out_features=width),
        ]
    return tuple(edits)
