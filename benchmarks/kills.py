"""What SIGKILL costs: a recipe killed at random moments and started again, against one that nobody disturbed.

    .venv/bin/python benchmarks/kills.py --kills 50 --recipe recipes/digits.yaml --folder /tmp/kills --json kills.json

One unbroken run is the reference; the seconds of its stages, one after the other, are the axis of its work. For each
following run that axis is cut into ``--kills-per-run`` equal parts, and a moment is drawn from each: kills are uniform
over the work and spread over the stages. The process and all it has started are killed when the work comes to such a
moment, and it is started again in the same folder. The next run has a fresh store. One Prefect server serves all.

Work done again is measured in the start after a kill: the seconds from where its first unfinished stage begins to the
first step of it that no earlier start had come to (or to the stage's end), and no more than had been spent on the stage
before. The share is against the seconds of all stages of the reference, the writing of the run folder included.
Starting a process and looking up kept stages is no work.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.killing import Place, differing, faults, is_complete, kill, parents, prefect_server  # noqa: E402
from flows.progress import bars  # noqa: E402

POLL_SECONDS = 0.05
STARTS = 20
"""A run that needs more starts than this is lost."""

Stage = tuple[str, str]


@dataclass
class Kill:
    """One kill and what it cost."""

    run: int
    stage: str
    """What was under way; empty between stages."""
    at_s: float
    """Place on the axis of work."""
    spent_s: float = 0.0
    """Seconds spent on that stage so far."""
    again_s: float = 0.0
    """Work done again because of it."""


@dataclass
class Run:
    """One recipe, killed and started until it was done."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    lost: str = ""
    """Why it never came to its end."""
    compared: int = 0
    different: list[Stage] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class Attempt:
    """What one process did of one stage."""

    stage: Stage
    began: float
    ended: float
    done: bool
    steps: list[tuple[float, str, int]]


def attempts_of(events: list[dict[str, Any]], killed: dict[int, float]) -> list[Attempt]:
    """Stages in the order in which processes worked on them; ``killed`` is pid -> time."""
    found: list[Attempt] = []
    open_: Attempt | None = None
    for event in events:
        if event["what"] == "begin":
            began: float = event["time"]
            open_ = Attempt((event["stage"], event["name"]), began, killed.get(event["pid"], began), False, [])
            found.append(open_)
        elif event["what"] == "end" and open_ is not None:
            open_.ended, open_.done, open_ = event["time"], True, None
        elif event["what"] == "step" and open_ is not None:
            open_.steps.append((event["time"], event["text"], event["done"]))
        elif event["what"] == "start":
            open_ = None
    return found


def work_again(attempts: list[Attempt], stage: Stage) -> list[float]:
    """For each killed attempt on a stage but for the last: seconds that the next attempt did again."""
    mine = [each for each in attempts if each.stage == stage]
    seen: set[tuple[str, int]] = set()
    spent, again = 0.0, []
    for number, each in enumerate(mine):
        if number:
            new = next((at for at, text, done in each.steps if (text, done) not in seen), each.ended)
            again.append(min(spent, new - each.began))
        seen |= {(text, done) for _, text, done in each.steps}
        spent = max(spent, each.ended - each.began) if not each.steps else spent + each.ended - each.began
    return again


class Axis:
    """The work of the unbroken run."""

    def __init__(self, attempts: list[Attempt]) -> None:
        self.stages = [(each.stage, each.ended - each.began) for each in attempts]
        self.total = sum(seconds for _, seconds in self.stages)

    def place(self, at: float) -> tuple[Stage, float, set[Stage]]:
        """The stage that a moment lies in, how far in it, and all stages after it."""
        for number, (stage, seconds) in enumerate(self.stages):
            if at < seconds:
                return stage, at, {later for later, _ in self.stages[number + 1 :]}
            at -= seconds
        return self.stages[-1][0], self.stages[-1][1], set()


def until_moment(
    place: Place, process: subprocess.Popen[bytes], axis: Axis, at: float, killed: dict[int, float]
) -> bool:
    """Wait until the work comes to a moment; False when the process has ended before."""
    stage, offset, later = axis.place(at)
    while process.poll() is None:
        attempts = attempts_of(place.seen(), killed | {process.pid: time.time()})
        mine = [each for each in attempts if each.stage == stage]
        spent = sum(each.ended - each.began for each in mine if each.steps or each is mine[-1])
        if mine and (spent >= offset or mine[-1].done):
            return True
        if any(each.stage in later for each in attempts):
            return True
        time.sleep(POLL_SECONDS)
    return False


def unbroken(place: Place) -> int:
    """Let a run come to its end; its exit code."""
    process = place.start()
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            kill(process)


def one_run(number: int, place: Place, axis: Axis, moments: list[float], reference: Place, on_kill: Any) -> Run:
    """Kill and start until it is done; then look at what there is."""
    found, left = Run(number), list(moments)
    killed: dict[int, float] = {}
    while True:
        if found.starts == STARTS:
            found.lost = f"not done after {STARTS} starts"
            return found
        process = place.start()
        found.starts += 1
        try:
            if left and until_moment(place, process, axis, left[0], killed):
                killed[process.pid] = time.time()
                kill(process)
                under_way = attempts_of(place.seen(), killed)[-1]
                name = " ".join(under_way.stage).strip() if not under_way.done else ""
                found.kills.append(Kill(number, name, left.pop(0), under_way.ended - under_way.began if name else 0.0))
                on_kill()
                if not is_complete(place.folder):
                    continue
                break
            if process.wait() != 0:
                found.lost = f"exit code {process.returncode}: {place.log.read_text()[-1500:]}"
                return found
            break
        finally:
            if process.poll() is None:
                kill(process)
    attempts = attempts_of(place.seen(), killed)
    for stage in {each.stage for each in attempts}:
        named = [each for each in found.kills if each.stage == " ".join(stage).strip()]
        for each, seconds in zip(named, work_again(attempts, stage), strict=False):
            each.again_s = seconds
    found.compared, found.different = differing(place, reference)
    found.faults = faults(place.folder)
    if (count := parents(place.folder)) != 1:
        found.faults.append(f"{count} MLflow runs of the recipe")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "digits.yaml")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept; must not exist")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills-per-run", type=int, default=5)
    arguments = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that server and run are ended too
    arguments.folder.mkdir(parents=True)
    folder, random_ = arguments.folder.absolute(), random.Random(arguments.seed)
    runs: list[Run] = []
    with prefect_server(folder / "server") as api, bars(console) as progress:
        bar = progress.add_task("unbroken run", total=arguments.kills)
        reference = Place(folder / "unbroken", arguments.recipe.absolute(), api)
        if unbroken(reference) != 0:
            raise SystemExit(f"The unbroken run has failed:\n{reference.log.read_text()[-3000:]}")
        axis = Axis(attempts_of(reference.seen(), {}))
        while (left := arguments.kills - sum(len(run.kills) for run in runs)) > 0 and len(runs) < arguments.kills:
            number = len(runs) + 1
            progress.update(bar, description=f"run {number}, {axis.total:.0f} s of work")
            part = axis.total / arguments.kills_per_run
            moments = [random_.uniform(each * part, (each + 1) * part) for each in range(arguments.kills_per_run)]
            if left < len(moments):
                moments = sorted(random_.sample(moments, left))
            place = Place(folder / f"run-{number}", arguments.recipe.absolute(), api)
            run = one_run(number, place, axis, moments, reference, lambda: progress.advance(bar))
            runs.append(run)
            if not (run.lost or run.faults or run.different):
                shutil.rmtree(place.folder / ".stillhouse")
    found = figures(runs, axis)
    show(console, found, runs, axis)
    if arguments.json is not None:
        content = {
            **found,
            "recipe": arguments.recipe.name,
            "seed": arguments.seed,
            "runs": [asdict(run) for run in runs],
        }
        arguments.json.write_text(json.dumps(content, indent=1))


def figures(runs: list[Run], axis: Axis) -> dict[str, Any]:
    """The numbers that the table shows."""
    shares = [each.again_s / axis.total for run in runs for each in run.kills]
    mean = sum(shares) / max(len(shares), 1)
    spread = math.sqrt(sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1))
    half = 1.96 * spread / math.sqrt(max(len(shares), 1))
    return {
        "cores": os.cpu_count(),
        "kills": len(shares),
        "runs": len(runs),
        "lost": sum(bool(run.lost) for run in runs),
        "unbroken_s": axis.total,
        "again_mean": mean,
        "again_interval": [max(0.0, mean - half), mean + half],
        "again_largest": max(shares, default=0.0),
        "artifacts_compared": sum(run.compared for run in runs),
        "artifacts_different": sum(len(run.different) for run in runs),
        "faults": sum(len(run.faults) for run in runs),
    }


def show(console: Console, found: dict[str, Any], runs: list[Run], axis: Axis) -> None:
    """Tables by stage and over all, then everything that is wrong."""
    by_stage: dict[str, list[Kill]] = defaultdict(list)
    for run in runs:
        for each in run.kills:
            by_stage[each.stage.partition(" ")[0] or "between stages"].append(each)
    work: dict[str, float] = defaultdict(float)
    for (stage, _), seconds in axis.stages:
        work[stage.partition(" ")[0]] += seconds
    table = Table("stage", "work", "kills", "done again, mean", "largest", title="By the stage that was killed")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in sorted({*work, *by_stage}, key=lambda stage: -work[stage]):
        costs = [each.again_s for each in by_stage[stage]]
        mean = f"{sum(costs) / len(costs):.2f} s" if costs else ""
        largest = f"{max(costs):.2f} s" if costs else ""
        table.add_row(stage, f"{work[stage]:.1f} s", str(len(costs)), mean, largest)
    console.print(table)
    low, high = found["again_interval"]
    total = Table(show_header=False, title="Over all")
    total.add_row("kills", str(found["kills"]))
    total.add_row("runs", f"{found['runs']}, {found['lost']} lost")
    total.add_row("work of an unbroken run", f"{found['unbroken_s']:.1f} s")
    total.add_row("work done again for each kill", f"{found['again_mean']:.2%} ({low:.2%} to {high:.2%})")
    total.add_row("largest", f"{found['again_largest']:.2%}")
    different = found["artifacts_different"]
    total.add_row("artifacts", f"{found['artifacts_compared']} compared, {different} different")
    total.add_row("doubles and leftovers", str(found["faults"]))
    console.print(total)
    for run in runs:
        for problem in [run.lost, *map(str, run.different), *run.faults]:
            if problem:
                console.print(f"run {run.number}: {problem}", markup=False, style="red")


if __name__ == "__main__":
    main()
