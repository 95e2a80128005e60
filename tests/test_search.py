"""tools/search.py ranks as eval.py does, encodes once, and explains what the judge makes of documents."""

import gzip
import io
import json
import lzma
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from small import random_texts, write_beir
from tiny import tiny_checkpoint

import eval as yardstick
from data import Document, Row, collate
from formats.checkpoints import Checkpoint, make_builder
from formats.corpus import Corpus
from formats.datasets import load_dataset
from formats.embedders import load_embedder
from formats.kept import EmbeddingStore, fingerprint
from formats.templates import TEMPLATES
from model import Embedder, read_prefix, target_loss
from related.bm25 import BM25
from support.launch import CPU
from tools import search

DEMO = ROOT / "demo"
# As `dream.py train` chooses them on the demo (the README's first screen).
HEADS = [[1, 1], [2, 0], [2, 1], [2, 4], [2, 5], [3, 0], [3, 4], [3, 5]]
QUESTION = "red cats and trees"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(yardstick, "DOCUMENT_BLOCK", 64)
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture
def folder(tmp_path):
    """150 documents, every tenth of which stands there twice, so that there are ties."""
    texts = random_texts(150, 1)
    texts[1::10] = texts[::10]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    return write_beir(tmp_path / "set", documents, {"q": QUESTION}, {"q": {"d1": 1}})


@pytest.fixture
def model(tmp_path):
    return str(tiny_checkpoint(tmp_path / "tiny"))


@pytest.fixture
def run(tmp_path):
    """A run of the demo before its first step: what explains, the judge, is the same afterwards."""
    run = tmp_path / "run"
    shutil.copytree(DEMO / "checkpoint", run / "step-000001")
    settings = {"judge": str(DEMO / "checkpoint"), "retriever": str(DEMO / "checkpoint"), "candidates": 6}
    settings |= {"train": str(DEMO / "train.jsonl"), "temperature": 0.1}
    contents = {"settings": settings, "heads": {"selected": HEADS}, "checkpoints": {"last": "step-000001"}}
    for name, content in contents.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    return run


def ask(capsys, *arguments, status=0):
    """The objects that --json prints."""
    assert search.main([*map(str, arguments), "--json", "--device", "cpu"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def watch(monkeypatch, calls):
    """Note what is encoded, and which blocks are read."""
    tokenize, read = Embedder.tokenize, EmbeddingStore.read

    def tokenized(embedder, texts, kind):
        calls.append(kind)
        return tokenize(embedder, texts, kind)

    def reading(store, start, end):
        calls.append((start, end))
        return read(store, start, end)

    monkeypatch.setattr(Embedder, "tokenize", tokenized)
    monkeypatch.setattr(EmbeddingStore, "read", reading)


@pytest.mark.parametrize("name", ["dense", "bm25"])
@pytest.mark.parametrize("question", [QUESTION, "glass virus", "of the tree"])
def test_documents_rank_as_in_eval(folder, model, capsys, name, question):
    model = "bm25" if name == "bm25" else model
    (answer,) = ask(capsys, question, "--model", model, "--corpus", folder, "--k", 40)
    dataset = load_dataset(folder)
    dataset.queries = {"q": question}
    if name == "bm25":
        hits = yardstick.bm25_hits(dataset, 150, quiet=True)
    else:
        embedder = load_embedder(model, CPU, torch.float32)
        hits = yardstick.dense_hits(embedder, dataset, 150, document_block=64, quiet=True)
    expected, _ = yardstick.make_run(["q"], hits, 40)
    assert {hit["id"]: hit["score"] for hit in answer["hits"]} == expected["q"]
    assert [hit["id"] for hit in answer["hits"]] == list(expected["q"])
    assert [hit["rank"] for hit in answer["hits"]] == list(range(1, len(expected["q"]) + 1))
    texts = dict(dataset.corpus())
    assert all(hit["text"] == texts[hit["id"]] for hit in answer["hits"])
    assert len({hit["score"] for hit in answer["hits"]}) < len(answer["hits"]), "there were ties"


def test_the_second_call_encodes_only_the_question(folder, model, capsys, monkeypatch):
    calls = []
    watch(monkeypatch, calls)
    blocks = [(0, 64), (64, 128), (128, 150)]
    first = ask(capsys, QUESTION, "--model", model, "--corpus", folder)
    assert calls == ["query", "document", "document", "document", *blocks, "query"]
    calls.clear()
    assert ask(capsys, QUESTION, "--model", model, "--corpus", folder) == first
    assert calls == [*blocks, "query"] and len(first[0]["hits"]) == 10


def test_the_second_call_reads_only_what_it_shows(folder, model, tmp_path, capsys, monkeypatch):
    """Not the corpus, and of the weights no more than it computes with."""
    read, weights, getitem = [], [], Corpus.__getitem__
    monkeypatch.setattr(Corpus, "__getitem__", lambda own, i: read.append(i) or getitem(own, i))
    monkeypatch.setattr(search, "fingerprint", lambda own: weights.append(own) or fingerprint(own))
    some = [QUESTION, "--model", model, "--corpus", folder, "--k", 3, "--embeddings", tmp_path / "kept"]
    first = ask(capsys, *some)
    assert len(read) > 150 and len(weights) == 1
    read.clear()
    assert ask(capsys, *some) == first and len(read) == 3 and len(weights) == 1
    (index,) = (tmp_path / "kept").glob("corpus-*.npz")
    index.write_bytes(index.read_bytes()[:1000])  # a broken one is made again
    read.clear()
    assert ask(capsys, *some) == first and len(read) == 153
    assert ask(capsys, *some) == first and len(read) == 156


@pytest.mark.parametrize("changed", ["corpus", "model"])
def test_what_has_changed_is_noticed(folder, model, capsys, monkeypatch, changed):
    """Also where size and mtime are the same as before."""
    some = [QUESTION, "--model", model, "--corpus", folder, "--k", 150]
    first = ask(capsys, *some)
    path = folder / "corpus.jsonl" if changed == "corpus" else Path(model) / "model.safetensors"
    times, content = path.stat(), bytearray(path.read_bytes())
    if changed == "corpus":
        content = content.replace(b'"d7"', b'"e7"')
    else:
        content[-8:] = bytes(8)
    assert len(content) == times.st_size
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    calls = []
    watch(monkeypatch, calls)
    second = ask(capsys, *some)
    assert "document" in calls and second != first
    assert ("e7" in {hit["id"] for hit in second[0]["hits"]}) == (changed == "corpus")


def test_the_store_is_that_of_eval(folder, model, tmp_path, capsys, monkeypatch):
    kept = ["--embeddings", str(tmp_path / "kept"), "--embeddings-dtype", "float16"]
    monkeypatch.setattr(yardstick.dense_hits, "__defaults__", (None, 64, False, None))
    assert yardstick.main(["--dataset", str(folder), "--model", model, "--device", "cpu", *kept]) == 0
    capsys.readouterr()
    calls = []
    watch(monkeypatch, calls)
    ask(capsys, QUESTION, "--model", model, "--corpus", folder, *kept)
    assert "document" not in calls and (0, 64) in calls


@pytest.mark.parametrize("name", ["dense", "bm25"])
def test_questions_are_asked_for_until_an_empty_line(folder, model, capsys, monkeypatch, name):
    """Whatever their number, embeddings are opened once and the corpus is read once."""
    calls = []
    if name == "dense":
        watch(monkeypatch, calls)
    else:
        monkeypatch.setattr(search, "BM25", lambda texts: calls.append("index") or BM25(texts))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n  glass virus \nof the tree\n\nnot asked\n"))
    some = ["--model", model if name == "dense" else "bm25", "--corpus", folder, "--k", 3]
    answers = ask(capsys, *some)
    assert [answer["question"] for answer in answers] == [QUESTION, "glass virus", "of the tree"]
    assert all(len(answer["hits"]) == 3 for answer in answers)
    if name == "dense":
        assert calls[4:] == [(0, 64), (64, 128), (128, 150), "query", "query", "query"]
    else:
        assert calls == ["index"]
    assert ask(capsys, "glass virus", *some) == [answers[1]]


def test_the_end_of_input_and_ctrl_c(folder, capsys, monkeypatch):
    some = ["--model", "bm25", "--corpus", str(folder)]
    monkeypatch.setattr("sys.stdin", io.StringIO("red"))
    assert len(ask(capsys, *some)) == 1
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ask(capsys, *some) == []
    monkeypatch.setattr(search, "open_corpus", lambda name: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ask(capsys, *some, status=130) == []


def test_bytes_that_are_no_text_may_be_typed(folder, model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("red \udcff cats\n"))
    (answer,) = ask(capsys, "--model", model, "--corpus", folder)
    assert answer["question"] == "red ? cats" and len(answer["hits"]) == 10


def test_a_terminal_without_the_letters(tmp_path, monkeypatch):
    """ASCII alone: JSON loses nothing, and what is shown has question marks."""
    (tmp_path / "c.jsonl").write_text(json.dumps({"_id": "a", "text": "red Bäume"}) + "\n")
    some = ["red", "--model", "bm25", "--corpus", str(tmp_path / "c.jsonl")]
    printed = []
    for flags in (["--json"], []):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert search.main([*some, *flags]) == 0
        printed.append(search.sys.stdout.buffer.getvalue().decode("ascii"))
    assert json.loads(printed[0])["hits"][0]["text"] == "red Bäume" and "red B?ume" in printed[1]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_nobody_reads_on(folder, monkeypatch, capsys, flags):
    """As with `| head -1`: no traceback, and the status that a shell gives for it."""
    reading, written = os.pipe()
    os.close(reading)
    with open(written, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert search.main([QUESTION, "--model", "bm25", "--corpus", str(folder), *flags]) == 141
    assert "Error" not in capsys.readouterr().err


def test_passages_are_wrapped_and_cut_unless_full(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = "red " + " ".join(f"word{i}" for i in range(80))
    lines = [{"_id": "a", "title": "T\x1b[2J", "text": text}, {"_id": "b", "text": "blue"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    some = ["red", "--model", "bm25", "--corpus", str(tmp_path / "c.jsonl")]
    assert search.main(some) == 0
    head, *passage = capsys.readouterr().out.splitlines()
    assert head.startswith("  1  0.") and head.endswith("  T [2J  [a]")
    assert len(passage) == 4 and passage[-1].endswith(" ...") and max(map(len, passage)) <= 60
    assert search.main([*some, "--full"]) == 0
    _, *passage = capsys.readouterr().out.splitlines()
    assert " ".join(line.strip() for line in passage) == text
    assert search.main(["green", *some[1:]]) == 0
    assert capsys.readouterr().out == "no document shares a word with the question\n"


def test_a_corpus_may_be_a_folder_a_file_a_zip_or_a_name(folder, tmp_path, capsys):
    content = (folder / "corpus.jsonl").read_bytes()
    (tmp_path / "alone.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "alone.jsonl.xz").write_bytes(lzma.compress(content))
    zipped = shutil.make_archive(str(tmp_path / "zipped"), "zip", folder)
    paths = [
        folder,
        folder / "corpus.jsonl",
        tmp_path / "alone.jsonl.gz",
        tmp_path / "alone.jsonl.xz",
        zipped,
    ]
    answers = [ask(capsys, QUESTION, "--model", "bm25", "--corpus", path) for path in paths]
    assert len(answers[0][0]["hits"]) == 10 and all(answer == answers[0] for answer in answers)
    (answer,) = ask(capsys, "Who taught \udcff Vane?", "--model", "bm25", "--corpus", "demo")
    assert answer["hits"][0]["title"] and answer["question"] == "Who taught ? Vane?"


def test_wrong_input_is_one_line_and_exit_status_2(folder, model, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = tmp_path / "parts"
    for name in "ab":
        shutil.copytree(folder, parts / name)
    here, bm25 = ["--corpus", str(folder)], ["--model", "bm25"]
    for arguments, message in (
        (["x", *bm25, "--corpus", "absent"], "--corpus absent: no such folder"),
        (["x", *bm25, "--corpus", str(parts)], "has several parts"),
        (["x", *bm25, "--corpus", str(tmp_path / "run" / "heads.json")], "'_id' is missing"),
        ([" ", *bm25, *here], "the question is empty"),
        (["x", *here], "runs/demo does not exist: train it (`python dream.py train`), or name another"),
        (["x", "--model", model, *here, "--embeddings", str(folder / "corpus.jsonl")], "is a file"),
        (["x", "--model", model, *here, "--explain"], "needs a run of dream.py"),
        (["x", *bm25, *here, "--explain", "y"], "needs a run of dream.py"),
        (["--model", str(run), *here, "--explain", "y"], "needs its question"),
    ):
        assert search.main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith("search: error: "), error
    for flags in (["--k", "0"], ["--max-length", "0"], ["--modle", "x"], ["--mod", "x"]):
        with pytest.raises(SystemExit) as stopped:
            search.main(["x", *here, *flags])
        assert stopped.value.code == 2


def test_weights_are_those_of_the_run(run, capsys, monkeypatch):
    """Without an answer no judge is asked, and questions may be typed."""
    monkeypatch.setattr(search, "Checkpoint", lambda *_: pytest.fail("no judge is needed"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Who taught Iris Vane?\nWho taught Hazel Vale?\n"))
    for model in (run, run / "step-000001"):
        for answer in ask(capsys, "--model", model, "--corpus", DEMO / "dev", "--explain"):
            scores = torch.tensor([hit["score"] for hit in answer["hits"]])
            weights = [hit["weight"] for hit in answer["hits"]]
            assert len(weights) == 6 and sum(weights) == pytest.approx(1, abs=1e-6)
            assert weights == pytest.approx((scores / 0.1).softmax(0).tolist(), abs=1e-6)
            assert "loss" not in answer and "gain" not in answer["hits"][0]


def test_the_helpful_document_lowers_the_loss_most(run, tmp_path, capsys):
    rows = [json.loads(line) for line in open(DEMO / "dev.jsonl").readlines()[:8]]
    helped = 0
    for number, row in enumerate(rows):
        corpus = tmp_path / f"{number}.jsonl"
        lines = [{"_id": str(i), **document} for i, document in enumerate(row["documents"])]
        corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
        some = [row["query"], "--model", run, "--corpus", corpus, "--k", len(lines)]
        (answer,) = ask(capsys, *some, "--explain", row["target"])
        hits = answer["hits"]
        assert sum(hit["weight"] for hit in hits) == pytest.approx(1, abs=1e-6)
        best = max(hits, key=lambda hit: hit["gain"])
        assert best["gain"] > 0 > min(hit["gain"] for hit in hits)
        helped += best["id"] == str(row["positive"])
        assert all(hit["gain"] == pytest.approx(answer["uniform_loss"] - hit["loss"]) for hit in hits)
        (wrong,) = ask(capsys, *some, "--explain", rows[number - 1]["target"])
        assert (
            wrong["uniform_loss"] > answer["uniform_loss"] and wrong["answer"] == rows[number - 1]["target"]
        )
    assert helped >= len(rows) - 1  # 37 of the first 40; by chance, 1 of 8


def test_losses_equal_those_of_the_parts(run, capsys, monkeypatch):
    """With one document there is nothing to weigh: every loss is the judge's own, without an injection."""
    some = ["Who taught Iris Vane?", "--model", run, "--corpus", DEMO / "dev", "--explain", "Greta Tollen"]
    (answer,) = ask(capsys, *some, "--k", 1)
    (hit,) = answer["hits"]
    checkpoint = Checkpoint(DEMO / "checkpoint", CPU, torch.float32)
    builder = make_builder(checkpoint.folder, TEMPLATES["plain"])
    row = Row(0, some[0], "Greta Tollen", [Document(hit["title"], hit["text"])], None)
    batch, judge = collate(builder.build([row]), CPU), checkpoint.causal_lm()
    with torch.no_grad():
        expected = target_loss(judge, batch, read_prefix(judge, batch)).item()
    for loss in (answer["loss"], answer["uniform_loss"], hit["loss"]):
        assert loss == pytest.approx(expected, abs=1e-5)
    assert hit["weight"] == 1 and hit["gain"] == pytest.approx(0, abs=1e-5)

    assert search.main([*map(str, some), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    (answer,) = ask(capsys, *some)
    hit = answer["hits"][0]
    assert f"weight {hit['weight']:.4f}   all weight here: loss {hit['loss']:.3f}" in printed
    assert f"loss {answer['loss']:.3f} with these weights" in printed
    assert math.isfinite(answer["loss"])
