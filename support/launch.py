"""How a command starts and ends: devices, dtypes, processes, exit statuses."""

import argparse
import difflib
import importlib
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from support.files import InputError

CPU = torch.device("cpu")
NARROW = 512  # hidden size; below it products are too small for their dtype to matter, and results stay exact


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a flag; auto, or None, is CUDA where there is one."""
    if isinstance(name, torch.device):
        return name
    name = name or "auto"
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: use auto, cpu or cuda")
    if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"--device {name}: each of several processes has a GPU of its own; use auto or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    return device


def pick_dtype(
    name: str | torch.dtype | None, device: torch.device, width: int = 0
) -> tuple[torch.dtype, str]:
    """The compute dtype of a flag, and the reason to print beside it; None is auto.

    width: the network's hidden size; on a CPU, auto is float32 up to NARROW, and then what multiplies faster.
    """
    if isinstance(name, torch.dtype):
        return name, "asked for"
    name = name or "auto"
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in named:
        return named[name], "asked for"
    if name != "auto":
        raise InputError(f"--dtype {name}: use auto, {', '.join(named)}")
    if device.type != "cuda" and width < NARROW:
        return torch.float32, "a CPU computes it fastest"
    if device.type != "cuda":
        gain = bfloat16_gain()
        told = f"the CPU multiplies bfloat16 {gain:.1f}x as fast"
        return (torch.bfloat16 if gain >= 1.5 else torch.float32), told
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has bfloat16 units"
    return torch.float32, "the GPU has no bfloat16 units, and float16 overflows"


@cache
def bfloat16_gain() -> float:
    """How many times as fast as in float32 the CPU multiplies in bfloat16: some milliseconds of a product of
    a real model's size. Of several processes, the first's finding."""
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)  # several would wait for one another on a busy machine
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    torch.set_num_threads(threads)
    return agree(seconds[0] / seconds[1])


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Memory that runs out is told in one line, with what to do. Raises InputError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory: {advice} ({error})"[:400]) from error


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32: no TF32, whatever a caller has set for its training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def join_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun started them; (0, 1) for one alone.

    All but the first print nothing. The first call joins the process group: gloo for what is on the CPU, nccl
    for what is on GPUs.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        # Its functions' defaults keep the group that exists when torch first imports it (as torch._dynamo
        # does): gloo's threads would outlive `leave_processes` and now and then abort the exit.
        importlib.import_module("torch.distributed.nn.functional")
        if torch.cuda.is_available():
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                told = f"--nproc-per-node {gpus}, or CUDA_VISIBLE_DEVICES= for processes on the CPU"
                raise InputError(f"torchrun: one process a GPU, and {gpus} are visible; use {told}")
            torch.cuda.set_device(local)
        # Ranks wait for the first while it chooses heads or fetches data: longer than the default allows.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=4))
        if torch.distributed.get_rank():
            sys.stdout = open(os.devnull, "w")
    return torch.distributed.get_rank(), processes


def agree(value: float) -> float:
    """The first process's number, in every process."""
    number = torch.tensor(value, dtype=torch.float64)
    if join_processes()[1] > 1:
        torch.distributed.broadcast(number, src=0)
    return number.item()


def one_process(name: str) -> None:
    """Refuse torchrun, for a command whose processes would all do the same work. Raises InputError."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{name} runs in one process, without torchrun")


def leave_processes(failed: bool = False, status: int = 0) -> int:
    """End the process group, and with it its threads: one that outlives the interpreter may abort it.

    failed: this process alone does. nccl's groups end together or not at all, and the others may wait for
    this one: it exits at once, with `status`, and torchrun then ends them. Returns `status`.
    """
    if torch.distributed.is_initialized():
        if failed:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        torch.distributed.destroy_process_group()
    return status


def add_up(stats: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> dict[str, Tensor]:
    """The sums of a training step and the gradients, added up over all processes; one message for all."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack(list(stats.values()))])
    torch.distributed.all_reduce(flat)
    *parts, sums = flat.split([*(gradient.numel() for gradient in gradients), len(stats)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return dict(zip(stats, sums, strict=True))


def merge_hits(scores: Tensor, indices: Tensor, k: int, processes: int) -> tuple[Tensor, Tensor]:
    """The k best of every process's hits, (Q, k) each."""
    missing = (0, k - scores.shape[1])  # a process with few documents has found fewer
    scores, indices = F.pad(scores, missing, value=-math.inf), F.pad(indices, missing, value=-1)
    parts = [torch.empty_like(scores) for _ in range(processes)]
    numbers = [torch.empty_like(indices) for _ in range(processes)]
    torch.distributed.all_gather(parts, scores)
    torch.distributed.all_gather(numbers, indices)
    scores, kept = torch.cat(parts, dim=1).topk(k, dim=1)
    return scores, torch.cat(numbers, dim=1).gather(1, kept)


def run_command(name: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """A command's exit status: that of its work, 2 when its input is wrong, 130 after Ctrl-C, 141 when nobody
    reads what it prints (`| head`). What goes wrong is told in one line, without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" where a terminal has no such letter
    try:
        status = work() or 0
        print(end="", flush=True)  # here a closed pipe can still be told
        return leave_processes(status=status)
    except KeyboardInterrupt:
        told, status = interrupted, 130
    except BrokenPipeError:  # who reads this has read enough: no more goes there, at the end neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return leave_processes(failed=True, status=141)
    except (InputError, OSError, SafetensorError) as error:
        told, status = f"error: {error}", 2
    print(f"{name}: {told}", file=sys.stderr)
    return leave_processes(failed=True, status=status)


def one_ahead(items: Iterable) -> Iterator:
    """The items, each made in a background thread while the one before it is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, iterator, end)
            yield item


def code_version() -> str | None:
    """The commit of this code, with -dirty where it was changed since; None outside a git checkout."""
    root = str(Path(__file__).parent.parent)
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, which takes no abbreviations and names the flag that a mistyped one may stand for.

    gone: flags and commands of earlier versions, and what to say of them.
    """

    def __init__(self, prog: str | None = None, gone: dict[str, str] | None = None, **options: Any):
        options.setdefault(
            "formatter_class", partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
        )
        super().__init__(prog, allow_abbrev=False, **options)
        self.gone = gone or {}

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        for word in [*args[:1], *(text.partition("=")[0] for text in args if text.startswith("--"))]:
            if word in self.gone:
                self.error(f"{word} {self.gone[word]}")
        namespace, unknown = super().parse_known_args(args, namespace)
        for flag in (text.partition("=")[0] for text in unknown if text.startswith("-")):
            known = [name for action in self._actions for name in action.option_strings]
            if close := difflib.get_close_matches(flag, known, 1):
                self.error(f"unrecognized arguments: {flag}; did you mean {close[0]}?")
        return namespace, unknown
