"""tools/geometry.py: alignment, uniformity and cosines against slow twins, and what is sampled for them."""

import json
import math

import numpy as np
import pytest
import torch
from small import CountingEmbedder, random_texts, write_beir
from tiny import tiny_checkpoint
from torch.nn.functional import normalize

from formats.datasets import load_dataset
from formats.embedders import load_embedder
from support.launch import CPU
from tools.geometry import geometry, main, measure_geometry, sample_pairs, uniformity


def unit_vectors(count: int, seed: int, dim: int = 8) -> torch.Tensor:
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_uniformity(x: torch.Tensor) -> float:
    """Wang and Isola's definition, pair by pair."""
    x = x.double()
    kernel = [math.exp(-2 * float(((a - b) ** 2).sum())) for i, a in enumerate(x) for b in x[:i]]
    return math.log(sum(kernel) / len(kernel))


def naive_auc(near: list[float], far: list[float]) -> float:
    return sum((a > b) + 0.5 * (a == b) for a in near for b in far) / (len(near) * len(far))


@pytest.fixture
def dataset(tmp_path):
    """50 documents; 12 queries with judgements from -1 to 2, some of documents that are not there."""
    documents = {f"d{i}": text for i, text in enumerate(random_texts(50, 1))}
    queries = {f"q{i}": text for i, text in enumerate(random_texts(12, 2, 6))}
    qrels = {q: {f"d{(7 * i + 3 * j) % 55}": j % 4 - 1 for j in range(8)} for i, q in enumerate(queries)}
    return load_dataset(write_beir(tmp_path / "set", documents, queries, qrels))


@pytest.mark.parametrize("tile", [1, 7, 19, 20, 512])
def test_uniformity_equals_the_definition_whatever_the_tiles(tile):
    x = unit_vectors(20, 0)
    assert uniformity(x.double(), tile) == pytest.approx(naive_uniformity(x), rel=1e-12)


def test_geometry_equals_its_definitions():
    queries, documents = unit_vectors(9, 1), unit_vectors(14, 2)
    generator = np.random.default_rng(0)
    relevant, random = (generator.integers(0, [9, 14], (count, 2)) for count in (30, 25))
    random[:5] = relevant[:5]  # ties
    found = geometry(queries, documents, relevant, random)
    x, y = queries.double(), documents.double()
    near, far = ([float(x[q] @ y[d]) for q, d in pairs] for pairs in (relevant, random))
    distances = [float(((x[q] - y[d]) ** 2).sum()) for q, d in relevant]
    assert found["alignment"] == pytest.approx(sum(distances) / 30, rel=1e-12)
    assert found["uniformity"] == pytest.approx(naive_uniformity(torch.cat([x, y])), rel=1e-12)
    assert found["uniformity_queries"] == pytest.approx(naive_uniformity(x), rel=1e-12)
    assert found["uniformity_documents"] == pytest.approx(naive_uniformity(y), rel=1e-12)
    assert found["cosine_relevant"] == pytest.approx(sum(near) / 30, rel=1e-12)
    assert found["cosine_random"] == pytest.approx(sum(far) / 25, rel=1e-12)
    assert found["auc"] == pytest.approx(naive_auc(near, far), rel=1e-12)
    assert (found["pairs"], found["random_pairs"]) == (30, 25)
    for name, cosines in (("relevant", near), ("random", far)):
        counts, edges = found[f"{name}_counts"], found["bin_edges"]
        assert (edges[0], edges[-1], len(edges)) == (-1, 1, len(counts) + 1) and sum(counts) == len(cosines)
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            assert count == sum(low <= cosine < high for cosine in cosines)


def test_identical_embeddings_are_at_the_ends():
    """Float32 vectors that rounding made longer than 1: no cosine falls out of the histogram."""
    same = unit_vectors(1, 3, 300).expand(6, 300) * 1.000001
    pairs = np.array([[i, i] for i in range(6)])
    found = geometry(same, same, pairs, pairs)
    assert found["alignment"] == 0 and found["auc"] == 0.5
    for name in ("uniformity", "uniformity_queries", "uniformity_documents"):
        assert found[name] == pytest.approx(0, abs=1e-12)
    assert found["relevant_counts"][-1] == found["random_counts"][-1] == 6
    opposite = geometry(same, -same, pairs, pairs)
    assert opposite["alignment"] == pytest.approx(4, rel=1e-5) and opposite["relevant_counts"][0] == 6


def test_uniformity_of_independent_directions_and_of_too_few():
    assert uniformity(torch.eye(100, dtype=torch.float64)) == pytest.approx(-4, rel=1e-12)
    assert uniformity(unit_vectors(1, 0)) is None
    assert uniformity(unit_vectors(0, 0)) is None


def test_the_sample_is_deterministic_bounded_and_what_it_says(dataset):
    every = sample_pairs(dataset)
    ids = list(dataset.documents.ids)
    named = {(every.queries[q], ids[every.documents[d]]) for q, d in every.relevant}
    positive = {(q, d) for q, judged in dataset.qrels.items() for d, gain in judged.items() if gain > 0}
    assert named == {(q, d) for q, d in positive if d in ids} and len(named) < len(positive)
    assert len(every.relevant) == len(named) == len(every.random)
    assert every.random[:, 0].tolist() == every.relevant[:, 0].tolist()
    for q, d in every.random:
        assert (every.queries[q], ids[every.documents[d]]) not in positive
    assert len(set(every.queries)) == len(every.queries) and len(set(every.documents)) == len(every.documents)

    some, again, other = (sample_pairs(dataset, 10, seed) for seed in (0, 0, 1))
    assert len(some.relevant) == 10 and set(every.relevant[:, 1]) > set(range(len(some.documents)))
    for first, second in zip(some, again, strict=True):
        assert np.array_equal(first, second)
    assert (some.queries, some.documents) != (other.queries, other.documents)


def test_a_query_to_which_all_are_relevant_has_no_random_pair(tmp_path):
    documents = {f"d{i}": text for i, text in enumerate(random_texts(9, 3))}
    qrels = {"all": {"d1": 1, "d2": 2, "d3": 1}, "one": {"d2": 1}, "none": {"d8": 0}}
    texts = dict.fromkeys(qrels, "red cats")
    dataset = load_dataset(write_beir(tmp_path / "set", documents, texts, qrels))
    sample = sample_pairs(dataset)
    assert sample.queries == ["all", "one"] and sample.documents == [1, 2, 3]
    assert len(sample.relevant) == 4 and [sample.queries[q] for q, _ in sample.random] == ["one"]
    del dataset.qrels["one"]
    found = measure_geometry(CountingEmbedder(), dataset)
    assert (found["pairs"], found["random_pairs"]) == (3, 0)
    assert found["cosine_random"] is found["auc"] is found["uniformity_queries"] is None
    assert found["uniformity_documents"] < 0


def test_a_document_with_the_querys_own_id_is_in_no_pair(tmp_path):
    documents = {"1": "red", "2": "blue", "3": "cats"}
    qrels = {"1": {"1": 1, "2": 1}, "2": {"3": 1}}
    dataset = load_dataset(write_beir(tmp_path / "set", documents, {"1": "red", "2": "blue"}, qrels))
    sample = sample_pairs(dataset)
    assert sample.relevant.tolist() == [[0, 0], [1, 1]] and sample.documents == [1, 2]
    assert sample.random.tolist() == [[0, 1]]  # to query 2, document 2 is itself, document 3 relevant


def test_only_the_samples_texts_are_encoded(dataset, monkeypatch):
    asked, tokenize = {}, CountingEmbedder.tokenize

    def watched(embedder, texts, kind):
        asked[kind] = texts
        return tokenize(embedder, texts, kind)

    monkeypatch.setattr(CountingEmbedder, "tokenize", watched)
    monkeypatch.setattr(sample_pairs, "__defaults__", (5, 0))
    found = measure_geometry(CountingEmbedder(), dataset)
    sample = sample_pairs(dataset)
    assert found["pairs"] == 5
    assert asked["query"] == [dataset.queries[q] for q in sample.queries]
    assert asked["document"] == [dataset.documents[d][1].full_text for d in sample.documents]


def test_command_line(dataset, tmp_path, capsys):
    """A table, bars and --json; datasets with nothing to measure get a line."""
    poor = write_beir(tmp_path / "poor", {"d": "red", "e": "cats"}, {"q": "red"}, {"q": {"d": 1}})
    model = tiny_checkpoint(tmp_path / "tiny")
    names = ["--dataset", str(dataset.path), str(poor), "--model", str(model), "--device", "cpu"]
    assert main([*names, "--json", str(tmp_path / "result.json")]) == 0
    printed = capsys.readouterr().out
    (first, second) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert second["geometry"] is None and "fewer than two relevant pairs" in printed
    found = first["geometry"]
    assert found == measure_geometry(load_embedder(model, CPU, torch.float32), dataset)
    table = printed[printed.index("\ngeometry") :]
    row = next(line.split() for line in table.splitlines() if line.startswith("set "))
    assert row[1] == str(found["pairs"]) and row[2] == f"{found['alignment']:.4f}"
    assert row[-1] == f"{found['auc']:.4f}"
    bars = [line for line in table.splitlines() if "#" in line]
    assert max(line.count("#") for line in bars) >= 30 and max(map(len, bars)) <= 100
    counted = sum(int(word) for line in bars for word in line.split() if word.isdigit())
    assert counted == found["pairs"] + found["random_pairs"]


def test_wrong_input_is_one_line_and_exit_status_2(dataset, tmp_path, capsys):
    some = ["--dataset", str(dataset.path), "--model"]
    for arguments, message in (
        ([*some, str(tmp_path / "absent")], "absent: no such folder"),
        ([*some, "x", "--json", str(tmp_path)], f"{tmp_path}: is a folder"),
        (["--dataset", "absent", "--model", "x"], "--dataset absent: no such folder"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("geometry: error: ") and message in line
    for flags in (["--max-length", "0"], ["--pairs", "5"]):
        with pytest.raises(SystemExit) as stopped:
            main([*some, "x", *flags])
        assert stopped.value.code == 2
