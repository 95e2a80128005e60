"""Embeddings kept on disk: what is reused, what is encoded again, and what is told."""

import json

import numpy as np
import pytest
import torch
from small import small_dataset
from tiny import tiny_checkpoint

import eval as yardstick
from formats.datasets import load_dataset
from formats.embedders import load_embedder
from formats.kept import STORED, EmbeddingStore, fingerprint
from model import Embedder, add_lora
from support.files import InputError
from support.launch import CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_dataset(tmp_path_factory.mktemp("kept") / "small")


@pytest.fixture
def dataset(folder):
    return load_dataset(folder, "test")


@pytest.fixture
def model(tmp_path):
    return tiny_checkpoint(tmp_path / "tiny")


def load(model, max_length=24):
    return load_embedder(model, CPU, torch.float32, max_length)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_embeddings_are_kept_and_reused(dataset, model, tmp_path, monkeypatch, name):
    """The second time nothing is encoded; an interrupted encoding goes on; other settings, another store."""
    embedder = load(model)
    expected = yardstick.dense_hits(embedder, dataset, 50, document_block=64, quiet=True)
    asked, tokenize = [], Embedder.tokenize
    monkeypatch.setattr(Embedder, "tokenize", lambda *some: asked.append(some[2]) or tokenize(*some))

    def hits(embedder):
        asked.clear()
        store = EmbeddingStore(tmp_path / "kept", embedder, dataset, STORED[name])
        return yardstick.dense_hits(embedder, dataset, 50, document_block=64, quiet=True, store=store)

    first = hits(embedder)
    assert asked == ["query"] + ["document"] * 5
    if name == "float32":
        assert np.array_equal(first.scores, expected.scores)
        assert np.array_equal(first.indices, expected.indices)
    else:
        np.testing.assert_allclose(first.scores, expected.scores, atol=0.02)
    second = hits(embedder)
    assert asked == ["query"] and np.array_equal(first.scores, second.scores)
    (folder,) = (tmp_path / "kept").iterdir()
    sorted(folder.glob("*.safetensors"))[2].unlink()
    third = hits(embedder)
    assert asked == ["query", "document"] and np.array_equal(first.scores, third.scores)
    hits(load(model, max_length=2))
    assert asked == ["query"] + ["document"] * 5
    with torch.no_grad():
        embedder.decoder.norm.weight[0] += 0.5  # other weights
    hits(embedder)
    assert asked == ["query"] + ["document"] * 5
    broken = sorted(folder.glob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(InputError, match="not a whole file of embeddings .*; delete it"):
        hits(load(model))


def test_another_job_may_fill_the_same_store(dataset, model, tmp_path, monkeypatch):
    """It writes the second block while ours is at the first: ours are what they would have been."""
    embedder = load(model)

    def hits():
        store = EmbeddingStore(tmp_path / "kept", embedder, dataset, torch.float32)
        return yardstick.dense_hits(embedder, dataset, 50, document_block=64, quiet=True, store=store)

    expected, write = yardstick.dense_hits(embedder, dataset, 50, quiet=True), EmbeddingStore.write

    def meanwhile(store, start, end, embeddings):
        monkeypatch.setattr(EmbeddingStore, "write", write)
        hits()
        for later in sorted(store.folder.glob("*.safetensors"))[2:]:
            later.unlink()
        return write(store, start, end, embeddings)

    monkeypatch.setattr(EmbeddingStore, "write", meanwhile)
    np.testing.assert_allclose(hits().scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(hits().scores, expected.scores, atol=1e-5)


def test_whatever_decides_an_embedding_is_in_the_stores_name(tmp_path):
    def digest(**changes):
        folder = tiny_checkpoint(tmp_path / "tiny")
        for name, content in changes.items():
            path = folder / f"{name}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(known | content))
        embedder = load(folder)
        torch.manual_seed(0)
        add_lora(embedder.decoder, 2, lora["alpha"], 0.0, ["q_proj"])
        return fingerprint(embedder)

    lora = {"alpha": 4.0}
    assert digest() == digest()
    seen = [digest(), digest(config={"rms_norm_eps": 0.1})]
    seen.append(digest(tokenizer_config={"add_eos_token": True, "eos_token": "<|endoftext|>"}))
    lora["alpha"] = 8.0
    seen.append(digest())
    assert len(set(seen)) == 4


def test_a_disk_too_small_for_the_embeddings_is_told_first(dataset, model, tmp_path, monkeypatch):
    monkeypatch.setattr("formats.kept.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="GB of embeddings, 0.0 GB free"):
        EmbeddingStore(tmp_path / "kept", load(model), dataset, torch.float32)
