"""One's own texts from beginning to end, as demo/own_corpus.py goes through it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def script(*arguments, cache):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DREAM_CACHE": str(cache)}
    command = [sys.executable, str(ROOT / "demo" / "own_corpus.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def texts(tmp_path):
    texts = tmp_path / "texts"
    (texts / "deep").mkdir(parents=True)
    documents = [json.loads(line) for line in open(ROOT / "demo" / "dev" / "corpus.jsonl")]
    for number in range(0, 120, 4):
        text = " ".join(document["text"] for document in documents[number : number + 4])
        (texts / ("deep" if number % 8 else "") / f"note_{number}.txt").write_text(text)
    (texts / "ignored.png").write_bytes(b"\x89PNG")
    return texts


QUESTION = "Where was Bruno Novak born?"


def test_text_files_to_answers(texts, tmp_path):
    out = tmp_path / "own"
    done = script(texts, QUESTION, "--out", out, "--steps", 2, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((out / "corpus.jsonl").read_text().splitlines()) == 30
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ ")] == [
        "dream.py",
        "dream.py",
        "-m",
    ]
    assert "step-000002" in done.stdout and "note " in done.stdout.split("$ ")[-1]


@pytest.mark.slow
def test_started_again_it_goes_on(texts, tmp_path):
    for _ in range(2):
        done = script(texts, QUESTION, "--out", tmp_path / "own", "--steps", 2, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr[-2000:]
    assert "train --resume" in done.stdout


def test_no_texts_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    done = script(tmp_path / "empty", "question", cache=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("empty: no .txt or .md files there\n")
    (tmp_path / "empty" / "a.txt").write_bytes(b"\xff\xfe\x00")
    done = script(tmp_path / "empty", "question", "--out", tmp_path / "out", cache=tmp_path)
    assert done.returncode == 2 and "a.txt: not UTF-8 text" in done.stderr and "Traceback" not in done.stderr
