"""tools/report.py: both files tell what the run's files hold, whatever state the run and its texts are in."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT
from small import write_beir
from tiny import tiny_checkpoint

import dream
import eval as yardstick
from formats.datasets import load_dataset
from formats.embedders import load_embedder
from support.launch import CPU
from tools.report import main

EVIL = "<script>alert(1)</script> & | *bold* \x1b[2J \u202eevil ![x](http://h/x.png)"
VOID = {"meta", "br"}
CHANGES = {"q0": 0.1, "q4": 0.3, "q8": 0.2, "q3": 0.05, "q2": -0.2, "q6": -0.4}  # of NDCG@10, by training


class Page(HTMLParser):
    """Checks that tags are balanced; collects tables, headings, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.tables, self.attributes, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open and text.startswith("<!doctype html>\n")

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def markdown_rows(text):
    """The cells of every table's row, without escapes and emphasis."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[re.sub(r"\\(.)", r"\1", cell.strip().replace("**", "")) for cell in row] for row in rows]
    return [row for row in cells if not all(re.fullmatch("-+:?", cell) for cell in row)]


def step(number, **changes):
    record = {"step": number, "loss": 2.0 / number, "effective_candidates": 8.0 - number / 10}
    record |= {
        "positive_weight": number / 100,
        "document_tokens_cut": 3,
        "tokens": 1000 + number,
        "retriever_tokens": 10,
    }
    record |= {"grad_norm": 1.0, "lr": 1e-4, "time": {"seconds": 0.5}}
    return {name: value for name, value in (record | changes).items() if value is not None}


def write(run, name, content):
    run.mkdir(exist_ok=True)
    (run / f"{name}.json").write_text(json.dumps(content))


def make_dataset(tmp_path):
    """Thirty documents, one of them hostile, and twelve queries in two groups."""
    texts = [f"the {name} tree of number {i}" for i in range(15) for name in ("red", "glass")]
    documents = {f"d{i}": text for i, text in enumerate(texts)} | {"d7": EVIL}
    queries = {f"q{i}": f"which {i} tree" for i in range(11)} | {"q11": EVIL}
    qrels = {query: {f"d{i * 2}": 1, "d1": 0} for i, query in enumerate(queries)}
    groups = {query: "odd" if i % 2 else "even" for i, query in enumerate(queries)}
    path = write_beir(tmp_path / "set", documents, queries, qrels, groups)
    content = (path / "corpus.jsonl").read_text().replace('"title": ""', f'"title": {json.dumps(EVIL)}', 3)
    (path / "corpus.jsonl").write_text(content)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset and a finished run, as `train` leaves it, of a tiny retriever that has learnt nothing."""
    tmp_path = tmp_path_factory.mktemp("made")
    folder, run = make_dataset(tmp_path), tmp_path / "my <run>"
    tiny_checkpoint(run / "step-000040")
    dataset = load_dataset(folder)
    hits = yardstick.dense_hits(
        load_embedder(run / "step-000040", CPU, torch.float32), dataset, 31, quiet=True
    )
    after = yardstick.evaluate_hits(dataset, hits, 100, per_query=True)[0]
    before = json.loads(json.dumps(after))
    for query, change in CHANGES.items():
        before["ndcg@10_per_query"][query] -= change
    before["metrics"]["ndcg@10"], before["groups"]["odd"]["ndcg@10"] = 0.12345, 0.54321
    results = {"bm25": [before | {"metrics": {**before["metrics"], "ndcg@10": 0.777}}], "before": [before]}
    write(run, "results", results | {"after": [after]})
    flags = ["--train", "rows.jsonl", "--judge", str(tmp_path / "a-judge"), "--retriever", "owner/name"]
    flags += ["--test", str(folder), "--out", str(run), "--steps", "40", "--lr", "0.0003"]
    args = vars(dream.parse_arguments(["train", *flags, "--query-prompt", "find: "]))
    write(run, "settings", args | {"rows": 2000, "rows_fingerprint": "abc"})
    report = {"budget": 0.875, "context_gain": 2.5, "steering_range": 3.25, "steering_best_is_relevant": None}
    write(run, "heads", {"scores": [[0.1, 0.9], [-0.2, 0.3]], "selected": [[0, 1]], "report": report})
    write(run, "checkpoints", {"last": "step-000040", "best": "step-000040"})
    records = [step(number) for number in range(1, 41)]
    records[2] = step(3, time={"seconds": 9.0})  # medians do not mind
    records[9] = step(10, loss=None, grad_norm=None, skipped=True, rows=[1, 2])
    records[19] = step(20, loss=float("nan"), positive_weight=None)
    records[20:20] = [{"step": 20, "dev": {"ndcg@10": 0.4321}}]
    records += [{"step": 40, "dev": {"ndcg@10": 0.8642}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


@pytest.fixture
def run(tmp_path, made, folder):
    """That run and its dataset, copied: tests may break them."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "my <run>"
    write(run, "settings", json.loads((run / "settings.json").read_text()) | {"test": [str(folder)]})
    return run


def make(run, *flags):
    """The page and the Markdown of a report that must work out."""
    assert main([str(run), "--device", "cpu", *map(str, flags)]) == 0
    return Page((run / "report.html").read_text()), (run / "report.md").read_text()


def test_both_files_hold_the_figures_of_the_run(run, folder):
    page, text = make(run)
    after = json.loads((run / "results.json").read_text())["after"][0]
    score, odd = after["metrics"]["ndcg@10"], after["groups"]["odd"]["ndcg@10"]
    rows = [row for table in page.tables for row in table]
    assert rows == markdown_rows(text)
    for row in (
        ["dataset", "queries", "BM25", "before", "after"],
        ["set", "12", "0.7770", "0.1235", f"{score:.4f}"],
        ["set: odd", "6", "0.5432", "0.5432", f"{odd:.4f}"],
        ["tokens a second, median", "2,041"],
        ["seconds a step, median", "0.500"],
        ["minutes of all steps, without evaluation and saving", "0.5"],
        ["tokens read by the retriever", "400"],
        ["steps", "40"],
        ["steps skipped, loss or gradient not finite", "1"],
        ["document tokens cut from prompts", "120"],
        ["context gain, in nats", "2.50"],
        ["share of rows whose best candidate is the relevant one", "–"],
        ["steps", "40 (default: 1000)"],
        ["lr", "0.0003 (default: 0.0001)"],
        ["query_prompt", '"find: " (default: none)'],
        ["judge", "a-judge"],
        ["batch", "32"],
    ):
        assert row in rows, row
    names = [row[0] for table in page.tables if table[0] == ["setting", "value"] for row in table[1:]]
    assert sorted(names) == sorted(set(names)) and not {"resume", "overwrite", "command"} & set(names)
    for told in ("40 of 40 steps.", "Checkpoint: step-000040, dev NDCG@10 0.8642"):
        assert told in page.text and told in text
    assert str(run.parent) not in text + (run / "report.html").read_text(), "no local path"
    names = re.findall(r"!\[.*?\]\(report/(\w+)\.svg\)", text)
    assert names == ["results", *("loss dev effective_candidates positive_weight lr grad_norm heads".split())]
    html = (run / "report.html").read_text()
    assert all((run / "report" / f"{name}.svg").read_text() in html for name in names)


def test_the_page_is_accessible_and_needs_nothing_else(run):
    page, _ = make(run)
    assert ("html", "lang", "en") in page.attributes
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.attributes.count(("svg", "role", "img")) == 8
    assert len([a for a in page.attributes if a[:2] == ("th", "scope")]) >= sum(map(len, page.tables))
    assert not [
        a for a in page.attributes if a[0] in ("script", "link", "img", "iframe") or a[1] in ("src", "href")
    ]
    assert (
        "@import" not in (run / "report.html").read_text() and "url(" not in (run / "report.html").read_text()
    )


def test_hostile_text_stays_text(run):
    page, text = make(run)
    html = (run / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and "<title>Run my &lt;run&gt;<" in html
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", html + text)
    assert r"\<script\>alert(1)\</script\> & \| \*bold\*" in text and r"!\[x\](http" in text
    assert "<script>alert(1)</script> & | *bold* [2J evil" in page.text


@pytest.mark.parametrize("count", [1, 6, 24])
def test_the_queries_that_gained_and_lost_most(run, count):
    page, text = make(run, "--queries", count)
    after = json.loads((run / "results.json").read_text())["after"][0]["ndcg@10_per_query"]
    gained = ["q4", "q8", "q0", "q3"][: (count + 1) // 2]
    others = sorted(after.keys() - {"q2", "q6"} - set(gained), key=lambda query: (after[query], query))
    expected = [*gained, *["q6", "q2", *others][: count // 2]]
    part = text.split("## Queries")[1].split("## Speed")[0]
    assert ("### Lost most, or still found worst" in part) == (count > 1)
    pattern = (
        r"\*\*which (\d+) tree\*\*\n\nNDCG@10 (\S+), before (\S+); first relevant document: (?:rank (\d+))?"
    )
    told = re.findall(pattern, re.sub(r"\*\*\\<script.*\*\*", "**which 11 tree**", part))
    assert [f"q{number}" for number, *_ in told] == expected
    for query, (_, now, before, _) in zip(expected, told, strict=True):
        assert float(now) == pytest.approx(after[query], abs=6e-5)
        assert float(before) == pytest.approx(after[query] - CHANGES.get(query, 0.0), abs=6e-5)
    found = [table for table in page.tables if table[0] == ["best documents, ✓ relevant", "cosine"]]
    assert len(found) == len(expected) and all(len(table) == 4 for table in found)
    for table, (_, now, _, rank) in zip(found, told, strict=True):
        scores = [float(score) for _, score in table[1:]]
        assert scores == sorted(scores, reverse=True) and -1 <= scores[-1] <= scores[0] <= 1.001
        # Each query has one relevant document, so its rank decides NDCG@10.
        assert float(now) == pytest.approx(1 / math.log2(1 + int(rank)) if int(rank) <= 10 else 0, abs=6e-5)
        marked = [row for row in table[1:] if row[0].startswith("✓ ")]
        assert marked == ([table[int(rank)]] if int(rank) <= 3 else [])
    page_marks = (run / "report.html").read_text().count('<tr class="marked"><th scope="row">✓')
    assert page_marks == sum(row[0].startswith("✓ ") for table in found for row in table)


def test_queries_of_another_dataset_or_without_earlier_scores(run, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    with open(other / "corpus.jsonl", "a") as file:
        file.write(json.dumps({"_id": "new", "text": "a new text"}) + "\n")
    _, text = make(run, "--dataset", other)
    assert "queries of other" in text and "### Found best" in text and "before 0" not in text
    assert text.count("first relevant document:") == 10
    _, text = make(run, "--queries", 0)
    assert "## Queries" not in text and "cosine" not in text


@pytest.mark.parametrize("gone", ["dataset", "test", "checkpoints", "weights"])
def test_queries_that_cannot_be_searched_are_left_out_with_one_line(run, folder, gone):
    if gone == "dataset":
        shutil.rmtree(folder)
    elif gone == "test":
        write(run, "settings", json.loads((run / "settings.json").read_text()) | {"test": []})
    elif gone == "checkpoints":
        (run / "checkpoints.json").unlink()
    else:
        shutil.rmtree(run / "step-000040")
    page, text = make(run)
    line = next(line for line in text.splitlines() if line.startswith("Left out: "))
    told = {"dataset": "no such folder", "test": "no test dataset", "checkpoints": "no checkpoint yet"}
    assert told.get(gone, "step-000040") in line and "## Settings" in text and "0.7770" in page.text


def test_an_unfinished_run_shows_what_there_is(run):
    results = json.loads((run / "results.json").read_text())
    write(run, "results", results | {"after": []})
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:15]) + lines[15][:40])
    page, text = make(run, "--queries", 0)
    assert "15 of 40 steps, not finished." in page.text
    assert ["set", "12", "0.7770", "0.1235", "–"] in markdown_rows(text)
    for name in ("metrics.jsonl", "checkpoints.json", "results.json", "settings.json"):
        (run / name).unlink()
        page, text = make(run, "--queries", 0)
    assert page.headings == [1, 2] and "## Heads" in text and "not finished" in text


def test_skipped_steps_are_gaps_and_many_steps_are_thinned(run):
    make(run, "--queries", 0)
    loss, weight = ((run / "report" / f"{n}.svg").read_text() for n in ("loss", "positive_weight"))
    paths = [re.findall(r"[ML]", path) for path in re.findall(r' d="(M[^"]*L[^"]*L[^"]*L[^"]*)"', loss)]
    raw, mean = paths
    assert (raw.count("M"), len(raw)) == (3, 38), "steps 10 and 20 are missing"
    assert (mean.count("M"), len(mean)) == (1, 38)
    assert "nan" not in (loss + weight).lower()
    records = [step(number) for number in range(1, 3001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make(run, "--queries", 0)
    assert len((run / "report" / "loss.svg").read_text()) < 20_000


def test_the_mean_is_that_of_the_last_steps(run):
    """A constant stays the constant, and a single peak is spread over the mean's width."""
    records = [step(number, loss=1.0 + 8.0 * (number == 21)) for number in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make(run, "--queries", 0)
    svg = (run / "report" / "loss.svg").read_text()
    assert "mean of the last 2 steps" in svg and svg.count('stroke-opacity="0.35"') == 2, (
        "raw values stand back"
    )
    raw, mean = re.findall(r' d="(M[^"]*L[^"]*L[^"]*L[^"]*)"', svg)
    heights = [[float(y) for _, y in re.findall(r"[ML](\S+) ([\d.]+)", path)] for path in (raw, mean)]
    low, top = heights[0][0], min(heights[0])
    assert heights[1][20] == heights[1][21] == pytest.approx((low + top) / 2, abs=0.1)
    assert {y for i, y in enumerate(heights[1]) if i not in (20, 21)} == {low}


def test_several_datasets_get_their_mean(run):
    results = json.loads((run / "results.json").read_text())
    for kind, parts in results.items():
        other = json.loads(json.dumps(parts[0])) | {"dataset": "second", "groups": {}}
        other["metrics"] = {name: 0.5 for name in other["metrics"]}
        results[kind] = [parts[0], other]
    write(run, "results", results)
    page, text = make(run, "--queries", 0)
    table = page.tables[0]
    assert [row[0] for row in table[1:]] == ["set", "set: even", "set: odd", "second", "mean"]
    assert "](report/results.svg)" in text and "NDCG@10: mean" in text
    assert table[-1][2:4] == [f"{(0.777 + 0.5) / 2:.4f}", f"{(0.12345 + 0.5) / 2:.4f}"]


def test_the_same_run_gives_the_same_report(run, tmp_path):
    make(run)
    first = {path.name: path.read_bytes() for path in [*run.glob("report.*"), *run.glob("report/*")]}
    make(run)
    assert first == {path.name: path.read_bytes() for path in [*run.glob("report.*"), *run.glob("report/*")]}
    assert len(first) == 10
    assert main([str(run), "--queries", "0", "--out", str(tmp_path / "new" / "x y.html")]) == 0
    assert (
        "](x%20y/loss.svg)" in (tmp_path / "new" / "x y.md").read_text()
        and (tmp_path / "new/x y/loss.svg").exists()
    )


def test_a_run_of_another_objective_has_no_heads(run):
    (run / "heads.json").unlink()
    settings = json.loads((run / "settings.json").read_text())
    write(run, "settings", settings | {"objective": "replug", "temperature": 0.1})
    page, text = make(run, "--queries", 0)
    assert "Heads" not in page.text and ["temperature", "0.1"] in markdown_rows(text)
    assert ["objective", "replug (default: dream)"] in markdown_rows(text)


def test_a_run_of_an_earlier_version(run):
    """null stood for what was not given, and there were settings that are gone."""
    settings = json.loads((run / "settings.json").read_text())
    earlier = {"num_heads": None, "judge_context": None, "dev": None, "refresh_candidates": 50}
    write(run, "settings", settings | earlier | {"isolate_documents": True})
    rows = markdown_rows(make(run, "--queries", 0)[1])
    for name in ("num_heads", "judge_context", "dev", "judge_lr"):
        assert [name, "none"] in rows
    assert not {"refresh_candidates", "isolate_documents"} & {row[0] for row in rows}


def test_wrong_input_is_one_line_and_exit_status_2(run, tmp_path, capsys):
    cases = [([str(tmp_path / "absent")], "is no run of dream.py train"), ([str(ROOT)], "is no run")]
    cases += [([str(run), "--out", str(tmp_path / "x.md")], "must end in .html")]
    (tmp_path / "taken.html").mkdir()
    cases += [([str(run), "--out", str(tmp_path / "taken.html")], "is a folder")]
    for arguments, message in cases:
        assert main([*arguments, "--queries", "0"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("report: error: ") and message in line
    good = {path: path.read_bytes() for path in run.glob("*.json*")}
    for name, content in (
        ("results.json", '{"bm25": [1]}'),
        ("results.json", "{"),
        ("heads.json", '{"selected": 3}'),
        ("settings.json", "[]"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n'),
        ("metrics.jsonl", "[1]\n"),
        ("checkpoints.json", '{"last": "elsewhere"}'),
    ):
        (run / name).write_text(content)
        assert main([str(run), "--queries", "0"]) == 2, (name, content)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"report: error: {run}"), line
        for path, old in good.items():
            path.write_bytes(old)
    assert not list(run.glob("report*"))
    with pytest.raises(SystemExit):
        main([str(run), "--queries", "-1"])


def test_ctrl_c(run, monkeypatch, capsys):
    monkeypatch.setattr("tools.report.collect", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([str(run)]) == 130 and capsys.readouterr().err == "report: interrupted\n"
