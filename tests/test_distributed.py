"""Two processes on the CPU (gloo), as torchrun starts them, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file
from small import random_texts, write_beir
from tiny import tiny_checkpoint

import dream
import eval as yardstick
from tools import heads, mine

# The commands one after another in one process group. Beside the script, each process leaves the names of its
# threads before the group ends and after it.
SEVERAL = """
import importlib, json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import torch
from support import launch
leave, launch.leave_processes = launch.leave_processes, lambda failed=False, status=0: status
for program, *arguments in json.loads(sys.argv[2]):
    assert importlib.import_module(program).main(arguments) == 0
    print("-- done", flush=True)
importlib.import_module("torch._dynamo")  # as an optimizer does, after the group exists
torch.distributed.all_reduce(torch.ones(3))
names = lambda: [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
found, rank = [names()], torch.distributed.get_rank()
leave()
pathlib.Path(__file__).with_name(f"threads-{rank}.json").write_text(json.dumps([*found, names()]))
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


def launch(processes, script, *arguments):
    """Run a script as a user does, by torchrun."""
    flags = ["--nproc-per-node", str(processes), "--master-port", "0", "--rdzv-backend", "c10d"]
    runner = [sys.executable, "-m", "torch.distributed.run", *flags, "--rdzv-endpoint", "localhost:0"]
    command = [*runner, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


OBJECTIVES = {
    "dream": "",
    "dream-in-batch": "--in-batch-negatives",  # three rows and two: two pieces and one
    "infonce": "--objective infonce --in-batch-negatives",
    "revela": "--objective revela --group-size 4 --temperature 0.1 --batch 12",
    "judge-lora": "--judge-lora --candidates 3 --steps 2",
}
LONGER = "--steps 4 --change-settings".split()  # resumed: both read what the first wrote


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A judge, rows, a dataset, and whatever two processes made of them: all in one launch, one by one."""
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
    commands = [command for objective in OBJECTIVES for command in training(folder, objective, 2)]
    commands += [evaluation(folder, kept, 2) for kept in (False, True)]
    (folder / "several.py").write_text(SEVERAL)
    printed = launch(2, folder / "several.py", ROOT, json.dumps(commands)).stdout
    return folder, printed.split("-- done\n")


def training(folder, objective, processes):
    """The commands that train for four steps, into folder/OBJECTIVE-PROCESSES."""
    names = ["--train", folder / "rows.jsonl", "--judge", folder / "judge", "--retriever", folder / "judge"]
    names += ["--dev", folder / "set", "--dev-split", "test", "--test", folder / "set"]
    flags = "--steps 4 --batch 5 --eval-every 2 --lr 1e-3 --lora-rank 4 --num-heads 4 --device cpu".split()
    flags += ["--retriever-batch", 4, "--judge-batch", 2, "--max-target", 8, *OBJECTIVES[objective].split()]
    out = str(folder / f"{objective}-{processes}")
    begun = ["dream", "train", *map(str, [*names, *flags]), "--out", out]
    return [begun, ["dream", "train", "--resume", out, *LONGER]] if objective == "judge-lora" else [begun]


def evaluation(folder, kept, processes):
    """A command that evaluates, with a store or without, into folder/scores-KEPT-PROCESSES.trec and .json."""
    written = folder / f"scores-{kept}-{processes}"
    flags = ["--trec", f"{written}.trec", "--json", f"{written}.json", "--device", "cpu"]
    flags += ["--embeddings", folder / "kept"] if kept else []
    return ["eval", *map(str, ["--dataset", folder / "set", "--model", folder / "judge", *flags])]


def alone(command):
    program, *arguments = command
    assert {"dream": dream, "eval": yardstick}[program].main(arguments) == 0


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_train_as_one(world, objective, capsys):
    """The same global batch: equal losses and weights to float tolerance; the first process alone writes."""
    folder, printed = world
    commands = training(folder, objective, 1)
    for command in commands:
        alone(command)
    by_one, by_two = (folder / f"{objective}-{processes}" for processes in (1, 2))
    judge = ["judge/adapter_model.safetensors"] if objective in ("judge-lora", "revela") else []
    for file in ["adapter_model.safetensors", *judge]:
        first, second = (load_file(run / "step-000004" / file) for run in (by_one, by_two))
        learnt = [float(abs(tensor).max()) for name, tensor in first.items() if "lora_B" in name]
        # Of the last layer's texts before their ends, only keys and values are computed.
        assert sum(size > 1e-4 for size in learnt) >= len(learnt) - (7 if judge else 0)
        for name, tensor in first.items():
            assert abs(tensor - second[name]).max() < 2e-5, name
    for one, two in zip(metrics(by_one), metrics(by_two), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key.endswith("tokens"):  # a document of rows in both is read by both
                assert two[key] >= value
            else:
                assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    told, told_by_two = capsys.readouterr().out, "".join(text for text in printed if str(by_two) in text)
    assert told_by_two.count("checkpoint: ") == len(commands)
    assert told_by_two.count("NDCG@10") == told.count("NDCG@10") > 0


def test_torchrun_starts_the_command_itself(world):
    done = launch(2, "dream.py", "train", "--resume", world[0] / "dream-2")  # nothing left to do
    assert done.stdout.count("checkpoint: ") == 1


@pytest.mark.parametrize("kept", [False, True])
def test_two_processes_evaluate_as_one(world, kept):
    """Each encodes and searches its share; hits and scores equal one process's; a store serves both."""
    folder, _ = world
    alone(evaluation(folder, kept, 1))
    assert len(list((folder / "kept").rglob("*.safetensors"))) == 1  # one block, encoded once
    first, second = (json.loads((folder / f"scores-{kept}-{n}.json").read_text()) for n in (1, 2))
    assert first["results"][0]["metrics"] == pytest.approx(second["results"][0]["metrics"], abs=1e-3)
    assert (first["settings"]["processes"], second["settings"]["processes"]) == (1, 2)
    files = (folder / f"scores-{kept}-{n}.trec" for n in (1, 2))
    runs = [{tuple(line.split()[::2][:2]): float(line.split()[4]) for line in file.open()} for file in files]
    assert len(runs[0]) == 12 * 101
    assert runs[0].keys() == runs[1].keys()
    assert max(abs(runs[0][key] - runs[1][key]) for key in runs[0]) < 1e-5


@pytest.mark.parametrize("tool, flags", [(heads, []), (mine, ["--corpus", "absent", "--groups", "2"])])
def test_commands_that_are_not_for_several_processes_say_so(tmp_path, monkeypatch, capsys, tool, flags):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tool.main([*flags, "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.endswith(" runs in one process, without torchrun\n")
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_alone_leaves_at_once(tmp_path):
    """The others may wait for it for ever: nobody is asked, and torchrun ends them."""
    (tmp_path / "fails.py").write_text(FAILS)
    with pytest.raises(AssertionError, match=r"exitcode  : 2 "):
        launch(2, tmp_path / "fails.py", ROOT)
    assert not (tmp_path / "left").exists()


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="reads the names of threads, as Linux tells them"
)
def test_no_thread_of_the_group_outlives_it(world):
    """One that does may want the interpreter while it ends: the process then aborts, its work done."""
    for rank in (0, 1):
        before, after = json.loads((world[0] / f"threads-{rank}.json").read_text())
        assert any("gloo" in name for name in before) and not any("gloo" in name for name in after)
