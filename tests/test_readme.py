"""README.md and docs/: every command runs, the Python snippet runs, links and flags exist, pages stay short.

The commands run in the pages' order in a copy of the project. What needs a download meets small stand-ins: a
hub on the loopback, datasets that look as if they had been fetched. What needs a GPU runs on the CPU, eight
processes become two, trainings are cut to a few steps (`test_slow.py` runs the demo in full), and a study
only says what it would run.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from loopback import Loopback
from test_dream import write_rows
from test_eval import write_beir
from tiny import byte_tokenizer, make_rows, tiny_checkpoint

from formats.catalogue import BEIR
from formats.embedders import load_embedder, save_embedder
from model import add_lora

MODELS = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-Embedding-0.6B"]
MODELS += ["HuggingFaceTB/SmolLM2-135M-Instruct"]
MODELS += ["yixuantt/DREAM-0.5B"]

# In the order in which a reader meets them: later commands use what earlier ones made.
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("training", "evaluation", "results", "scale"))]
PROGRAMS = ["dream.py train", "eval.py"]
PROGRAMS += [f"-m tools.{name}" for name in "mine heads geometry export search report study".split()]
PROGRAMS += ["-m tests.bench"]
REMOVED = {"--refresh-candidates", "--isolate-documents", "--compile", "--geometry"}  # named beside results
ELSEWHERE = {"--slow", "--nproc-per-node"}  # pytest's, torchrun's


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines that follow a $ in the pages' console blocks, continuation lines joined."""
    found = []
    for name in PAGES:
        text = re.sub(r"\\\n\s*", "", page(name))
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
            found += [line.strip().removeprefix("$ ") for line in block.splitlines() if "$ " in line]
    return found


def stand_in(command: str) -> list[str] | None:
    """The command as it is run here; None for those of the environment and of the tests themselves."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # the environment's
        words = words[1:]
    if words[0] in ("pip", "curl") or "pytest" in words or "tests.bench" in words:
        return None
    launcher = [sys.executable]
    if words[0] == "torchrun":
        launcher += [
            "-m",
            "torch.distributed.run",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
        ]
        words[words.index("8")] = "2"
    words = ["cpu" if word == "cuda" else word for word in words[1:]]
    words = ["demo" if word == "rteb" else word for word in words]  # its layouts: test_datasets.py
    if "--steps" in words:  # a resumed run that is given more of them
        words[words.index("--steps") + 1] = "3"
    elif "train" in words and "--resume" not in words:
        words += ["--steps", "2", "--judge-context", "1024"]
    elif "demo/own_corpus.py" in words:
        words += ["--steps", "2"]
    elif "tools.study" in words:
        words += ["--dry-run"]
    return launcher + words


@pytest.fixture
def place(tmp_path):
    """A copy of the project, with the files that the pages' commands name."""
    place = tmp_path / "project"
    skipped = shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv", ".*_cache", "tests")
    shutil.copytree(ROOT, place, ignore=skipped)
    write_rows(place / "rows.jsonl", make_rows([4] * 40))
    texts = [
        f"note {i} tells of thing {i * 7} and of its {i + 3} colours. Its owner number {i * 11} sold it in "
        f"the year {1500 + i} to a collector from town {i * 13}."
        for i in range(60)
    ]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"q{i}": text[:20] for i, text in enumerate(texts[:6])}
    qrels = {query: {f"d{i}": 1} for i, query in enumerate(queries)}
    for name in [*BEIR, "path"]:
        folder = place / "path" / "to" / "folder" if name == "path" else tmp_path / "cache" / name
        parts = [folder / part for part in ("android", "english")] if name == "cqadupstack" else [folder]
        for part in parts:
            write_beir(part, documents, queries, qrels)
            shutil.copy(part / "qrels" / "test.tsv", part / "qrels" / "dev.tsv")
    shutil.make_archive(str(place / "other"), "zip", place / "path" / "to" / "folder")
    shutil.copy(place / "path" / "to" / "folder" / "corpus.jsonl", place / "corpus.jsonl")
    squad = []
    for text in texts:
        answer = " ".join(text.split()[4:6])
        squad += [{"context": text, "qas": [{"question": text[:20], "answers": [{"text": answer}]}]}]
    (place / "train-v1.1.json").write_text(json.dumps({"data": [{"title": "Notes", "paragraphs": squad}]}))
    asked = [
        {"query": text[:20], "answers": [text[5:20]], "passage_id": f"d{i}"} for i, text in enumerate(texts)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    (place / "path" / "to" / "texts").mkdir()
    lines = [json.loads(line) for line in open(ROOT / "demo" / "dev" / "corpus.jsonl")]
    for number in range(0, 120, 4):
        text = " ".join(line["text"] for line in lines[number : number + 4])
        (place / "path" / "to" / "texts" / f"note_{number}.txt").write_text(text)
    return place


@pytest.mark.slow
def test_every_command_of_the_pages_runs(place, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", vocab_size=310)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    retriever = load_embedder(folder, "cpu", "float32")
    add_lora(retriever.decoder, 8, 16)
    save_embedder(retriever, place / "studies" / "smollm2" / "adapter", MODELS[4])
    ran = 0
    with Loopback(repos=dict.fromkeys(MODELS, folder)) as hub:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": hub.url,
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment |= {
            "HF_HOME": str(tmp_path / "hf"),
            "DREAM_CACHE": str(tmp_path / "cache"),
            "COLUMNS": "100",
        }
        environment.pop("HF_TOKEN", None)
        for command in commands():
            if (words := stand_in(command)) is None:
                continue
            done = subprocess.run(
                words, cwd=place, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"$ {command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
            ran += 1
    assert ran >= 26
    for made in ("runs/mine/report.html", "scores.json", "beir.json", "exports/mine/modules.json", "kept"):
        assert (place / made).exists(), made
    assert len((place / "runs/mine/metrics.jsonl").read_text().splitlines()) > 2, "it was given more steps"


def test_the_python_snippet_runs(monkeypatch):
    """The README's snippet, at most ten lines, with the demo's checkpoint in the place of a trained run."""
    snippets = [s for s in re.findall(r"```python\n(.*?)```", page("README.md"), re.DOTALL) if "import" in s]
    assert len(snippets) == 1 and len(snippets[0].splitlines()) <= 10
    code = snippets[0].replace('"runs/demo"', '"demo/checkpoint"')
    assert code != snippets[0]
    monkeypatch.chdir(ROOT)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    shown = [float(line.split()[0]) for line in printed.getvalue().splitlines()]
    assert len(shown) == 3 and shown == sorted(shown, reverse=True) and -1 <= shown[-1] and shown[0] <= 1
    (cosine, *_), (best, *_) = names["scores"][0], names["found"][0]
    query, passage = (
        names["embedder"].encode([text], kind)[0]
        for text, kind in ((names["questions"][0], "query"), (names["passages"][int(best)], "document"))
    )
    assert float(query @ passage) == pytest.approx(float(cosine), abs=1e-5)
    assert float(query @ query) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_stay_short(name):
    """At most 200 lines; but for tables and commands at most 120 columns."""
    lines = page(name).splitlines()
    assert len(lines) <= 200
    wide = [line for line in lines if len(line) > 120 and not line.lstrip().startswith(("|", "$"))]
    assert not wide


def test_every_page_is_here():
    assert sorted(PAGES[1:]) == sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "studies/real-text-stand-in.md"])
def test_links_lead_somewhere(name):
    """Files and headings that a page links to exist; a heading's anchor is made as GitHub makes it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


@pytest.mark.slow
def test_every_flag_of_the_pages_exists():
    """A flag that a page names is one of our programs', or is named as removed."""
    helped = ""
    for program in PROGRAMS:
        command = [sys.executable, *shlex.split(program), "--help"]
        helped += subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    flag = r"(?<![\w-])--[a-z][a-z-]*[a-z]"
    known = set(re.findall(flag, helped)) | REMOVED | ELSEWHERE
    for name in PAGES:
        assert not set(re.findall(flag, page(name))) - known, name
