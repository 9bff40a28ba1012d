"""TAS: a search for width and depth by gradient, of which each target is a candidate."""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from compression.card import MethodCard
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data.dataset import Dataset, Split
from compression.distill.losses import AnyLoss, Kd
from compression.distill.merging.batch_norm import reestimate_batch_norm
from compression.distill.procedures.training import Training
from compression.distill.step import DistillationStep
from compression.errors import CompressionError
from compression.models import ModelSpec
from compression.search.scale import fresh_model
from compression.search.space import Choices, Genes, Space, Workshop
from compression.search.tas.plan import (
    Plan,
    convolutions,
    cost_of_choices,
    cost_tables,
    derived_spec,
    expected_cost,
    macs_of,
    plan_of,
    walk_down,
)
from compression.search.tas.supernet import Architect, Supernet, hand_down
from compression.train import StepFn, TrainConfig
from compression.train.batches import Batches
from compression.types import Batch
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Tas(Space):
    """The width and depth that one network has left when a supernet was trained under each cost.

    Dong and Yang 2019 (arXiv:1905.09717). The supernet (``supernet.py``) learns on one half of the train split, and
    the choices on the other half, in turns, both by the trial's own distillation. The choices' loss has ``cost_weight``
    times log(expected cost) added while the likeliest network costs more than the target, the same taken off while it
    is more than ``tolerance`` of the largest network's cost below, and nothing between. The last choices between are
    taken; if there were none and the likeliest network costs more than the target, the options that lose least
    probability are exchanged for smaller ones until it fits.

    Ours: the cost is the latency that the model of this machine predicts, operator by operator, or MACs, exact for
    every pair of widths, where the paper multiplies expected widths. The paper chooses the width of every convolution
    and adds residual outputs of unequal widths where they overlap. Networks of the zoo have no such addition, so in a
    residual network there is one width choice for the outputs of a stage, one for the inside of each block, and one for
    the stem. Weights follow the one-cycle AdamW of trials, not SGD; inherited ones get new batch norm statistics.
    """

    kind: Literal["tas"] = "tas"
    base: ResidualCnn | PlainCnn | None = None
    """The largest network of the space; None takes that of ``parent``."""
    parent: Annotated[str, Field(min_length=1)] | None = None
    """Name of the teacher whose structure (not its weights) is the largest network, where there is no ``base``."""
    ratios: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Width choices as shares of the channels of each layer; all of them are always a choice."""
    round_to: int = Field(default=8, ge=1, le=256)
    """Channel counts are multiples of this."""
    targets: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.25, 0.5, 0.75)
    """Shares of the largest network's cost, each a choice of the search and a supernet to train."""
    cost: Literal["latency", "macs"] = "latency"
    """Predicted milliseconds of all operators, or multiply-accumulates."""
    tolerance: float = Field(default=0.05, ge=0.0, lt=1.0)
    """How far below the target is near enough, as a share of the largest network's cost."""
    cost_weight: float = Field(default=2.0, ge=0.0, le=1e6)
    """Factor of the cost in the loss of the choices."""
    train: TrainConfig = TrainConfig(epochs=8)
    """Schedule of the supernet; an epoch is half of the train split."""
    rate: float = Field(default=0.01, gt=0.0, le=1.0)
    """Learning rate of the choices' Adam. The paper has 0.001 for some 60,000 steps; a step of Adam moves a logit by
    about the rate, so that a thousand steps, as here, would leave all options about equally likely."""
    weight_decay: float = Field(default=1e-3, ge=0.0, le=1.0)
    """Pulls the choices' logits to 0."""
    tau_first: float = Field(default=5.0, gt=0.0, le=100.0)
    """Temperature of the draws at the start; it falls along a cosine."""
    tau_last: float = Field(default=0.1, gt=0.0, le=100.0)
    """Temperature at the end."""
    inherit: bool = False
    """Whether candidates keep what they have in common with the supernet, with new batch norm statistics; else they
    start fresh, as published."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Transformable architecture search (TAS)",
        paper="Dong and Yang 2019, Network Pruning via Transformable Architecture Search, arXiv:1905.09717",
        summary="Trains one network of all widths and depths, samples among them, and learns by gradient which to keep "
        "so that a latency or MACs target is met; every target gives one candidate.",
        needs="A plain or residual network, labels or teacher outputs, and for cost 'latency' the latency model.",
        cost="One supernet per target: two forward and backward passes a step, and a batch norm for every width.",
        evidence="The paper reports about 93.7 % for ResNet-56 on CIFAR-10 at 53 % less FLOPs. "
        "Measured on Fashion-MNIST: worse than random designs at equal latency; see `measured`.",
    )

    @model_validator(mode="after")
    def _one_largest_network(self) -> Self:
        if (self.base is None) == (self.parent is None):
            found = "neither base nor parent" if self.base is None else "base and parent"
            raise ValueError(f"space 'tas' has {found}, expected one of them. Name the largest network once.")
        return self

    @field_validator("ratios", "targets")
    @classmethod
    def _ascending(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(values)))

    @property
    def label(self) -> str:
        return f"tas-{self.parent if self.base is None else self.base.kind}"

    @property
    def trains_while_building(self) -> bool:
        return True

    @property
    def wants_latency_model(self) -> bool:
        """Whether the latency model of this machine is of use."""
        return self.cost == "latency"

    def genes(self, shop: Workshop) -> Genes:
        plan, tables = self._plan(shop)
        if math.prod(plan.sizes) == 1:
            raise CompressionError(
                f"Space '{self.label}' has 1 network, expected something to choose. Lower round_to or add ratios."
            )
        least = cost_of_choices(plan, tables, [0] * len(plan.sizes))
        if self.targets[0] < least:
            raise CompressionError(
                f"Space '{self.label}' has target {self.targets[0]:g}, expected at least {least:.3g}, the share of the "
                f"largest network's {self.cost} that the smallest one costs. Raise it, or allow smaller ratios."
            )
        return {"target": self.targets}

    def build(self, choices: Choices, shop: Workshop) -> tuple[nn.Module, ModelSpec]:
        if "target" not in choices:
            raise CompressionError(
                f"Candidate of '{self.label}' has no choice of target, expected one. Name all genes."
            )
        target = float(choices["target"])
        folder = shop.folder / self._name(shop) / f"target-{target:g}"
        if not folder.is_dir():
            self._search(target, folder, shop)
        return load_checkpoint(folder)

    def _largest(self, shop: Workshop) -> ResidualCnn | PlainCnn:
        if self.base is not None:
            return self.base
        name = self.parent or ""
        _, spec = shop.parent(name)
        if not isinstance(spec.model, ResidualCnn | PlainCnn) or spec.edits:
            found = f"kind '{spec.model.kind}'" + (" with edits" if spec.edits else "")
            raise CompressionError(
                f"Parent '{name}' has {found}, expected residual_cnn or plain_cnn as the zoo builds it. Give base."
            )
        return spec.model

    def _name(self, shop: Workshop) -> str:
        """Of this space in the shop's folder; targets have folders in it."""
        content = [
            self.model_dump(mode="json", exclude={"targets"}),
            self._largest(shop).model_dump(mode="json"),
            shop.seed,
        ]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.label}-{digest[:8]}"

    def _plan(self, shop: Workshop) -> tuple[Plan, list[Tensor]]:
        """What may be chosen, and the cost tables.

        Predictions are kept on disk: a latency model that is fitted again after a kill must not change the search.
        """
        if self.cost == "latency" and shop.latency is None:
            raise CompressionError(
                f"Space '{self.label}' has cost 'latency' and no latency model, expected one. Pass latency_model, or "
                "set cost to macs."
            )
        plan = plan_of(
            self._largest(shop),
            shop.dataset.input_shape,
            shop.dataset.num_classes,
            ratios=self.ratios,
            round_to=self.round_to,
        )
        if self.cost == "macs" or shop.latency is None:
            return plan, cost_tables(plan, macs_of)
        path = shop.folder / self._name(shop) / "costs.json"
        if not path.is_file():
            tables = cost_tables(plan, shop.latency.operators_ms)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(path.name + ".part")
            draft.write_text(json.dumps([table.tolist() for table in tables]), encoding="utf-8")
            draft.replace(path)
        tables = json.loads(path.read_text(encoding="utf-8"))
        return plan, [torch.tensor(table, dtype=torch.float64) for table in tables]

    def _search(self, target: float, folder: Path, shop: Workshop) -> None:
        """Train a supernet for one target, and leave the network it comes to in ``folder``."""
        plan, tables = self._plan(shop)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(shop.seed)
            supernet = Supernet(plan)
        architect = Architect(
            plan,
            tables,
            target=target,
            tolerance=self.tolerance,
            cost_weight=self.cost_weight,
            rate=self.rate,
            weight_decay=self.weight_decay,
        )
        training = shop.training(supernet, self.train, f"{folder.parent.name}/{folder.name}")
        half, other = halves(training.dataset, seed=shop.seed)
        distil = training.step(supernet, epochs=self.train.epochs, losses=_losses(training), dataset=half)
        training.run(
            supernet,
            train=self.train,
            dataset=half,
            step=self._step(supernet, architect, distil, training, other),
            helpers=nn.ModuleList([architect, distil.helpers]),
            self_trained=[supernet.choices, *distil.self_trained],
            backward=distil.backward,
            monitored=False,
        )
        architect.settle(supernet)
        chosen, facts = self._chosen(supernet, tables, target)
        model, spec = fresh_model(derived_spec(plan, chosen, shop.template()), shop.seed)
        if self.inherit:
            hand_down(supernet, model, convolutions(plan, chosen))
            reestimate_batch_norm(model, training.dataset, seed=shop.seed)  # the supernet's saw mixtures
        draft = folder.with_name(folder.name + ".part")
        shutil.rmtree(draft, ignore_errors=True)
        save_checkpoint(model, spec, draft)
        (draft / "search.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draft.replace(folder)
        if training.checkpoint_dir is not None:
            shutil.rmtree(training.checkpoint_dir, ignore_errors=True)

    def _chosen(self, supernet: Supernet, tables: list[Tensor], target: float) -> tuple[list[int], dict[str, Any]]:
        """The options that are taken, within the target, and facts about them; costs are shares of the largest's."""
        plan, likeliest = supernet.plan, supernet.likeliest()
        log_probabilities = [row.detach().double().log_softmax(dim=0) for row in supernet.rows()]
        cost = partial(cost_of_choices, plan, tables)
        chosen = walk_down(likeliest, log_probabilities, cost, target)
        options = [options[place] for options, place in zip(plan.options, chosen, strict=True)]
        facts = {
            "target": target,
            "cost": cost(chosen),
            "likeliest_cost": cost(likeliest),
            "expected_cost": float(expected_cost(plan, tables, [row.exp() for row in log_probabilities])),
            "widths": options[: len(plan.widths)],
            "depths": options[len(plan.widths) :],
        }
        if chosen != likeliest:
            logger.warning(
                "%s ended above its target: options were made smaller until the network cost %.3f in place of %.3f",
                self.label,
                facts["cost"],
                facts["likeliest_cost"],
            )
        logger.info("%s found %s", self.label, facts)
        return chosen, facts

    def _step(
        self, supernet: Supernet, architect: Architect, distil: DistillationStep, training: Training, other: Split
    ) -> StepFn:
        """A step of the choices on the ``other`` half, then the losses of the weights."""
        epochs = self.train.epochs

        def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            batches = Batches(
                split=other,
                preprocessing=training.dataset.preprocessing,
                augment=training.augment,
                seed=training.seed,
                augment_seed=training.panel[0].spec.seed,
                views=training.config.views,
                batch_size=self.train.batch_size,
                max_steps=self.train.max_steps_per_epoch,
                device=batch.images.device,
            )
            steps = batches.steps_per_epoch
            supernet.tau = self._tau((batch.epoch + batch.step / steps) / epochs)
            theirs = next(batches.epoch(batch.epoch, batch.step % steps))
            # Past the wrapper of the model, which counts on a backward pass for every call.
            first, *others = distil(supernet, theirs).values()
            architect.learn(supernet, sum(others, first))
            return distil(model, batch)

        return step

    def _tau(self, done: float) -> float:
        """Temperature after a share of the training, 0..1."""
        fall = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return self.tau_last + (self.tau_first - self.tau_last) * fall


def halves(dataset: Dataset, *, seed: int) -> tuple[Dataset, Split]:
    """The dataset with a random half of its train split, and the other half.

    Raises:
        CompressionError: the train split has fewer than two samples.
    """
    train = dataset.train
    count = len(train.labels)
    if count < 2:
        raise CompressionError(
            f"Train split of '{dataset.name}' has {count} samples, expected two at least, because space 'tas' learns "
            "weights and choices from different ones. Make it larger."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first, second = (
        Split(train.images[rows], train.labels[rows], train.ids[rows])
        for rows in (order[: count // 2].sort().values, order[count // 2 :].sort().values)
    )
    return replace(dataset, train=first), second


def _losses(training: Training) -> Sequence[AnyLoss]:
    """The configured losses without those that look at stages, whose widths change from step to step."""
    kept = [loss for loss in training.config.weighted_losses if not loss.needs.student_maps]
    teaches = any(loss.weight > 0 and not loss.needs.another_term for loss in kept)
    return kept if teaches else [*kept, Kd(temperature=2.0)]
