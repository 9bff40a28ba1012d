import threading
import time
from pathlib import Path

import pytest

from compression.types import Frozen
from tasks import tracking
from tasks.artifacts import Store
from tasks.settings import settings
from tasks.stage import (
    DirectRunner,
    PlanRunner,
    Stage,
    StageIndex,
    StageOutput,
    StageResult,
    Work,
    stage,
    use_runner,
)


class Config(Frozen):
    text: str = "hello"


class Counter:
    """A stage that counts how often it really ran."""

    def __init__(self) -> None:
        self.runs = 0
        self.fail_first = False
        self.delay = 0.0

    def make(self, name: str = "count") -> Stage:
        def work_on(work: Work, *, name: str, config: Config, source: StageResult | None = None) -> StageOutput:
            """Count."""
            self.runs += 1
            time.sleep(self.delay)
            marker = work.scratch / "half-way"
            if self.fail_first and not marker.exists():
                marker.write_text("here")
                raise RuntimeError("killed half-way")
            before = (work.open(source) / "text").read_text() if source else ""
            with work.store.put("text") as draft:
                (draft.folder / "text").write_text(before + config.text)
            return StageOutput(artifact=draft.done(), metrics={"accuracy": 0.5}, info={"resumed": marker.exists()})

        return stage(name, libraries=())(work_on)


@pytest.fixture
def runner(home: Path) -> DirectRunner:
    store = Store(settings().store_dir)
    store.prepare()
    parent = tracking._create("test", {"stage": "recipe"})
    return DirectRunner(index=StageIndex(store), parent_run=parent)


def test_same_work_is_skipped_and_other_work_is_not(runner: DirectRunner) -> None:
    counter = Counter()
    count = counter.make()
    with use_runner(runner):
        first = count(name="a", config=Config())
        again = count(name="a", config=Config())
        other = count(name="a", config=Config(text="bye"))
    assert counter.runs == 2
    assert (first.cached, again.cached, other.cached) == (False, True, False)
    assert again.artifact == first.artifact
    assert other.artifact != first.artifact


def test_a_changed_input_artifact_changes_the_key(runner: DirectRunner) -> None:
    counter = Counter()
    count = counter.make()
    with use_runner(runner):
        one = count(name="one", config=Config(text="1"))
        two = count(name="two", config=Config(text="2"))
        assert count.key("x", {"config": Config(), "source": one}) != count.key(
            "x", {"config": Config(), "source": two}
        )
        assert count(name="x", config=Config(), source=one).inputs == (one.artifact.sha256,)


def test_changed_code_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.stage import code_digest

    package = tmp_path / "methods_under_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "loss.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = code_digest(("methods_under_test",))
    code_digest.cache_clear()
    (package / "loss.py").write_text("x = 2\n")
    changed = code_digest(("methods_under_test",))
    assert changed != before
    code_digest.cache_clear()
    (package / "loss.py").write_text('"""A comment is not code."""\n\nx   =   2  # nor is this\n')
    assert code_digest(("methods_under_test",)) == changed
    code_digest.cache_clear()


def test_a_damaged_artifact_is_recomputed_not_served(runner: DirectRunner) -> None:
    counter = Counter()
    count = counter.make()
    with use_runner(runner):
        first = count(name="a", config=Config())
        (runner.index.store.place(first.artifact) / "text").write_text("hellp")
        again = count(name="a", config=Config())
    assert counter.runs == 2
    assert not again.cached
    assert again.artifact == first.artifact


def test_a_damaged_record_is_recomputed(runner: DirectRunner) -> None:
    counter = Counter()
    count = counter.make()
    with use_runner(runner):
        first = count(name="a", config=Config())
        path = runner.index.folder / f"{first.key}.json"
        path.write_text(path.read_text()[:40])
        assert not count(name="a", config=Config()).cached
    assert counter.runs == 2


def test_a_failed_stage_finds_its_scratch_again_and_clears_it_after_success(runner: DirectRunner) -> None:
    counter = Counter()
    counter.fail_first = True
    count = counter.make()
    with use_runner(runner):
        with pytest.raises(RuntimeError, match="half-way") as caught:
            count(name="a", config=Config())
        assert "Stage 'count' of 'a' failed" in caught.value.__notes__[0]
        assert count(name="a", config=Config()).info["resumed"] is True
    assert not list((settings().home_dir / "scratch").iterdir())


def test_from_a_stage_on_kept_results_are_not_used(runner: DirectRunner) -> None:
    early, late = Counter(), Counter()
    first, second = early.make("early"), late.make("late")
    with use_runner(runner):
        second(name="a", config=Config(), source=first(name="a", config=Config()))
    forced = DirectRunner(index=runner.index, parent_run=runner.parent_run, force_from="late")
    with use_runner(forced):
        second(name="a", config=Config(), source=first(name="a", config=Config()))
    assert (early.runs, late.runs) == (1, 2)


def test_a_plan_runs_nothing_and_knows_what_is_kept(runner: DirectRunner) -> None:
    counter = Counter()
    count = counter.make()
    with use_runner(runner):
        count(name="a", config=Config())
    plan = PlanRunner(runner.index)
    with use_runner(plan):
        kept = count(name="a", config=Config())
        todo = count(name="b", config=Config(text="new"), source=kept)
        after = count(name="c", config=Config(), source=todo)
    assert counter.runs == 1
    assert [result.is_pending for result in (kept, todo, after)] == [False, True, True]


def test_two_threads_do_the_same_work_once(runner: DirectRunner) -> None:
    counter = Counter()
    counter.delay = 0.5
    count = counter.make()
    found: list[StageResult] = []

    def go() -> None:
        with use_runner(runner):
            found.append(count(name="a", config=Config()))

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.runs == 1
    assert sorted(result.cached for result in found) == [False, True]


def test_mlflow_shows_fresh_and_cached_stages_as_children(runner: DirectRunner) -> None:
    count = Counter().make()
    with use_runner(runner):
        first = count(name="a", config=Config())
        count(name="a", config=Config())
    runs = tracking.children(runner.parent_run.id)
    assert len(runs) == 2
    assert {run.data.tags.get("cached", "false") for run in runs} == {"true", "false"}
    assert all(run.data.metrics["accuracy"] == 0.5 for run in runs)
    assert {run.data.tags["stage_key"] for run in runs} == {first.key}


def test_a_failing_stage_leaves_a_failed_run_with_the_error(runner: DirectRunner) -> None:
    counter = Counter()
    counter.fail_first = True
    count = counter.make()
    with use_runner(runner), pytest.raises(RuntimeError):
        count(name="a", config=Config())
    (run,) = tracking.children(runner.parent_run.id)
    assert run.info.status == "FAILED"
    assert "half-way" in run.data.tags["error"]
