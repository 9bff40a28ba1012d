"""The catalogue as people and programs read it."""

import difflib
import json
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compression.catalogue import catalogue
from compression.errors import InputError
from compression.measured import measured_of
from compression.types import Frozen

STAGES = {
    "distill": ("losses", "combinations", "samplers", "procedures", "mergers", "augmenters"),
    "select": ("sources", "selectors"),
    "search": ("searchers", "spaces", "proposers", "filters", "priors", "criteria"),
    "sparsify": ("sparsifiers",),
    "quantize": ("quantizers", "sensitivity"),
    "evaluate": ("evidence",),
}
"""Stage of a recipe -> the kinds it can name, in the order in which a method is looked for."""
SINGULAR = {"losses": "loss", "criteria": "criterion", "sensitivity": "sensitivity", "evidence": "evidence"}
"""Of the kinds that do not just lose an s."""


def show_methods(console: Console, kind: str | None, name: str | None, *, as_json: bool = False) -> None:
    """Print all kinds, one kind or stage, or the card and fields of one method; as JSON for programs.

    Raises:
        InputError: no such kind or method.
    """
    chosen = _chosen(kind, name)
    if as_json:
        facts = {each: [method_facts(each, config) for config in configs] for each, configs in chosen.items()}
        console.out(json.dumps(facts, indent=1), highlight=False)
        return
    for each, configs in chosen.items():
        if name is not None:
            _show_card(console, each, configs[0])
            return
        table = Table("method", "what it does", "needs", "measured here", title=each, show_lines=True)
        for config in configs:
            card = getattr(config, "card", None)
            summary = card.summary if card else (config.__doc__ or "").strip()
            found = "\n".join(row.words() for row in measured_of(each, _kind(config))) or "-"
            table.add_row(_kind(config), escape(summary), escape(card.needs) if card else "", escape(found))
        console.print(table)


def method_facts(kind: str, config: type[Frozen]) -> dict[str, Any]:
    """Return kind, the texts of the card, ``measured`` results, and ``fields``: name -> type, default and meaning.

    All are JSON values.

    A field that must be given has no default.
    """
    card = getattr(config, "card", None)
    fields = {}
    for field, facts in config.model_fields.items():
        fields[field] = {"type": _type_name(facts.annotation), "meaning": facts.description or ""}
        if not facts.is_required():
            fields[field]["default"] = to_jsonable_python(facts.get_default(call_default_factory=True))
    results = [row.model_dump(mode="json", exclude={"method"}) for row in measured_of(kind, _kind(config))]
    texts = card.model_dump() if card is not None else {}
    return {"kind": _kind(config), **texts, "measured": results, "fields": fields}


def _chosen(kind: str | None, name: str | None) -> dict[str, list[type[Frozen]]]:
    """Return the asked part of the catalogue: everything, some kinds, or one method of one kind."""
    kinds = catalogue()
    if kind is None:
        return kinds
    aliases = {SINGULAR.get(each, each.removesuffix("s")): (each,) for each in kinds}
    aliases |= {stage: tuple(each for each in parts if each in kinds) for stage, parts in STAGES.items()}
    aliases |= {each: (each,) for each in kinds}
    if kind not in aliases:
        raise InputError(_unknown("Kind", kind, list(kinds)))
    chosen = {each: kinds[each] for each in aliases[kind]}
    if name is None:
        return chosen
    for each, configs in chosen.items():
        for config in configs:
            if _kind(config) == name:
                return {each: [config]}
    raise InputError(_unknown("Method", name, [_kind(config) for configs in chosen.values() for config in configs]))


def _show_card(console: Console, kind: str, config: type[Frozen]) -> None:
    card = getattr(config, "card", None)
    if card is not None:
        for field, value in card.model_dump().items():
            console.print(f"[bold]{field}[/]: {escape(value)}")
    for row in measured_of(kind, _kind(config)):
        console.print(f"[bold]measured[/]: {escape(row.words())}; {escape(row.setting)}")
    table = Table("field", "type", "default", "meaning")
    for field, facts in config.model_fields.items():
        default = "required" if facts.is_required() else str(facts.get_default(call_default_factory=True))
        table.add_row(*map(escape, (field, _type_name(facts.annotation), default, facts.description or "")))
    console.print(table)


def _kind(config: type[Frozen]) -> str:
    return config.model_fields["kind"].default


def _type_name(annotation: Any) -> str:
    """Return the type as one writes it, without modules: ``int | None``, ``tuple[float, ...]``, ``'kd'``."""
    parts, origin = get_args(annotation), get_origin(annotation)
    if not parts:
        plain = {type(None): "None", Ellipsis: "..."}.get(annotation)
        return plain or getattr(annotation, "__name__", str(annotation))
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin is Annotated:
        return _type_name(parts[0])
    names = [_type_name(part) for part in parts]
    return " | ".join(names) if origin in (Union, UnionType) else f"{_type_name(origin)}[{', '.join(names)}]"


def _unknown(what: str, found: str, known: list[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"{what} '{found}' does not exist, expected one of: {', '.join(known)}." + (
        f" Did you mean '{close[0]}'?" if close else ""
    )
