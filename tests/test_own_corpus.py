"""One's own texts from beginning to end, as demo/own_corpus.py goes through it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from demo import own_corpus
from support.files import JsonLines


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
    ran = [line.split()[2:4] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert ran == [["-m", "tools.mine"], ["dream.py", "train"], ["-m", "tools.search"]]
    assert "step-000002" in done.stdout and "note " in done.stdout.split("$ ")[-1]


@pytest.mark.slow
def test_started_again_it_goes_on(texts, tmp_path):
    for _ in range(2):
        done = script(texts, QUESTION, "--out", tmp_path / "own", "--steps", 2, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr[-2000:]
    assert "train --resume" in done.stdout
    done = script(texts, QUESTION, "--out", tmp_path / "own", "--steps", 3, cache=tmp_path / "cache")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(
        "was begun with --steps 2; delete it to begin anew, or choose another --out"
    )


@pytest.fixture
def commands(monkeypatch):
    """Those that are run; of the real ones only what a second start looks at is left behind."""
    ran = []

    def run(*command):
        ran.append(command)
        flags = dict(zip(command, command[1:], strict=False))
        out = own_corpus.Path(flags.get("--out", "/"))
        if command[1] == "tools.mine":
            out.write_bytes(own_corpus.Path(flags["--corpus"]).read_bytes())
        elif command[1] == "train" and "--resume" not in flags:
            out.mkdir()
            kept = {"judge": flags["--judge"], "retriever": flags["--retriever"]}
            kept |= {
                "steps": int(flags["--steps"]),
                "rows_fingerprint": JsonLines(own_corpus.Path(flags["--train"])).fingerprint,
            }
            (out / "settings.json").write_text(json.dumps(kept))

    monkeypatch.setattr(own_corpus, "run", run)
    return ran


def test_only_the_same_goes_on(texts, tmp_path, commands, capsys):
    given = [str(texts), QUESTION, "--out", str(tmp_path / "own")]
    assert own_corpus.main([*given, "--steps", "2"]) == 0
    assert own_corpus.main([*given, "--steps", "2"]) == 0
    assert commands[-2][:3] == ("dream.py", "train", "--resume")
    capsys.readouterr()

    def refused(*flags):
        assert own_corpus.main([*given, *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "delete it to begin anew, or choose another --out" in error
        return error

    assert "run: was begun with --steps 2;" in refused()
    assert f"with --judge {ROOT / 'demo' / 'checkpoint'};" in refused("--steps", "2", "--judge", "owner/name")
    (texts / "note_0.txt").write_text("something else")
    assert "with other texts;" in refused("--steps", "2")


def test_folders_are_the_callers(texts, tmp_path, commands, monkeypatch):
    """The commands run in the project's root."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert own_corpus.main(["texts", "--out", "own", "--judge", "mine", "--retriever", "owner/name"]) == 0
    _, train, _ = commands
    assert train[train.index("--judge") + 1] == str(tmp_path / "mine")
    assert train[train.index("--retriever") + 1] == "owner/name"


def test_ctrl_c_waits_for_what_the_command_saves(tmp_path):
    command = (
        "import pathlib, signal, sys, time\n"
        "def save(*_): time.sleep(1); pathlib.Path(sys.argv[2]).touch(); sys.exit(7)\n"
        "signal.signal(signal.SIGINT, save); pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    script = f"from demo import own_corpus; own_corpus.run('-c', {command!r}, {str(ready)!r}, {str(saved)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not ready.exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to both
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 7 and saved.exists()


def test_no_texts_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    command = [str(tmp_path / "empty"), "question", "--out", str(tmp_path / "out")]
    assert own_corpus.main(command) == 2
    assert capsys.readouterr().err.endswith("empty: no .txt or .md files there\n")
    (tmp_path / "empty" / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert own_corpus.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a.txt: not UTF-8 text" in error
