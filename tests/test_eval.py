"""The yardstick against slow twins: metrics, search, encoding, BM25, and the command line."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import tiny_checkpoint
from torch import nn

import eval as yardstick
import formats.kept
import formats.results
import related.bm25
import support.launch
from formats.datasets import load_dataset
from formats.embedders import load_embedder
from model import add_lora
from support.files import InputError

SHARED = ROOT.parent / "shared" / "data" / "beir"
WORDS = "red blue green cats dogs berries heroes buses glass virus run runs tree trees of the a".split()


def random_texts(count: int, seed: int, longest: int = 30) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(count)]


def write_beir(folder: Path, documents: dict, queries: dict, qrels: dict, groups: dict | None = None) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": key, "title": "", "text": text} for key, text in documents.items()]
    asked = [{"_id": key, "text": text} for key, text in queries.items()]
    for query in asked if groups else []:
        query["metadata"] = {"entity": groups[query["_id"]]}
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{q}\t{d}\t{gain}\n" for q, judged in qrels.items() for d, gain in judged.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture
def small(tmp_path):
    """A dataset of 300 documents, of which every tenth stands there twice, and 20 queries."""
    texts = random_texts(300, 1)
    for i in range(0, 300, 10):
        texts[i + 1] = texts[i]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"q{i}": text for i, text in enumerate(random_texts(20, 2, 6))}
    generator = random.Random(3)
    qrels = {q: {d: generator.randint(-1, 3) for d in generator.sample(list(documents), 30)} for q in queries}
    groups = {q: "seen" if i % 3 else "unseen" for i, q in enumerate(queries)}
    return write_beir(tmp_path / "small", documents, queries, qrels, groups)


class CountingEmbedder(nn.Module):
    """An embedder that can be computed by hand: a token is a word, an embedding normalised word counts."""

    dim, device = len(WORDS), torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.batches = []

    def tokenize(self, texts, kind):
        return [[WORDS.index(word) for word in text.split()] for text in texts]

    def embed(self, token_ids):
        self.batches.append([len(ids) for ids in token_ids])
        counts = torch.stack([torch.bincount(torch.tensor(ids), minlength=self.dim) for ids in token_ids])
        return nn.functional.normalize(counts.float(), dim=1)


def naive_metrics(ranked: list[str], judged: dict[str, int], k: int) -> dict[str, float]:
    gains = [max(judged.get(doc_id, 0), 0) for doc_id in ranked]
    ideal = sorted((max(gain, 0) for gain in judged.values()), reverse=True)
    relevant = sum(gain > 0 for gain in ideal)
    if not relevant:
        return dict.fromkeys(("ndcg", "map", "recall", "precision", "mrr@10"), 0.0)
    dcg, best = (sum(g / math.log2(i + 2) for i, g in enumerate(list_[:k])) for list_ in (gains, ideal))
    hits = [i for i, gain in enumerate(gains) if gain > 0]
    return {
        "ndcg": dcg / best,
        "map": sum((n + 1) / (i + 1) for n, i in enumerate(hits) if i < k) / relevant,
        "recall": sum(i < k for i in hits) / relevant,
        "precision": sum(i < k for i in hits) / k,
        "mrr@10": 1 / (hits[0] + 1) if hits and hits[0] < 10 else 0.0,
    }


def test_metrics_equal_the_naive_ones():
    generator = random.Random(0)
    docs = [str(i) for i in range(200)]
    qrels = {f"q{i}": {d: generator.randint(-2, 3) for d in generator.sample(docs, 15)} for i in range(50)}
    qrels["zero"] = {"1": 0, "2": -1}
    # Four distinct scores in 150 hits: nearly everything is a tie.
    run = {q: {d: generator.randint(0, 3) / 3 for d in generator.sample(docs, 150)} for q in qrels}
    run["q0"] = {}
    del run["q1"]
    values = yardstick.score_queries(run, qrels, (1, 10, 100))
    assert set(values) == {
        f"{m}@{k}" for m in ("ndcg", "map", "recall", "precision") for k in (1, 10, 100)
    } | {
        "map",
        "mrr@10",
    }
    for row, (query_id, judged) in enumerate(qrels.items()):
        hits = run.get(query_id, {})
        ranked = sorted(sorted(hits, reverse=True), key=lambda d: -hits[d])  # noqa: B023, used at once
        for k in (1, 10, 100):
            expected = naive_metrics(ranked, judged, k)
            for name in ("ndcg", "map", "recall", "precision"):
                assert values[f"{name}@{k}"][row] == pytest.approx(expected[name], abs=1e-12)
        assert values["map"][row] == pytest.approx(naive_metrics(ranked, judged, 1000)["map"], abs=1e-12)
        assert values["mrr@10"][row] == expected["mrr@10"]
    means = yardstick.evaluate(run, qrels, (1, 10, 100))
    assert means == {name: pytest.approx(column.mean()) for name, column in values.items()}
    assert values["ndcg@10"][[0, 1, -1]].tolist() == [0, 0, 0]


def test_ties_rank_by_id_descending_and_scores_compare_as_float32():
    assert yardstick.ranking({"a": 1, "c": 1, "b": 1}) == ["c", "b", "a"]
    assert yardstick.ranking({"10": 1, "9": 1, "1": 2}) == ["1", "9", "10"]
    assert yardstick.ranking({"a": 1 + 1e-9, "b": 1.0}) == ["b", "a"]


def naive_search(queries, documents, k):
    """A full sort; of equal scores the higher index first."""
    scores = queries.float() @ documents.float().T
    order = [sorted(range(len(documents)), key=lambda i: (-row[i], -i))[:k] for row in scores.tolist()]
    return [[(float(scores[q, i]), i) for i in row] for q, row in enumerate(order)]


@pytest.mark.parametrize("tiles", [(1024, 32768), (1, 1), (3, 7), (7, 64), (5, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_search_equals_a_full_sort_whatever_the_tiles(tiles, dtype):
    torch.manual_seed(0)
    # Small whole numbers: every product is exact, so tiles cannot differ by rounding, and ties are many.
    queries = torch.randint(-3, 4, (9, 6)).to(dtype)
    documents = torch.randint(-3, 4, (100, 6)).to(dtype)
    scores, indices = yardstick.search(queries, documents, 100, *tiles)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    found = [
        sorted(zip(*row, strict=True), reverse=True)
        for row in zip(scores.tolist(), indices.tolist(), strict=True)
    ]
    assert found == naive_search(queries, documents, 100)
    top = yardstick.search(queries, documents, 10, *tiles)[0]
    assert torch.equal(top, scores[:, :10])


def test_search_goes_on_from_an_earlier_block_and_marks_missing_hits():
    torch.manual_seed(1)
    queries, documents = torch.randn(4, 8), torch.randn(30, 8)
    whole = yardstick.search(queries, documents, 12)
    first = yardstick.search(queries, documents[:5], 12)
    assert (first[1][:, 5:] == -1).all() and (first[0][:, 5:] == -math.inf).all()
    before = first[0].clone()
    both = yardstick.search(queries, documents[5:], 12, offset=5, best=first)
    assert torch.equal(whole[1], both[1])
    torch.testing.assert_close(whole[0], both[0])
    assert torch.equal(before, first[0]), "the earlier result is left as it was"


def test_search_computes_in_full_precision_and_restores_the_setting():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.manual_seed(2)
        queries, documents = torch.randn(3, 512), torch.randn(50, 512)
        scores, _ = yardstick.search(queries, documents, 50)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    exact = (queries.double() @ documents.double().T).sort(dim=1, descending=True).values
    torch.testing.assert_close(scores.double(), exact, atol=1e-4, rtol=0)


def test_tied_hits_are_ranked_by_id_and_ties_beyond_the_margin_are_counted():
    ids = [f"{i}" for i in range(500)]
    queries, documents = torch.ones(1, 2), torch.ones(500, 2)
    scores, indices = yardstick.search(queries, documents, 500)
    run, ambiguous = yardstick.make_run(["q"], yardstick.Hits(scores.numpy(), indices.numpy(), ids), 100)
    assert list(run["q"]) == sorted(ids, reverse=True)[:100] and ambiguous == 0
    scores, indices = yardstick.search(queries, documents, 228)
    _, ambiguous = yardstick.make_run(["q"], yardstick.Hits(scores.numpy(), indices.numpy(), ids), 100)
    assert ambiguous == 1


def test_encode_restores_the_order_and_encodes_each_text_once():
    texts = random_texts(40, 5) * 2
    embedder = CountingEmbedder()
    embedder.train()
    found = yardstick.encode(embedder, texts, "document", batch_tokens=64)
    assert embedder.training, "the mode is put back"
    lengths = [length for batch in embedder.batches for length in batch]
    assert len(lengths) == len(set(texts)) and lengths == sorted(lengths, reverse=True)
    assert all(len(batch) * batch[0] <= 64 for batch in embedder.batches)
    expected = torch.cat([CountingEmbedder().embed(embedder.tokenize([text], "document")) for text in texts])
    assert torch.equal(found, expected) and found.dtype == torch.float32


def test_encode_does_not_depend_on_batch_size_or_order(tmp_path):
    embedder = load_embedder(tiny_checkpoint(tmp_path / "tiny"), torch.device("cpu"), torch.float32)
    texts = random_texts(25, 6)
    one_by_one = yardstick.encode(embedder, texts, "document", batch_tokens=1)
    together = yardstick.encode(embedder, texts, "document", batch_tokens=100_000)
    backwards = yardstick.encode(embedder, texts[::-1], "document", batch_tokens=300).flip(0)
    assert one_by_one.shape == (25, embedder.dim)
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(one_by_one, backwards, atol=1e-5, rtol=0)
    torch.testing.assert_close(one_by_one.norm(dim=1), torch.ones(25))


def test_encode_refuses_embeddings_that_are_not_finite():
    embedder = CountingEmbedder()
    embedder.embed = lambda token_ids: torch.full((len(token_ids), embedder.dim), math.nan)
    with pytest.raises(InputError, match="--dtype float32"):
        yardstick.encode(embedder, ["red"], "query")


def naive_bm25(texts: list[str], query: str, k1: float = 1.2, b: float = 0.75) -> list[float]:
    documents = [Counter(map(related.bm25.stem, related.bm25.words(text))) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in map(related.bm25.stem, related.bm25.words(query)):
        n = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
        for i, document in enumerate(documents):
            norm = k1 * (1 - b + b * document.total() / mean)
            scores[i] += idf * document[word] / (document[word] + norm)
    return scores


@pytest.mark.parametrize("count", [1, 40, 2500])  # the index is built in blocks of 1,024
def test_bm25_equals_the_naive_one(count):
    texts = random_texts(count, 7)
    queries = [*random_texts(5, 8, 6), "red red cat", "unheard of", "", "unheard"]
    scores, indices = related.bm25.BM25(iter(texts)).search(queries, count + 3)
    assert (
        scores.dtype == np.float32
        and indices.dtype == np.int64
        and indices.shape == (len(queries), count + 3)
    )
    for query, row, numbers in zip(queries, scores, indices, strict=True):
        expected = naive_bm25(texts, query)
        hits = {i: s for i, s in enumerate(expected) if s > 0}
        assert set(numbers[numbers >= 0]) == set(hits) and (row[numbers < 0] == -np.inf).all()
        assert row[numbers >= 0] == pytest.approx([hits[i] for i in numbers[numbers >= 0]], rel=1e-5)
        assert (np.diff(row[numbers >= 0]) <= 0).all()


def test_bm25_keeps_the_best_and_of_tied_documents_the_earlier():
    texts = ["blue", "red", "red", "red red", "red"]
    scores, indices = related.bm25.BM25(texts).search(["red"], 3)
    assert indices.tolist() == [[3, 1, 2]]
    everything, _ = related.bm25.BM25(texts).search(["red"], 5)
    assert np.array_equal(everything[:, :3], scores)
    many = ["red" if i % 3 else "red red" for i in range(600)]
    _, indices = related.bm25.BM25(many).search(["red"], 300)
    assert indices[0].tolist() == [*range(0, 600, 3), *[i for i in range(600) if i % 3][:100]]


def test_bm25_of_texts_without_words():
    for texts in ([], ["", "..."]):
        scores, indices = related.bm25.BM25(texts).search(["red"], 2)
        assert indices.tolist() == [[-1, -1]] and np.isneginf(scores).all()


def test_stemmer():
    expected = {"cats": "cat", "berries": "berry", "movies": "movy", "buses": "buse", "heroes": "heroes"}
    expected |= {"trees": "trees", "glass": "glass", "virus": "virus", "is": "is", "s": "s", "gas": "ga"}
    assert {word: related.bm25.stem(word) for word in expected} == expected
    assert related.bm25.words("The Cat's TWO-fold β_1") == ["the", "cat", "s", "two", "fold", "β_1"]


def test_bm25_index_is_eight_bytes_a_posting():
    texts = random_texts(2000, 9)
    index = related.bm25.BM25(texts)
    assert index.postings.nbytes == 8 * sum(len(set(map(related.bm25.stem, text.split()))) for text in texts)
    assert index.norms.nbytes == 4 * len(texts)


@pytest.mark.parametrize(("name", "expected"), [("scifact", 0.666), ("nfcorpus.zip", 0.319)])
def test_bm25_figures(name, expected):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent: the BM25 figure of {name} was NOT checked")
    dataset = load_dataset(SHARED / name, "test")
    result, _ = yardstick.evaluate_hits(dataset, yardstick.bm25_hits(dataset, 228, quiet=True), 100)
    assert result["metrics"]["ndcg@10"] == pytest.approx(expected, abs=0.001)


def test_dense_evaluation_equals_one_built_from_the_parts(small):
    dataset, embedder = load_dataset(small, "test"), CountingEmbedder()
    result = yardstick.evaluate_embedder(embedder, dataset, k=100)
    ids, texts = zip(*dataset.corpus(), strict=True)
    vectors = [embedder.embed(embedder.tokenize(list(t), "x")) for t in (dataset.queries.values(), texts)]
    scores = (vectors[0] @ vectors[1].T).tolist()
    run = {q: dict(zip(ids, row, strict=True)) for q, row in zip(dataset.queries, scores, strict=True)}
    run = {q: {d: hits[d] for d in yardstick.ranking(hits)[:100]} for q, hits in run.items()}
    expected = yardstick.evaluate(run, dataset.qrels, (1, 3, 5, 10, 100))
    assert result["metrics"] == {name: pytest.approx(value, abs=6e-6) for name, value in expected.items()}
    assert (result["dataset"], result["split"]) == ("small", "test")
    assert (result["queries"], result["documents"]) == (20, 300)
    parts = result["groups"]
    assert (parts["seen"]["queries"], parts["unseen"]["queries"]) == (13, 7)
    mean = (13 * parts["seen"]["ndcg@10"] + 7 * parts["unseen"]["ndcg@10"]) / 20
    assert mean == pytest.approx(result["metrics"]["ndcg@10"], abs=1e-5)


def test_a_corpus_is_streamed_in_blocks(small, monkeypatch):
    """At most a block of texts is ever asked of the embedder, and blocks do not change what is found."""
    dataset, asked = load_dataset(small, "test"), []
    tokenize = yardstick.tokenize

    def watched(embedder, texts, kind):
        texts = list(texts)
        asked.append((kind, len(texts)))
        return tokenize(embedder, texts, kind)

    whole = yardstick.dense_hits(CountingEmbedder(), dataset, 300, quiet=True)
    monkeypatch.setattr(yardstick, "tokenize", watched)
    blocks = yardstick.dense_hits(CountingEmbedder(), dataset, 300, document_block=64, quiet=True)
    assert asked == [("query", 20), *[("document", 64)] * 4, ("document", 300 - 256)]
    assert list(blocks.doc_ids) == list(whole.doc_ids) == [doc_id for doc_id, _ in dataset.corpus()]
    assert yardstick.evaluate_hits(dataset, blocks, 100) == yardstick.evaluate_hits(dataset, whole, 100)


def test_progress_knows_the_tokens_to_come(small, monkeypatch):
    dataset, bars = load_dataset(small, "test"), []
    embed_all = yardstick.embed_all

    def watched(embedder, tokenized, batch_tokens, bar=None):
        embeddings = embed_all(embedder, tokenized, batch_tokens, bar)
        if bar is not None:
            bars.append((bar.n, bar.total))
        return embeddings

    monkeypatch.setattr(yardstick, "embed_all", watched)
    yardstick.dense_hits(CountingEmbedder(), dataset, 10, document_block=100)
    assert [done < total for done, total in bars] == [True, True, False] and bars[-1][0] == bars[-1][1]
    assert bars[0][1] == pytest.approx(bars[-1][1], rel=0.25)


def test_the_next_block_is_made_while_one_is_used():
    made = []
    items = support.launch.one_ahead(made.append(i) or i for i in range(5))
    assert next(items) == 0 and made[:1] == [0]
    for _ in range(100):
        time.sleep(0.01)
        if len(made) == 2:
            break
    assert made == [0, 1]  # one, not more: memory holds two blocks
    assert list(items) == [1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        list(support.launch.one_ahead(1 // i for i in (1, 0)))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_embeddings_are_kept_and_reused(small, tmp_path, monkeypatch, name):
    """The second time nothing is encoded; an interrupted encoding goes on; other settings, another store."""
    dataset = load_dataset(small, "test")
    model = tiny_checkpoint(tmp_path / "tiny")
    embedder = load_embedder(model, torch.device("cpu"), torch.float32)
    expected = yardstick.dense_hits(embedder, dataset, 50, document_block=64, quiet=True)
    asked, tokenize = [], yardstick.tokenize
    monkeypatch.setattr(
        yardstick, "tokenize", lambda e, texts, kind: asked.append(kind) or tokenize(e, texts, kind)
    )

    def hits(embedder):
        asked.clear()
        store = formats.kept.EmbeddingStore(tmp_path / "kept", embedder, dataset, formats.kept.STORED[name])
        return yardstick.dense_hits(embedder, dataset, 50, document_block=64, quiet=True, store=store)

    first = hits(embedder)
    assert asked == ["query"] + ["document"] * 5
    if name == "float32":
        assert np.array_equal(first.scores, expected.scores) and np.array_equal(
            first.indices, expected.indices
        )
    else:
        np.testing.assert_allclose(first.scores, expected.scores, atol=0.02)
    second = hits(embedder)
    assert asked == ["query"] and np.array_equal(first.scores, second.scores)
    (folder,) = (tmp_path / "kept").iterdir()
    sorted(folder.glob("*.safetensors"))[2].unlink()
    third = hits(embedder)
    assert asked == ["query", "document"] and np.array_equal(first.scores, third.scores)
    shorter = load_embedder(model, torch.device("cpu"), torch.float32, max_length=2)
    hits(shorter)
    assert asked == ["query"] + ["document"] * 5
    with torch.no_grad():
        embedder.decoder.norm.weight[0] += 0.5  # other weights
    hits(embedder)
    assert asked == ["query"] + ["document"] * 5
    broken = sorted(folder.glob("*.safetensors"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(InputError, match="not a whole file of embeddings .*; delete it"):
        hits(load_embedder(model, torch.device("cpu"), torch.float32))


def test_another_job_may_fill_the_same_store(small, tmp_path, monkeypatch):
    """It writes the second block while ours is at the first: ours are what they would have been."""
    dataset = load_dataset(small, "test")
    embedder = load_embedder(tiny_checkpoint(tmp_path / "tiny"), torch.device("cpu"), torch.float32)

    def hits():
        store = formats.kept.EmbeddingStore(tmp_path / "kept", embedder, dataset, torch.float32)
        return yardstick.dense_hits(embedder, dataset, 50, document_block=64, quiet=True, store=store)

    expected, write = (
        yardstick.dense_hits(embedder, dataset, 50, quiet=True),
        formats.kept.EmbeddingStore.write,
    )

    def meanwhile(store, start, end, embeddings):
        monkeypatch.setattr(formats.kept.EmbeddingStore, "write", write)
        hits()
        for later in sorted(store.folder.glob("*.safetensors"))[2:]:
            later.unlink()
        return write(store, start, end, embeddings)

    monkeypatch.setattr(formats.kept.EmbeddingStore, "write", meanwhile)
    np.testing.assert_allclose(hits().scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(hits().scores, expected.scores, atol=1e-5)


def test_whatever_decides_an_embedding_is_in_the_stores_name(tmp_path):
    def fingerprint(**changes):
        folder = tiny_checkpoint(tmp_path / "tiny")
        for name, content in changes.items():
            path = folder / f"{name}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(known | content))
        embedder = load_embedder(folder, torch.device("cpu"), torch.float32)
        torch.manual_seed(0)
        add_lora(embedder.decoder, 2, lora["alpha"], 0.0, ["q_proj"])
        return formats.kept.fingerprint(embedder)

    lora = {"alpha": 4.0}
    assert fingerprint() == fingerprint()
    seen = [fingerprint(), fingerprint(config={"rms_norm_eps": 0.1})]
    seen.append(fingerprint(tokenizer_config={"add_eos_token": True, "eos_token": "<|endoftext|>"}))
    lora["alpha"] = 8.0
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_a_disk_too_small_for_the_embeddings_is_told_first(small, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.kept.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    embedder = load_embedder(tiny_checkpoint(tmp_path / "tiny"), torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match="GB of embeddings, 0.0 GB free"):
        formats.kept.EmbeddingStore(tmp_path / "kept", embedder, load_dataset(small, "test"), torch.float32)


def test_identical_ids_are_dropped_unless_kept(tmp_path):
    documents = {"1": "red", "2": "red blue", "3": "green"}
    write_beir(tmp_path / "same", documents, {"1": "red"}, {"1": {"2": 1}})
    dataset = load_dataset(tmp_path / "same", "test")
    for hits in (
        yardstick.bm25_hits(dataset, 10, quiet=True),
        yardstick.dense_hits(CountingEmbedder(), dataset, 10, quiet=True),
    ):
        result, run = yardstick.evaluate_hits(dataset, hits, 100)
        assert "1" not in run["1"] and result["metrics"]["mrr@10"] == 1.0
        result, run = yardstick.evaluate_hits(dataset, hits, 100, keep_identical_ids=True)
        assert list(run["1"])[0] == "1" and result["metrics"]["mrr@10"] == 0.5


def test_duplicate_document_ids_are_an_error(tmp_path):
    folder = write_beir(tmp_path / "twice", {"1": "red", "2": "blue"}, {"q": "red"}, {"q": {"1": 1}})
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"_id": "2", "text": "green"}\n')
    assert yardstick.main(["--dataset", str(folder), "--model", "bm25"]) == 2


def test_command_line_with_a_checkpoint(small, tmp_path, capsys):
    model = tiny_checkpoint(tmp_path / "tiny")
    again = shutil.copytree(small, tmp_path / "again")
    files = ["--trec", str(tmp_path / "{dataset}.trec"), "--json", str(tmp_path / "result.json")]
    arguments = ["--dataset", str(small), str(again), "--model", str(model), "--max-length", "64", *files]
    assert yardstick.main([*arguments, "--query-prompt", "query: ", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "max_length: 64" in printed and "seen: 13 queries, NDCG@10" in printed
    written = json.loads((tmp_path / "result.json").read_text())
    first, second = written["results"]
    assert (
        first["metrics"] == second["metrics"] == written["averages"]["mean"]
        and f"{first['metrics']['ndcg@10']:.4f}" in printed
    )
    assert written["settings"]["prompts"]["query"] == "query: " and written["settings"]["dtype_reason"]
    run, qrels = {}, load_dataset(small, "test").qrels
    for line in (tmp_path / "small.trec").read_text().splitlines():
        query_id, zero, doc_id, rank, score, tag = line.split()
        assert (zero, tag) == ("Q0", "tiny")
        run.setdefault(query_id, {})[doc_id] = float(score)
        assert len(run[query_id]) == int(rank)
    again = yardstick.evaluate(run, qrels)
    assert again == {name: pytest.approx(value, abs=6e-6) for name, value in first["metrics"].items()}


def test_two_folders_of_one_name_are_refused(small, tmp_path, capsys):
    again = shutil.copytree(small, tmp_path / "other" / "small")
    assert yardstick.main(["--dataset", str(small), str(again), "--model", "bm25"]) == 2
    assert "--dataset: several are called 'small'; give each folder" in capsys.readouterr().err


def test_checkpoints_of_two_runs_have_two_names_in_mteb(small, tmp_path):
    for run in ("one", "two"):
        model = tiny_checkpoint(tmp_path / run / "step-000002")
        arguments = ["--dataset", str(small), "--model", str(model), "--mteb", str(tmp_path / "out")]
        assert yardstick.main([*arguments, "--device", "cpu"]) == 0
    names = {folder.name for folder in (tmp_path / "out" / "results").iterdir()}
    assert names == {"local__one-step-000002", "local__two-step-000002"}


@pytest.mark.parametrize("broken", [BrokenPipeError(), KeyboardInterrupt(), PermissionError(13, "no", "f")])
def test_a_command_that_cannot_go_on_says_so_in_a_line(broken, monkeypatch, capfd):
    def fails(args):
        raise broken

    monkeypatch.setattr(yardstick, "run_evaluation", fails)
    monkeypatch.setattr(os, "dup2", lambda *handles: None)
    status, told = {
        BrokenPipeError: (141, ""),
        KeyboardInterrupt: (130, "eval.py: interrupted\n"),
        PermissionError: (2, "eval.py: error: [Errno 13] no: 'f'\n"),
    }[type(broken)]
    assert yardstick.main(["--dataset", "demo", "--model", "bm25"]) == status
    assert capfd.readouterr().err == told


def test_command_line_with_bm25(small, tmp_path, capsys):
    result = tmp_path / "new" / "result.json"
    assert yardstick.main(["--dataset", str(small), "--model", "bm25", "--json", str(result)]) == 0
    settings = json.loads(result.read_text())["settings"]
    assert (settings["k1"], settings["b"]) == (1.2, 0.75) and "S-stemmer" in settings["analyser"]
    assert "NDCG@10" in capsys.readouterr().out


def test_wrong_input_is_one_line_and_exit_status_2(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some = ["--dataset", str(small)]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.json").write_text("{}")
    for arguments, message in (
        (some, "runs/demo does not exist: train it"),
        (["--dataset", "absent", "--model", "bm25"], "--dataset absent: no such folder"),
        ([*some, "--model", "bm25", "--split", "dev"], "splits there: test"),
        ([*some, "--model", str(tmp_path)], str(tmp_path)),
        ([*some, "--model", "runs/nope"], "runs/nope: no such folder; give"),
        ([*some, "--model", "begun"], "begun: this run has no checkpoint yet"),
        ([*some, "--model", "bm25", "--mteb", "/proc/1"], "/proc/1: cannot be written, /proc/1 is read-only"),
    ):
        assert yardstick.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("eval.py: error: ") and error.count("\n") == 1
    for arguments in (
        [*some, "--modle", "bm25"],
        [*some, "--mod", "bm25"],
        [*some, "--k", "99"],
        [*some, "--batch-tokens", "0"],
        [*some, *some[1:], "--trec", "x.trec"],
        [],
    ):
        with pytest.raises(SystemExit) as stopped:
            yardstick.main(arguments)
        assert stopped.value.code == 2


def test_ids_with_spaces_do_not_go_into_a_run(tmp_path):
    with pytest.raises(InputError, match="spaces"):
        formats.results.write_run(tmp_path / "x.trec", {"q": {"a b": 1.0}}, "tag")
    assert not (tmp_path / "x.trec").exists()


def test_script_runs_and_every_flag_has_help(small):
    command = [sys.executable, str(ROOT / "eval.py")]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--identical-ids" in done.stdout
    done = subprocess.run(
        [*command, "--dataset", str(small), "--model", "none"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
