"""The recipe: everything one run needs, as one immutable value. Read from YAML, refused with place and way out."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator

from compression.attention import AttentionConfig
from compression.augment import AnyAugment, NoAugment, Robust
from compression.calibration import Calibrate
from compression.data import AnyData
from compression.distill import DistillConfig, Progressive
from compression.errors import RecipeError
from compression.quantize import AnyQuantizer
from compression.quantize.sensitivity import SensitivityConfig
from compression.robustness.accuracy import RobustnessConfig
from compression.search import AnySearch
from compression.select import SelectConfig
from compression.sparsify import AnySparsifier
from compression.teachers import Teacher
from compression.types import Frozen, Slug
from compression.zoo import Group
from export.gate import Policy
from export.model_card.stated import Card
from export.promotion import Promotion
from export.targets import AnyTarget
from flows.policy_file import include_policy
from flows.safe_yaml import load_yaml, read_limited


class Recipe(Frozen, title="Written out"):
    """One whole run, from teachers to a verdict on what may ship."""

    name: Slug
    """Names the run folder and the registered model."""
    description: str = ""
    """What it is for, in one line."""
    seed: int = Field(default=0, ge=0)
    """Seeds every split, initialisation, permutation and augmented view."""
    data: AnyData
    """Where images and labels come from."""
    unlabelled: AnyData | None = None
    """More images of the same kind, whose labels are not looked at: students learn what teachers say about them."""
    augment: AnyAugment = NoAugment()
    """Training-time augmentation; a pure function of seed, view and sample, so that teacher outputs can be kept."""
    teachers: tuple[Teacher, ...] = Field(min_length=1)
    """The big models, one entry each."""
    select: SelectConfig
    """Which teachers make the panel."""
    search: AnySearch
    """Which students are tried."""
    distill: DistillConfig
    """How a student is taught."""
    sparsify: AnySparsifier | None = None
    """Zeros in the distilled student's weights, kept by what follows; the dense student stays as a control."""
    sensitivity: SensitivityConfig | None = SensitivityConfig()
    """What every layer costs when it alone is rounded or cut: a heat map, and what accuracy control goes by."""
    quantize: AnyQuantizer | None = None
    """INT8, after training or by fine-tuning; required by targets with precision int8."""
    calibrate: Calibrate | None = Calibrate()
    """A temperature for each form of a student, stored in its files; ``apply`` divides the logits in them."""
    targets: tuple[AnyTarget, ...] = Field(min_length=1)
    """The runtimes and precisions that files are made for."""
    robustness: RobustnessConfig | None = RobustnessConfig()
    """Accuracy of every file on corrupted test images."""
    attention: AttentionConfig | None = AttentionConfig()
    """Whether students look where their teacher looks; pictures for the report."""
    policy: Policy
    """What an accepted model must prove."""
    promotion: Promotion = Promotion()
    """When an accepted model replaces the champion."""
    card: Card = Card()
    """What people state in the model card: use and licences."""
    benchmark_rounds: PositiveInt = 30
    """Interleaved rounds of the latency benchmark; more rounds, narrower noise floor."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        names = [teacher.name for teacher in self.teachers]
        _refuse_repeats("teachers", names)
        _refuse_repeats("targets", [target.name for target in self.targets])
        _refuse_repeats("card.teacher_licences", [each.teacher for each in self.card.teacher_licences])
        strangers = [each.teacher for each in self.card.teacher_licences if each.teacher not in names]
        if strangers:
            raise ValueError(
                f"card.teacher_licences has '{strangers[0]}', expected one of the teachers {', '.join(names)}."
            )
        if self.select.panel_size > len(names):
            raise ValueError(
                f"select.panel_size is {self.select.panel_size}, but there are {len(names)} teachers. "
                "Lower it, or add teachers."
            )
        with_model = [teacher.name for teacher in self.teachers if teacher.model is not None]
        if not with_model:
            raise ValueError(
                "teachers has black boxes alone, expected one with a model among them: students are compared with its "
                "size and speed. Add one, say of source train."
            )
        for number, space in enumerate(self.search.spaces):
            parent = getattr(space, "parent", None)
            if parent is not None and parent not in with_model:
                raise ValueError(
                    f"search.spaces.{number}.parent is '{parent}', expected one of {', '.join(with_model)}."
                )
        single = [n for n, s in enumerate(self.search.spaces) if not isinstance(getattr(s, "base", None), Group)]
        if isinstance(self.distill.procedure, Progressive) and single:
            raise ValueError(
                f"search.spaces.{single[0]} is of single networks, but distill.procedure progressive trains groups. "
                "Take spaces {kind: scale, base: {kind: group, members: [...]}}."
            )
        wants = self.distill.needs_teachers or ("a loss" if self.distill.teacher_features else "")
        if wants and len(with_model) < len(names):
            raise ValueError(
                f"teachers has a black box, but {wants} of distill needs more than its outputs. Take losses that "
                "compare logits, stored teachers, and procedure single."
            )
        formats = self.sensitivity.formats if self.sensitivity is not None else ()
        asking = [n for n, space in enumerate(self.search.spaces) if space.wants_sensitivity]
        if asking and "half the channels" not in formats:
            raise ValueError(
                f"search.spaces.{asking[0]} has use_sensitivity, but sensitivity has no column 'half the channels'. "
                "Add it to sensitivity.formats."
            )
        if self.quantize is not None and self.quantize.control is not None and formats and "int8" not in formats:
            raise ValueError(
                "quantize has control, but sensitivity has no column 'int8', by which it orders the layers. Add it to "
                "sensitivity.formats."
            )
        if isinstance(self.augment, Robust) and (wants or self.distill.teachers.adds_snapshot):
            raise ValueError(
                "augment is robust, under which stored teachers look at clean views, but distill runs teachers live. "
                "Take augment shift_flip, or losses and combinations of stored outputs."
            )
        if self.quantize is None:
            for target in self.targets:
                if target.precision == "int8":
                    raise ValueError(
                        f"Target '{target.name}' has precision int8, but the recipe has no quantize section. "
                        "Add `quantize: {kind: qat, ...}`, or use precision float32."
                    )
        if not any(target.kind == "onnxruntime" for target in self.targets):
            raise ValueError(
                "targets has no onnxruntime entry, but the evidence is measured with ONNX Runtime. Add one."
            )
        return self


def _refuse_repeats(where: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{where} has the name '{repeated[0]}' twice, expected unique names. Rename one.")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``a.b.0=value`` overrides applied.

    Raises:
        RecipeError: unreadable file, not YAML, or values that do not fit; the message lists every problem with
            file, line, place in the file, what was found and what is expected.
    """
    try:
        text = read_limited(path, what=f"Recipe '{path}'")
    except FileNotFoundError as error:
        near = sorted(str(other) for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f" Recipes there: {', '.join(near)}." if near else " Shipped recipes are in recipes/."
        raise RecipeError(f"Recipe '{path}' does not exist.{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Recipe '{path}' cannot be read: {error}.") from error
    raw, node = load_yaml(text, what=f"Recipe '{path}'")
    lines = _line_numbers(node)
    if not isinstance(raw, dict):
        raise RecipeError(f"Recipe '{path}' holds {type(raw).__name__}, expected a mapping of sections.")
    files = include_policy(raw, path, lines)
    raw = _unshared(raw)
    for override in overrides:
        _apply(raw, override)
    return parse_recipe(raw, source=str(path), lines=lines, files=files)


def _unshared(value: Any) -> Any:
    """A copy in which an override of one place does not change another with the same YAML anchor."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def parse_recipe(
    raw: Mapping[str, Any],
    *,
    source: str = "recipe",
    lines: Mapping[tuple, int] | None = None,
    files: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe from nested plain values; RecipeError lists every problem. ``files``: section -> where it came from."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = explain(error, raw)
        rows = []
        for place, message in problems:
            line = (lines or {}).get(place)
            where = ".".join(str(part) for part in place) or "(whole recipe)"
            file = (files or {}).get(str(place[0]), source) if place else source
            rows.append(f"  {file}{f':{line}' if line else ''}  {where}: {message}")
        count = "1 problem" if len(rows) == 1 else f"{len(rows)} problems"
        raise RecipeError(f"Recipe '{source}' has {count}; nothing was run.\n" + "\n".join(rows)) from error


def explain(error: ValidationError, raw: Any) -> list[tuple[tuple, str]]:
    """(place, message) per real problem: for a union, only the member whose ``kind`` was written counts."""
    kinds = _kinds_by_class()
    problems: dict[tuple, str] = {}
    for item in error.errors():
        place: list[Any] = []
        value: Any = raw
        refused: str | None = None
        for part in _plain(item["loc"]):
            if isinstance(part, str) and part in kinds and not (isinstance(value, Mapping) and part in value):
                written = value.get("kind") if isinstance(value, Mapping) else None
                if written != kinds[part]:
                    refused = kinds[part]
                    break
                continue
            place.append(part)
            value = _child(value, part)
        where = tuple(place)
        if refused is not None:
            problems.setdefault((*where, "kind"), _kind_message(value, _plain(item["loc"]), error, kinds))
        else:
            problems[where] = _message(item, value)
    return [(place, message) for place, message in problems.items() if message]


def _plain(loc: Sequence[Any]) -> tuple[Any, ...]:
    """A location whose class names are bare: pydantic writes ``function-after[check(), Name]`` for checked models."""
    return tuple(
        re.findall(r"\w+", part)[-1] if isinstance(part, str) and part.startswith("function-") else part for part in loc
    )


def _kind_message(value: Any, loc: Sequence[Any], error: ValidationError, kinds: Mapping[str, str]) -> str:
    """Empty when another member of the union did match by kind."""
    depth = next(number for number, part in enumerate(loc) if isinstance(part, str) and part in kinds)
    for number in range(len(loc) - 1, -1, -1):
        if isinstance(loc[number], str) and loc[number] in kinds:
            depth = number
            break
    prefix = tuple(loc[:depth])
    places = [_plain(item["loc"]) for item in error.errors()]
    members = {
        kinds[str(place[depth])]
        for place in places
        if place[:depth] == prefix and len(place) > depth and str(place[depth]) in kinds
    }
    written = value.get("kind") if isinstance(value, Mapping) else None
    if written in members:
        return ""
    wanted = ", ".join(sorted(members))
    if written is None:
        return f"is missing, expected one of: {wanted}. Say which kind this section is."
    close = difflib.get_close_matches(str(written), sorted(members), n=1)
    return f"is '{written}', expected one of: {wanted}." + (f" Did you mean '{close[0]}'?" if close else "")


def _message(item: Any, value: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key. Remove it, or correct its spelling (`stillhouse methods` lists the fields of each method)."
    if kind == "missing":
        return "is missing. Add it."
    if kind == "value_error":
        return str(context.get("error", item["msg"]))
    return f"is {value!r}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _child(value: Any, part: Any) -> Any:
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return None


def _kinds_by_class() -> dict[str, str]:
    """Class name -> literal ``kind`` of every config that has one."""
    found: dict[str, str] = {}
    todo: list[type[BaseModel]] = [Frozen]
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        field = cls.model_fields.get("kind")
        if field is not None and isinstance(field.default, str):
            found[cls.__name__] = field.default
    return found


def _line_numbers(node: Any, place: tuple = ()) -> dict[tuple, int]:
    lines = {place: node.start_mark.line + 1} if node is not None else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines.update(_line_numbers(value, (*place, key.value)))
            lines[(*place, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines.update(_line_numbers(value, (*place, number)))
    return lines


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b.0=value`` in nested plain values; the value is read as YAML."""
    dotted, separator, text = override.partition("=")
    parts = [int(part) if part.isdigit() else part for part in dotted.strip().split(".")]
    if not separator or not all(str(part) for part in parts):
        raise RecipeError(
            f"Override '{override}' has no '=', expected NAME.NAME=VALUE, for example --set distill.train.epochs=5."
        )
    value, _ = load_yaml(text, what=f"The value of override '{override[:200]}'")
    target: Any = raw
    for depth, part in enumerate(parts[:-1]):
        child = _child(target, part)
        if not isinstance(child, dict | list):
            _refuse_override(override, parts[: depth + 1], target)
        target = child
    last = parts[-1]
    if isinstance(target, list):
        if not isinstance(last, int) or last >= len(target):
            _refuse_override(override, parts, target)
        target[last] = value
    elif isinstance(target, dict):
        target[str(last)] = value  # a new key is checked with the whole recipe
    else:
        _refuse_override(override, parts, target)


def _refuse_override(override: str, parts: Sequence[Any], target: Any) -> NoReturn:
    choices = [str(key) for key in target] if isinstance(target, dict) else [str(n) for n in range(len(target or ()))]
    close = difflib.get_close_matches(str(parts[-1]), choices, n=1)
    raise RecipeError(
        f"Override '{override}' names '{'.'.join(str(part) for part in parts)}', which the recipe does not have; "
        f"expected one of: {', '.join(choices)}." + (f" Did you mean '{close[0]}'?" if close else "")
    )


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
