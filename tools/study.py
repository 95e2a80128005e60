"""Run a study: train with several settings and seeds, and compare the results in tables and figures.

    python -m tools.study studies/demo/study.json
    python -m tools.study studies/demo/study.json --jobs 2 --only dream infonce
    python -m tools.study studies/demo/study.json --dry-run
    OMP_NUM_THREADS=1 python -m tools.study studies/demo/study.json     one core, beside other work

Run it from the project's root. The study file is one JSON object:

    "title"    and, optional, "about": text
    "prepare"  optional: [{"makes": FILE in the output folder, "command": [SCRIPT, ARGUMENT, ...]}]
    "train"    flags of `dream.py train` for all runs: {"steps": 60, "full": true, "test": ["demo"]}
    "seeds"    [0, 1, 2]
    "runs"     [{"name", "flags": {...}, "seeds": optional}]; all are compared with the first
    "tables"   [{"title", "runs": [NAME, ...], "baselines": true}]; baselines: BM25, the untrained retriever
    "figures"  optional: [{"file": "a.svg", "title", "kind": "bars", "runs": [NAME, ...], "bm25": true},
               {..., "kind": "lines", "x": FLAG, "xlabel"}, {..., "kind": "heads", "run": NAME}]

In flags and commands, {out} is the output folder and {here} the study file's. Each run and seed trains in its
own process and folder. Finished runs are skipped unless their flags have changed, interrupted ones go on, and
a failure stops no other run. Tables and figures (tools/compare.py) are written after every run, beside the
study file; where results of runs are there that this folder does not have, into the output folder.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dream import parse_arguments
from support.files import InputError, read_json, write_atomic
from support.launch import ArgumentParser, code_version, run_command
from support.runs import run_lock
from support.show import progress
from tools import compare, figures

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, "dream.py", "train"]
STUDY: dict[str, Any] = {  # the fields of a study file and what they hold; a ? marks optional ones
    "title": str,
    "about?": str,
    "prepare?": [{"makes": str, "command": [str]}],
    "train": dict,
    "seeds": [int],
    "runs": [{"name": str, "flags": dict, "seeds?": [int]}],
    "tables": [{"title": str, "runs": [str], "baselines?": bool}],
    "figures?": [
        {"file": str, "title": str, "kind": str, "runs?": [str], "run?": str}
        | {"bm25?": bool, "x?": str, "xlabel?": str}
    ],
}
TYPES = {str: "text", int: "an integer", bool: "true or false", dict: "an object", list: "a non-empty list"}


def check(where: str, value: Any, kind: Any) -> None:
    """Raises InputError unless the value is of the kind: a type, [kind of its items] or {field: kind}."""
    expected, found = kind if isinstance(kind, type) else type(kind), type(value)
    if found is not expected or value in ("", []):
        raise InputError(f"{where} must be {TYPES[expected]}, not {json.dumps(value)[:40]}")
    if isinstance(kind, list):
        for number, item in enumerate(value):
            check(f"{where}[{number}]", item, kind[0])
    elif isinstance(kind, dict):
        known = {name.rstrip("?"): own for name, own in kind.items()}
        if unknown := [name for name in value if name not in known]:
            raise InputError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
        for name, own in known.items():
            if name in value or name in kind:  # what is missing reads as null
                check(f"{where}: {name}", value.get(name), own)


def to_arguments(flags: dict) -> list[str]:
    """Flags as the command line has them: true is --flag, false --no-flag, a list several values."""
    arguments: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments.append(f"--{flag}={value}")
    return arguments


def read_flags(where: str, flags: dict, arguments: list[str]) -> dict:
    """The settings that `dream.py train` makes of the flags. Raises InputError where one is wrong."""
    said = io.StringIO()
    try:
        for name, value in flags.items():
            if name in ("seed", "out", "resume"):
                raise InputError(f"{name!r} is set by the study itself")
            if value is None or isinstance(value, dict):
                raise InputError(f"{name!r} must be a number, a text, true, false or a list of those")
        with contextlib.redirect_stderr(said):
            return vars(parse_arguments(["train", *arguments]))
    except (InputError, SystemExit) as error:
        told = said.getvalue().strip().rpartition("\n")[2] or error  # argparse prints its usage first
        raise InputError(f"{where}: {told}") from error


@dataclass
class Run:
    """One training: a named setting with one seed."""

    name: str
    seed: int
    flags: dict  # common and own ones, as in the study file
    arguments: list[str]  # the same for dream.py train
    settings: dict  # what it makes of them
    folder: Path  # beside it FOLDER.json, how the run was started, and FOLDER.log
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def read(self, suffix: str) -> dict:
        path = Path(f"{self.folder}{suffix}")
        return read_json(path) if path.exists() else {}

    def state(self) -> str:
        if not self.read("/settings.json"):
            return "new"
        if self.read(".json").get("flags") != self.flags:
            return "changed"
        return "finished" if self.read("/results.json").get("after") else "interrupted"

    def command(self) -> list[str]:
        resume = self.state() == "interrupted"
        return [*TRAIN, *(["--resume", str(self.folder)] if resume else [*self.arguments, "--overwrite"])]

    def start(self, threads: int) -> subprocess.Popen:
        """Begin the training, or go on with it."""
        command, old, new = self.command(), self.read(".json").get("flags", {}), self.flags
        if self.state() == "changed":
            changes = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]
            tqdm.write(f"{self}: its flags have changed ({', '.join(changes)}); it is done again")
            (self.folder / "settings.json").unlink()  # its old results must not pass for new ones
        record = {"name": self.name, "seed": self.seed, "flags": new, "machine": describe_machine(threads)}
        write_atomic(f"{self.folder}.json", json.dumps(record, indent=1) + "\n")
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(f"{self.folder}.log", "a", encoding="utf-8") as log:
            print("$ python", shlex.join(command[1:]), file=log, flush=True)
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def ended(self, status: int) -> None:
        """Tell where the training failed."""
        self.failed = status != 0 or self.state() != "finished"
        if self.failed:
            told = f"{self}: failed, exit status {status}; the end of {self.folder}.log:"
            lines = Path(f"{self.folder}.log").read_text(errors="replace").splitlines()
            tqdm.write("\n  ".join([told, *lines[-5:]]), file=sys.stderr)


def describe_machine(threads: int) -> dict:
    """What results depend on, beside the flags."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {"commit": code_version(), "torch": torch.__version__, "cpu": cpu and cpu[1], "gpu": gpu}
    return facts | {"cores": os.cpu_count(), "threads": threads}


class Study:
    """What a study file defines, every field and flag checked. Raises InputError."""

    def __init__(self, path: Path, out: Path | None = None, results: Path | None = None):
        self.content, self.path = read_json(path), path.resolve()
        check(str(path), self.content, STUDY)
        name = self.path.parent.name if path.stem == "study" else path.stem
        self.out = (out or ROOT / "runs" / "studies" / name).resolve()
        self.results = (results or self.path.parent).resolve()
        inputs = self.content.get("prepare", [])
        self.inputs = [(self.out / item["makes"], self.fill(item["command"])) for item in inputs]
        self.runs: dict[str, list[Run]] = {}  # of each name, one per seed
        slugs = set()
        for number, item in enumerate(self.content["runs"]):
            name, flags = item["name"], self.content["train"] | item["flags"]
            at, slug = f"{path}: runs[{number}] ({name})", re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            if not slug or slug in slugs:
                raise InputError(f"{at}: a name needs letters a-z or digits that are not another's")
            if "test" in item["flags"] or not flags.get("test"):
                raise InputError(f"{at}: 'test' belongs in 'train': runs are compared on the same datasets")
            slugs.add(slug)
            self.runs[name] = []
            for seed in dict.fromkeys(item.get("seeds", self.content["seeds"])):
                folder = self.out / f"{slug}-s{seed}"
                arguments = [*self.fill(to_arguments(flags)), f"--seed={seed}", f"--out={folder}"]
                settings = read_flags(at, flags, arguments)
                self.runs[name].append(Run(name, seed, flags, arguments, settings, folder))
        for part in ("tables", "figures"):
            for number, item in enumerate(self.content.get(part, [])):
                at, kind = f"{path}: {part}[{number}]", item.get("kind", "bars")
                if kind not in ("bars", "lines", "heads"):
                    raise InputError(f"{at}: 'kind' must be bars, lines or heads, not {kind!r}")
                names = [item.get("run")] if kind == "heads" else item.get("runs", [None])
                if unknown := [name for name in names if name not in self.runs]:
                    raise InputError(f"{at}: no run is named {unknown[0]!r}")
                x = [self.runs[name][0].settings.get(item.get("x")) for name in names if kind == "lines"]
                if not all(type(value) in (int, float) for value in x):
                    raise InputError(f"{at}: 'x' must be a flag that is a number in all of its runs")

    def fill(self, arguments: list[str]) -> list[str]:
        places = {"{out}": str(self.out), "{here}": str(self.path.parent)}
        return [re.sub("{out}|{here}", lambda found: places[found[0]], text) for text in arguments]

    def prepare(self) -> None:
        """Make the files that the runs read. Raises InputError."""
        for made, command in self.inputs:
            if not made.exists():
                print(f"prepare: {made.name}", flush=True)
                status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
                if status or not made.exists():
                    raise InputError(f"{made}: not made, exit status {status}")

    def protect(self) -> None:
        """Results of runs that were never here, as in a fresh clone, stay; ours go to the output folder."""
        path = self.results / "results.json"
        entries = read_json(path).get("runs", []) if path.exists() else []
        done = {
            (e["name"], s) for e in entries for s, own in e["seeds"].items() if own["state"] == "finished"
        }
        runs = [run for own in self.runs.values() for run in own if (run.name, str(run.seed)) in done]
        if absent := [run for run in runs if not run.read(".json")]:
            self.results = self.out
            print(f"{path}: left alone, {len(absent)} of its runs are not here; results go to {self.out}")

    def train(self, todo: list[Run], jobs: int) -> None:
        """Train, `jobs` runs at once, and write the results after each of them."""
        given = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(given) if given.isdigit() else max(1, (os.cpu_count() or 1) // jobs)
        waiting, running = list(todo), dict[subprocess.Popen, Run]()
        try:
            with progress(total=len(todo), desc="study", unit="run", hidden=not todo) as bar:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        run = waiting.pop(0)
                        running[run.start(threads)] = run
                    time.sleep(0.1)
                    for process in [process for process in running if process.poll() is not None]:
                        running.pop(process).ended(process.returncode)
                        self.write()
                        bar.update()
        finally:
            for process in running:
                process.terminate()  # a training saves first
            for process in running:
                process.wait()

    def write(self) -> str:
        """Write results.json, the figures and results.md with what there is so far; returns the tables."""
        entries, machines = list[dict](), list[dict]()
        for name, runs in self.runs.items():
            done = [run for run in runs if run.state() == "finished"]
            seeds = {str(run.seed): {"state": "failed" if run.failed else "missing"} for run in runs}
            seeds |= {str(run.seed): compare.read_scores(run.folder) for run in done}
            entries.append({"name": name, "flags": runs[0].flags, "datasets": {}, "seeds": seeds})
            machines += [run.read(".json")["machine"] for run in done]
        compare.compare(entries)
        unique = [own for number, own in enumerate(machines) if own not in machines[:number]]
        results = {"title": self.content["title"], "machines": unique, "flips": compare.FLIPS}
        results |= {"study": self.content, "runs": entries}
        write_atomic(self.results / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        drawn = []
        for item in self.content.get("figures", []):
            if svg := self.draw(item, entries):
                write_atomic(self.results / item["file"], svg)
                drawn.append(item)
        name = self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name
        write_atomic(self.results / "results.md", compare.page(results, name, drawn))
        return "\n\n".join(compare.tables(results))

    def draw(self, item: dict, entries: list[dict]) -> str:
        """A figure as SVG, empty while there is nothing to show."""
        if item["kind"] == "heads":
            runs = self.runs[item["run"]]
            heads = next((run.read("/heads.json") for run in runs if run.state() == "finished"), {})
            scores = heads.get("scores")  # without them where another objective or given heads were used
            return figures.head_map(item["title"], scores, heads["selected"]) if scores else ""
        x = [self.runs[name][0].settings.get(item.get("x")) for name in item["runs"]]
        return compare.draw(item, entries, x)


def run_study(args: argparse.Namespace) -> int:
    """Everything `main` does, InputError not caught; the exit status."""
    study = Study(args.study, args.out, args.results)
    if unknown := [name for name in args.only if name not in study.runs]:
        raise InputError(f"--only: no run is named {unknown[0]!r}; there are {', '.join(study.runs)}")
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: at least 1")
    chosen = [run for name, runs in study.runs.items() if not args.only or name in args.only for run in runs]
    todo = [run for run in chosen if run.state() != "finished"]
    if args.dry_run:
        for made, command in study.inputs:
            state = "finished" if made.exists() else "new"
            print(f"prepare {made.name}: {state}\n  python {shlex.join(command)}")
        for run in todo:
            print(f"{run}: {run.state()}\n  python {shlex.join(run.command()[1:])}")
        return 0
    study.protect()
    if args.tables:
        print(study.write())
        return 0
    with run_lock(study.out):
        study.prepare()
        study.write()  # what is wrong with finished runs shows before hours of others
        study.train(todo, args.jobs)
        print(study.write())
    print(f"\nwritten: results.json, results.md and figures in {study.results}")
    if failed := [str(run) for run in todo if run.failed]:
        print(f"study: failed: {', '.join(failed)}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says, and 1 when a run failed."""
    parser = ArgumentParser("study", description=__doc__)
    add = parser.add_argument
    add("study", metavar="FILE", type=Path, help="the study's definition, JSON")
    add("--out", type=Path, metavar="DIR", help="where runs are kept (default: runs/studies/NAME)")
    add("--results", type=Path, metavar="DIR", help="where tables and figures go (default: beside FILE)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once, which share the cores (default: 1)")
    add("--only", nargs="+", default=[], metavar="NAME", help="run these alone")
    add("--tables", action="store_true", help="run nothing, write what is finished")
    add("--dry-run", action="store_true", help="show what would be run, and write nothing")
    args = parser.parse_args(argv)
    told = "interrupted; the same command goes on where it stopped"
    return run_command("study", lambda: run_study(args), told)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
