"""What orchestration adds to the stages of a finished run, and what a no-op re-run costs.

    .venv/bin/python benchmarks/orchestration.py runs/fashion-mnist/<run-id> [--again recipes/fashion-mnist.yaml]

The share is (wall time of the run - seconds inside stage functions) / wall time, from MLflow's own start and end times
and the lineage of the run. ``--again`` runs the finished recipe once more: its wall time and peak memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from tasks import tracking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--again", type=Path, help="its recipe, to be run once more")
    arguments = parser.parse_args()
    summary = json.loads((arguments.run / "summary.json").read_text())
    lineage = json.loads((arguments.run / "lineage.json").read_text())
    info = tracking.client().get_run(summary["mlflow_run"]).info
    wall = (info.end_time - info.start_time) / 1000
    inside = sum(row["seconds"] for row in lineage if not row["cached"])
    print(f"wall {wall:.1f} s, inside stages {inside:.1f} s, orchestration {(wall - inside) / wall:.2%}")
    for row in sorted(lineage, key=lambda row: -row["seconds"])[:8]:
        print(f"  {row['seconds']:8.1f} s  {row['stage']}/{row['name']}{'  (kept)' if row['cached'] else ''}")
    if arguments.again is not None:
        started = time.monotonic()
        command = [sys.executable, "-m", "flows.cli", "compress", str(arguments.again)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
        )
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        nothing = "Nothing has changed" in done.stdout
        print(f"again: {seconds:.1f} s, exit code {done.returncode}, no stage executed: {nothing}, peak {peak:.2f} GiB")


if __name__ == "__main__":
    main()
