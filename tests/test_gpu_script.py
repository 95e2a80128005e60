"""tests/gpu.py itself: its cheapest check on a CPU, what it writes, and its exit status."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def run(folder, *flags):
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--quick", "--json", folder / "gpu.json"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    return done, json.loads((folder / "gpu.json").read_text())["parts"]


def test_the_cheapest_check(tmp_path):
    done, (part,) = run(tmp_path, "--only", "bias")
    assert done.returncode == 0, done.stdout
    assert part["name"] == "bias" and part["status"] == "ok" and len(part["lines"]) == 2
    for line in part["lines"]:
        assert line["ok"] and 0 < line["figures"]["difference"] <= line["limit"]
    assert done.stdout.count("gradient of ") == 2


@pytest.mark.parametrize(
    "flags, status, told",
    [
        (["--only", "machine", "--seconds", "0"], "not run", ""),
        (["--only", "learn", *"--model absent --rows absent --dev absent".split()], "failed", "absent"),
    ],
)
def test_what_fails_or_is_not_run_is_told(tmp_path, flags, status, told):
    done, (part,) = run(tmp_path, *flags)
    assert done.returncode == 1 and part["status"] == status and told in part["log"]
    assert done.stdout.rstrip().endswith(status)
