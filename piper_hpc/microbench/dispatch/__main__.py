"""`python -m piper_hpc.microbench.dispatch`: the all-to-all benchmark on the testbed (needs root), as `make bench-a2a`.

Exit codes: 0 measured and no bar missed, 1 measured with a bar missed, 2 could not measure all.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from types import FrameType

from piper_hpc.microbench.dispatch.bench import BenchError, measure
from piper_hpc.microbench.dispatch.stages import smoke, stages
from piper_hpc.runs import RunFolder


def main() -> int:
    """The command: measures, then shows the table and writes the report."""
    parser = argparse.ArgumentParser(prog="python -m piper_hpc.microbench.dispatch", description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder of runs (default: runs)")
    parser.add_argument("--only", metavar="MACHINE", action="append", help="measure this machine alone, e.g. 4x2")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of the time that each part gets (default 1); a cell has six iterations at least",
    )
    parser.add_argument("--smoke", action="store_true", help="one small cell, to see that it runs")
    chosen = parser.parse_args()
    planned = smoke() if chosen.smoke else stages(chosen.scale)
    wanted = [stage for stage in planned if not chosen.only or stage.name in chosen.only]
    if not wanted or chosen.scale <= 0:
        names = ", ".join(repr(stage.name) for stage in planned)
        print(f"error: --only {chosen.only} --scale {chosen.scale}: machines are {names}, scale above 0, for example "
              f"--only {planned[0].name} --scale 1", file=sys.stderr)  # fmt: skip
        return 2
    signal.signal(signal.SIGTERM, _interrupt)  # the testbed is taken down on the way out
    run = RunFolder.create(chosen.runs)
    complete = False
    try:
        measure(run, wanted)
        complete = True
    except BenchError as error:
        print(f"error: not all was measured: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {run.path}", file=sys.stderr)
    judged = subprocess.run([sys.executable, "-m", "analysis.bench_a2a", str(run.path)], check=False).returncode
    return judged if complete else 2


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
