"""Runners that carry the story out only as far as one unit of it needs: one teacher, or one finalist."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.stage import DirectRunner, PlanRunner, Runner, Stage, StageIndex, StageResult, placeholder, use_runner

Unit = tuple[str, str | int]
"""``("teacher", name)`` or ``("student", number of the finalist)``."""

BEFORE_TEACHERS = ("data",)


class UnitIsDone(Exception):  # noqa: N818  (no error: it ends the story where the unit ends)
    """Raised by a runner at the first stage behind its unit."""


class Course:
    """Where the story is, seen from one unit."""

    def __init__(self, unit: Unit) -> None:
        self.kind, self.which = unit
        self._students_began = False

    def wants(self, stage: str, name: str) -> bool:
        """Whether the unit needs this stage.

        Raises:
            UnitIsDone: the unit ends before this stage.
        """
        if self.kind == "teacher":
            if stage in BEFORE_TEACHERS:
                return True
            if stage not in ("teacher", "teacher_outputs"):
                raise UnitIsDone
            return name == self.which
        student = re.match(r"student-(\d+)(?!\d)", name)
        if student is None and self._students_began:
            raise UnitIsDone
        self._students_began = self._students_began or student is not None
        return student is None or int(student[1]) == self.which


class UnitPlan(PlanRunner):
    """Looks one unit's stages up and runs nothing."""

    def __init__(self, index: StageIndex, unit: Unit) -> None:
        super().__init__(index)
        self.course = Course(unit)

    def run(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult:
        """The kept result or a placeholder; what other units do is not in ``results``."""
        if not self.course.wants(stage.name, name):
            return placeholder(stage, name)
        return super().run(stage, name, inputs)


@dataclass
class UnitRunner(DirectRunner):
    """Does one unit's stages and what they need; what is kept is not shown again."""

    unit: Unit = ("", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.course = Course(self.unit)

    def run(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult:
        """A placeholder for other units' work; else the kept result, or a fresh one."""
        if not self.course.wants(stage.name, name):
            return placeholder(stage, name)
        kept = None if self.force_from else self.index.get(stage.key(name, inputs))
        return kept or super().run(stage, name, inputs)


def carry_out_unit(recipe: Any, runner: Runner) -> None:
    """Go through the story with a runner that ends at its unit's end."""
    from flows.compress import story

    with use_runner(runner):
        try:
            story(recipe)
        except UnitIsDone:
            return
