"""A long training on the demo with kills: does it come back each time, and does its memory stay flat?

    python tests/soak.py [--steps 3000] [--kills 6]

Kills the run (SIGKILL) at random moments of its first two thirds, resumes it, and samples the memory of the
last third, which is one process without a break. Prints the slope of a straight line through those samples,
in percent per 1,000 steps, and fails where it is 1 or more. Runs by hand: about ten minutes on two cores.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def steps_done(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"loss"')
    except OSError:
        return 0


def resident(process: subprocess.Popen) -> float:
    """MB of memory that is the process's own, not the file cache's."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=6)
    args = parser.parse_args()
    generator = random.Random(0)
    run = Path(tempfile.mkdtemp()) / "run"
    small = ["--batch", "4", "--candidates", "4", "--eval-every", "100", "--head-examples", "16", "--test"]
    begin = ["train", "--steps", str(args.steps), *small, "--out", str(run)]

    def start() -> subprocess.Popen:
        known = (run / "settings.json").exists()
        command = ["train", "--resume", str(run)] if known else begin
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, str(ROOT / "dream.py"), *command], cwd=ROOT, **quiet)

    process = start()
    for kill in sorted(generator.randint(1, args.steps * 2 // 3 - 100) for _ in range(args.kills)):
        while steps_done(run) < kill and process.poll() is None:
            time.sleep(0.05)
        process.kill()
        process.wait()
        print(f"killed after step {steps_done(run)}", flush=True)
        process = start()
    samples = []
    while process.poll() is None:
        step = steps_done(run)
        if step > args.steps * 2 // 3:
            try:
                samples.append((step, resident(process)))
            except (OSError, TypeError):  # it has just ended
                break
        time.sleep(1)
    process.wait()
    steps, memory = np.array(samples).T
    slope = 100 * np.polyfit(steps, memory, 1)[0] * 1000 / memory.mean()
    print(f"{steps_done(run):,} steps, {args.kills} kills, exit status {process.returncode}")
    print(f"memory {memory.mean():.0f} MB, slope {slope:+.2f}% per 1,000 steps over {len(memory)} samples")
    return int(process.returncode != 0 or steps_done(run) != args.steps or slope >= 1)


if __name__ == "__main__":
    sys.exit(main())
