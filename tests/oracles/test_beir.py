"""The yardstick on real data against BEIR's own reader, search and evaluation, on the same embeddings.

Two embeddings: hashed bags of words, rounded so that every score is exact and ties are many, and the demo's
checkpoint (--slow). BEIR's exact search and ours see the same vectors, so nothing may differ but its default
score function, which normalises once more.
"""

import json
import random
import shutil
import zlib
from functools import cache

import pytest
import torch
from conftest import ROOT
from small import SHARED
from torch import nn

import eval as yardstick
from formats.datasets import load_dataset
from formats.embedders import load_embedder
from model import Embedder
from related.bm25 import words
from support.launch import CPU

CUTOFFS = [1, 3, 5, 10, 100]
NAMES = {"ndcg": "NDCG", "map": "MAP", "recall": "Recall", "precision": "P"}


class BagOfWords(Embedder):
    """An embedder without a model: words hashed to 512 counts, unit length, in steps of 1/1024.

    In these steps every product and every partial sum of a score fits in float32, so scores do not depend on
    the order of summation: not on tiles, not on the machine.
    """

    dim, device = 512, CPU

    def __init__(self):
        nn.Module.__init__(self)

    def tokenize(self, texts, kind):
        return [[zlib.crc32(word.encode()) % self.dim for word in words(text)] for text in texts]

    def embed(self, token_ids):
        counts = [
            torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=self.dim) for ids in token_ids
        ]
        return (nn.functional.normalize(torch.stack(counts).float(), dim=1) * 1024).round() / 1024


@pytest.fixture(scope="module", params=["nfcorpus.zip", "scifact"])
def real(request, tmp_path_factory):
    """Our dataset, read from the zip or the folder, and what BEIR reads from the folder or unpacked zip."""
    loader = pytest.importorskip("beir.datasets.data_loader")
    path = SHARED / request.param
    if not path.exists():
        pytest.skip(f"{path} is absent: {request.param} was NOT compared with BEIR")
    folder = path
    if path.suffix == ".zip":
        unpacked = tmp_path_factory.mktemp("unpacked")
        shutil.unpack_archive(path, unpacked)
        (folder,) = unpacked.iterdir()
    return load_dataset(path, "test"), loader.GenericDataLoader(data_folder=str(folder)).load(split="test")


@cache
def embedder(kind: str):
    return (
        BagOfWords() if kind == "words" else load_embedder(ROOT / "demo/checkpoint", CPU, torch.float32, 64)
    )


@cache
def embeddings_of(kind: str, path) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (Q, C) and documents (N, C) of a dataset, encoded once for all tests."""
    dataset = load_dataset(path, "test")
    queries = embedder(kind).encode(list(dataset.queries.values()), "query")
    return queries, embedder(kind).encode([text for _, text in dataset.corpus()], "document")


class LookUp:
    """What BEIR takes for a model: embeddings by text."""

    def __init__(self, dataset, queries, documents):
        texts = (text for _, text in dataset.corpus())
        self.queries = dict(zip(dataset.queries.values(), queries, strict=True))
        self.documents = dict(zip(texts, documents, strict=True))

    def encode_queries(self, queries, batch_size, **rest):
        return torch.stack([self.queries[text] for text in queries])

    def encode_corpus(self, corpus, batch_size, **rest):
        return torch.stack([self.documents[(d["title"] + " " + d["text"]).strip()] for d in corpus])


def evaluate_beir(real, embeddings, function: str, chunk: int):
    """BEIR's hits and its metrics under our names."""
    exact = pytest.importorskip("beir.retrieval.search.dense").DenseRetrievalExactSearch
    evaluation = pytest.importorskip("beir.retrieval.evaluation")
    dataset, (corpus, queries, qrels) = real
    model = exact(LookUp(dataset, *embeddings), corpus_chunk_size=chunk)
    evaluator = evaluation.EvaluateRetrieval(model, k_values=CUTOFFS, score_function=function)
    hits = evaluator.retrieve(corpus, queries)
    values = evaluator.evaluate(qrels, hits, CUTOFFS)
    pairs = zip(NAMES.items(), values, strict=True)
    return hits, {f"{ours}@{k}": found[f"{theirs}@{k}"] for (ours, theirs), found in pairs for k in CUTOFFS}


def evaluate_ours(dataset, embeddings, *tiles):
    """Our result, run and unrounded metrics from the same embeddings."""
    scores, indices = yardstick.search(*embeddings, 100 + yardstick.MARGIN, *tiles)
    hits = yardstick.Hits(scores.numpy(), indices.numpy(), [doc_id for doc_id, _ in dataset.corpus()])
    result, run = yardstick.evaluate_hits(dataset, hits, 100)
    return result, run, yardstick.evaluate(run, dataset.qrels, CUTOFFS)


def test_beirs_reader_reads_the_same(real):
    """Ids, their order, texts to the last space, queries and judgements."""
    dataset, (corpus, queries, qrels) = real
    ours = dict(dataset.corpus())
    assert list(ours) == list(corpus) and list(dataset.queries) == list(queries)
    texts = {
        doc_id: (document["title"] + " " + document["text"]).strip() for doc_id, document in corpus.items()
    }
    assert not [doc_id for doc_id in texts if ours[doc_id] != texts[doc_id]]
    same_queries, same_qrels = dataset.queries == queries, dataset.qrels == qrels
    assert same_queries and same_qrels and list(dataset.qrels) == list(qrels)


@pytest.mark.parametrize("kind", ["words", pytest.param("demo", marks=pytest.mark.slow)])
def test_metrics_equal_beirs(real, kind):
    """BEIR in chunks of k + 1 documents: its top-k drops nothing before its heap orders ties by id."""
    dataset = real[0]
    embeddings = embeddings_of(kind, dataset.path)
    hits, theirs = evaluate_beir(real, embeddings, "dot", 101)
    result, run, ours = evaluate_ours(dataset, embeddings)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=5.1e-6)  # theirs is rounded
    assert {name: result["metrics"][name] for name in theirs} == pytest.approx(theirs, abs=1e-9)
    assert (result["queries"], result["documents"]) == (len(real[1][1]), len(real[1][0]))
    if kind == "words":
        assert not [query_id for query_id in run if yardstick.ranking(hits[query_id]) != list(run[query_id])]
        ties = sum(len(found) - len(set(found.values())) for found in run.values())
        assert ties > len(run) and result["metrics"]["ndcg@10"] > 0.05, "a case with ties, and not chance"


@pytest.mark.parametrize("kind", ["words", pytest.param("demo", marks=pytest.mark.slow)])
def test_beirs_default_chunk_cuts_ties_at_random(real, kind):
    """With its default, 50,000 documents a chunk, only hits that tie with the last one may be others."""
    dataset = real[0]
    embeddings = embeddings_of(kind, dataset.path)
    hits, theirs = evaluate_beir(real, embeddings, "dot", 50_000)
    _, run, ours = evaluate_ours(dataset, embeddings)
    for name, expected in theirs.items():
        assert ours[name] == pytest.approx(expected, abs=1e-3 if name.endswith("@100") else 5.1e-6)
    for query_id, found in run.items():
        assert len(found) == len(hits[query_id]) == 100
        others = hits[query_id].keys() ^ found.keys()
        scores = [(hits[query_id] | found)[doc_id] for doc_id in others]
        assert scores == pytest.approx([min(found.values())] * len(scores), abs=1e-6)


@pytest.mark.parametrize("kind", ["words", pytest.param("demo", marks=pytest.mark.slow)])
def test_beirs_default_score_differs_by_rounding_alone(real, kind):
    """cos_sim normalises the unit vectors again: scores move by some 1e-7, and only ties may swap."""
    dataset = real[0]
    embeddings = [nn.functional.normalize(part, dim=1) for part in embeddings_of(kind, dataset.path)]
    hits, theirs = evaluate_beir(real, embeddings, "cos_sim", 50_000)
    _, run, ours = evaluate_ours(dataset, embeddings)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-4)
    check_order(run, {query_id: list(yardstick.ranking(found)) for query_id, found in hits.items()}, 1e-6)


def check_order(run, other, tolerance):
    """`other` lists documents in an order that the scores of `run` allow, give or take the tolerance."""
    for query_id, found in run.items():
        assert len(other[query_id]) == len(found)
        floor = min(found.values())  # one that is missing here was cut off: at most this good
        scores = [found.get(doc_id, floor) for doc_id in other[query_id]]
        best_below = floor
        for score in reversed(scores):
            assert score >= best_below - tolerance, f"query {query_id}: an order that rounding cannot explain"
            best_below = max(best_below, score)
        lost = [score for doc_id, score in found.items() if doc_id not in set(other[query_id])]
        assert all(score <= floor + tolerance for score in lost), f"query {query_id}: a hit is lost"


TILES = [(1, 2000), (7, 501), (50, 101)]


@pytest.mark.parametrize("kind", ["words", pytest.param("demo", marks=pytest.mark.slow)])
def test_tiles_and_blocks_of_the_search_do_not_matter(real, kind):
    """The scores of bags of words are exact: equal hits. The demo's: equal metrics to five decimals."""
    dataset, embeddings = real[0], embeddings_of(kind, real[0].path)
    _, run, expected = evaluate_ours(dataset, embeddings)
    found = [evaluate_ours(dataset, embeddings, *tiles)[1:] for tiles in TILES]
    for size in (500, 1999):  # as dense_hits searches a corpus, block by block
        best = None
        for first in range(0, len(embeddings[1]), size):
            block = embeddings[1][first : first + size]
            best = yardstick.search(embeddings[0], block, 100 + yardstick.MARGIN, offset=first, best=best)
        doc_ids = [doc_id for doc_id, _ in dataset.corpus()]
        again = yardstick.Hits(best[0].numpy(), best[1].numpy(), doc_ids)
        blocks = yardstick.evaluate_hits(dataset, again, 100)[1]
        found.append((blocks, yardstick.evaluate(blocks, dataset.qrels, CUTOFFS)))
    for other, metrics in found:
        assert metrics == pytest.approx(expected, abs=5e-6)
        if kind == "words":
            differing = [q for q in run if run[q] != other[q] or list(run[q]) != list(other[q])]
            assert not differing


def shuffle_corpus(folder, documents: dict[str, str], dataset, seed: int):
    """The same dataset in another order, on disk."""
    ids = list(documents)
    random.Random(seed).shuffle(ids)
    (folder / "qrels").mkdir(parents=True)
    rows = ({"_id": doc_id, "title": "", "text": documents[doc_id]} for doc_id in ids)
    asked = ({"_id": query_id, "text": text} for query_id, text in dataset.queries.items())
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    lines = (f"{q}\t{d}\t{gain}\n" for q, judged in dataset.qrels.items() for d, gain in judged.items())
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return load_dataset(folder, "test")


def test_the_order_of_the_corpus_and_its_blocks_do_not_matter(real, tmp_path):
    dataset = real[0]
    _, run, expected = evaluate_ours(dataset, embeddings_of("words", dataset.path))
    other = shuffle_corpus(tmp_path / "shuffled", dict(dataset.corpus()), dataset, 1)
    hits = yardstick.dense_hits(
        embedder("words"), other, 100 + yardstick.MARGIN, 5000, document_block=777, quiet=True
    )
    again = yardstick.evaluate_hits(other, hits, 100)[1]
    assert list(hits.doc_ids) != list(dict(dataset.corpus())), "it is shuffled"
    assert not [query_id for query_id in run if list(run[query_id]) != list(again[query_id])]
    assert yardstick.evaluate(again, other.qrels, CUTOFFS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("real", ["nfcorpus.zip"], indirect=True)
@pytest.mark.parametrize(
    ("batch_tokens", "block", "seed"), [(512, 32_768, 1), (4096, 1000, 2), (65_536, 250, 3)]
)
def test_batches_blocks_and_order_move_real_embeddings_by_rounding_alone(
    real, tmp_path, monkeypatch, batch_tokens, block, seed
):
    """As `python eval.py --batch-tokens` encodes, from a corpus in another order.

    tests/test_eval.py has this for 25 short texts of a random model.
    """
    dataset = real[0]
    queries, documents = embeddings_of("demo", dataset.path)
    texts = dict(dataset.corpus())
    by_id = dict(zip(texts, documents, strict=True))
    _, run, expected = evaluate_ours(dataset, (queries, documents))
    parts, embed_all = [], Embedder.embed_all

    def watched(*arguments):
        parts.append(embed_all(*arguments))
        return parts[-1]

    monkeypatch.setattr(Embedder, "embed_all", watched)
    other = shuffle_corpus(tmp_path / "shuffled", texts, dataset, seed)
    hits = yardstick.dense_hits(
        embedder("demo"), other, 100 + yardstick.MARGIN, batch_tokens, block, quiet=True
    )
    assert len(parts) == 1 + -(-len(texts) // block)
    reordered = torch.stack([by_id[doc_id] for doc_id in hits.doc_ids])
    torch.testing.assert_close(torch.cat(parts[1:]), reordered, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts[0], queries, atol=1e-5, rtol=0)
    result, again = yardstick.evaluate_hits(other, hits, 100)
    check_order(run, {query_id: list(found) for query_id, found in again.items()}, 1e-5)
    assert result["metrics"]["ndcg@10"] == pytest.approx(expected["ndcg@10"], abs=1e-3)
