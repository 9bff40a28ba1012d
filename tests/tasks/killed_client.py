"""MLflow's client in a process that is killed before one of its writing calls."""

from typing import Any


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it."""


class Kills:
    """The client, but the process dies instead of making the writing call number ``number``."""

    def __init__(self, client: Any, number: int) -> None:
        self.client, self.left = client, number

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.client, name)
        if not name.startswith(("set_", "delete_", "create_", "update_", "log_")):
            return call

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed(name)
            return call(*args, **kwargs)

        return counted
