"""Run a study: the same training with several settings and seeds, compared in tables and figures.

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

{out} in flags and commands is the output folder, {here} the study file's. Each run and seed trains in a
process and a folder of its own. What is finished is not run again unless its flags have changed, what was
interrupted goes on, a failure stops no other run. Tables and figures are written after every run.

p: two-sided paired randomisation test over queries, their scores averaged over seeds first (Smucker, Allan
and Carterette, CIKM 2007), by random sign flips; Holm's correction over all comparisons of a dataset.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import dream
from support.files import InputError, check_writable, inside, read_json, write_atomic
from support.launch import code_version, run_command
from tools import figures
from tools.export import table

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100  # columns of a table
FLIPS = 100_000
OWN_FLAGS = ("command", "seed", "out", "resume", "overwrite", "change_settings")  # set by the study alone
KINDS = {str: "text", list: "a list", dict: "an object", bool: "true or false"}
FIGURES: dict[str, tuple[dict, dict]] = {  # kind: fields that it needs, fields that it may have
    "bars": ({"runs": list}, {"bm25": bool}),
    "lines": ({"runs": list, "x": str}, {"xlabel": str, "bm25": bool}),
    "heads": ({"run": str}, {}),
}
MEASURE = "ndcg@10"
COMPARED = {"difference": "+.4f", "p": ".2g", "p_holm": ".2g"}
LEGEND = """Means and sample standard deviations over seeds. Difference: to *{first}*, the mean over queries.
p: two-sided paired randomisation test over queries, {flips:,} random sign flips, scores averaged over seeds
first (Smucker, Allan and Carterette, CIKM 2007); it tells about other queries, not about other seeds. Holm:
adjusted over all comparisons of a dataset in this study. Each run and seed: results.json."""

Command = Callable[[list[str]], list[str]]  # what follows `dream.py train` -> the whole command


@dataclass
class Run:
    """One line of a table: some flags, trained once a seed."""

    name: str
    slug: str
    flags: dict  # common and own ones, as in the study file
    seeds: list[int]
    arguments: list[str]  # for dream.py train, but for --seed and --out
    settings: dict  # what dream.py makes of them

    def label(self, seed: int) -> str:
        return f"{self.name}, seed {seed}"


@dataclass
class Study:
    content: dict  # of the file, as it is
    path: Path
    out: Path
    results: Path
    runs: dict[str, Run]
    prepare: list[tuple[Path, list[str]]]  # (what is made, command)

    def folder(self, run: Run, seed: int) -> Path:
        return self.out / f"{run.slug}-s{seed}"


class Task(NamedTuple):
    """A process to run. key: the run's name and seed."""

    key: tuple[str, int]
    label: str
    command: tuple[str, ...]
    log: Path


# Reading the study


def checked(where: str, value: Any, needed: dict[str, type], optional: dict[str, type] | None = None) -> dict:
    """The object, once it has the fields that are needed and no others. Raises InputError."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {json.dumps(value)[:40]}")
    known = needed | (optional or {})
    for name in value:
        if name not in known:
            raise InputError(f"{where}: unknown field {name!r}; known are {', '.join(known)}")
    for name, kind in known.items():
        if name in needed and name not in value:
            raise InputError(f"{where}: {name!r} is missing")
        if name in value and (not isinstance(value[name], kind) or kind is str and not value[name].strip()):
            raise InputError(f"{where}: {name!r} must be {KINDS[kind]}, not {json.dumps(value[name])[:40]}")
    return value


def list_of(where: str, values: list, kind: type[int] | type[str]) -> list:
    """The list, once it has something in it, of one kind and nothing twice. Raises InputError."""
    bad = [v for v in values if type(v) is not kind or (v < 0 if isinstance(v, int) else not v.strip())]
    if not values or bad:
        what = "seeds (whole numbers from 0 on)" if kind is int else "texts"
        raise InputError(f"{where}: must be a list of one or more {what}, not {json.dumps(values)[:40]}")
    if twice := [v for v in values if values.count(v) > 1]:
        raise InputError(f"{where}: {twice[0]!r} is there twice")
    return values


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


def parse_flags(where: str, arguments: list[str], flags: dict) -> dict:
    """What `dream.py train` makes of the flags. Raises InputError where it would refuse them."""
    known = set(vars(dream.parse_arguments(["train"])))
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        if name in OWN_FLAGS:
            raise InputError(f"{where}: {name!r} is set by the study itself; leave it out")
        if any(not isinstance(v, bool | int | float | str) for v in values):
            raise InputError(f"{where}: {name!r} must be a number, a text, true, false or a list of those")
        if name not in known:
            raise InputError(f"{where}: dream.py train has no flag {name!r}; its --help lists them")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return vars(dream.parse_arguments(["train", *arguments, "--out=."]))
    except SystemExit as error:
        raise InputError(f"{where}: {said.getvalue().strip().splitlines()[-1]}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def read_study(path: Path, out: Path | None = None, results: Path | None = None) -> Study:
    """The study that a file defines, every field and flag checked. Raises InputError."""
    needed: dict[str, type] = {"title": str, "train": dict, "seeds": list, "runs": list, "tables": list}
    content = checked(str(path), read_json(path), needed, {"about": str, "prepare": list, "figures": list})
    here = path.resolve().parent
    stem = here.name if path.stem == "study" else path.stem
    out, results = (out or ROOT / "runs" / "studies" / stem).resolve(), (results or here).resolve()
    if path.resolve() in (results / "results.json", results / "results.md"):
        raise InputError(f"{path}: would be overwritten by the results; give the file another name")
    check_writable(out, folder=True)
    check_writable(results / "results.json")
    places = {"{out}": str(out), "{here}": str(here)}

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(v) for v in value]
        return re.sub(r"\{(out|here)\}", lambda m: places[m[0]], value) if isinstance(value, str) else value

    prepare = []
    for number, item in enumerate(content.get("prepare", [])):
        at = f"{path}: prepare[{number}]"
        checked(at, item, {"makes": str, "command": list})
        if not item["command"] or not all(isinstance(part, str) for part in item["command"]):
            raise InputError(f"{at}: 'command' must be a list of texts, the first one a script")
        prepare.append((inside(out, item["makes"], path), filled(item["command"])))

    list_of(f"{path}: seeds", content["seeds"], int)
    runs: dict[str, Run] = {}
    slugs: dict[str, str] = {}
    for number, item in enumerate(content["runs"]):
        at = f"{path}: runs[{number}]"
        checked(at, item, {"name": str, "flags": dict}, {"seeds": list})
        name, flags = item["name"], content["train"] | item["flags"]
        at += f" ({name})"
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        if not slug or len(name) > 40 or not name.isprintable():
            raise InputError(f"{at}: a name has up to 40 characters, some of them letters a-z or digits")
        if slug in slugs:
            raise InputError(f"{at}: its name is that of another run ({slugs[slug]}), or too much like it")
        slugs[slug] = name
        if "test" in item["flags"]:
            raise InputError(f"{at}: 'test' belongs into 'train': runs are compared on the same queries")
        arguments = to_arguments({key: filled(value) for key, value in flags.items()})
        settings = parse_flags(at, arguments, flags)
        if not settings["test"]:
            raise InputError(f"{path}: train: 'test' is missing, the datasets that runs are compared on")
        seeds = list_of(f"{at}: seeds", item.get("seeds", content["seeds"]), int)
        runs[name] = Run(name, slug, flags, seeds, arguments, settings)
    if not runs:
        raise InputError(f"{path}: 'runs' is empty")

    def known_runs(at: str, names: list) -> None:
        if unknown := [name for name in list_of(f"{at}: runs", names, str) if name not in runs]:
            raise InputError(f"{at}: no run is named {unknown[0]!r}")

    for number, item in enumerate(content["tables"]):
        at = f"{path}: tables[{number}]"
        known_runs(at, checked(at, item, {"title": str, "runs": list}, {"baselines": bool})["runs"])
    files = []
    for number, item in enumerate(content.get("figures", [])):
        at = f"{path}: figures[{number}]"
        kind = item.get("kind") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in FIGURES:
            raise InputError(f"{at}: 'kind' must be {', '.join(FIGURES)}, not {kind!r}")
        checked(at, item, {"file": str, "kind": str, "title": str, **FIGURES[kind][0]}, FIGURES[kind][1])
        known_runs(at, item["runs"] if "runs" in item else [item["run"]])
        numbers = [runs[name].settings.get(item["x"]) for name in item["runs"]] if kind == "lines" else []
        if not all(type(value) in (int, float) for value in numbers):
            raise InputError(f"{at}: 'x' is {item['x']!r}, which is not a number in all of its runs")
        if not re.fullmatch(r"[\w-][\w.-]*\.svg", item["file"]) or item["file"] in files:
            raise InputError(
                f"{at}: 'file' must be a name of its own that ends in .svg, not {item['file']!r}"
            )
        files.append(item["file"])
    return Study(content, path, out, results, runs, prepare)


# Running it


def record(study: Study, run: Run, seed: int) -> dict:
    """What was kept of how a run was started: its flags, and on which machine and commit."""
    path = study.folder(run, seed).with_suffix(".json")
    return read_json(path) if path.exists() else {}


def state(study: Study, run: Run, seed: int) -> str:
    """new, finished, interrupted, or changed: its folder is from other flags."""
    folder = study.folder(run, seed)
    if not (folder / "settings.json").exists():
        return "new"
    if record(study, run, seed).get("flags") != run.flags:
        return "changed"
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    after, before = results.get("after"), results.get("before")
    return "finished" if after and len(after) == len(before or []) else "interrupted"


def arguments_of(study: Study, run: Run, seed: int) -> list[str]:
    """What follows `dream.py train` to begin a run or to go on with it."""
    folder = study.folder(run, seed)
    if state(study, run, seed) == "interrupted":
        return ["--resume", str(folder)]
    anew = ["--overwrite"] if (folder / "checkpoints.json").exists() else []
    return [*run.arguments, f"--seed={seed}", f"--out={folder}", *anew]


def machine(threads: int) -> dict:
    """What figures depend on, beside the flags."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {"commit": code_version(), "torch": torch.__version__, "cpu": found[1] if found else None}
    return facts | {"gpu": gpu, "cores": os.cpu_count(), "threads": threads}


def trainings(study: Study, todo: list[tuple[Run, int]], command: Command, threads: int) -> Iterator[Task]:
    """The training processes, each made ready when it is asked for."""
    facts = machine(threads)
    for run, seed in todo:
        folder = study.folder(run, seed)
        if state(study, run, seed) == "changed":
            old = record(study, run, seed).get("flags", {})
            both = [(key, old.get(key), run.flags.get(key)) for key in {**old, **run.flags}]
            told = ", ".join(f"{key}: {was} -> {now}" for key, was, now in both if was != now)
            tqdm.write(f"{run.label(seed)}: its flags have changed ({told}); it is done again")
            # Without its settings a run counts as not begun, whatever happens between here and its start.
            (folder / "settings.json").unlink()
        arguments = arguments_of(study, run, seed)
        content = {"name": run.name, "seed": seed, "flags": run.flags, "machine": facts}
        write_atomic(folder.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
        yield Task((run.name, seed), run.label(seed), tuple(command(arguments)), folder.with_suffix(".log"))


def start(task: Task, threads: int) -> subprocess.Popen:
    """The task's process, its output going to the end of its log."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "a", encoding="utf-8") as log:
        print("$", shlex.join(["python", *task.command[1:]]), file=log, flush=True)
        return subprocess.Popen(
            task.command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches it through us, once
        )


def run_processes(tasks: Iterator[Task], jobs: int, threads: int, ended: Callable[[Task, int], None]) -> None:
    """Run them, `jobs` at once; `ended` is told each one's exit status. An interruption stops them too."""
    running: dict[Task, subprocess.Popen] = {}
    try:
        while True:
            while len(running) < jobs and (task := next(tasks, None)):
                running[task] = start(task, threads)
            if not running:
                return
            time.sleep(0.1)
            for task in [task for task, process in running.items() if process.poll() is not None]:
                ended(task, running.pop(task).returncode)
    finally:
        stop(list(running.values()))


def stop(processes: list[subprocess.Popen]) -> None:
    """Asked to end, a training saves first; a second interruption does not wait for that."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def last_lines(log: Path, count: int = 5) -> str:
    """The end of what a process printed, without progress bars."""
    text = log.read_bytes()[-8000:].decode(errors="replace")
    kept = [line.rpartition("\r")[2] for line in text.split("\n") if line.strip()]
    return "\n".join(f"  {line[:200]}" for line in kept[-count:])


# Statistics


def sign_flip_p(differences: np.ndarray, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p of the paired randomisation test: would random signs move the mean as far from 0?

    differences: (Q,) of two systems' scores, a query each. p = (1 + hits) / (1 + flips), never 0.
    """
    d = np.asarray(differences, np.float64)
    d = d[d != 0]  # the sign of nothing changes nothing
    generator, hits = np.random.default_rng(seed), 0
    bound = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # a tie is a hit, whatever the rounding
    size = max(1, 2**21 // max(1, len(d)))  # flips at once: 16 MB of float64
    for first in range(0, flips, size):
        count = min(size, flips - first)
        bits = np.frombuffer(generator.bytes((count * len(d) + 7) // 8), np.uint8)
        signs = np.unpackbits(bits, count=count * len(d)).reshape(count, len(d))  # (F, Q), 0 or 1
        hits += int((np.abs(2 * (signs @ d) - d.sum()) >= bound).sum())
    return (1 + hits) / (1 + flips)


@cache
def _remembered_p(differences: bytes) -> float:
    """Partial results are written after every run; what did not change is not flipped again."""
    return sign_flip_p(np.frombuffer(differences))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment of p values, in their own order (Holm, 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def summary(values: list[float]) -> dict:
    """Mean and sample standard deviation, the latter of two values or more."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


# Collecting what the runs left


def read_figures(folder: Path) -> dict:
    """The figures of a finished run and seed. Raises InputError where they are not as train writes them."""
    results = read_json(folder / "results.json")
    try:
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        datasets: dict[str, dict] = {}
        for kind in ("bm25", "before", "after"):
            seen: Counter[str] = Counter()
            for result in results[kind]:
                seen[dataset := result["dataset"]] += 1
                dataset += f" ({seen[dataset]})" * (seen[dataset] > 1)  # another folder of the same name
                own = {"queries": result["queries"], MEASURE: result["metrics"][MEASURE]}
                own["groups"] = {name: g[MEASURE] for name, g in result.get("groups", {}).items()}
                if kind == "after":
                    own["per_query"] = result[f"{MEASURE}_per_query"]
                datasets.setdefault(dataset, {})[kind] = own
        trained = [step for step in steps if "time" in step]
        tokens = [step["retriever_tokens"] for step in trained if "retriever_tokens" in step]
        return {
            "datasets": datasets,
            "dev": max((step["dev"][MEASURE] for step in steps if "dev" in step), default=None),
            "retriever_tokens": sum(tokens) if len(tokens) == len(trained) else None,
            "seconds": sum(step["time"]["seconds"] for step in trained),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        advice = "not as this dream.py writes it; delete the folder to run it again"
        raise InputError(f"{folder}: its results or metrics are {advice} ({what})") from error


def collect(study: Study, failed: set) -> dict:
    """All figures of the study as they are now, as results.json has them."""
    machines: list[dict] = []
    runs, queries = [], {}
    for run in study.runs.values():
        seeds: dict[int, dict] = {}
        for seed in run.seeds:
            if state(study, run, seed) == "finished":
                seeds[seed] = {**read_figures(study.folder(run, seed)), "state": "finished"}
                known = record(study, run, seed).get("machine", {})
                machines += [known] if known not in machines else []
            else:
                seeds[seed] = {"state": "failed" if (run.name, seed) in failed else "missing"}
        done = [own for own in seeds.values() if own["state"] == "finished"]
        entry: dict[str, Any] = {"name": run.name, "flags": run.flags, "datasets": {}}
        for dataset in done[0]["datasets"] if done else []:
            after = [own["datasets"][dataset]["after"] for own in done]
            scores = {"queries": after[0]["queries"], **summary([own[MEASURE] for own in after])}
            scores["groups"] = {g: summary([own["groups"][g] for own in after]) for g in after[0]["groups"]}
            entry["datasets"][dataset] = scores
            per_query = [own.pop("per_query") for own in after]
            if any(own.keys() != per_query[0].keys() for own in per_query):
                raise InputError(
                    f"{study.out}: seeds of {run.name!r} were scored on other queries of {dataset}"
                )
            means = {q: statistics.fmean(own[q] for own in per_query) for q in per_query[0]}
            queries[run.name, dataset] = means
        for name in ("dev", "retriever_tokens", "seconds"):
            values = [own[name] for own in done]
            entry[name] = summary(values) if values and None not in values else None
        runs.append(entry | {"seeds": {str(seed): own for seed, own in seeds.items()}})
    compare(study, runs, queries)
    about = {"title": study.content["title"], "machines": machines, "flips": FLIPS}
    return about | {"study": study.content, "runs": runs}


def compare(study: Study, runs: list[dict], queries: dict[tuple[str, str], dict[str, float]]) -> None:
    """Add each run's difference to the first one, and its p values, to its datasets."""
    first, *others = runs
    for dataset in first["datasets"]:
        against, compared = queries[first["name"], dataset], []
        for entry in (other for other in others if dataset in other["datasets"]):
            own = queries[entry["name"], dataset]
            if own.keys() != against.keys():
                both = f"{first['name']!r} and {entry['name']!r}"
                raise InputError(f"{study.out}: {both} were scored on other queries of {dataset}")
            differences = np.array([own[q] - against[q] for q in against])  # (Q,)
            scores = entry["datasets"][dataset]
            scores |= {"difference": differences.mean().item(), "p": _remembered_p(differences.tobytes())}
            compared.append(scores)
        for scores, p in zip(compared, holm([scores["p"] for scores in compared]), strict=True):
            scores["p_holm"] = p


# Showing it


def plus_minus(value: dict | None, form: str = ".4f") -> str:
    if value is None:
        return "–"
    deviation = f" ± {value['deviation']:{form}}" if value["deviation"] is not None else ""
    return f"{value['mean']:{form}}{deviation}"


def fold(rows: list[list[str]]) -> str:
    """One Markdown table, or several with the first column repeated, none wider than WIDTH columns."""
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    blocks, room = [[0]], WIDTH - 1 - widths[0]
    for column, width in enumerate(widths[1:], 1):
        if width > room and len(blocks[-1]) > 1:
            blocks.append([0])
            room = WIDTH - 1 - widths[0]
        blocks[-1].append(column)
        room -= width
    return "\n\n".join(table([[row[column] for column in block] for row in rows], left=1) for block in blocks)


def seeds_cell(entry: dict) -> str:
    states = [own["state"] for own in entry["seeds"].values()]
    missing = [f"{states.count(s)} {s}" for s in ("failed", "missing") if s in states]
    return ", ".join([str(states.count("finished")), *missing])


def score_table(dataset: str, entries: list[dict], baselines: bool) -> str:
    """One dataset's scores: baselines, then the runs with their differences to the first run."""
    groups = sorted({g for entry in entries for g in entry["datasets"].get(dataset, {}).get("groups", {})})
    rows = [["run", "seeds", "NDCG@10", "difference", "p", "p (Holm)", *groups]]
    found: dict[tuple, list[str]] = {}
    for kind, name in (("bm25", "BM25"), ("before", "untrained retriever")):
        for entry in entries if baselines else []:
            for own in (
                own["datasets"][dataset][kind] for own in entry["seeds"].values() if "datasets" in own
            ):
                cells = [f"{x:.4f}" for x in (own[MEASURE], *(own["groups"][g] for g in groups))]
                other = any(known == kind for known, *_ in found)  # another retriever, or another length
                title = f"{name} ({entry['name']})" if other else name
                found.setdefault((kind, *cells), [title, "", cells[0], "", "", "", *cells[1:]])
    rows += found.values()
    for entry in entries:
        scores = entry["datasets"].get(dataset)
        cells = [entry["name"].replace("|", "\\|"), seeds_cell(entry)]
        if scores is None:
            failed = any(own["state"] == "failed" for own in entry["seeds"].values())
            rows.append(cells + ["failed" if failed else "missing"] * (4 + len(groups)))
            continue
        cells += [plus_minus(scores)]
        cells += [f"{scores[k]:{form}}" if k in scores else "" for k, form in COMPARED.items()]
        rows.append(cells + [plus_minus(scores["groups"].get(g)) for g in groups])
    return fold(rows)


def markdown(study: Study, results: dict) -> tuple[str, str]:
    """The tables alone, for a terminal, and the whole results.md."""
    entries = {entry["name"]: entry for entry in results["runs"]}
    datasets = list(dict.fromkeys(d for entry in entries.values() for d in entry["datasets"]))
    tables = []
    for item in study.content["tables"]:
        own = [entries[name] for name in item["runs"]]
        tables.append(f"## {item['title']}")
        for dataset in datasets or ["no results yet"]:
            count = next((e["datasets"][dataset]["queries"] for e in own if dataset in e["datasets"]), None)
            tables.append(f"**{dataset}**" + (f", {count:,} queries" if count else ""))
            tables.append(score_table(dataset, own, item.get("baselines", False)))
        rows = [["run", "best dev NDCG@10", "retriever tokens", "seconds of training"]]
        for e in own:
            costs = [plus_minus(e[name], ",.0f") for name in ("retriever_tokens", "seconds")]
            rows.append([e["name"].replace("|", "\\|"), plus_minus(e["dev"]), *costs])
        tables.append(fold(rows))
    shown = "\n\n".join(tables)
    path = study.path.resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    first = study.content["runs"][0]["name"]
    parts = [f"# {study.content['title']}", study.content.get("about", "")]
    parts += [f"```console\n$ python -m tools.study {shlex.quote(name)}\n```", shown]
    drawn = [item for item in study.content.get("figures", []) if (study.results / item["file"]).exists()]
    parts += [f"![{item['title']}]({item['file']})" for item in drawn]
    parts += ["## How to read this", LEGEND.format(first=first, flips=FLIPS)]
    for own in results["machines"]:
        where = own.get("gpu") or own.get("cpu") or "a CPU"
        threads = f"{own.get('cores')} cores, {own.get('threads')} threads a run"
        parts.append(f"Run on {where}, {threads}, torch {own.get('torch')}, at commit {own.get('commit')}.")
    return shown, "\n\n".join(part for part in parts if part) + "\n"


def draw(study: Study, item: dict, results: dict) -> str | None:
    """One figure as SVG; None while there is nothing to show. Of several datasets, their unweighted mean."""
    entries = {entry["name"]: entry for entry in results["runs"]}
    if item["kind"] == "heads":
        run = study.runs[item["run"]]
        seeds = [s for s in run.seeds if entries[run.name]["seeds"][str(s)]["state"] == "finished"]
        path = study.folder(run, seeds[0]) / "heads.json" if seeds else None
        heads = read_json(path) if path and path.exists() else {}
        drawn = "scores" in heads  # a file of heads that was given may have none, InfoNCE has no heads
        return figures.head_map(item["title"], heads["scores"], heads["selected"]) if drawn else None

    def average(own: dict, kind: str = "after") -> float:
        return statistics.fmean(result[kind][MEASURE] for result in own["datasets"].values())

    scored = {}
    for name in item["runs"]:
        done = [own for own in entries[name]["seeds"].values() if own["state"] == "finished"]
        scored[name] = summary([average(own) for own in done]) if done else {"mean": None, "deviation": None}
    known = [own for e in entries.values() for own in e["seeds"].values() if own["state"] == "finished"]
    if all(own["mean"] is None for own in scored.values()):
        return None
    reference = (average(known[0], "bm25"), "BM25") if item.get("bm25") else None
    datasets = list(known[0]["datasets"])
    label = f"NDCG@10, {datasets[0] if len(datasets) == 1 else f'mean of {len(datasets)} datasets'}"
    if item["kind"] == "bars":
        means, deviations = ([own[k] for own in scored.values()] for k in ("mean", "deviation"))
        return figures.bars(item["title"], list(scored), means, deviations, label, reference)
    x = {name: study.runs[name].settings[item["x"]] for name in scored}
    points = [(x[name], *scored[name].values()) for name in sorted(scored, key=x.__getitem__)]
    return figures.lines(item["title"], {"runs": points}, item.get("xlabel", item["x"]), label, reference)


def write_results(study: Study, failed: set) -> str:
    """Write results.json, results.md and the figures, as far as there are results; returns the tables."""
    results = collect(study, failed)
    write_atomic(study.results / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for item in study.content.get("figures", []):
        if svg := draw(study, item, results):
            write_atomic(study.results / item["file"], svg)
    shown, page = markdown(study, results)
    write_atomic(study.results / "results.md", page)
    return shown


def make_inputs(study: Study, threads: int) -> None:
    """Run what prepares, where its file is not there yet. Raises InputError when that fails."""

    def ended(task: Task, status: int) -> None:
        if status or not Path(task.label).exists():
            raise InputError(
                f"{task.label}: not made, exit status {status}; {task.log}: {last_lines(task.log)}"
            )

    for number, (made, command) in enumerate(study.prepare):
        if not made.exists():
            print(f"prepare: {made.name}", flush=True)
            whole = (sys.executable, *command)
            task = Task(("prepare", number), str(made), whole, study.out / f"prepare-{number}.log")
            run_processes(iter([task]), 1, threads, ended)


def run_study(study: Study, jobs: int, only: list[str], command: Command) -> int:
    """Prepare, run what is not finished, write; the exit status."""
    cores, given = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS", "")
    # More threads than free cores stall a run many times over: a reader who knows of other work can say so.
    threads = int(given) if given.isdigit() else max(1, cores // jobs)
    failed: set[tuple[str, int]] = set()
    with dream.run_lock(study.out):
        make_inputs(study, cores)
        chosen = [run for run in study.runs.values() if not only or run.name in only]
        todo = [(run, seed) for run in chosen for seed in run.seeds]
        todo = [(run, seed) for run, seed in todo if state(study, run, seed) != "finished"]
        write_results(study, failed)  # what is wrong with finished runs is told before hours of others
        with tqdm(total=len(todo), desc="study", unit="run", disable=not todo) as bar:

            def ended(task: Task, status: int) -> None:
                bar.update()
                bar.set_postfix_str(task.label)
                if status or state(study, study.runs[task.key[0]], task.key[1]) != "finished":
                    failed.add(task.key)
                    told = f"{task.label}: failed, exit status {status}; the end of {task.log}:"
                    bar.write(f"{told}\n{last_lines(task.log)}", file=sys.stderr)
                write_results(study, failed)

            run_processes(trainings(study, todo, command, threads), jobs, threads, ended)
        print(write_results(study, failed))
    print(f"\nwritten: results.json, results.md and figures in {study.results}")
    if failed:
        told = ", ".join(study.runs[name].label(seed) for name, seed in sorted(failed))
        print(f"study: failed: {told}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def show_plan(study: Study, only: list[str]) -> None:
    """What would be run, and how; nothing is written."""
    for made, own in study.prepare:
        print(f"prepare: {made.name} {'is there' if made.exists() else 'with: python ' + shlex.join(own)}")
    for run in study.runs.values():
        for seed in run.seeds if not only or run.name in only else []:
            now = state(study, run, seed)
            print(f"{run.label(seed)}: {now}")
            if now != "finished":
                print("  python dream.py train", shlex.join(arguments_of(study, run, seed)))


def dream_command(arguments: list[str]) -> list[str]:
    return [sys.executable, "dream.py", "train", *arguments]


def carry_out(args: argparse.Namespace, command: Command) -> int:
    """Everything `main` does, InputError not caught; the exit status, 1 when a run failed."""
    study = read_study(args.study, args.out, args.results)
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: at least 1")
    if unknown := [name for name in args.only if name not in study.runs]:
        raise InputError(f"--only: no run is named {unknown[0]!r}; there are {', '.join(study.runs)}")
    if args.dry_run:
        show_plan(study, args.only)
    elif args.tables:
        print(write_results(study, set()))
    else:
        return run_study(study, args.jobs, args.only, command)
    return 0


def main(argv: list[str] | None = None, command: Command = dream_command) -> int:
    """The exit status, as `run_command` says, and 1 when a run failed."""
    parser = argparse.ArgumentParser(
        prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", metavar="FILE", type=Path, help="the study's definition, JSON")
    add("--out", type=Path, metavar="DIR", help="where runs are kept (default: runs/studies/NAME)")
    add("--results", type=Path, metavar="DIR", help="where tables and figures go (default: beside FILE)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once, which share the cores (default: 1)")
    add("--only", nargs="+", default=[], metavar="NAME", help="run these alone")
    add("--tables", action="store_true", help="run nothing, write what is finished")
    add("--dry-run", action="store_true", help="show what would be run, and write nothing")
    args = parser.parse_args(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    told = "interrupted; the same command goes on where it stopped"
    try:
        return run_command("study", lambda: carry_out(args, command), told)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
