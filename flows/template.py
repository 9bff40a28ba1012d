"""``stillhouse init``: the shipped image-folder template with a name and a data folder filled in."""

import re
from pathlib import Path

from compression.errors import InputError
from tasks.settings import SOURCE_ROOT

TEMPLATE = SOURCE_ROOT / "recipes" / "image-folder-template.yaml"


def write_template(name: str, data: Path, folder: Path) -> Path:
    """The new recipe's path.

    Raises:
        InputError: the name cannot be a recipe's name, or the file exists already.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,47}", name):
        raise InputError(
            f"Recipe name '{name}' has other characters than expected: lower case letters, digits, dashes. Rename it."
        )
    path = folder / f"{name}.yaml"
    if path.exists():
        raise InputError(f"Recipe '{path}' exists already. Choose another name, or delete it.")
    text = TEMPLATE.read_text(encoding="utf-8")
    text = re.sub(r"^name: .*$", f"name: {name}", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^  root: .*$", f"  root: {data}", text, count=1, flags=re.MULTILINE)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
