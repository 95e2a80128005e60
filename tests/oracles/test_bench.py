"""The benchmark's rows on a real checkpoint run, and both sides compute the same."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

for library in ("transformers", "peft"):
    pytest.importorskip(library)


def test_rows_on_a_checkpoint():
    command = "-m tests.bench --quick --repeats 1 --seconds 1 --only train heads --model demo/checkpoint"
    command += " --rows demo/train.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    for work in ("InfoNCE step, 1 rows", "DREAM step, 1 rows", "tools.heads, 1 rows"):
        assert work in run.stdout
