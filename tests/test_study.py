"""tools/study.py: results, resuming, failures, wrong study files, one real study."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from tiny import make_rows, tiny_checkpoint

from tools.study import Study, main, to_arguments

# In place of `dream.py train`: writes what a run's folder has. --temperature decides the scores; --heads says
# whether it fails, dies in the middle (once), or waits for a signal.
STUB = """
import json, pathlib, signal, sys, time
arguments = dict(a.removeprefix("--").partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
resumed = "--resume" in sys.argv
out = pathlib.Path(sys.argv[sys.argv.index("--resume") + 1] if resumed else arguments["out"])
with open(out.parent / "calls.txt", "a") as calls:
    calls.write(f"{out.name} {'resumes' if resumed else 'begins'}\\n")
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
FIGURES = [
    {"file": "a.svg", "kind": "bars", "title": "A", "runs": ["first", "Second one"], "bm25": True},
    {"file": "b.svg", "kind": "lines", "title": "B", "x": "temperature", "runs": ["Second one", "first"]},
    {"file": "c.svg", "kind": "heads", "title": "C", "run": "first"},
]
BASE = {
    "title": "Toy",
    "train": {"test": ["demo"], "temperature": 0.3},
    "seeds": [0, 1],
    "runs": [{"name": "first", "flags": {}}, {"name": "Second one", "flags": {"temperature": 0.35}}],
    "tables": [{"title": "All", "runs": ["first", "Second one"], "baselines": True}],
    "figures": FIGURES,
}


class Toy:
    """A study whose trainings are the stub's."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        (folder / "stub.py").write_text(STUB)

    def __call__(self, *flags, **changes):
        self.content = {**BASE, **changes}
        (self.folder / "study.json").write_text(json.dumps(self.content))
        return main([str(self.folder / "study.json"), "--out", str(self.out), *map(str, flags)])

    def calls(self):
        path = self.out / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(lines)

    def results(self):
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.study.TRAIN", [sys.executable, str(tmp_path / "stub.py")])
    return Toy(tmp_path)


BEGINS = ["first-s0 begins", "first-s1 begins", "second-one-s0 begins", "second-one-s1 begins"]


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
    for path in toy.out.glob("*/results.json"):
        results = json.loads(path.read_text())
        for kind, (own,) in results.items():
            results[kind] = [own, own | {"metrics": {"ndcg@10": own["metrics"]["ndcg@10"] / 2}}]
        path.write_text(json.dumps(results))
    assert toy("--tables") == 0
    own = toy.results()["runs"][0]["seeds"]["0"]["datasets"]
    for kind in results:
        assert own["toy (2)"][kind]["ndcg@10"] == own["toy"][kind]["ndcg@10"] / 2 > 0


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


def test_a_changed_run_is_done_again(toy, capsys):
    """Also when it was killed before it began: then the new flags are on record beside the old results."""
    assert toy() == 0 and toy.calls() == BEGINS
    runs = [BASE["runs"][0], {"name": "Second one", "flags": {"temperature": 0.2}}]
    (toy.folder / "stub.py").write_text("raise SystemExit(9)")
    assert toy(runs=runs) == 1 and toy.calls() == []
    assert "Second one, seed 1: its flags have changed (temperature: 0.35 -> 0.2)" in capsys.readouterr().out
    (toy.folder / "stub.py").write_text(STUB)
    assert toy(runs=runs) == 0 and toy.calls() == BEGINS[2:]
    assert toy.results()["runs"][1]["datasets"]["toy"]["difference"] == pytest.approx(-0.1)


def test_a_failing_run_stops_no_other(toy, capsys):
    runs = [{"name": "broken", "flags": {"heads": "worst"}}, *BASE["runs"]]
    tables = [{"title": "All", "runs": ["broken", "first"]}]
    assert toy("--jobs", 2, runs=runs, tables=tables) == 1
    errors = capsys.readouterr().err
    assert "broken, seed 0: failed, exit status 3" in errors and "  progress 2\n  the reason, 東京" in errors
    assert errors.splitlines()[-1].startswith("study: failed: broken, seed 0, broken, seed 1;")
    page = (toy.folder / "results.md").read_text()
    assert re.search(r"\| broken +\| 0, 2 failed \| +– \|", page)
    assert re.search(r"\| first +\| +2 \| 0\.33", page) and len(toy.calls()) == 6


def test_tables_of_what_is_there(toy):
    """Results are written after every run; --tables runs nothing, whatever is missing."""
    assert toy("--only", "first") == 0 and toy.calls() == BEGINS[:2]
    (toy.folder / "results.md").unlink()
    assert toy("--tables") == 0 and toy.calls() == []
    page = (toy.folder / "results.md").read_text()
    assert re.search(r"\| Second one +\| 0, 2 missing \| +– \|", page) and "0.3350" in page


def test_results_of_runs_that_are_not_here_stay(toy, capsys):
    """As in a fresh clone: --tables and new runs leave what is committed alone."""
    assert toy() == 0
    committed = {path: path.read_bytes() for path in toy.folder.glob("*") if path.suffix in (".md", ".svg")}
    committed[toy.folder / "results.json"] = (toy.folder / "results.json").read_bytes()
    toy.out.rename(toy.folder / "elsewhere")
    capsys.readouterr()
    for flags in (["--tables"], ["--only", "first"]):
        assert toy(*flags) == 0
        (told,) = [line for line in capsys.readouterr().out.splitlines() if "left alone" in line]
        assert "results.json: left alone" in told and told.endswith(f"results go to {toy.out}")
        assert all(path.read_bytes() == content for path, content in committed.items())
    states = json.loads((toy.out / "results.json").read_text())["runs"][0]["seeds"]
    assert [own["state"] for own in states.values()] == ["finished", "finished"]
    assert toy() == 0
    capsys.readouterr()
    assert toy() == 0  # now all runs are here
    assert "left alone" not in capsys.readouterr().out


def test_a_dry_run_writes_nothing(toy, capsys):
    assert toy("--dry-run") == 0
    assert toy.calls() == [] and not toy.out.exists() and not (toy.folder / "results.json").exists()
    shown = capsys.readouterr().out
    assert shown.count(": new\n") == shown.count("--test demo --temperature=0.3") == 4
    assert "--seed=1 --out=" in shown


def test_threads_are_those_that_are_asked_for(toy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert toy("--only", "first", "--jobs", "2") == 0
    assert [machine["threads"] for machine in toy.results()["machines"]] == [3]


def test_preparing_is_done_once(toy, capsys):
    (toy.folder / "make.py").write_text("import sys; open(sys.argv[1], 'x').write('made')")
    prepare = [{"makes": "sub.txt", "command": ["{here}/make.py", "{out}/sub.txt"]}]
    assert toy(prepare=prepare) == 0 and (toy.out / "sub.txt").read_text() == "made"
    assert toy(prepare=prepare) == 0
    capsys.readouterr()
    assert toy(prepare=[prepare[0] | {"makes": "other.txt"}]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "other.txt: not made, exit status 1" in error


def test_results_without_scores_of_queries_are_told(toy, capsys):
    assert toy() == 0
    path = toy.out / "first-s0" / "results.json"
    content = json.loads(path.read_text())
    del content["after"][0]["ndcg@10_per_query"]
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert toy() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "first-s0" in error and "KeyError('ndcg@10_per_query')" in error


def test_an_interruption_reaches_the_trainings(toy):
    """And what was finished before is in the results, as after every run."""
    runs = [{"name": "first", "flags": {}, "seeds": [0]}, {"name": "Second one", "flags": {"heads": "all"}}]
    toy("--dry-run", runs=runs)
    code = (
        "import sys; from tools import study; study.TRAIN = [sys.executable, sys.argv[1]]; "
        "sys.exit(study.main(sys.argv[2:]))"
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
    states = [own["state"] for entry in toy.results()["runs"] for own in entry["seeds"].values()]
    assert states == ["finished", "missing", "missing"]


WRONG = {
    "a field": ({"sedes": [1]}, ": unknown field 'sedes'"),
    "a missing field": ({"tables": None}, ": tables must be a non-empty list, not null"),
    "a wrong type": ({"train": []}, ": train must be an object, not []"),
    "no seeds": ({"seeds": []}, ": seeds must be a non-empty list, not []"),
    "a seed": ({"seeds": [0, True]}, ": seeds[1] must be an integer, not true"),
    "a run's field": ({"runs": [{"name": "a"}]}, "runs[0]: flags must be an object, not null"),
    "a name": ({"runs": [{"name": "!", "flags": {}}]}, "runs[0] (!): a name needs letters"),
    "a name twice": ({"runs": BASE["runs"] + [{"name": "FIRST!", "flags": {}}]}, "runs[2] (FIRST!): a name"),
    "a flag": ({"train": {"sets": 3, "test": ["a"]}}, "runs[0] (first): dream.py: error: unrecognized"),
    "a value": ({"train": {"steps": "many", "test": ["demo"]}}, "--steps: invalid int value: 'many'"),
    "a switch": ({"train": {"full": 1, "test": ["demo"]}}, "--no-full: ignored explicit argument '1'"),
    "null": ({"train": {"dev": None, "test": ["demo"]}}, "'dev' must be a number, a text, true, false or a"),
    "the seed": ({"train": {"seed": 3, "test": ["demo"]}}, "'seed' is set by the study itself"),
    "no tests": ({"train": {"test": []}}, "'test' belongs in 'train'"),
    "own tests": ({"runs": [{"name": "a", "flags": {"test": ["demo"]}}]}, "'test' belongs in 'train'"),
    "a table": ({"tables": [{"title": "a", "runs": ["frist"]}]}, "tables[0]: no run is named 'frist'"),
    "a figure": ({"figures": [{**FIGURES[0], "kind": "pie"}]}, "figures[0]: 'kind' must be bars, lines or"),
    "a figure's run": ({"figures": [{**FIGURES[2], "run": "x"}]}, "figures[0]: no run is named 'x'"),
    "a figure's x": ({"figures": [{**FIGURES[1], "x": "heads"}]}, "figures[0]: 'x' must be a flag that is"),
    "a command": ({"prepare": [{"makes": "a", "command": "b"}]}, "prepare[0]: command must be a non-"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_study_files_are_one_line(toy, capsys, what):
    changes, message = WRONG[what]
    assert toy(**changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and f"{toy.folder / 'study.json'}" in error
    assert toy.calls() == [] and not toy.out.exists()


def test_wrong_command_lines(toy, tmp_path, capsys):
    assert toy("--only", "frist") == 2
    assert "no run is named 'frist'; there are first, Second one" in capsys.readouterr().err
    assert toy("--jobs", 0) == 2
    assert main([str(tmp_path / "nowhere.json")]) == 2


def test_flags_become_arguments():
    flags = {"full": True, "append_eos": False, "test": ["a", "b"], "query_prompt": "-x y", "lr": 2e-3}
    expected = ["--full", "--no-append-eos", "--test", "a", "b", "--query-prompt=-x y", "--lr=0.002"]
    assert to_arguments(flags) == expected


def test_the_studies_of_the_project_are_right():
    paths = sorted(ROOT.glob("studies/*/study.json"))
    assert paths and all(Study(path).runs for path in paths)


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
        "seeds": [1],
        "runs": [{"name": "first", "flags": {}}, {"name": "Second one", "flags": {"temperature": 0.5}}],
    }
    (tmp_path / "study.json").write_text(json.dumps(content))
    command = [str(tmp_path / "study.json"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for entry in results["runs"]:
        assert [own["state"] for own in entry["seeds"].values()] == ["finished"]
        assert 0 <= entry["datasets"]["set"]["mean"] <= 1 and entry["seconds"]["mean"] > 0
        assert 0 <= entry["dev"]["mean"] <= 1 and entry["retriever_tokens"]["mean"] > 0
    assert 0 < results["runs"][1]["datasets"]["set"]["p"] <= 1
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/metrics.jsonl")}
    assert main(command) == 0  # nothing is trained again
    assert len(written) == 2 and all(path.stat().st_mtime_ns == then for path, then in written.items())
