"""The folder of a training run: its lock, metrics, checkpoints, signals, and how a killed run goes on.

OUT/settings.json     the flags                          OUT/metrics.jsonl   one object a step
OUT/heads.json        what was decided before step 1     OUT/results.json    --test before and after
OUT/step-N/           checkpoints, whole or not there    OUT/checkpoints.json  {"last", "best"}
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.files import InputError, inside, read_json, sync, write_atomic
from support.hub import find_folder

COUNTS = ["document_tokens_cut", "retriever_tokens", "tokens"]  # of a step, in metrics.jsonl
DEFAULT_MODEL = "runs/demo"
RUN_FILES = (
    "checkpoints.json settings.json heads.json metrics.jsonl results.json report.html report.md".split()
)


def read_run(folder: Path, *names: str) -> list[dict]:
    """A run's JSON files by name, without their suffix; {} for one that is not there. Raises InputError."""
    files = [folder / f"{name}.json" for name in names]
    return [read_json(file) if file.exists() else {} for file in files]


def resolve_run(folder: str | Path) -> Path:
    """A run's folder stands for its best checkpoint, other folders for themselves."""
    folder = Path(folder)
    listing = folder / "checkpoints.json"
    if listing.exists():
        names = read_json(listing)
        return inside(folder, names.get("best") or names.get("last"), listing)
    if (folder / "settings.json").exists() and not (folder / "config.json").exists():
        again = shlex.join(["python", "dream.py", "train", "--resume", str(folder)])
        raise InputError(f"{folder}: this run has no checkpoint yet; go on with: {again}")
    return folder


def locate(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint: a run's best one, a folder itself, a hub name's local copy, fetched first.

    weights: False fetches only what describes it. Raises InputError.
    """
    if Path(name) == Path(DEFAULT_MODEL) and not Path(name).exists():  # it is no name of the hub
        raise InputError(f"{name} does not exist: train it (`python dream.py train`), or name another model")
    return find_folder(resolve_run(name) if Path(name).is_dir() else name, weights)


# One writer, and how it is stopped


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Keep other processes from writing to a run; the lock is gone when this process is, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", timeout=0)
        with lock:
            yield
    except Timeout as error:
        raise InputError(f"{out}: another process is writing to this run") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: cannot be written ({error}); what was saved before is whole") from error


class Interrupt:
    """SIGINT and SIGTERM ask a run to finish its step and save; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: finishing this step, then saving", file=sys.stderr, flush=True)

    def agreed(self) -> signal.Signals | None:
        """The signal that any process got: all must stop after the same step."""
        if not torch.distributed.is_initialized():
            return self.signal
        number = torch.tensor(self.signal or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(number)) if number else None


# Beginning, and going on


def last_checkpoint(out: Path, resume: bool, overwrite: bool) -> Path | None:
    """Where a resumed run goes on; None for one that begins. Raises InputError where a run is in the way."""
    listing = out / "checkpoints.json"
    if not listing.exists():
        if resume:
            print(f"note: {out}: stopped before its first checkpoint, it begins anew", flush=True)
        return None
    if resume:
        return inside(out, read_json(listing).get("last"), listing)
    if not overwrite:
        raise InputError(f"{out}: holds a run already; --resume {out} goes on, --overwrite starts anew")
    return None


def check_tests(out: Path, tests: list[str]) -> None:
    """A resumed run is scored on the datasets that it was begun with. Raises InputError."""
    before = read_json(out / "results.json").get("before")
    if not isinstance(before, list):
        raise InputError(f"{out / 'results.json'}: 'before' is missing or no list")
    scored = [result.get("dataset") for result in before if isinstance(result, dict)]
    if scored != tests:
        raise InputError(f"--test: {out} was begun with {scored}; keep to that, and use eval.py for others")


def clear(out: Path) -> None:
    """Remove an earlier run from its folder, and nothing else."""
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)
    for old in out.glob("step-*/trainer.json"):
        shutil.rmtree(old.parent)


def check_space(out: Path, weights: int, keep: int) -> None:
    """Say now, not after hours, that the checkpoints will not fit on the disk. Raises InputError.

    weights: how many numbers are trained. keep: how many checkpoints are kept beside the best.
    """
    # Weights and two moments in float32; beside those kept, the best and the one being written.
    need = 12 * weights * (keep + 2)
    if need > (free := shutil.disk_usage(out).free):
        raise InputError(f"{out}: checkpoints need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


# Checkpoints


def save_checkpoint(
    out: Path, step: int, write: Callable[[Path], None], optimizer: dict[str, Tensor], best: dict, keep: int
) -> None:
    """Write OUT/step-N whole or not at all, point checkpoints.json at it, keep the last ones and the best.

    write: puts the models into a folder. optimizer: its state, by name. best: {} or {"step", "ndcg@10"}.
    """
    folder = out / f"step-{step:06d}"
    temporary = out / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    save_file(optimizer, temporary / "optimizer.safetensors")
    write_atomic(temporary / "trainer.json", json.dumps({"step": step, "best": best}, indent=1) + "\n")
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    names = {"last": folder.name, "best": f"step-{best['step']:06d}" if best else None}
    write_atomic(out / "checkpoints.json", json.dumps(names, indent=1) + "\n")
    # A run that was killed may have left a later one whole that nothing points at.
    steps = sorted(out.glob("step-*"), key=lambda f: (f == folder, f.name.removeprefix("step-").zfill(20)))
    for other in steps[:-keep]:
        if other.name != names["best"]:
            shutil.rmtree(other)


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter]) -> dict:
    """The optimizer's tensors, by the parameter's name and their own."""
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in names.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_trainer(
    optimizer: torch.optim.Optimizer, names: Iterable[str], folder: Path
) -> tuple[int, dict[str, Any]]:
    """What `save_checkpoint` left beside the weights: the steps done and the best of them on dev.

    The optimizer gets its state back, for parameters of these names, in this order.
    """
    path = folder / "optimizer.safetensors"
    try:
        saved = load_file(path)
        state = {
            number: {key: saved[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for number, name in enumerate(names)
        }
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the run cannot go on from this checkpoint") from error
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path}: not a whole file of this run's optimizer ({error})") from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    path = folder / "trainer.json"
    progress = read_json(path)
    step, best = progress.get("step"), progress.get("best")
    if type(step) is not int or step < 1 or not isinstance(best, dict):
        raise InputError(f"{path}: 'step' or 'best' is missing or wrong")
    return step, best


# Metrics


class Log:
    """metrics.jsonl, one object a step. Figures stay on the device until `flush`: no step waits for them."""

    PATIENCE = 10  # steps in a row whose loss or gradient is not finite; then the run ends

    def __init__(self, path: Path | None, first_step: int):
        self.pending: list[dict] = []
        self.last: dict = {}
        self.skipped = 0  # in a row
        self.began = time.perf_counter()  # of the step that runs
        self.file = None  # all but the first process write nothing
        if path is not None:
            kept = []
            if first_step:  # lines after the checkpoint belong to steps that will be done again
                if not path.exists():
                    raise InputError(f"{path}: no such file; the run cannot go on without its metrics")
                whole, _, _ = path.read_text().rpartition("\n")  # half a line is of a process that was killed
                kept = [line for line in whole.splitlines() if json.loads(line)["step"] <= first_step]
            write_atomic(path, "".join(line + "\n" for line in kept))
            self.file = open(path, "a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()

    def add(self, step: int, stats: dict, rows: list[int]) -> None:
        """The figures of a step, just done; its seconds are those since `clock`."""
        seconds = time.perf_counter() - self.began
        self.pending.append({"step": step, **stats, "rows": rows, "time": {"seconds": seconds}})

    def clock(self) -> None:
        self.began = time.perf_counter()

    def flush(self) -> dict[str, str]:
        """Read and write what is pending; returns what the progress bar shows. Raises InputError."""
        shown, tokens, began = {}, 0, time.perf_counter()
        records: list[dict[str, Any]] = [
            {k: v.item() if isinstance(v, Tensor) else v for k, v in record.items()}
            for record in self.pending
        ]
        if records:  # steps are only sent to a GPU: what is still to be computed is waited for here
            records[-1]["time"]["seconds"] += time.perf_counter() - began
        for values in records:
            self.skipped = self.skipped + 1 if values["skipped"] else 0
            if self.skipped:
                print(f"step {values['step']} is skipped: its loss or gradient is not finite", flush=True)
            else:
                del values["skipped"], values["rows"]
            numbers = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
            whole = {k: int(numbers[k]) for k in COUNTS}
            self.write(numbers | whole)
            tokens += whole["tokens"]
            self.last = numbers if "loss" in numbers else self.last
            if self.skipped == self.PATIENCE:
                raise InputError(
                    f"{self.PATIENCE} steps in a row, up to {values['step']}, had a loss or gradient that is "
                    "not finite (their rows are in metrics.jsonl); lower --lr, or use --dtype float32"
                )
        if records and self.last:
            seconds = sum(record["time"]["seconds"] for record in records)
            shown = {"loss": f"{self.last['loss']:.3f}", "tokens/s": f"{tokens / seconds:,.0f}"}
            shown["candidates"] = f"{self.last['effective_candidates']:.2f}"
        self.pending = []
        return shown

    def write(self, record: dict) -> None:
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """To the disk, before a checkpoint that says these steps are done."""
        if self.file:
            os.fsync(self.file.fileno())
