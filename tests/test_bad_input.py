"""Bad input at the level of the commands: one clear line on stderr, exit status 2, nothing half-written.

BAD is a table: what is wrong, what is done to a good set of files, the command, what its message must hold.
GOOD is its counterpart: input that is odd and must work. tests/test_data.py has the readers' own cases.
"""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_checkpoint
from tokenizers import normalizers

import dream
import eval as yardstick
from tools import export, heads, mine

TOOLS = {"export": export.main, "heads": heads.main, "mine": mine.main}
PROGRAMS = {"dream.py": dream.main, "eval.py": yardstick.main, **TOOLS}
MODEL = "--judge judge --retriever judge --steps 2 --batch 2 --lora-rank 2"
TRAIN = f"dream.py train --train rows.jsonl {MODEL} --out new"
HEADS = "heads --train rows.jsonl --judge judge --out new.json"
MINE = "mine --corpus data --questions questions.jsonl --out new.jsonl --judge judge --candidates 3"
RESUME = "dream.py train --resume run --steps 3 --change-settings"
EVAL = "eval.py --dataset data --model judge"
BM25 = "eval.py --dataset data --model bm25"
EXPORT = "export run --format merged --to new"
PROGRESS = re.compile(r"\[\d+:\d+[<,].*\]")  # a line of tqdm
# Whole files of a run that began.
RECORDS = {".lock", "settings.json", "heads.json", "results.json", "metrics.jsonl"}
DEEP = "[" * 100_000
GONE = object()
SURROGATE = "\\ud800"  # as JSON writes it: half of a character


def row(**changes) -> str:
    good = {"query": "what is it?", "target": "it", "documents": ["it is so", "it is not"], "positive": 0}
    return json.dumps({k: v for k, v in {**good, **changes}.items() if v is not GONE}, ensure_ascii=False)


@pytest.fixture(scope="session")
def good_files(tmp_path_factory):
    """A checkpoint, rows, a dataset, questions, heads, and a run with an adapter: all of it good."""
    folder = tmp_path_factory.mktemp("good")
    size = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    tiny_checkpoint(folder / "judge", num_key_value_heads=1, **size)
    rows = [row(query=f"question {i}?", documents=[f"it is {i}", f"it is not {i}"]) for i in range(12)]
    corpus = [{"_id": f"d{i}", "title": "", "text": f"word{i} it is"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": f"word{i}"} for i in range(2)]
    questions = [{"query": f"what is word{i}?", "answers": ["it"], "passage_id": f"d{i}"} for i in range(2)]
    files = {"data/corpus.jsonl": corpus, "data/queries.jsonl": queries, "questions.jsonl": questions}
    (folder / "data" / "qrels").mkdir(parents=True)
    for name, values in files.items():
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    judgements = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n"
    (folder / "data" / "qrels" / "test.tsv").write_text(judgements)
    (folder / "rows.jsonl").write_text("".join(text + "\n" for text in rows))
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert run(TRAIN.replace("--out new", "--out run"))[0] == 0
        assert run(HEADS.replace("new.json", "heads.json"))[0] == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def files(good_files, tmp_path, monkeypatch):
    """A copy of the good files as the working folder; what runs longer than half a minute is stopped."""

    def too_long(*_):
        raise TimeoutError("the command hangs")

    shutil.copytree(good_files, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and no power fails here
    edit("run/settings.json", train=str(Path("rows.jsonl").resolve()))()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    yield tmp_path / "w"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(command: str, capsys=None) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr, without progress bars and argparse's usage."""
    program, *arguments = shlex.split(command)
    try:
        status = PROGRAMS[program](arguments)
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err if capsys else ""
    lines = [line for line in re.split(r"[\r\n]+", error) if line.strip() and not PROGRESS.search(line)]
    return status, lines[-1:] if lines and lines[0].startswith("usage: ") else lines


def snapshot(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


# What may be done to the files


def put(name: str, content: str | bytes | dict | list):
    def change():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def line(name: str, number: int, content: str | bytes):
    """Line `number`, from 1, becomes `content`."""

    def change():
        lines = Path(name).read_bytes().splitlines()
        lines[number - 1 : number] = [content if isinstance(content, bytes) else content.encode()]
        Path(name).write_bytes(b"\n".join(lines) + b"\n")

    return change


def edit(name: str, **changes):
    """Keys of a JSON file; GONE removes one."""

    def change():
        content = {**json.loads(Path(name).read_text()), **changes}
        Path(name).write_text(json.dumps({k: v for k, v in content.items() if v is not GONE}))

    return change


def config(**changes):
    return edit("judge/config.json", **changes)


def tensors(alter, name: str = "judge/model.safetensors"):
    def change():
        content = load_file(name)
        alter(content)
        save_file(content, name)

    return change


def fill(value: float, *names: str):
    def alter(content):
        for name in names or content:
            content[name] = torch.full_like(content[name], value)

    return alter


def seven_wide(content):
    """Heads of 7 instead of 8 dimensions."""
    for name, tensor in content.items():
        if "self_attn" in name:
            size = {16: 14, 8: 7}[tensor.shape[1 if "o_proj" in name else 0]]
            content[name] = (tensor[:, :size] if "o_proj" in name else tensor[:size]).contiguous()


def remove(name: str):
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def folder(name: str):
    def change():
        if Path(name).exists():
            remove(name)()
        Path(name).mkdir(parents=True)

    return change


def move(name: str, to: str):
    return lambda: shutil.move(name, to)


def cut(name: str, keep: int):
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:keep])


def tokenizer(normalizer):
    def change():
        made = byte_tokenizer()
        made.normalizer = normalizer
        made.save("judge/tokenizer.json")

    return change


def index(shard):
    """The weights as the one shard of an index, which lies at `shard`, seen from the checkpoint."""

    def change():
        names = list(load_file("judge/model.safetensors"))
        where = shard.format(here=Path.cwd())
        shutil.move("judge/model.safetensors", Path("judge") / where)
        put("judge/model.safetensors.index.json", {"weight_map": dict.fromkeys(names, where)})()

    return change


def header(content: bytes, length: int | None = None, data: bytes = b""):
    """A safetensors file with this header, which says it is `length` long."""
    length = len(content) if length is None else length
    return put("judge/model.safetensors", length.to_bytes(8, "little") + content + data)


def adapter(**changes):
    return edit("run/step-000002/adapter_config.json", **changes)


def tables(name: str, *lines: str):
    return put(name, "".join(text + "\n" for text in lines))


def jsonl_judgements(score: str):
    text = '{"query-id": "q0", "corpus-id": "d0", "score": ' + score + "}\n"
    return [remove("data/qrels/test.tsv"), put("data/qrels/test.jsonl", text)]


def case(what: str, prepare, command: str, *needles: str):
    marks = []
    if "cuda" in what:
        marks.append(pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device"))
    return pytest.param(prepare, command, needles, id=what, marks=marks)


good = bad = case
NONE: list = []
PLACES = {"a": [0, 8], "b": [4, 12]}
OVERLAP = {name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in PLACES.items()}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

BAD = [
    # Training rows
    bad("rows: broken JSON", line("rows.jsonl", 3, '{"query": '), TRAIN, "rows.jsonl, line 3", "not JSON"),
    bad(
        "rows: a NUL byte", line("rows.jsonl", 3, b'{"query": "\0"}'), TRAIN, "rows.jsonl, line 3", "not JSON"
    ),
    bad("rows: nothing but NUL bytes", put("rows.jsonl", b"\0" * 5000), TRAIN, "rows.jsonl, line 1"),
    bad(
        "rows: invalid UTF-8",
        line("rows.jsonl", 2, b'{"query": "\xff"}'),
        TRAIN,
        "rows.jsonl, line 2",
        "UTF-8",
    ),
    bad("rows: UTF-16", put("rows.jsonl", row().encode("utf-16")), TRAIN, "rows.jsonl, line 1", "UTF-8"),
    bad("rows: a BOM in the middle", line("rows.jsonl", 2, "\ufeff" + row()), TRAIN, "rows.jsonl, line 2"),
    bad("rows: wrong type", line("rows.jsonl", 2, row(query=5)), TRAIN, "line 2", "'query' is int"),
    bad("rows: an empty string", line("rows.jsonl", 2, row(target=" ")), TRAIN, "line 2", "no target"),
    bad(
        "rows: an empty document",
        line("rows.jsonl", 2, row(documents=["a", ""])),
        TRAIN,
        "line 2",
        "document 1",
    ),
    bad("rows: nested 100,000 deep", line("rows.jsonl", 2, DEEP), TRAIN, "rows.jsonl, line 2"),
    bad("rows: nested in a field", line("rows.jsonl", 2, '{"query": ' + DEEP), TRAIN, "rows.jsonl, line 2"),
    bad(
        "rows: 5,000 digits",
        line("rows.jsonl", 2, '{"positive": ' + "9" * 5000 + "}"),
        TRAIN,
        "line 2",
        "not JSON",
    ),
    bad("rows: NaN", line("rows.jsonl", 2, row(positive=float("nan"))), TRAIN, "line 2", "'positive' is nan"),
    bad(
        "rows: 1e400",
        line("rows.jsonl", 2, row().replace('"positive": 0', '"positive": 1e400')),
        TRAIN,
        "line 2",
        "'positive' is inf",
    ),
    bad(
        "rows: 1e400 as query",
        line("rows.jsonl", 2, '{"query": 1e400, "target": "t", "documents": ["a", "b"]}'),
        TRAIN,
        "line 2",
        "'query'",
    ),
    bad(
        "rows: half a surrogate",
        line("rows.jsonl", 2, row(query="Q").replace("Q", SURROGATE)),
        TRAIN,
        "line 2",
    ),
    bad(
        "rows: half a surrogate in a document",
        line("rows.jsonl", 2, row(documents=["a", "Q"]).replace("Q", SURROGATE)),
        HEADS,
        "line 2",
    ),
    bad(
        "rows: half a surrogate in the target",
        line("rows.jsonl", 2, row(target="Q").replace("Q", SURROGATE)),
        HEADS,
        "line 2",
    ),
    bad(
        "rows: one candidate each",
        put("rows.jsonl", "\n".join([row(documents=["a"])] * 12)),
        TRAIN,
        "rows.jsonl",
        "at least two different",
    ),
    bad(
        "rows: a CSV",
        [remove("rows.jsonl"), put("rows.csv", "query,target\nwhat is it?,it\n")],
        TRAIN.replace("rows.jsonl", "rows.csv"),
        "rows.csv, line 1: not JSON",
        "looks like a table (CSV, TSV): write one JSON object a line",
    ),
    bad("rows: a TSV under another name", put("rows.jsonl", "what?\tit\n"), TRAIN, "looks like a table"),
    bad(
        "questions: a TSV",
        put("questions.tsv", "1\twhat is it?\n"),
        MINE.replace("questions.jsonl", "questions.tsv"),
        "questions.tsv, line 1: not JSON",
        "looks like a table",
    ),
    bad(
        "judge: biases that the weights do not hold",
        config(model_type="llama", mlp_bias=True),
        TRAIN,
        "_proj.bias",
        "is missing; config.json says mlp_bias: true",
    ),
    bad(
        "resume: nothing was saved",
        remove("run/settings.json"),
        RESUME,
        "run/settings.json: no such file",
        "begin again, without --resume",
        "--out run",
    ),
    bad(
        "dev: the split is not there",
        NONE,
        f"{TRAIN} --dev data",
        "no qrels for split 'dev'; splits there: test",
        "--dev-split test",
    ),
    bad(
        "an adapter whose base is gone",
        adapter(base_model_name_or_path="/gone"),
        EVAL.replace("judge", "run"),
        "adapter_config.json: the adapter's base is not there: /gone: no such folder",
        "base_model_name_or_path",
    ),
    bad(
        "a run without a checkpoint",
        remove("run/checkpoints.json"),
        EVAL.replace("judge", "run"),
        "no checkpoint yet; go on with: python dream.py train --resume run",
    ),
    bad("rows: too few", put("rows.jsonl", row()), TRAIN, "rows.jsonl", "at least 10"),
    bad("rows: empty file", put("rows.jsonl", b""), TRAIN, "rows.jsonl", "no row"),
    bad("rows: missing", remove("rows.jsonl"), TRAIN, "rows.jsonl: no such file"),
    bad("rows: a folder", folder("rows.jsonl"), TRAIN, "rows.jsonl: cannot be read"),
    bad(
        "rows: a .gz that is cut",
        put("r.jsonl.gz", gzip.compress(row().encode() * 99)[:-20]),
        TRAIN.replace("rows.jsonl", "r.jsonl.gz"),
        "r.jsonl.gz: cannot be read",
    ),
    bad(
        "rows: a .xz of garbage",
        put("r.jsonl.xz", b"garbage" * 99),
        TRAIN.replace("rows.jsonl", "r.jsonl.xz"),
        "r.jsonl.xz: cannot be read",
    ),
    bad(
        "rows: a query longer than the judge's context",
        line("rows.jsonl", 2, row(query="w " * 200)),
        TRAIN + " --judge-context 300",
        "rows.jsonl, line 2",
        "--judge-context",
    ),
    bad(
        "rows: more candidates than fit",
        line("rows.jsonl", 2, row(documents=[f"{i} " * 20 for i in range(8)])),
        TRAIN + " --judge-context 150",
        "rows.jsonl, line 2",
        "--candidates",
    ),
    bad(
        "rows: a target without tokens",
        [
            tokenizer(normalizers.Replace("Z", "")),
            line("rows.jsonl", 2, row(target="ZZ")),
            put("t.txt", "Read:\n{documents}Q: {query}\nA:{target}"),
        ],
        TRAIN + " --judge-template t.txt",
        "rows.jsonl, line 2",
        "'ZZ' has no tokens",
    ),
    bad(
        "template: without a target",
        put("t.txt", "Read:\n{documents}Q: {query}"),
        TRAIN + " --judge-template t.txt",
        "template",
        "{target}",
    ),
    bad("template: not a text file", put("t.txt", b"\xff\xfe"), TRAIN + " --judge-template t.txt", "t.txt"),
    # Datasets
    bad("corpus: broken JSON", line("data/corpus.jsonl", 3, "{"), BM25, "corpus.jsonl, line 3"),
    bad(
        "corpus: wrong type",
        line("data/corpus.jsonl", 3, '{"_id": "x", "text": ["a"]}'),
        BM25,
        "corpus.jsonl, line 3",
        "'text' is list",
    ),
    bad(
        "corpus: an id twice",
        line("data/corpus.jsonl", 3, '{"_id": "d0", "text": "a"}'),
        BM25,
        "corpus.jsonl, line 3",
        "'d0' stands already on line 1",
    ),
    bad(
        "corpus: an empty id",
        line("data/corpus.jsonl", 3, '{"_id": "", "text": "a"}'),
        BM25,
        "corpus.jsonl, line 3",
        "'_id'",
    ),
    bad("corpus: nested 100,000 deep", line("data/corpus.jsonl", 3, DEEP), BM25, "corpus.jsonl, line 3"),
    bad(
        "corpus: half a surrogate",
        line("data/corpus.jsonl", 3, '{"_id": "x", "text": "a \\udc00"}'),
        EVAL,
        "corpus.jsonl, line 3",
    ),
    bad(
        "corpus: half a surrogate as id",
        line("data/corpus.jsonl", 3, '{"_id": "\\udc00", "text": "a"}'),
        BM25,
        "corpus.jsonl, line 3",
    ),
    bad("corpus: no documents", put("data/corpus.jsonl", "\n"), BM25, "corpus.jsonl: no documents"),
    bad("corpus: missing", remove("data/corpus.jsonl"), BM25, "data: no corpus"),
    bad(
        "queries: an empty text",
        line("data/queries.jsonl", 2, '{"_id": "q1", "text": ""}'),
        BM25,
        "queries.jsonl, line 2",
        "'text'",
    ),
    bad(
        "queries: half a surrogate",
        line("data/queries.jsonl", 2, '{"_id": "q1", "text": "\\ud800"}'),
        EVAL,
        "queries.jsonl, line 2",
    ),
    bad(
        "queries: an id twice",
        line("data/queries.jsonl", 2, '{"_id": "q0", "text": "a"}'),
        BM25,
        "queries.jsonl, line 2",
        "twice",
    ),
    bad(
        "qrels: an unknown query", line("data/qrels/test.tsv", 2, "q9\td0\t1"), BM25, "queries.jsonl", "'q9'"
    ),
    bad(
        "qrels: none",
        put("data/qrels/test.tsv", "query-id\tcorpus-id\tscore\n"),
        BM25,
        "test.tsv: no judgements",
    ),
    bad(
        "qrels: no header, and no integer",
        put("data/qrels/test.tsv", "q0\td0\t1.0\nq1\td1\t1\n"),
        BM25,
        "test.tsv, line 1",
    ),
    bad(
        "qrels: no integer",
        line("data/qrels/test.tsv", 3, "q1\td1\t1.5"),
        BM25,
        "test.tsv, line 3",
        "whole score",
    ),
    bad(
        "qrels: spaces for tabs", line("data/qrels/test.tsv", 3, "q1 d1 1"), BM25, "test.tsv, line 3", "tabs"
    ),
    bad(
        "qrels: 400 digits", line("data/qrels/test.tsv", 3, "q1\td1\t" + "9" * 400), BM25, "test.tsv, line 3"
    ),
    bad(
        "qrels: 5,000 digits",
        line("data/qrels/test.tsv", 3, "q1\td1\t" + "9" * 5000),
        BM25,
        "test.tsv, line 3",
    ),
    bad(
        "qrels: invalid UTF-8",
        line("data/qrels/test.tsv", 3, b"\xff\td1\t1"),
        BM25,
        "test.tsv, line 3",
        "UTF-8",
    ),
    bad("qrels: NaN", jsonl_judgements("NaN"), BM25, "test.jsonl, line 1", "'score' is nan"),
    bad("qrels: Infinity", jsonl_judgements("1e400"), BM25, "test.jsonl, line 1", "'score' is inf"),
    bad("qrels: 400 digits in JSON", jsonl_judgements("9" * 400), BM25, "test.jsonl, line 1", "'score'"),
    bad("qrels: a folder", folder("data/qrels/test.tsv"), BM25, "test.tsv"),
    bad(
        "dataset: a file",
        put("d.zip", b"PK garbage"),
        BM25.replace(" data", " d.zip"),
        "d.zip: neither a folder nor a zip",
    ),
    bad(
        "dataset: its card is nested too deep",
        put("data/README.md", "---\nconfigs: " + DEEP[:1500] + "\n---\n"),
        BM25,
        "README.md",
    ),
    bad(
        "dataset: its card leaves the folder",
        put("data/README.md", "---\nconfigs:\n- config_name: corpus\n  data_files: ../x\n---\n"),
        BM25,
        "README.md: refused",
    ),
    # Mining
    bad(
        "questions: no answer",
        line("questions.jsonl", 2, '{"query": "a"}'),
        MINE,
        "questions.jsonl, line 2",
        "no answer",
    ),
    bad(
        "questions: an unknown passage",
        line("questions.jsonl", 2, '{"query": "a", "answer": "b", "passage_id": "x"}'),
        MINE,
        "questions.jsonl, line 2",
        "'x' is not in the corpus",
    ),
    bad(
        "questions: half a surrogate",
        line("questions.jsonl", 2, '{"query": "a", "answer": "\\ud800"}'),
        MINE,
        "questions.jsonl, line 2",
    ),
    bad("questions: empty file", put("questions.jsonl", ""), MINE, "questions.jsonl: no questions"),
    bad(
        "questions: the source is an empty document",
        line("data/corpus.jsonl", 2, '{"_id": "d1", "text": " "}'),
        MINE,
        "questions.jsonl, line 2",
        "d1",
    ),
    bad(
        "questions: wrong source",
        line("questions.jsonl", 2, '{"query": "a", "answer": "b", "source": 5}'),
        MINE,
        "questions.jsonl, line 2",
        "'source'",
    ),
    bad("mine: into a folder", folder("new.jsonl"), MINE, "new.jsonl"),
    bad("mine: below a file", put("new", ""), MINE.replace("new.jsonl", "new/rows.jsonl"), "new"),
    # Weights
    bad("weights: NaN", tensors(fill(float("nan"))), EVAL, "not all finite"),
    bad("weights: inf", tensors(fill(float("inf"), "model.norm.weight")), EVAL, "not all finite"),
    bad(
        "weights: NaN in the judge",
        [lambda: shutil.copytree("judge", "other"), tensors(fill(float("nan")))],
        TRAIN.replace("--retriever judge", "--retriever other"),
        "finite",
    ),
    bad("weights: NaN in the judge, heads alone", tensors(fill(float("nan"))), HEADS, "finite"),
    bad(
        "weights: NaN in the retriever",
        [lambda: shutil.copytree("judge", "other"), tensors(fill(float("nan")), "other/model.safetensors")],
        TRAIN.replace("--retriever judge", "--retriever other") + " --steps 12",
        "finite",
    ),
    bad(
        "weights: NaN in the adapter",
        tensors(fill(float("nan")), "run/step-000002/adapter_model.safetensors"),
        EVAL.replace("judge", "run"),
        "not all finite",
    ),
    bad(
        "weights: missing", remove("judge/model.safetensors"), EVAL, "judge", "neither model.safetensors nor"
    ),
    bad("weights: a folder", folder("judge/model.safetensors"), EVAL, "model.safetensors"),
    bad("weights: empty", put("judge/model.safetensors", b""), EVAL, "model.safetensors: not a whole"),
    bad("weights: cut", cut("judge/model.safetensors", 20_000), EVAL, "model.safetensors: not a whole"),
    bad("weights: a header of 2^62 bytes", header(b"{}", 1 << 62), EVAL, "model.safetensors: not a whole"),
    bad("weights: a header that is no JSON", header(b"{{{{{{{{"), EVAL, "model.safetensors: not a whole"),
    bad(
        "weights: a header nested 100,000 deep", header(DEEP.encode()), EVAL, "model.safetensors: not a whole"
    ),
    bad(
        "weights: overlapping offsets",
        header(json.dumps(OVERLAP).encode(), data=bytes(12)),
        EVAL,
        "model.safetensors: not a whole",
    ),
    bad(
        "weights: a shard outside",
        index("../outside.safetensors"),
        EVAL,
        "index.json",
        "../outside.safetensors",
    ),
    bad(
        "weights: a shard by absolute path",
        index("{here}/outside.safetensors"),
        EVAL,
        "index.json",
        "outside.safetensors",
    ),
    bad(
        "weights: a shard that is missing",
        [index("a.safetensors"), remove("judge/a.safetensors")],
        EVAL,
        "index.json",
        "a.safetensors, which is not in",
    ),
    bad(
        "weights: a weight_map that is a list",
        [remove("judge/model.safetensors"), put("judge/model.safetensors.index.json", {"weight_map": ["a"]})],
        EVAL,
        "index.json",
        "weight_map",
    ),
    bad(
        "weights: shards that are numbers",
        [
            remove("judge/model.safetensors"),
            put("judge/model.safetensors.index.json", {"weight_map": {"a": 5}}),
        ],
        EVAL,
        "index.json",
    ),
    # config.json
    bad("config: missing", remove("judge/config.json"), EVAL, "config.json: no such file"),
    bad("config: broken", put("judge/config.json", "{"), EVAL, "config.json: not readable as JSON"),
    bad("config: a list", put("judge/config.json", "[]"), EVAL, "config.json: expected a JSON dict"),
    bad("config: nested 100,000 deep", put("judge/config.json", DEEP), EVAL, "config.json"),
    bad(
        "config: other sizes than the tensors",
        config(intermediate_size=17),
        EVAL,
        "judge: tensor layers.0.mlp",
        "config.json implies",
    ),
    bad("config: more layers than the tensors", config(num_hidden_layers=3), EVAL, "judge: tensor layers.2"),
    bad("config: 10^9 layers", config(num_hidden_layers=10**9), EVAL, "judge", "num_hidden_layers"),
    bad("config: no heads", config(num_attention_heads=0), EVAL, "config.json: num_attention_heads is 0"),
    bad("config: -2 heads", config(num_attention_heads=-2), EVAL, "config.json: num_attention_heads is -2"),
    bad("config: 10^9 heads", config(num_attention_heads=10**9, num_key_value_heads=1), EVAL, "config.json"),
    bad(
        "config: 10^9 heads of 8",
        config(num_attention_heads=10**9, head_dim=8),
        EVAL,
        "judge: tensor layers.0.self_attn.q_proj",
    ),
    bad(
        "config: 10^30 heads of 8",
        config(num_attention_heads=10**30, head_dim=8),
        EVAL,
        "config.json: num_attention_heads",
    ),
    bad(
        "config: heads as a string",
        config(num_attention_heads="2"),
        EVAL,
        "config.json: num_attention_heads is '2'",
    ),
    bad(
        "config: heads missing",
        config(num_attention_heads=GONE),
        EVAL,
        "config.json: num_attention_heads is None",
    ),
    bad("config: 2.5 layers", config(num_hidden_layers=2.5), EVAL, "config.json: num_hidden_layers is 2.5"),
    bad(
        "config: NaN layers",
        config(num_hidden_layers=float("nan")),
        EVAL,
        "config.json: num_hidden_layers is nan",
    ),
    bad(
        "config: infinite context",
        config(max_position_embeddings=float("inf")),
        EVAL,
        "config.json: max_position_embeddings is inf",
    ),
    bad(
        "config: key-value heads that do not divide",
        config(num_attention_heads=3, num_key_value_heads=2),
        EVAL,
        "config.json: num_attention_heads is not a multiple",
    ),
    bad(
        "config: odd head_dim", [config(head_dim=7), tensors(seven_wide)], EVAL, "config.json: head_dim is 7"
    ),
    bad(
        "config: vocab_size below the table's",
        config(vocab_size=200, eos_token_id=1),
        EVAL,
        "tensor embed_tokens.weight has shape (300, 16)",
    ),
    bad(
        "config: vocab_size below the tokenizer's",
        lambda: tiny_checkpoint(Path("judge"), num_hidden_layers=1, vocab_size=200, eos_token_id=1),
        EVAL,
        "token id 256",
        "vocab_size 200",
    ),
    bad(
        "config: a table below vocab_size",
        config(vocab_size=400),
        EVAL,
        "tensor embed_tokens.weight has shape (300, 16)",
    ),
    bad(
        "config: eos_token_id out of range",
        [
            config(eos_token_id=10**6),
            tokenizer(normalizers.Replace("w", "")),
            line("data/corpus.jsonl", 1, '{"_id": "d0", "text": "w"}'),
        ],
        EVAL,
        "config.json: eos_token_id is 1000000",
    ),
    bad(
        "config: eos_token_id negative",
        [config(eos_token_id=-1), line("data/corpus.jsonl", 1, '{"_id": "d0", "text": ""}')],
        EVAL,
        "config.json: eos_token_id is -1",
    ),
    bad(
        "config: eos_token_id a string",
        [config(eos_token_id="x"), line("data/corpus.jsonl", 1, '{"_id": "d0", "text": ""}')],
        EVAL,
        "config.json: eos_token_id is 'x'",
    ),
    bad(
        "config: eos_token_id not in the tokenizer",
        config(eos_token_id=299),
        TRAIN + " --append-eos",
        "eos_token_id",
    ),
    bad(
        "config: rope_theta 0",
        config(rope_theta=0, rope_parameters=GONE),
        EVAL,
        "config.json: rope_theta is 0",
    ),
    bad(
        "config: rope_theta 0 in rope_parameters",
        config(rope_parameters={"rope_theta": 0}),
        EVAL,
        "config.json: rope_theta is 0",
    ),
    bad(
        "config: rope_theta -1 in rope_parameters",
        config(rope_parameters={"rope_theta": -1.0}),
        EVAL,
        "config.json: rope_theta is -1",
    ),
    bad(
        "config: rope_theta a string",
        config(rope_parameters={"rope_theta": "x"}),
        EVAL,
        "config.json: rope_theta is 'x'",
    ),
    bad("config: rope_parameters a list", config(rope_parameters=[1]), EVAL, "config.json: rope_parameters"),
    bad(
        "config: unknown rope_type",
        config(rope_parameters={"rope_type": "yarn"}),
        EVAL,
        "config.json: rope_type is 'yarn'",
    ),
    bad(
        "config: llama3 without its figures",
        config(rope_parameters={"rope_type": "llama3"}),
        EVAL,
        "config.json",
        "factor",
    ),
    bad(
        "config: llama3 without a factor",
        config(rope_parameters={**LLAMA3, "original_max_position_embeddings": 32, "factor": 0}),
        EVAL,
        "config.json",
        "factor",
    ),
    bad("config: model_type a list", config(model_type=["qwen2"]), EVAL, "config.json: model_type"),
    # The tokenizer and the embedding's settings
    bad("tokenizer: missing", remove("judge/tokenizer.json"), EVAL, "judge: no tokenizer.json"),
    bad("tokenizer: broken", put("judge/tokenizer.json", "{}"), EVAL, "tokenizer.json: not a tokenizer"),
    bad(
        "tokenizer: nested 100,000 deep",
        put("judge/tokenizer.json", DEEP),
        EVAL,
        "tokenizer.json: not a tokenizer",
    ),
    bad(
        "tokenizer_config: broken",
        put("judge/tokenizer_config.json", "["),
        EVAL,
        "tokenizer_config.json: not readable",
    ),
    bad(
        "tokenizer_config: a token that is a number",
        put("judge/tokenizer_config.json", {"add_eos_token": True, "eos_token": 5}),
        EVAL,
        "tokenizer_config.json: eos_token",
    ),
    bad(
        "modules: a path outside",
        put(
            "run/step-000002/modules.json",
            [{"path": "../../judge", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}],
        ),
        EVAL.replace("judge", "run"),
        "modules.json",
        "../../judge",
    ),
    bad(
        "modules: a pooling outside",
        [
            put(
                "run/step-000002/modules.json",
                [{"path": "", "type": "x.Transformer"}, {"path": "../p", "type": "x.Pooling"}],
            ),
            move("run/step-000002/1_Pooling", "run/p"),
        ],
        EVAL.replace("judge", "run"),
        "modules.json",
        "../p",
    ),
    bad(
        "modules: a path that is a number",
        put(
            "run/step-000002/modules.json",
            [{"path": 5, "type": "x.Transformer"}, {"path": 6, "type": "x.Pooling"}],
        ),
        EVAL.replace("judge", "run"),
        "modules.json",
    ),
    bad(
        "modules: an object",
        put("run/step-000002/modules.json", {}),
        EVAL.replace("judge", "run"),
        "modules.json: expected a JSON list",
    ),
    bad(
        "settings: max_seq_length a string",
        put("run/step-000002/sentence_bert_config.json", {"max_seq_length": "x"}),
        EVAL.replace("judge", "run"),
        "sentence_bert_config.json",
        "max_seq_length",
    ),
    bad(
        "settings: max_seq_length negative",
        put("run/step-000002/sentence_bert_config.json", {"max_seq_length": -1}),
        EVAL.replace("judge", "run"),
        "sentence_bert_config.json",
        "max_seq_length",
    ),
    bad(
        "settings: model_max_length a string",
        [
            remove("run/step-000002/sentence_bert_config.json"),
            edit("run/step-000002/tokenizer_config.json", model_max_length="x"),
        ],
        EVAL.replace("judge", "run"),
        "tokenizer_config.json",
        "model_max_length",
    ),
    bad(
        "settings: prompts a list",
        put("run/step-000002/config_sentence_transformers.json", {"prompts": ["a"]}),
        EVAL.replace("judge", "run"),
        "config_sentence_transformers.json",
        "prompts",
    ),
    bad(
        "settings: a prompt with half a surrogate",
        put("run/step-000002/config_sentence_transformers.json", '{"prompts": {"query": "\\ud800"}}'),
        EVAL.replace("judge", "run"),
        "config_sentence_transformers.json",
    ),
    # Adapters
    bad("adapter: r 0", adapter(r=0), EVAL.replace("judge", "run"), "adapter_config.json: r is 0"),
    bad("adapter: r true", adapter(r=True), EVAL.replace("judge", "run"), "adapter_config.json: r is True"),
    bad("adapter: r 10^12", adapter(r=10**12), EVAL.replace("judge", "run"), "run/step-000002/adapter_"),
    bad(
        "adapter: negative alpha",
        adapter(lora_alpha=-1),
        EVAL.replace("judge", "run"),
        "adapter_config.json",
        "lora_alpha -1",
    ),
    bad(
        "adapter: alpha NaN",
        adapter(lora_alpha=float("nan")),
        EVAL.replace("judge", "run"),
        "adapter_config.json",
        "lora_alpha nan",
    ),
    bad(
        "adapter: unknown targets",
        adapter(target_modules=["c_attn"]),
        EVAL.replace("judge", "run"),
        "adapter_config.json",
        "'c_attn'",
    ),
    bad(
        "adapter: targets a string",
        adapter(target_modules="all-linear"),
        EVAL.replace("judge", "run"),
        "adapter_config.json: target_modules is 'all-linear'",
    ),
    bad(
        "adapter: targets that are lists",
        adapter(target_modules=[["q_proj"]]),
        EVAL.replace("judge", "run"),
        "adapter_config.json: target_modules",
    ),
    bad(
        "adapter: no targets",
        adapter(target_modules=[]),
        EVAL.replace("judge", "run"),
        "adapter_model.safetensors: unexpected tensor",
    ),
    bad(
        "adapter: DoRA", adapter(use_dora=True), EVAL.replace("judge", "run"), "adapter_config.json: use_dora"
    ),
    bad(
        "adapter: base not named",
        adapter(base_model_name_or_path=GONE),
        EVAL.replace("judge", "run"),
        "adapter_config.json: base_model_name_or_path",
    ),
    bad(
        "adapter: base missing",
        adapter(base_model_name_or_path="./absent"),
        EVAL.replace("judge", "run"),
        "./absent: no such folder",
    ),
    bad(
        "adapter: its own base",
        adapter(base_model_name_or_path="run/step-000002"),
        EVAL.replace("judge", "run"),
        "run/step-000002",
    ),
    bad(
        "adapter: without weights",
        remove("run/step-000002/adapter_model.safetensors"),
        EVAL.replace("judge", "run"),
        "adapter_model.safetensors",
    ),
    bad(
        "adapter: cut weights",
        cut("run/step-000002/adapter_model.safetensors", 900),
        EVAL.replace("judge", "run"),
        "adapter_model.safetensors",
    ),
    # Runs
    bad(
        "checkpoints.json: a folder elsewhere",
        [
            move("run/step-000002", "elsewhere"),
            put("run/checkpoints.json", {"last": "../elsewhere", "best": None}),
        ],
        EVAL.replace("judge", "run"),
        "checkpoints.json",
        "../elsewhere",
    ),
    bad(
        "checkpoints.json: a missing folder",
        put("run/checkpoints.json", {"last": "step-000009", "best": None}),
        EVAL.replace("judge", "run"),
        "step-000009",
    ),
    bad(
        "checkpoints.json: a list",
        put("run/checkpoints.json", []),
        EVAL.replace("judge", "run"),
        "checkpoints.json: expected a JSON dict",
    ),
    bad(
        "checkpoints.json: empty",
        put("run/checkpoints.json", {}),
        EVAL.replace("judge", "run"),
        "checkpoints.json",
    ),
    bad(
        "checkpoints.json: a number",
        put("run/checkpoints.json", {"last": 5}),
        EVAL.replace("judge", "run"),
        "checkpoints.json",
    ),
    bad(
        "resume: checkpoints.json elsewhere",
        [
            move("run/step-000002", "elsewhere"),
            put("run/checkpoints.json", {"last": "../elsewhere", "best": None}),
        ],
        RESUME,
        "checkpoints.json",
        "../elsewhere",
    ),
    bad("resume: checkpoints.json empty", put("run/checkpoints.json", {}), RESUME, "checkpoints.json"),
    bad("resume: no such run", NONE, "dream.py train --resume absent", "absent/settings.json: no such file"),
    bad("resume: settings missing", remove("run/settings.json"), RESUME, "run/settings.json: no such file"),
    bad("resume: settings broken", cut("run/settings.json", 50), RESUME, "run/settings.json: not readable"),
    bad(
        "resume: settings of the wrong type",
        edit("run/settings.json", batch="many"),
        RESUME,
        "run/settings.json",
        "batch",
    ),
    bad(
        "resume: retriever a number",
        edit("run/settings.json", retriever=5),
        RESUME,
        "run/settings.json",
        "retriever",
    ),
    bad("resume: an empty object for settings", put("run/settings.json", {}), RESUME, "--judge"),
    bad("resume: results of another shape", put("run/results.json", {"before": 5}), RESUME, "'before' is"),
    bad(
        "resume: results of numbers",
        put("run/results.json", {"before": [5, {"dataset": "x"}]}),
        RESUME,
        "['x']",
    ),
    bad("resume: heads missing", remove("run/heads.json"), RESUME, "heads.json: no such file"),
    bad("resume: heads without a selection", put("run/heads.json", {}), RESUME, "heads.json", "selected"),
    bad(
        "resume: heads that do not exist",
        put("run/heads.json", {"selected": [[9, 9]]}),
        RESUME,
        "heads.json",
        "selected",
    ),
    bad("resume: heads flat", put("run/heads.json", {"selected": [0, 1]}), RESUME, "heads.json", "selected"),
    bad("resume: trainer.json broken", put("run/step-000002/trainer.json", "{"), RESUME, "trainer.json"),
    bad(
        "resume: trainer.json empty", put("run/step-000002/trainer.json", {}), RESUME, "trainer.json", "step"
    ),
    bad(
        "resume: optimizer missing",
        remove("run/step-000002/optimizer.safetensors"),
        RESUME,
        "optimizer.safetensors: no such file",
    ),
    bad(
        "resume: optimizer cut",
        cut("run/step-000002/optimizer.safetensors", 900),
        RESUME,
        "optimizer.safetensors: not a whole",
    ),
    bad("resume: metrics missing", remove("run/metrics.jsonl"), RESUME, "metrics.jsonl: no such file"),
    bad(
        "resume: rows changed",
        line("rows.jsonl", 2, row(query="other")),
        RESUME.replace(" --change-settings", "").replace(" --steps 3", ""),
        "rows.jsonl: has changed",
    ),
    bad(
        "train: a run stands there", NONE, TRAIN.replace("--out new", "--out run"), "run: holds a run already"
    ),
    bad(
        "heads: flat", put("h.json", {"selected": [0, 1]}), TRAIN + " --heads h.json", "h.json", "'selected'"
    ),
    bad(
        "heads: one twice",
        put("h.json", {"selected": [[0, 1], [1, 1], [0, 1]]}),
        TRAIN + " --heads h.json",
        "h.json",
        "names a head twice",
    ),
    bad(
        "heads: another number than asked for",
        put("h.json", {"selected": [[0, 1], [1, 1]]}),
        TRAIN + " --heads h.json --num-heads 3",
        "--num-heads 3: h.json selects 2 heads",
    ),
    bad(
        "flag: --dtype float16 in train",
        NONE,
        TRAIN + " --dtype float16",
        "choose from 'auto', 'float32', 'bfloat16'",
    ),
    bad(
        "flag: in-batch negatives that change nothing",
        NONE,
        TRAIN + " --in-batch-negatives --document-mass full",
        "--in-batch-negatives has no effect with --document-mass full",
    ),
    bad("heads: a number", put("h.json", {"selected": 5}), TRAIN + " --heads h.json", "h.json", "'selected'"),
    bad(
        "heads: letters",
        put("h.json", {"selected": ["ab"]}),
        TRAIN + " --heads h.json",
        "h.json",
        "'selected'",
    ),
    bad(
        "heads: halves",
        put("h.json", {"selected": [[0.5, 1]]}),
        TRAIN + " --heads h.json",
        "h.json",
        "'selected'",
    ),
    bad(
        "heads: out of range",
        put("h.json", {"selected": [[2, 0]]}),
        TRAIN + " --heads h.json",
        "h.json",
        "'selected'",
    ),
    bad("heads: a list", put("h.json", [[0, 1]]), TRAIN + " --heads h.json", "h.json: expected a JSON dict"),
    bad(
        "heads: scores of the wrong shape",
        put("h.json", {"selected": [[0, 1]], "scores": [[1.0], [1.0, 2.0]]}),
        TRAIN + " --heads h.json",
        "h.json",
        "scores",
    ),
    bad("heads: no such way", NONE, TRAIN + " --heads bottom", "bottom"),
    # Where results go
    bad("train: --out is a file", put("new", ""), TRAIN, "new"),
    bad("heads: --out is a folder", folder("new.json"), HEADS, "new.json"),
    bad("heads: --out is below a file", put("new", ""), HEADS.replace("new.json", "new/h.json"), "new"),
    bad("eval: --json below a file", put("new", ""), BM25 + " --json new/scores.json", "new"),
    bad("eval: --json is a folder", folder("new"), BM25 + " --json new", "new"),
    bad("eval: --trec is a folder", folder("new"), BM25 + " --trec new", "new"),
    bad("eval: --trec below a file", put("new", ""), BM25 + " --trec new/x.trec", "new"),
    bad("eval: --mteb is a file", put("new", ""), BM25 + " --mteb new", "new"),
    bad("eval: --embeddings is a file", put("new", ""), EVAL + " --embeddings new", "new"),
    bad("export: --to is a file", put("new", ""), EXPORT, "new"),
    bad("export: --to is below a file", put("new", ""), EXPORT.replace("--to new", "--to new/x"), "new"),
    bad("export: --to is not empty", put("new/x", ""), EXPORT, "new: is not empty"),
    bad("export: no adapter", NONE, "export judge --format adapter --to new", "judge: has no adapter"),
    bad("export: no such run", NONE, "export absent --format merged --to new", "absent: no such folder"),
    bad(
        "export: checkpoints.json elsewhere",
        [
            move("run/step-000002", "elsewhere"),
            put("run/checkpoints.json", {"last": "../elsewhere", "best": None}),
        ],
        EXPORT,
        "checkpoints.json",
        "../elsewhere",
    ),
    bad(
        "export: results of the wrong shape",
        put("run/results.json", {"after": [1], "bm25": [1], "before": [1]}),
        EXPORT,
        "results.json",
    ),
    # Flags
    *[
        bad(f"flag: {flag}", NONE, f"{TRAIN} {flag}", flag.split()[0])
        for flag in (
            "--steps 0",
            "--steps 1.5",
            "--batch -1",
            "--lr nan",
            "--lr inf",
            "--lr -1",
            "--temperature 0",
            "--temperature -1",
            "--max-length 0",
            "--judge-batch 0",
            "--retriever-batch 0",
            "--lora-rank 0",
            "--lora-rank 1000000000000",
            "--candidates 0",
            "--candidates 1",
            "--num-heads 1000000000",
            "--num-heads 0",
            "--warmup 2",
            "--seed -1",
            "--seed 1.5",
            "--lora-dropout 1.5",
            "--lora-dropout 1",
            "--max-target 0",
            "--clip 0",
            "--judge-context 1",
            "--device nonsense",
            "--device meta",
            "--device mps",
            "--dtype int8",
            "--test absent",
            "--dev absent",
            "--detect-rows all",
            "--batch 1000000000000",
            "--nonsense 1",
            "--judge-template absent",
        )
    ],
    bad("flag: --device cuda", NONE, TRAIN + " --device cuda", "--device cuda: this machine has no CUDA"),
    bad("flag: --lora-targets c_attn", NONE, TRAIN + " --lora-targets c_attn", "'c_attn'"),
    bad("flag: --candidates 1 in mine", NONE, MINE + " --candidates 1", "--candidates"),
    bad("flag: --limit 0 in mine", NONE, MINE + " --limit 0", "--limit"),
    bad("flag: --seed -1 in mine", NONE, MINE + " --seed -1 --limit 1", "--seed"),
    bad("flag: --by absent in mine", NONE, MINE + " --by absent", "absent: no such folder"),
    bad("flag: --query-prompt in bytes", NONE, EVAL + " --query-prompt a\udce9", "--query-prompt: not UTF-8"),
    bad("flag: --k 5", NONE, BM25 + " --k 5", "--k: 5 is not at least 100"),
    bad("flag: --batch-tokens 0", NONE, EVAL + " --batch-tokens 0", "--batch-tokens: 0 is not at least 1"),
    bad("flag: --max-length 0 in eval", NONE, EVAL + " --max-length 0", "--max-length: 0 is not at least 1"),
    bad(
        "flag: --device cuda in eval",
        NONE,
        EVAL + " --device cuda",
        "--device cuda: this machine has no CUDA",
    ),
    bad("flag: --device meta in eval", NONE, EVAL + " --device meta", "--device meta"),
    bad("flag: --device mps in eval", NONE, EVAL + " --device mps", "--device mps"),
    bad("flag: --modle", NONE, "eval.py --dataset data --modle bm25", "--modle"),
    bad(
        "flag: a folder that is missing is not asked for at the hub",
        NONE,
        TRAIN.replace("--retriever judge", "--retriever ./no/such"),
        "./no/such: no such folder; give",
    ),
    bad("flag: an empty --dataset", NONE, "eval.py --dataset '' --model bm25", "--dataset"),
    bad("flag: a text for --k", NONE, BM25 + " --k many", "--k", "'many'"),
    bad("command: mistyped", NONE, "dream.py trian", "'trian'", "train"),
    bad("command: none", NONE, "dream.py", "required", "train"),
    bad("command: no --judge", NONE, "dream.py train --train rows.jsonl", "--judge is missing"),
    bad("command: export without --to", NONE, "export run --format merged", "--to"),
]

DOCUMENT = '{"_id": "d0", "title": "", "text": "word0 it is"}\n'
ODD = {
    "emoji": "\U0001f469\u200d\U0001f52c \U0001f642",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "combining characters": unicodedata.normalize("NFD", "\u00e9\u1eaf") + "e" + "\u0301" * 50,
    "surrogates in pairs": "\\ud83d\\ude42",
    "control characters": "\\u0000 \\u0007 \\u2028 \\ufeff",
    "a NUL, escaped": "a\\u0000b",
}
GOOD = [
    good("nothing odd", NONE, TRAIN),
    good("nothing odd: heads", NONE, HEADS),
    good("nothing odd: mine", NONE, MINE),
    good("nothing odd: eval", NONE, EVAL),
    good("nothing odd: export", NONE, EXPORT),
    good("nothing odd: resume", NONE, RESUME),
    *[
        good(
            f"rows: {what}",
            line("rows.jsonl", 2, row(query="X", target="X", documents=["X", "aX"]).replace("X", text)),
            TRAIN,
        )
        for what, text in ODD.items()
    ],
    *[
        good(
            f"dataset: {what}",
            [
                line("data/corpus.jsonl", 1, DOCUMENT.replace("word0", text)),
                line("data/queries.jsonl", 1, '{"_id": "q0", "text": "X"}'.replace("X", text)),
            ],
            EVAL + " --json new.json --trec new.trec",
        )
        for what, text in ODD.items()
    ],
    *[
        good(
            f"questions: {what}",
            line("questions.jsonl", 1, '{"query": "X word1", "answer": "X"}'.replace("X", text)),
            MINE,
        )
        for what, text in ODD.items()
    ],
    good(
        "rows: a BOM, CRLF and blank lines",
        put("rows.jsonl", "\ufeff" + "\r\n\r\n".join([row()] * 12)),
        TRAIN,
    ),
    good(
        "dataset: a BOM and CRLF",
        [
            line("data/qrels/test.tsv", 1, "\ufeffquery-id\tcorpus-id\tscore\r"),
            line("data/qrels/test.tsv", 2, "q0\td0\t1\r"),
            line("data/corpus.jsonl", 1, "\ufeff" + DOCUMENT.strip() + "\r"),
        ],
        BM25,
    ),
    good("rows: some with one candidate", line("rows.jsonl", 2, row(documents=["a"])), TRAIN),
    good(
        "rows: a query of 5,000 words for the retriever",
        line("rows.jsonl", 2, row(query="word " * 300)),
        TRAIN + " --max-length 16",
    ),
    good("rows: a long document", line("rows.jsonl", 2, row(documents=["word " * 5000, "b"])), TRAIN),
    good(
        "qrels: unknown documents",
        put("data/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td9\t1\nq1\td1\t1\n"),
        EVAL,
    ),
    good(
        "qrels: nothing relevant", put("data/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t0\n"), EVAL
    ),
    good("corpus: an empty document", line("data/corpus.jsonl", 3, '{"_id": "x", "text": ""}'), EVAL),
    good(
        "corpus: an empty document, mined",
        line("data/corpus.jsonl", 4, '{"_id": "x", "text": ""}'),
        MINE + " --by judge --candidates 8",
    ),
    good("corpus: one document", [put("data/corpus.jsonl", DOCUMENT)], EVAL),
    good(
        "questions: no candidate has a word of it",
        line("questions.jsonl", 2, '{"query": "zzz", "answer": "it"}'),
        MINE,
    ),
    good("eval: more hits than memory has room for", NONE, BM25 + " --k 1000000000000"),
    good("eval: as many of a model", NONE, EVAL + " --k 1000000000000"),
    good("mine: as many candidates", NONE, MINE + " --candidates 1000000000000"),
    good("tokenizer: knows no a", tokenizer(normalizers.Replace("a", "")), HEADS),
    good("resume: a last line of metrics.jsonl that is cut", cut("run/metrics.jsonl", 300), RESUME),
    good("adapter: a run whose folder moved", [move("run", "moved")], EVAL.replace("judge", "moved")),
]


@pytest.mark.parametrize("prepare, command, needles", BAD)
def test_bad_input_is_one_line_and_exit_status_2(prepare, command, needles, files, capsys):
    for step in prepare if isinstance(prepare, list) else [prepare]:
        step()
    before = snapshot(files)
    status, lines = run(command, capsys)
    assert status == 2, f"exit status {status}, stderr: {lines}"
    assert len(lines) == 1 and lines[0].startswith(f"{shlex.split(command)[0]}: error: "), lines
    assert all(needle in lines[0] for needle in needles), lines
    assert len(lines[0]) < 2000, "a message is no dump"
    after = snapshot(files)
    assert {name for name in before if after.get(name) != before[name]} <= {
        "run/metrics.jsonl",
        "run/settings.json",
    }
    assert {name for name in set(after) - set(before) if Path(name).name not in RECORDS} == set()


@pytest.mark.parametrize("prepare, command, needles", GOOD)
def test_odd_input_works(prepare, command, needles, files, capsys):
    for step in prepare if isinstance(prepare, list) else [prepare]:
        step()
    status, lines = run(command, capsys)
    assert (status, lines) == (0, [])


BIG = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import eval as yardstick
lines = Path("data/corpus.jsonl").read_text().splitlines()
lines[1] = json.dumps({"_id": "d1", "text": "word it is " * 4_500_000})
Path("data/corpus.jsonl").write_text("\\n".join(lines))
status = yardstick.main(["--dataset", "data", "--model", sys.argv[2]])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(status)
"""


@pytest.mark.slow
def test_a_line_of_50_megabytes(files):
    """Read and scored in a process of its own, within 3 GB and two minutes."""
    signal.alarm(0)
    command = [sys.executable, "-c", BIG, str(ROOT), "bm25"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-1000:]
    assert int(done.stdout.split()[-1]) < 3000


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(files, capsys):
    Path("rows.jsonl").chmod(0)
    status, lines = run(TRAIN, capsys)
    assert status == 2 and len(lines) == 1 and "rows.jsonl: cannot be read" in lines[0]
