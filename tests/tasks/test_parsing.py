"""Threads that build syntax trees do not disturb each other."""

import ast
import gc
import sys
import threading

import pytest

from tasks.parsing import serialize_parsing

SOURCE = "def f(a, b):\n    return [a + b, {a: b}]\n" * 20


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the collector does not run inside the parser")
def test_a_tree_built_while_the_collector_lets_another_thread_run_is_whole() -> None:
    serialize_parsing()
    now, done, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        now.wait(10)
        ast.parse(SOURCE)
        done.set()

    def let_it_run(phase: str, info: dict[str, int]) -> None:
        inside = sys._getframe().f_back
        if (
            threading.current_thread() is threading.main_thread()
            and not seen
            and inside
            and inside.f_code.co_filename == ast.__file__
        ):
            seen.append(phase)
            now.set()
            done.wait(0.5)  # in turn it cannot be done before this thread is

    thread = threading.Thread(target=other)
    thread.start()
    thresholds = gc.get_threshold()
    gc.callbacks.append(let_it_run)
    try:
        gc.set_threshold(10)
        tree = ast.parse(SOURCE)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(let_it_run)
    thread.join(10)
    assert seen, "the collector did not run inside the parser"
    assert len(tree.body) == 20
    assert done.is_set()


def test_it_is_set_once() -> None:
    serialize_parsing()
    first = ast.parse
    serialize_parsing()
    assert ast.parse is first
