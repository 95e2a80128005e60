"""BM25 against a loop over its formula, its stemmer and its index, and its figures on real data."""

import math
from collections import Counter

import numpy as np
import pytest
from small import SHARED, random_texts

from eval import bm25_hits, evaluate_hits
from formats.datasets import load_dataset
from related.bm25 import BM25, stem, words


def naive_bm25(texts: list[str], query: str, k1: float = 1.2, b: float = 0.75) -> list[float]:
    documents = [Counter(map(stem, words(text))) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in map(stem, words(query)):
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
    scores, indices = BM25(iter(texts)).search(queries, count + 3)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    assert scores.shape == indices.shape == (len(queries), count + 3)
    for query, row, numbers in zip(queries, scores, indices, strict=True):
        expected = naive_bm25(texts, query)
        hits = {i: s for i, s in enumerate(expected) if s > 0}
        assert set(numbers[numbers >= 0]) == set(hits) and (row[numbers < 0] == -np.inf).all()
        assert row[numbers >= 0] == pytest.approx([hits[i] for i in numbers[numbers >= 0]], rel=1e-5)
        assert (np.diff(row[numbers >= 0]) <= 0).all()


def test_keeps_the_best_and_of_tied_documents_the_earlier():
    texts = ["blue", "red", "red", "red red", "red"]
    scores, indices = BM25(texts).search(["red"], 3)
    assert indices.tolist() == [[3, 1, 2]]
    everything, _ = BM25(texts).search(["red"], 5)
    assert np.array_equal(everything[:, :3], scores)
    many = ["red" if i % 3 else "red red" for i in range(600)]
    _, indices = BM25(many).search(["red"], 300)
    assert indices[0].tolist() == [*range(0, 600, 3), *[i for i in range(600) if i % 3][:100]]


def test_of_texts_without_words():
    for texts in ([], ["", "..."]):
        scores, indices = BM25(texts).search(["red"], 2)
        assert indices.tolist() == [[-1, -1]] and np.isneginf(scores).all()


def test_stemmer():
    expected = {"cats": "cat", "berries": "berry", "movies": "movy", "buses": "buse", "heroes": "heroes"}
    expected |= {"trees": "trees", "glass": "glass", "virus": "virus", "is": "is", "s": "s", "gas": "ga"}
    assert {word: stem(word) for word in expected} == expected
    assert words("The Cat's TWO-fold β_1") == ["the", "cat", "s", "two", "fold", "β_1"]


def test_index_is_eight_bytes_a_posting():
    texts = random_texts(2000, 9)
    index = BM25(texts)
    assert index.postings.nbytes == 8 * sum(len(set(map(stem, text.split()))) for text in texts)
    assert index.norms.nbytes == 4 * len(texts)


@pytest.mark.parametrize(("name", "expected"), [("scifact", 0.666), ("nfcorpus.zip", 0.319)])
def test_figures(name, expected):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent: the BM25 figure of {name} was NOT checked")
    dataset = load_dataset(SHARED / name, "test")
    result, _ = evaluate_hits(dataset, bm25_hits(dataset, 228, quiet=True), 100)
    assert result["metrics"]["ndcg@10"] == pytest.approx(expected, abs=0.001)
