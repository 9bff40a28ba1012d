"""Why the agent does not do what was asked for."""

from __future__ import annotations


class Refused(Exception):
    """A bundle, or another signed file, is not taken; nothing was changed. ``code`` says why in one word."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Failed(Exception):
    """A bundle was tried and is not good here; the model from before is active."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
