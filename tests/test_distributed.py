"""Two processes on the CPU (gloo), as torchrun starts them, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_eval import random_texts, write_beir
from tiny import tiny_checkpoint

LEAVES = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
import torch
from support.launch import join_processes, leave_processes
join_processes()
importlib.import_module("torch._dynamo")  # as an optimizer or --compile does, after the group exists
torch.distributed.all_reduce(torch.ones(3))
names = lambda: [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
assert any("gloo" in name for name in names()), names()
leave_processes()
assert not any("gloo" in name for name in names()), names()
"""

FAILS = """
import atexit, pathlib, sys
sys.path.insert(0, sys.argv[1])
import torch
from support.launch import join_processes, leave_processes
rank, _ = join_processes()
if rank == 1:
    atexit.register((pathlib.Path(__file__).parent / "left").touch)  # an ordinary exit comes by here
    leave_processes(failed=True, status=2)
torch.distributed.barrier()
"""


def launch(processes, script, *arguments, **settings):
    """Run a command as a user does: alone, or by torchrun."""
    alone = [sys.executable, str(ROOT / script)]
    flags = ["--nproc-per-node", str(processes), "--master-port", "0", "--rdzv-backend", "c10d"]
    runner = [sys.executable, "-m", "torch.distributed.run", *flags, "--rdzv-endpoint", "localhost:0"]
    command = [*(alone if processes == 1 else [*runner, str(ROOT / script)]), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **settings}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_checkpoint(folder / "judge")
    texts = random_texts(60, 3)
    rows = [
        {"query": f"query {i}", "target": texts[i][:9], "documents": texts[i : i + 2 + i % 3], "positive": 0}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = {f"d{i}": text for i, text in enumerate(random_texts(101, 4))}
    queries = {f"q{i}": text for i, text in enumerate(random_texts(12, 5, 4))}
    write_beir(folder / "set", documents, queries, {q: {f"d{i}": 1} for i, q in enumerate(queries)})
    return folder


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.parametrize(
    "objective",
    [
        "--objective dream",
        "--objective infonce --in-batch-negatives",
        "--objective revela --group-size 4 --temperature 0.1 --batch 12",
        "--judge-lora --refresh-candidates 2 --candidates 3",
    ],
)
def test_two_processes_train_as_one(world, tmp_path, objective):
    """The same global batch: equal losses and weights to float tolerance; the first process alone writes."""
    names = ["--train", world / "rows.jsonl", "--judge", world / "judge", "--retriever", world / "judge"]
    names += ["--dev", world / "set", "--dev-split", "test", "--test", world / "set"]
    flags = "--steps 4 --batch 5 --eval-every 2 --lr 1e-3 --lora-rank 4 --num-heads 4".split()
    flags += ["--retriever-batch", 4, "--judge-batch", 2, "--device", "cpu", "--max-target", 8]
    flags += objective.split()
    printed = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        printed[processes] = launch(processes, "dream.py", "train", *names, *flags, "--out", out).stdout
    judge = ["judge/adapter_model.safetensors"] if "judge" in objective or "revela" in objective else []
    for file in ["adapter_model.safetensors", *judge]:
        first, second = (load_file(tmp_path / n / "step-000004" / file) for n in "12")
        learnt = [float(abs(tensor).max()) for name, tensor in first.items() if "lora_B" in name]
        # Of the last layer's texts before their ends, only keys and values are computed.
        assert sum(size > 1e-4 for size in learnt) >= len(learnt) - (7 if judge else 0)
        for name, tensor in first.items():
            assert abs(tensor - second[name]).max() < 2e-5, name
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key.endswith("tokens"):  # a document of rows in both is read by both
                assert two[key] >= value
            else:
                assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert printed[2].count("checkpoint: ") == 1 and printed[2].count("NDCG@10") == printed[1].count(
        "NDCG@10"
    )
    resumed = launch(2, "dream.py", "train", "--resume", tmp_path / "2")  # nothing left to do
    assert "checkpoint: " in resumed.stdout


@pytest.mark.parametrize("kept", [False, True])
def test_two_processes_evaluate_as_one(world, tmp_path, kept):
    """Each encodes and searches its share; hits and scores equal one process's; a store serves both."""
    results = {}
    for processes in (2, 1):
        files = ["--trec", tmp_path / f"{processes}.trec", "--json", tmp_path / f"{processes}.json"]
        arguments = ["--dataset", world / "set", "--model", world / "judge", "--device", "cpu", *files]
        store = ["--embeddings", tmp_path / "kept"] if kept else []
        launch(processes, "eval.py", *arguments, *store)
        results[processes] = json.loads((tmp_path / f"{processes}.json").read_text())["results"]
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == int(kept)  # one block, encoded once
    assert results[1][0]["metrics"] == pytest.approx(results[2][0]["metrics"], abs=1e-3)
    runs = [
        {tuple(line.split()[::2][:2]): float(line.split()[4]) for line in (tmp_path / f"{n}.trec").open()}
        for n in (1, 2)
    ]
    assert len(runs[0]) == 12 * 101
    assert runs[0].keys() == runs[1].keys()
    assert max(abs(runs[0][key] - runs[1][key]) for key in runs[0]) < 1e-5


def test_commands_that_are_not_for_several_processes_say_so(world):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, str(ROOT / "dream.py"), "heads"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2 and done.stderr.endswith("heads runs in one process, without torchrun\n")


def test_a_process_that_fails_alone_leaves_at_once(tmp_path):
    """The others may wait for it for ever: nobody is asked, and torchrun ends them."""
    (tmp_path / "fails.py").write_text(FAILS)
    with pytest.raises(AssertionError, match=r"exitcode  : 2 "):
        launch(2, tmp_path / "fails.py", ROOT)
    assert not (tmp_path / "left").exists()


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="reads the names of threads, as Linux tells them"
)
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that does may want the interpreter while it ends: the process then aborts, its work done."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    launch(2, tmp_path / "leaves.py", ROOT)
