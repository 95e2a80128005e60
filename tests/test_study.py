"""tools/study.py: the statistics by brute force, resuming, failures, wrong study files, one real study."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT
from tiny import make_rows, tiny_checkpoint

from support.files import InputError
from tools.study import fold, holm, main, read_figures, read_study, sign_flip_p, summary, to_arguments

# In place of `dream.py train`: writes what a run's folder has. --temperature decides the scores; --heads says
# whether it fails, dies in the middle (once), or waits for a signal.
STUB = """
import json, pathlib, signal, sys, time
arguments = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
resumed = "--resume" in sys.argv
out = pathlib.Path(sys.argv[sys.argv.index("--resume") + 1] if resumed else arguments["out"])
with open(out.parent / "calls.txt", "a") as calls:
    overwritten = " overwrites" * ("--overwrite" in sys.argv)
    calls.write(f"{out.name} {'resumes' if resumed else 'begins'}{overwritten}\\n")
settings = json.loads((out / "settings.json").read_text()) if resumed else arguments
out.mkdir(exist_ok=True)
(out / "settings.json").write_text(json.dumps(settings))
(out / "checkpoints.json").write_text("{}")
how, seed = settings.get("heads", "top"), int(settings["seed"])
if how == "worst":
    print("progress 1\\rprogress 2\\nthe reason, 東京")
    sys.exit(3)
def result(scores):
    value = sum(scores.values()) / len(scores)
    groups = {"even": {"queries": 3, "ndcg@10": value - 0.1}}
    return {"dataset": "toy", "queries": len(scores), "metrics": {"ndcg@10": value}, "groups": groups,
            "ndcg@10_per_query": scores}
def scores(base):
    return {f"q{i}": round(base + i / 100, 5) for i in range(8)}
found = {"bm25": [result(scores(0.5))], "before": [result(scores(0.1))], "after": []}
(out / "results.json").write_text(json.dumps(found))
if how == "random" and not resumed:
    sys.exit(1)
if how == "all":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (out / "waits").touch()
    time.sleep(60)
    sys.exit("nobody came")
temperature = float(settings.get("temperature", 0.05))
noise = [0.001 * seed * (-1) ** i for i in range(8)]
found["after"] = [result({q: s + e for (q, s), e in zip(scores(temperature).items(), noise)})]
(out / "results.json").write_text(json.dumps(found))
steps = [{"step": i, "loss": 1.0, "retriever_tokens": 10, "time": {"seconds": 2.0}} for i in (1, 2)]
lines = [*steps, {"step": 1, "dev": {"ndcg@10": 0.7}}, {"step": 2, "dev": {"ndcg@10": 0.6 + seed / 10}}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(out / "heads.json").write_text(json.dumps({"scores": [[0.1, 0.2]], "selected": [[0, 1]]}))
"""
BASE = {
    "title": "Toy",
    "train": {"test": ["demo"], "temperature": 0.3},
    "seeds": [0, 1],
    "runs": [{"name": "first", "flags": {}}, {"name": "Second one", "flags": {"temperature": 0.35}}],
    "tables": [{"title": "All", "runs": ["first", "Second one"], "baselines": True}],
    "figures": [
        {"file": "a.svg", "kind": "bars", "title": "A", "runs": ["first", "Second one"], "bm25": True},
        {"file": "b.svg", "kind": "lines", "title": "B", "x": "temperature", "runs": ["Second one", "first"]},
        {"file": "c.svg", "kind": "heads", "title": "C", "run": "first"},
    ],
}


class Toy:
    """A study whose trainings are the stub's."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        (folder / "stub.py").write_text(STUB)

    def __call__(self, *flags, **changes):
        self.content = {**BASE, **changes}
        (self.folder / "study.json").write_text(json.dumps(self.content))
        arguments = [str(self.folder / "study.json"), "--out", str(self.out), *map(str, flags)]
        return main(arguments, lambda own: [sys.executable, str(self.folder / "stub.py"), *own])

    def calls(self):
        path = self.out / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(lines)

    def results(self):
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


BEGINS = ["first-s0 begins", "first-s1 begins", "second-one-s0 begins", "second-one-s1 begins"]


# The statistics


@pytest.mark.parametrize("size", [1, 2, 5, 9, 12])
def test_sign_flips_against_all_of_them(size):
    generator = np.random.default_rng(size)
    differences = np.round(generator.normal(0.3, 1, size), 1)  # rounded: ties and zeros occur
    sums = np.array([np.dot(s, differences) for s in itertools.product((-1, 1), repeat=size)])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=5 * np.sqrt(0.25 / 100_000))


def test_sign_flips_of_known_p():
    assert sign_flip_p(np.zeros(7)) == 1.0
    assert sign_flip_p(np.array([0.5, -0.5])) == 1.0  # no sum is nearer to 0
    assert sign_flip_p(np.full(10, 0.1)) == pytest.approx(2 / 2**10, rel=0.3)  # all signs equal: 2 of 1024
    assert sign_flip_p(np.full(300, 0.1)) == 1 / 100_001  # none found, and yet not 0
    assert sign_flip_p(np.full(6, -0.1)) == sign_flip_p(np.full(6, 0.1))  # two-sided


def test_sign_flips_are_seeded_and_in_bounded_parts():
    differences = np.random.default_rng(0).normal(0.1, 1, 5000)  # many parts
    assert sign_flip_p(differences, 3000) == sign_flip_p(differences, 3000)
    assert 0 < sign_flip_p(differences, 3000) < 1 / 1000
    p = [sign_flip_p(np.random.default_rng(i).normal(0, 1, 40), 2000) for i in range(200)]
    assert abs(np.mean(p) - 0.5) < 0.1 and np.mean(np.array(p) <= 0.05) < 0.1  # uniform where nothing differs


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_summary_is_the_sample_standard_deviation():
    assert summary([1.0, 2.0, 4.0]) == {"mean": pytest.approx(7 / 3), "deviation": pytest.approx(1.527525)}
    assert summary([1.0]) == {"mean": 1.0, "deviation": None}


# Tables


def test_folding_keeps_every_column_within_the_width():
    rows = [["run", *(f"column {i}" for i in range(20))], ["a name", *(str(i) * 9 for i in range(20))]]
    text = fold(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert [c for c in re.findall(r"column \d+", text)] == rows[0][1:] and text.count("a name") > 1


def test_results_are_right(toy, capsys):
    assert toy() == 0 and toy.calls() == BEGINS
    shown, results = capsys.readouterr().out, toy.results()
    first, second = results["runs"]
    scores = second["datasets"]["toy"]
    assert scores["mean"] == pytest.approx(0.35 + 0.035) and scores["deviation"] == pytest.approx(0, abs=1e-9)
    assert scores["difference"] == pytest.approx(0.05)  # on each of 8 queries: 2 of 256 signs
    assert scores["p"] == scores["p_holm"] == pytest.approx(2 / 256, rel=0.2)
    assert "p" not in first["datasets"]["toy"] and first["datasets"]["toy"]["queries"] == 8
    assert scores["groups"]["even"]["mean"] == pytest.approx(0.285)
    assert first["dev"]["mean"] == pytest.approx(0.7) and first["retriever_tokens"]["mean"] == 20
    assert first["seconds"]["mean"] == 4 and first["seeds"]["1"]["datasets"]["toy"]["after"]["queries"] == 8
    assert results["study"] == toy.content and results["machines"][0]["torch"]
    page = (toy.folder / "results.md").read_text()
    assert shown.split("\n\nwritten")[0] in page and max(map(len, shown.splitlines()[:-1])) <= 100
    assert re.search(r"\| Second one +\| +2 \| 0\.3850 ± 0\.0000 \| +\+0\.0500 \| 0\.0\d+ \|", page)
    assert re.search(r"\| BM25 +\| +\| +0\.5350 \|", page) and "untrained retriever" in page
    assert "![A](a.svg)" in page and str(toy.folder) not in page + json.dumps(results)
    for name in ("a.svg", "b.svg", "c.svg"):
        ElementTree.parse(toy.folder / name)
    assert "BM25 0.5350" in (toy.folder / "a.svg").read_text()


def test_datasets_of_one_name_are_kept_apart(toy):
    """Two folders may have it; the lists of a run's results.json have the same order."""
    assert toy("--only", "first") == 0
    path = toy.out / "first-s0" / "results.json"
    results = json.loads(path.read_text())
    for kind, (own,) in results.items():
        results[kind] = [own, own | {"metrics": {"ndcg@10": own["metrics"]["ndcg@10"] / 2}}]
    path.write_text(json.dumps(results))
    first, second = (read_figures(path.parent)["datasets"][name] for name in ("toy", "toy (2)"))
    for kind in results:
        assert second[kind]["ndcg@10"] == first[kind]["ndcg@10"] / 2 > 0


def test_a_terminal_without_the_letters(toy, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert toy() == 0
    assert "0.3850 ? 0.0000" in sys.stdout.buffer.getvalue().decode("ascii")


# Running


def test_a_finished_run_is_not_run_again(toy):
    assert toy() == 0 and toy.calls() == BEGINS
    assert toy() == 0 and toy.calls() == []
    assert toy(seeds=[0, 1, 2]) == 0 and toy.calls() == ["first-s2 begins", "second-one-s2 begins"]


def test_an_interrupted_run_goes_on(toy):
    runs = [BASE["runs"][0], {"name": "Second one", "flags": {"heads": "random"}, "seeds": [0]}]
    assert toy(runs=runs) == 1  # it died in the middle
    assert toy.results()["runs"][1]["seeds"]["0"]["state"] == "failed"
    assert toy.calls() == [*BEGINS[:3]]
    assert toy(runs=runs) == 0 and toy.calls() == ["second-one-s0 resumes"]
    assert toy.results()["runs"][1]["seeds"]["0"]["state"] == "finished"


def test_a_changed_run_is_told_and_done_again(toy, capsys):
    assert toy() == 0 and toy.calls() == BEGINS
    changed = [BASE["runs"][0], {"name": "Second one", "flags": {"temperature": 0.2}}]
    assert toy(runs=changed) == 0
    assert "Second one, seed 1: its flags have changed (temperature: 0.35 -> 0.2)" in capsys.readouterr().out
    assert toy.calls() == ["second-one-s0 begins overwrites", "second-one-s1 begins overwrites"]
    assert toy.results()["runs"][1]["datasets"]["toy"]["difference"] == pytest.approx(-0.1)


def test_killed_before_a_changed_run_begins_it_still_is_done_again(toy):
    """The new flags are on record, the old results in the folder, which must not be taken for the new."""
    assert toy() == 0 and toy.calls() == BEGINS
    runs = [BASE["runs"][0], {"name": "Second one", "flags": {"temperature": 0.2}}]
    stub = (toy.folder / "stub.py").read_text()
    (toy.folder / "stub.py").write_text("raise SystemExit(9)")
    assert toy(runs=runs) == 1 and toy.calls() == []
    (toy.folder / "stub.py").write_text(stub)
    assert toy(runs=runs) == 0
    assert toy.calls() == ["second-one-s0 begins overwrites", "second-one-s1 begins overwrites"]
    assert toy.results()["runs"][1]["datasets"]["toy"]["difference"] == pytest.approx(-0.1)


def test_a_failing_run_stops_no_other(toy, capsys):
    runs = [{"name": "broken", "flags": {"heads": "worst"}}, *BASE["runs"]]
    tables = [{"title": "All", "runs": ["broken", "first"]}]
    assert toy("--jobs", 2, runs=runs, tables=tables) == 1
    errors = capsys.readouterr().err
    assert "broken, seed 0: failed, exit status 3" in errors and "  progress 2\n  the reason, 東京" in errors
    assert errors.splitlines()[-1].startswith("study: failed: broken, seed 0, broken, seed 1;")
    page = (toy.folder / "results.md").read_text()
    assert re.search(r"\| broken +\| 0, 2 failed \| +failed \|", page) and re.search(
        r"\| first +\| +2 \| 0\.33", page
    )
    assert len(toy.calls()) == 6


def test_partial_results_tell_what_is_missing(toy):
    assert toy("--only", "first") == 0 and toy.calls() == BEGINS[:2]
    page = (toy.folder / "results.md").read_text()
    assert re.search(r"\| Second one +\| 0, 2 missing \| +missing \|", page) and "0.3350" in page


def test_a_dry_run_writes_nothing(toy, capsys):
    assert toy("--dry-run") == 0
    assert toy.calls() == [] and not toy.out.exists() and not (toy.folder / "results.json").exists()
    shown = capsys.readouterr().out
    assert shown.count(": new\n  python dream.py train --test demo --temperature=0.3") == 4
    assert "--seed=1 --out=" in shown


def test_tables_of_what_is_there(toy):
    """Nothing is run, whatever is missing; and the threads are the user's, where there is a number."""
    assert toy("--only", "first") == 0
    toy.calls()
    (toy.folder / "results.md").unlink()
    assert toy("--tables") == 0
    assert toy.calls() == [] and "missing" in (toy.folder / "results.md").read_text()


def test_threads_are_those_that_are_asked_for(toy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert toy("--only", "first", "--jobs", "2") == 0
    machines = toy.results()["machines"]
    assert [own["threads"] for own in (machines.values() if isinstance(machines, dict) else machines)] == [3]


def test_preparing_is_done_once(toy, capsys):
    script = toy.folder / "make.py"
    script.write_text("import sys; open(sys.argv[1], 'x').write('made')")
    prepare = [{"makes": "sub.txt", "command": ["{here}/make.py", "{out}/sub.txt"]}]
    assert toy(prepare=prepare) == 0 and (toy.out / "sub.txt").read_text() == "made"
    assert toy(prepare=prepare) == 0
    capsys.readouterr()
    prepare = [{"makes": "other.txt", "command": ["{here}/make.py", "{out}/sub.txt"]}]
    assert toy(prepare=prepare) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "other.txt: not made, exit status 1" in error
        and "FileExistsError" in error
    )


def test_results_without_scores_of_queries_are_told(toy, capsys):
    assert toy() == 0
    path = toy.out / "first-s0" / "results.json"
    content = json.loads(path.read_text())
    del content["after"][0]["ndcg@10_per_query"]
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert toy() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "first-s0" in error and "'ndcg@10_per_query' is missing" in error


def test_an_interruption_reaches_the_trainings(toy):
    toy("--dry-run", runs=[{"name": "first", "flags": {"heads": "all"}}], tables=[], figures=[])
    code = (
        "import sys; from tools.study import main; stub, *own = sys.argv[1:]; "
        "sys.exit(main(own, lambda more: [sys.executable, stub, *more]))"
    )
    files = [toy.folder / "stub.py", toy.folder / "study.json", "--out", toy.out, "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, files)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(list(toy.out.glob("*/waits"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]  # the stub would wait for a minute
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "study: interrupted; the same command goes on where it stopped"


# Wrong study files

WRONG = {
    "a field": ({"sedes": [1]}, "unknown field 'sedes'"),
    "a missing field": ({"tables": None}, "'tables' must be a list, not null"),
    "no title": ({"title": " "}, "'title' must be text"),
    "a wrong type": ({"train": []}, "'train' must be an object"),
    "no seeds": ({"seeds": []}, "seeds: must be a list of one or more seeds"),
    "seeds": ({"seeds": [0, True]}, "seeds: must be a list"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds: 1 is there twice"),
    "no runs": ({"runs": []}, "'runs' is empty"),
    "a run": ({"runs": [{"name": "a"}]}, "runs[0]: 'flags' is missing"),
    "a name twice": ({"runs": BASE["runs"] + [{"name": "FIRST!", "flags": {}}]}, "another run (first)"),
    "a name": ({"runs": [{"name": "!", "flags": {}}]}, "a name has up to 40 characters"),
    "a flag": ({"train": {"sets": 3}}, "runs[0] (first): dream.py train has no flag 'sets'"),
    "a hyphen": ({"train": {"eval-every": 3}}, "no flag 'eval-every'"),
    "a value": ({"train": {"steps": "many", "test": ["demo"]}}, "--steps: invalid int value: 'many'"),
    "a choice": ({"train": {"detect_rows": "all", "test": ["demo"]}}, "--detect-rows: invalid choice"),
    "a switch": ({"train": {"full": 1, "test": ["demo"]}}, "--full"),
    "not a switch": ({"train": {"steps": True, "test": ["demo"]}}, "--steps: expected one argument"),
    "null": ({"train": {"steps": None}}, "'steps' must be a number, a text, true, false or a list"),
    "the seed": ({"train": {"seed": 3}}, "'seed' is set by the study itself"),
    "no tests": ({"train": {"test": []}}, "'test' is missing"),
    "own tests": ({"runs": [{"name": "a", "flags": {"test": ["demo"]}}]}, "'test' belongs into 'train'"),
    "a table": ({"tables": [{"title": "a", "runs": ["frist"]}]}, "tables[0]: no run is named 'frist'"),
    "a figure": ({"figures": [{"kind": "pie"}]}, "figures[0]: 'kind' must be bars, lines, heads"),
    "a figure's kind": ({"figures": [{"kind": []}]}, "figures[0]: 'kind' must be bars, lines, heads, not []"),
    "a figure's run": ({"figures": [{**BASE["figures"][2], "run": "x"}]}, "no run is named 'x'"),
    "a figure's x": ({"figures": [{**BASE["figures"][1], "x": "heads"}]}, "'x' is 'heads', which is not a"),
    "a figure's file": ({"figures": [{**BASE["figures"][2], "file": "../a.svg"}]}, "'file' must be a name"),
    "one file": ({"figures": [BASE["figures"][0]] * 2}, "'file' must be a name of its own"),
    "a command": ({"prepare": [{"makes": "a", "command": []}]}, "prepare[0]: 'command' must be a list of"),
    "a way out": ({"prepare": [{"makes": "../a", "command": ["b"]}]}, "'../a' is not the name of something"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_study_files_are_one_line(toy, capsys, what):
    changes, message = WRONG[what]
    assert toy(**changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and f"{toy.folder / 'study.json'}" in error
    assert toy.calls() == [] and not toy.out.exists()


def test_wrong_command_lines_and_files(toy, tmp_path, capsys):
    assert (
        toy("--only", "frist") == 2
        and "no run is named 'frist'; there are first, Second one" in capsys.readouterr().err
    )
    assert toy("--jobs", 0) == 2
    assert main([str(tmp_path / "nowhere.json")]) == 2
    (tmp_path / "list.json").write_text("[]")
    assert main([str(tmp_path / "list.json")]) == 2
    (tmp_path / "results.json").write_text(json.dumps(BASE))
    with pytest.raises(InputError, match="would be overwritten"):
        read_study(tmp_path / "results.json")


def test_flags_become_arguments():
    flags = {"full": True, "append_eos": False, "test": ["a", "b"], "query_prompt": "-x y", "lr": 2e-3}
    expected = ["--full", "--no-append-eos", "--test", "a", "b", "--query-prompt=-x y", "--lr=0.002"]
    assert to_arguments(flags) == expected


def test_the_studies_of_the_project_are_right():
    paths = sorted(ROOT.glob("studies/*/study.json"))
    assert paths and all(read_study(path).runs for path in paths)


# The real thing


def test_a_real_study(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "checkpoint")
    rows = [
        {"query": r.query, "target": r.target, "documents": [vars(d) for d in r.documents], "positive": 0}
        for r in make_rows([3, 2, 4] * 8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "set" / "qrels").mkdir(parents=True)
    texts = {"corpus": [{"_id": f"d{i}", "text": rows[i]["documents"][0]["text"]} for i in range(6)]}
    texts["queries"] = [{"_id": f"q{i}", "text": rows[i]["query"]} for i in range(6)]
    for name, items in texts.items():
        (tmp_path / "set" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(6))
    for split in ("dev", "test"):
        (tmp_path / "set" / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    names = {"train": "{here}/rows.jsonl", "judge": "{here}/checkpoint", "retriever": "{here}/checkpoint"}
    sets = {"dev": "{here}/set", "test": ["{here}/set"], "device": "cpu", "num_heads": 2}
    content = {
        **BASE,
        "train": names | sets | {"steps": 2, "batch": 2, "eval_every": 2, "lr": 0.01},
        "runs": [{"name": "first", "flags": {}}, {"name": "Second one", "flags": {"temperature": 0.5}}],
    }
    (tmp_path / "study.json").write_text(json.dumps(content))
    command = [str(tmp_path / "study.json"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for entry in results["runs"]:
        assert [own["state"] for own in entry["seeds"].values()] == ["finished"] * 2
        assert 0 <= entry["datasets"]["set"]["mean"] <= 1 and entry["seconds"]["mean"] > 0
        assert 0 <= entry["dev"]["mean"] <= 1 and entry["retriever_tokens"]["mean"] > 0
    assert 0 < results["runs"][1]["datasets"]["set"]["p"] <= 1
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/metrics.jsonl")}
    assert main(command) == 0  # nothing is trained again
    assert len(written) == 4 and all(path.stat().st_mtime_ns == then for path, then in written.items())
