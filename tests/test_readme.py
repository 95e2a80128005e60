"""Every command of the README, in its order, in a copy of the project.

What needs a download meets small stand-ins: a hub on the loopback, datasets that look as if they had been
fetched. What needs a GPU runs on the CPU, eight processes become two, and trainings are cut to two steps
(`test_slow.py` runs the demo in full).
"""

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

import formats.catalogue

MODELS = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-Embedding-0.6B"]
MODELS += ["yixuantt/DREAM-0.5B"]


def commands() -> list[str]:
    """The lines that follow a $ in the README's console blocks, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "README.md").read_text())
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [
        line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines() if "$ " in line
    ]


def stand_in(command: str) -> list[str] | None:
    """The command as it is run here; None for those of the environment and of the tests themselves."""
    words = shlex.split(command)
    if words[0] == "pip" or "pytest" in words:
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
    if "train" in words and "--resume" not in words:
        words += ["--steps", "2", "--judge-context", "1024"]
    return launcher + words


@pytest.fixture
def place(tmp_path):
    """A copy of the project, with the files that the README's commands name."""
    place = tmp_path / "project"
    skipped = shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv", ".*_cache", "tests", "studies")
    shutil.copytree(ROOT, place, ignore=skipped)
    write_rows(place / "rows.jsonl", make_rows([4] * 40))
    texts = [f"note {i} tells of thing {i * 7} and of its {i + 3} colours" for i in range(60)]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"q{i}": text[:20] for i, text in enumerate(texts[:6])}
    qrels = {query: {f"d{i}": 1} for i, query in enumerate(queries)}
    for name in [*formats.catalogue.BEIR, "path"]:
        folder = place / "path" / "to" / "folder" if name == "path" else tmp_path / "cache" / name
        parts = [folder / part for part in ("android", "english")] if name == "cqadupstack" else [folder]
        for part in parts:
            write_beir(part, documents, queries, qrels)
            shutil.copy(part / "qrels" / "test.tsv", part / "qrels" / "dev.tsv")
    shutil.make_archive(str(place / "other"), "zip", place / "path" / "to" / "folder")
    shutil.copy(place / "path" / "to" / "folder" / "corpus.jsonl", place / "corpus.jsonl")
    asked = [
        {"query": text[:20], "answers": [text[5:20]], "passage_id": f"d{i}"} for i, text in enumerate(texts)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return place


@pytest.mark.slow
def test_every_command_of_the_readme_runs(place, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", vocab_size=310)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
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
    assert ran >= 14
    for made in ("runs/mine/report.html", "scores.json", "beir.json", "exports/mine/modules.json", "kept"):
        assert (place / made).exists(), made
