"""A defect of Python 3.11 that ends flow runs by chance, kept away."""

import ast
import sys
import threading
from functools import wraps
from typing import Any


def serialize_parsing() -> None:
    """Let one thread at a time build a syntax tree.

    Python 3.11 up to 3.11.7 counts the depth of a tree in one place for all threads (CPython issue 106905). When the
    garbage collector runs while one thread builds its tree, another may build its own meanwhile, and the first ends
    with "SystemError: AST constructor recursion depth mismatch". Prefect's threads and our imports both have pydantic
    and `inspect` parse source. From 3.12 on the collector does not run there.
    """
    if sys.version_info >= (3, 12) or hasattr(ast.parse, "__wrapped__"):
        return
    parse, turn = ast.parse, threading.RLock()

    @wraps(parse)
    def parse_in_turn(*args: Any, **kwargs: Any) -> Any:
        with turn:
            return parse(*args, **kwargs)

    ast.parse = parse_in_turn
