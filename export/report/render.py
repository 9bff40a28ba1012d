"""Templates to text: those of the report's folder, and of the folder of whoever shares its look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def render(template: str, facts: Mapping[str, Any], *, escape: bool, folder: Path | None = None) -> str:
    """The template filled in; an unknown name in it is an error. ``folder`` is looked into before the report's own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    own = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([folder, own] if folder is not None else own),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(facts)
