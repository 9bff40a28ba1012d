import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

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


def another_parent() -> tracking.Run:
    return tracking._create("another", {"stage": "recipe"})


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
    forced = DirectRunner(index=runner.index, parent_run=another_parent(), force_from="late")
    with use_runner(forced):
        second(name="a", config=Config(), source=first(name="a", config=Config()))
    assert (early.runs, late.runs) == (1, 2)


def test_a_killed_forced_run_goes_on_and_keeps_what_it_had_redone(runner: DirectRunner) -> None:
    early, late, last = Counter(), Counter(), Counter()
    first, second, third = early.make("early"), late.make("late"), last.make("last")

    def story() -> list[StageResult]:
        made = first(name="a", config=Config())
        made = second(name="a", config=Config(), source=made)
        return [made, third(name="a", config=Config(), source=made)]

    with use_runner(runner):
        story()
    parent = another_parent()
    with use_runner(DirectRunner(index=runner.index, parent_run=parent, force_from="late")):
        second(name="a", config=Config(), source=first(name="a", config=Config()))  # and here it was killed
    assert (early.runs, late.runs, last.runs) == (1, 2, 1)
    again = DirectRunner(index=runner.index, parent_run=parent, force_from="late")
    with use_runner(again):
        kept, redone = story()
    assert (early.runs, late.runs, last.runs) == (1, 2, 2)
    assert (kept.cached, redone.cached) == (True, False)
    assert kept.parent_run == redone.parent_run == parent.id


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


def test_mlflow_shows_fresh_and_cached_stages_as_children_once(runner: DirectRunner) -> None:
    count = Counter().make()
    other = DirectRunner(index=runner.index, parent_run=another_parent())
    with use_runner(runner):
        first = count(name="a", config=Config())
        count(name="a", config=Config())
    with use_runner(other):
        count(name="a", config=Config())
        count(name="a", config=Config())
    (fresh,) = tracking.children(runner.parent_run.id)
    (cached,) = tracking.children(other.parent_run.id)
    assert [run.data.tags.get("cached", "false") for run in (fresh, cached)] == ["false", "true"]
    assert cached.data.tags["source_run"] == fresh.info.run_id
    assert all(run.data.metrics["accuracy"] == 0.5 for run in (fresh, cached))
    assert {run.data.tags["stage_key"] for run in (fresh, cached)} == {first.key}


def test_a_result_says_what_it_cost_and_what_it_is_made_of(runner: DirectRunner) -> None:
    counter = Counter()
    count = counter.make()
    with use_runner(runner):
        source = count(name="source", config=Config())
        one = count(name="one", config=Config(), source=source)
        other = count(name="other", config=Config(text="bye"), source=source)
        late = count(name="late", config=Config(), source=other)
    assert one.parent_run == runner.parent_run.id
    assert one.cpu_seconds is not None
    assert 0 <= one.cpu_seconds < 30
    assert one.made_of["libraries"] == {}
    assert one.made_of["config"] == late.made_of["config"] != other.made_of["config"], "artifacts are in `inputs`"
    assert one.made_of["code"] == other.made_of["code"]
    kept = runner.index.get(one.key)
    assert kept is not None
    assert kept.model_copy(update={"cached": False}) == one


def key_of(name: str, inputs: dict[str, Any]) -> str:
    """The stage key, written out: a change of it throws away what people have in their stores."""
    payload = {"stage": "count", "name": name, "code": "code", "libraries": {}, "inputs": inputs}
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def test_records_and_keys_of_earlier_versions_still_count(
    runner: DirectRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store outlives the program: a record without the newer fields is a kept result, under the same key."""
    monkeypatch.setattr("tasks.stage.code_digest", lambda modules: "code")
    counter = Counter()
    count = counter.make()
    with use_runner(runner):
        made = count(name="a", config=Config())
        later = count(name="b", config=Config(), source=made)
        assert made.key == key_of("a", {"config": {"text": "hello"}})
        source = {"kind": "text", "sha256": made.artifact.sha256}
        assert later.key == key_of("b", {"config": {"text": "hello"}, "source": source})
        path = runner.index.folder / f"{later.key}.json"
        record = json.loads(path.read_text())
        for field in ("cpu_seconds", "energy_j", "made_of", "parent_run"):
            del record[field]
        path.write_text(json.dumps(record))
        kept = count(name="b", config=Config(), source=made)
    assert counter.runs == 2
    assert kept.cached
    assert (kept.cpu_seconds, kept.energy_j, kept.made_of, kept.parent_run) == (None, None, {}, "")


def test_what_a_killed_process_left_is_cleared_when_its_stage_turns_out_kept(runner: DirectRunner) -> None:
    count = Counter().make()
    with use_runner(runner):
        first = count(name="a", config=Config())
        scratch = settings().home_dir / "scratch" / first.key
        scratch.mkdir()
        (scratch / "step-1").write_text("")
        assert count(name="a", config=Config()).cached
    assert not scratch.exists()


def test_an_interrupted_stage_goes_on_in_the_same_mlflow_run(runner: DirectRunner) -> None:
    calls: list[tracking.Run] = []

    def work_on(work: Work, *, name: str) -> StageOutput:
        calls.append(work.run)
        work.run.log_series([{"epoch": epoch, "loss": 1.0 / (epoch + 1)} for epoch in range(len(calls) + 2)])
        tracking.log_candidate(work.run, "trial-0", params={"width": 8}, metrics={"accuracy": 0.25})
        if len(calls) == 1:
            raise KeyboardInterrupt
        with work.store.put("text") as draft:
            (draft.folder / "text").write_text("done")
        return StageOutput(artifact=draft.done(), metrics={"accuracy": 0.5})

    learn = stage("learn", libraries=())(work_on)
    with use_runner(runner):
        with pytest.raises(KeyboardInterrupt):
            learn(name="a")
        (before,) = tracking.children(runner.parent_run.id)
        assert before.info.status == "KILLED"
        learn(name="a")
    (run,) = tracking.children(runner.parent_run.id)
    assert run.info.run_id == before.info.run_id
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags
    history = tracking.client().get_metric_history(run.info.run_id, "loss")
    assert sorted(point.step for point in history) == [0, 1, 2, 3]
    assert len(tracking.client().get_metric_history(run.info.run_id, "accuracy")) == 1
    (trial,) = tracking.children(run.info.run_id)
    assert (trial.info.run_name, trial.info.status) == ("trial-0", "FINISHED")
    assert len(tracking.client().get_metric_history(trial.info.run_id, "accuracy")) == 1


def test_a_failing_stage_leaves_a_failed_run_with_the_error(runner: DirectRunner) -> None:
    counter = Counter()
    counter.fail_first = True
    count = counter.make()
    with use_runner(runner), pytest.raises(RuntimeError):
        count(name="a", config=Config())
    (run,) = tracking.children(runner.parent_run.id)
    assert run.info.status == "FAILED"
    assert "half-way" in run.data.tags["error"]
