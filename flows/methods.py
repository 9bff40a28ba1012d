"""The catalogue as people read it."""

import difflib

from rich.console import Console
from rich.table import Table

from compression.catalogue import catalogue
from compression.errors import InputError


def show_methods(console: Console, kind: str | None, name: str | None) -> None:
    """Print all kinds, one kind, or the card and fields of one method.

    Raises:
        InputError: no such kind or method.
    """
    kinds = catalogue()
    if kind is not None and kind not in kinds:
        raise InputError(_unknown("Kind", kind, list(kinds)))
    for each, configs in kinds.items():
        if kind not in (None, each):
            continue
        by_name = {config.model_fields["kind"].default: config for config in configs}
        if name is not None:
            if name not in by_name:
                raise InputError(_unknown("Method", name, list(by_name)))
            _show_card(console, by_name[name])
            return
        table = Table("method", "what it does", "source", title=each)
        for method, config in by_name.items():
            card = getattr(config, "card", None)
            table.add_row(method, card.summary if card else (config.__doc__ or "").strip(), card.paper if card else "")
        console.print(table)


def _show_card(console: Console, config: type) -> None:
    card = getattr(config, "card", None)
    if card is not None:
        for field, value in card.model_dump().items():
            console.print(f"[bold]{field}[/]: {value}")
    table = Table("field", "type", "default", "meaning")
    for field, facts in config.model_fields.items():
        kind = getattr(facts.annotation, "__name__", str(facts.annotation))
        default = "required" if facts.is_required() else str(facts.get_default(call_default_factory=True))
        table.add_row(field, kind, default, facts.description or "")
    console.print(table)


def _unknown(what: str, found: str, known: list[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"{what} '{found}' does not exist, expected one of: {', '.join(known)}." + (
        f" Did you mean '{close[0]}'?" if close else ""
    )
