"""Nothing is lost: killed, stopped, out of memory, out of space, NaN, two writers, changed settings."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from small import CountingEmbedder
from tiny import make_rows, tiny_checkpoint

import dream
import model
from support import runs
from support.files import InputError

FLAGS = "--steps 12 --batch 4 --eval-every 3 --lr 1e-2 --num-heads 2 --lora-dropout 0.1 --device cpu".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A judge, rows, and a run of 12 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("interruptions")
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    rows = [
        {"query": r.query, "target": r.target, "documents": [vars(d) for d in r.documents], "positive": 0}
        for r in make_rows([3, 2, 4] * 8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["--train", folder / "rows.jsonl", "--judge", checkpoint, "--retriever", checkpoint]
    command = ["train", *map(str, names), *FLAGS]
    assert dream.main([*command, "--out", str(folder / "whole")]) == 0
    return folder, command


def start(*arguments):
    command = [sys.executable, str(ROOT / "dream.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def content(run):
    """Everything that must be the same: weights, optimizer, state, and the metrics but for their times."""
    names = ("adapter_model.safetensors", "optimizer.safetensors", "trainer.json")
    found = {name: (run / "step-000012" / name).read_bytes() for name in names}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return found | {"metrics": [{k: v for k, v in line.items() if k != "time"} for line in lines]}


def steps_done(run):
    try:
        return (run / "metrics.jsonl").read_text().count('"loss"')
    except OSError:
        return 0


def wait_for_step(process, run, step):
    while steps_done(run) < step and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(world, tmp_path, number):
    folder, command = world
    run = tmp_path / "run"
    process = start(*command, "--steps", 2000, "--eval-every", 1000, "--out", run)
    wait_for_step(process, run, 1)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert f"{number.name}: finishing this step" in errors
    assert printed.endswith(f"go on with: python dream.py train --resume {run}\n")
    last = json.loads((run / "checkpoints.json").read_text())["last"]
    assert (run / last / "optimizer.safetensors").exists()
    assert json.loads((run / last / "trainer.json").read_text())["step"] == steps_done(run)


def test_a_second_sigint_stops_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), runs.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.agreed() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_stopped_anywhere_and_resumed_is_the_same_run(world, tmp_path, monkeypatch):
    """Also where no evaluation was due: the checkpoint of the signal's step is as good as any."""
    folder, command = world
    run = tmp_path / "run"
    step = dream.training_step
    count = [0]

    def signalled(*arguments):
        count[0] += 1
        if count[0] in (4, 6):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(dream, "training_step", signalled)
    assert dream.main([*command, "--out", str(run)]) == 143
    assert json.loads((run / "checkpoints.json").read_text())["last"] == "step-000004"
    assert dream.main(["train", "--resume", str(run)]) == 143
    assert dream.main(["train", "--resume", str(run)]) == 0
    assert content(run) == content(folder / "whole")
    assert dream.main(["train", "--resume", str(run)]) == 0  # nothing is left to do


def kill_and_resume(world, run, seed):
    """SIGKILL at random moments of the start or the training, then resume to the end; returns the kills."""
    folder, command = world
    generator, kills = random.Random(seed), 0
    process = start(*command, "--out", run)
    for _ in range(2):
        wait_for_step(process, run, generator.randint(0, 11))
        time.sleep(generator.random() * 0.3)
        kills += process.poll() is None
        process.kill()
        process.communicate()
        known = (run / "settings.json").exists()
        process = start(*(["train", "--resume", run] if known else [*command, "--out", run]))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert content(run) == content(folder / "whole")
    assert not list(run.glob(".*.tmp")) and len(list(run.glob("step-*"))) == 1
    return kills


def test_killed_and_resumed_is_the_same_run(world, tmp_path):
    kill_and_resume(world, tmp_path / "run", 0)


@pytest.mark.slow
def test_killed_twenty_times_is_the_same_run(world, tmp_path):
    assert sum(kill_and_resume(world, tmp_path / str(seed), seed) for seed in range(1, 13)) >= 20


def test_a_second_writer_is_refused(world, tmp_path, capsys):
    folder, command = world
    with runs.run_lock(tmp_path / "run"):
        assert dream.main([*command, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith("another process is writing to this run\n")


def test_changed_settings_are_listed_and_refused_unless_told(world, tmp_path, capsys):
    folder, command = world
    run = tmp_path / "run"
    assert dream.main([*command, "--steps", "3", "--out", str(run)]) == 0
    assert dream.main(["train", "--resume", str(run), "--steps", "6", "--lr", "1e-2"]) == 2
    error = capsys.readouterr().err
    assert "differs from its settings: --steps 6 (was 3); add --change-settings" in error
    assert dream.main(["train", "--resume", str(run), "--steps", "6", "--change-settings"]) == 0
    assert json.loads((run / "settings.json").read_text())["steps"] == 6 and steps_done(run) == 6
    rows = tmp_path / "rows.jsonl"
    rows.write_text((folder / "rows.jsonl").read_text() + "\n")
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "train": str(rows), "steps": 7}))
    assert dream.main(["train", "--resume", str(run)]) == 2
    assert f"{rows}: has changed since the run began" in capsys.readouterr().err


def test_a_resumed_run_keeps_to_its_tests(world, tmp_path, capsys):
    folder, command = world
    run = tmp_path / "run"
    assert dream.main([*command, "--steps", "3", "--out", str(run)]) == 0
    longer = ["train", "--resume", str(run), "--steps", "6", "--test", "demo", "--change-settings"]
    assert dream.main(longer) == 2
    assert "was begun with []; keep to that, and use eval.py for others" in capsys.readouterr().err


def test_a_checkpoint_that_nothing_points_at_does_not_outlive_the_last(world, tmp_path):
    """Killed after a checkpoint was renamed and before checkpoints.json named it; then stopped earlier."""
    folder, command = world
    run = tmp_path / "run"
    assert dream.main([*command, "--steps", "4", "--eval-every", "2", "--keep", "1", "--out", str(run)]) == 0
    shutil.copytree(run / "step-000004", run / "step-000006")
    longer = ["train", "--resume", str(run), "--steps", "5", "--change-settings"]
    assert dream.main(longer) == 0
    assert json.loads((run / "checkpoints.json").read_text())["last"] == "step-000005"
    assert [folder.name for folder in run.glob("step-*")] == ["step-000005"]


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    """Wherever it was cut, also right behind an inner brace."""
    path = tmp_path / "metrics.jsonl"
    first, second = (json.dumps({"step": step, "time": {"seconds": 1.0}}) for step in (4, 5))
    for cut in range(len(second) + 1):
        path.write_text(f"{first}\n{second[:cut]}")
        with runs.Log(path, 5):
            assert path.read_text() == first + "\n"
    path.write_text(f"{first}\n{second}\n")
    with runs.Log(path, 4):
        assert path.read_text() == first + "\n"


def poisoned(monkeypatch, bad_steps):
    """Let the loss of some steps be NaN."""
    loss, step, calls = dream.target_loss, dream.training_step, [0]

    def target_loss(*arguments, **named):  # in dream.py: the heads are chosen by qrhead's own
        found = loss(*arguments, **named)
        return found * torch.nan if calls[0] in bad_steps else found

    def training_step(*arguments):
        calls[0] += 1
        return step(*arguments)

    monkeypatch.setattr(dream, "target_loss", target_loss)
    monkeypatch.setattr(dream, "training_step", training_step)


def test_a_step_that_is_not_finite_is_skipped_and_told(world, tmp_path, monkeypatch, capsys):
    """The weights and the optimizer are as if it had not been."""
    folder, command = world
    states, save = [], runs.save_checkpoint

    def saving(out, step, *rest):
        save(out, step, *rest)
        names = ("adapter_model.safetensors", "optimizer.safetensors")
        states.append([(out / f"step-{step:06d}" / name).read_bytes() for name in names])

    monkeypatch.setattr(runs, "save_checkpoint", saving)
    poisoned(monkeypatch, {2, 3})
    assert dream.main([*command, "--steps", "4", "--eval-every", "1", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "step 2 is skipped" in printed and "step 3 is skipped" in printed and "step 4 is" not in printed
    assert states[0] == states[1] == states[2]
    assert all(before != after for before, after in zip(states[2], states[3], strict=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "aside" not in line]
    assert [line.get("skipped", False) for line in lines] == [False, True, True, False]
    assert len(lines[1]["rows"]) == 4 and "loss" not in lines[1] and "rows" not in lines[0]


def test_ten_bad_steps_in_a_row_end_the_run(world, tmp_path, monkeypatch, capsys):
    folder, command = world
    poisoned(monkeypatch, range(2, 100))
    assert dream.main([*command, "--steps", "50", "--out", str(tmp_path / "run")]) == 2
    assert "10 steps in a row, up to 11," in capsys.readouterr().err


@pytest.mark.parametrize("function", ["target_loss", "embed"])
def test_out_of_memory_names_the_flags_to_lower(world, tmp_path, monkeypatch, capsys, function):
    """In the judge and on the way back into the retriever, with the values that the flags have."""
    folder, command = world

    def full(*arguments, **named):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return kept(*arguments, **named)

    owner = dream if function == "target_loss" else model.Embedder
    kept = getattr(owner, function)
    monkeypatch.setattr(owner, function, full)
    sizes = ["--judge-batch", "3", "--retriever-batch", "5"]
    assert dream.main([*command, *sizes, "--out", str(tmp_path / "run")]) == 2
    flags = "--judge-batch (3), --retriever-batch (5) or --batch (4)"
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"dream.py: error: out of memory: lower {flags} (CUDA out of memory. ")


def test_out_of_memory_while_encoding(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CountingEmbedder, "embed", full)
    with pytest.raises(InputError, match="out of memory with one text of 3 tokens .CUDA"):
        CountingEmbedder().embed_all([[1, 2, 3]], 77)


def test_a_batch_that_memory_does_not_hold_is_halved():
    sizes = []

    class Small(CountingEmbedder):
        dim = 1

        def embed(self, token_ids):
            sizes.append(len(token_ids))
            if len(token_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.tensor([[float(ids[0])] for ids in token_ids])

    assert Small().embed_all([[i, 0] for i in range(7)], 99).flatten().tolist() == list(range(7))
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_a_full_disk_is_told_before_and_leaves_the_last_checkpoint_whole(
    world, tmp_path, monkeypatch, capsys
):
    folder, command = world
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        assert dream.main([*command, "--out", str(run)]) == 2
    assert "checkpoints need" in capsys.readouterr().err and not list(run.glob("step-*"))

    def no_space(tensors, path):
        if "step-000006" in str(path):
            raise OSError(28, "No space left on device")
        return save(tensors, path)

    save = runs.save_file
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_file", no_space)
        assert dream.main([*command, "--overwrite", "--out", str(run)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads((run / "checkpoints.json").read_text())["last"] == "step-000003"
    assert dream.main(["train", "--resume", str(run)]) == 0
    assert content(run) == content(folder / "whole")


def test_an_out_that_cannot_be_written_is_told_at_once(world, tmp_path, capsys):
    folder, command = world
    (tmp_path / "file").write_text("")
    assert dream.main([*command, "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_overwriting_deletes_a_run_and_nothing_else(world, tmp_path):
    folder, command = world
    run = tmp_path / "run"
    (run / "notes").mkdir(parents=True)
    (run / "notes" / "mine.txt").write_text("keep me")
    short = [*command, "--steps", "4", "--eval-every", "1", "--out", str(run)]
    assert dream.main([*short, "--keep", "3"]) == 0
    assert [p.name for p in sorted(run.glob("step-*"))] == ["step-000002", "step-000003", "step-000004"]
    (run / "report.html").write_text("of the run that goes")
    assert dream.main([*short, "--overwrite", "--steps", "1"]) == 0
    assert not (run / "report.html").exists()
    assert [p.name for p in run.glob("step-*")] == ["step-000001"]
    assert (run / "notes" / "mine.txt").read_text() == "keep me"
