"""The yardstick against slow twins: metrics, search, encoding, and the command line."""

import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from small import CountingEmbedder, random_texts, small_dataset, write_beir
from tiny import tiny_checkpoint

import eval as yardstick
from formats.datasets import load_dataset
from formats.embedders import load_embedder, save_embedder
from formats.results import write_run
from support.files import InputError
from support.flags import flags_of
from support.launch import CPU, one_ahead


@pytest.fixture
def small(tmp_path):
    return small_dataset(tmp_path / "small")


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
    names = {f"{m}@{k}" for m in ("ndcg", "map", "recall", "precision") for k in (1, 10, 100)}
    assert set(values) == names | {"map", "mrr@10"}
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


def test_search_goes_on_from_an_earlier_block_and_finds_no_more_than_there_is():
    torch.manual_seed(1)
    queries, documents = torch.randn(4, 8), torch.randn(30, 8)
    whole = yardstick.search(queries, documents, 12)
    first = yardstick.search(queries, documents[:5], 12)
    assert first[0].shape == first[1].shape == (4, 5) and whole[0].shape == whole[1].shape == (4, 12)
    assert set(first[1][0].tolist()) == set(range(5))
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
    found = embedder.encode(texts, "document", batch_tokens=64)
    assert embedder.training, "the mode is put back"
    lengths = [length for batch in embedder.batches for length in batch]
    assert len(lengths) == len(set(texts)) and lengths == sorted(lengths, reverse=True)
    assert all(len(batch) * batch[0] <= 64 for batch in embedder.batches)
    expected = torch.cat([CountingEmbedder().embed(embedder.tokenize([text], "document")) for text in texts])
    assert torch.equal(found, expected) and found.dtype == torch.float32


def test_encode_does_not_depend_on_batch_size_or_order(tmp_path):
    embedder = load_embedder(tiny_checkpoint(tmp_path / "tiny"), CPU, torch.float32)
    texts = random_texts(25, 6)
    one_by_one = embedder.encode(texts, "document", batch_tokens=1)
    together = embedder.encode(texts, "document", batch_tokens=100_000)
    backwards = embedder.encode(texts[::-1], "document", batch_tokens=300).flip(0)
    assert one_by_one.shape == (25, embedder.dim)
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(one_by_one, backwards, atol=1e-5, rtol=0)
    torch.testing.assert_close(one_by_one.norm(dim=1), torch.ones(25))


def test_encode_refuses_embeddings_that_are_not_finite():
    embedder = CountingEmbedder()
    embedder.embed = lambda token_ids: torch.full((len(token_ids), embedder.dim), math.nan)
    with pytest.raises(InputError, match="--dtype float32"):
        embedder.encode(["red"], "query")


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
    tokenize = CountingEmbedder.tokenize

    def watched(embedder, texts, kind):
        asked.append((kind, len(texts)))
        return tokenize(embedder, texts, kind)

    whole = yardstick.dense_hits(CountingEmbedder(), dataset, 300, quiet=True)
    monkeypatch.setattr(CountingEmbedder, "tokenize", watched)
    blocks = yardstick.dense_hits(CountingEmbedder(), dataset, 300, document_block=64, quiet=True)
    assert asked == [("query", 20), *[("document", 64)] * 4, ("document", 300 - 256)]
    assert list(blocks.doc_ids) == list(whole.doc_ids) == [doc_id for doc_id, _ in dataset.corpus()]
    assert yardstick.evaluate_hits(dataset, blocks, 100) == yardstick.evaluate_hits(dataset, whole, 100)


def test_progress_knows_the_tokens_to_come(small, monkeypatch):
    dataset, bars = load_dataset(small, "test"), []
    embed_all = CountingEmbedder.embed_all

    def watched(embedder, token_ids, batch_tokens, bar=None):
        embeddings = embed_all(embedder, token_ids, batch_tokens, bar)
        if bar is not None:
            bars.append((bar.n, bar.total))
        return embeddings

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(CountingEmbedder, "embed_all", watched)
    monkeypatch.setattr("sys.stderr", Terminal())
    yardstick.dense_hits(CountingEmbedder(), dataset, 10, document_block=100)
    assert [done < total for done, total in bars] == [True, True, False] and bars[-1][0] == bars[-1][1]
    assert bars[0][1] == pytest.approx(bars[-1][1], rel=0.25)
    shown, log = sys.stderr.getvalue(), io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    yardstick.dense_hits(CountingEmbedder(), dataset, 10, document_block=100)
    assert "small: encode" in shown and not log.getvalue()  # nobody watches a log file


def test_the_next_block_is_made_while_one_is_used():
    made = []
    items = one_ahead(made.append(i) or i for i in range(5))
    assert next(items) == 0 and made[:1] == [0]
    for _ in range(100):
        time.sleep(0.01)
        if len(made) == 2:
            break
    assert made == [0, 1]  # one, not more: memory holds two blocks
    assert list(items) == [1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        list(one_ahead(1 // i for i in (1, 0)))


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


def test_several_models_share_a_table_and_score_as_they_do_alone(small, tmp_path, capsys):
    other = shutil.copytree(small, tmp_path / "other")
    models = [str(tiny_checkpoint(tmp_path / name)) for name in ("one", "longer")] + ["bm25"]
    embedder = load_embedder(models[1], CPU, torch.float32, 7)
    embedder.decoder.norm.weight.data[:4] = 3  # another model
    save_embedder(embedder, tmp_path / "longer")
    files = ["--trec", str(tmp_path / "{model}-{dataset}.trec"), "--json", str(tmp_path / "r.json")]
    files += ["--mteb", str(tmp_path / "mteb")]
    command = ["--dataset", str(small), str(other), "--device", "cpu", "--per-query", *files]
    alone = {}
    for model in models:
        assert yardstick.main([*command, "--model", model]) == 0
        alone[model] = json.loads((tmp_path / "r.json").read_text())
        assert set(alone[model]) == {"results", "averages", "settings"} and "mean" in alone[model]["averages"]
    (tmp_path / "r.json").unlink()
    runs = {path: path.read_text() for path in tmp_path.glob("*.trec")}
    assert len(runs) == 6
    for path in runs:
        path.unlink()
    capsys.readouterr()

    assert yardstick.main([*command, "--model", *models, models[0]]) == 0
    together = json.loads((tmp_path / "r.json").read_text())
    for model in models:
        own = [result for result in together["results"] if result["model"] == model]
        for result, expected in zip(own, alone[model]["results"], strict=True):
            assert {**expected, "model": model, "seconds": result["seconds"]} == result
        assert together["averages"][model] == alone[model]["averages"]
        assert together["settings"][model] == alone[model]["settings"]
    assert len({result["metrics"]["ndcg@10"] for result in together["results"]}) == 3
    assert {path: path.read_text() for path in tmp_path.glob("*.trec")} == runs
    names = {folder.name for folder in (tmp_path / "mteb" / "results").iterdir()}
    assert names == {"local__one", "local__longer", "bm25"}
    printed = capsys.readouterr().out
    assert f"\nmodel: {' | '.join(models)}\nk: 1000\n" in f"\n{printed}"
    assert "\nmax_length: 512 | 7 | -\n" in printed
    table = [line for line in printed.split("\n\n")[1].splitlines() if "  test  " in line]
    assert [line.split()[:2] for line in table] == [[name, m] for name in ("small", "other") for m in models]
    assert len(set(map(len, table))) == 1
    mean = alone[models[1]]["averages"]["mean"]["ndcg@10"]
    assert f"{models[1]}: mean NDCG@10: {mean:.4f}" in printed


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
    (tmp_path / "old" / "begun").mkdir(parents=True)
    (tmp_path / "begun" / "settings.json").write_text("{}")
    two = ["--dataset", str(small), str(shutil.copytree(small, tmp_path / "other"))]
    for part in "ab":
        shutil.copytree(small, tmp_path / "parts" / part)
    parts = ["--dataset", str(tmp_path / "parts")]
    for arguments, message in (
        (some, "runs/demo does not exist: train it"),
        (["--dataset", "absent", "--model", "bm25"], "--dataset absent: no such folder"),
        ([*some, "--model", "bm25", "--split", "dev"], "splits there: test"),
        ([*some, "--model", str(tmp_path)], str(tmp_path)),
        ([*some, "--model", "runs/nope"], "runs/nope: no such folder; give"),
        ([*some, "--model", "begun"], "begun: this run has no checkpoint yet"),
        ([*some, "--model", "bm25", "--mteb", "/proc/1"], "/proc/1: cannot be written, /proc/1 is read-only"),
        ([*parts, "--model", "bm25", "--trec", "x"], "--trec x: several datasets need {dataset} in the"),
        ([*parts, "absent", "--model", "runs/nope"], "--dataset absent: no such folder"),
    ):
        assert yardstick.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("eval.py: error: ") and error.count("\n") == 1
    for arguments, message in (
        ([*some, "--modle", "bm25"], "--modle; did you mean --model?"),
        ([*some, "--mod", "bm25"], "--mod; did you mean --model?"),
        ([*some, "--k", "99"], "--k: 99 is not at least 100"),
        ([*some, "--batch-tokens", "0"], "--batch-tokens: 0 is not at least 1"),
        ([*some, "--query-prompt", "\udcff"], "--query-prompt: not UTF-8"),
        ([*two, "--trec", "x"], "--trec x: several datasets need {dataset} in the file's name"),
        (["--dataset", "beir9", "--trec", "x"], "--trec x: several datasets need {dataset}"),
        ([*two, "--model", "a", "bm25", "--trec", "{dataset}"], "several models need {model} in the file's"),
        ([*some, "--model", "begun", "old/begun", "--mteb", "x"], "two of the models have the same name"),
        ([*some, "--geometry"], "--geometry is now a command of its own: python -m tools.geometry"),
        ([*some, "--compile"], "--compile was removed"),
        ([], "required: --dataset"),
    ):
        with pytest.raises(SystemExit) as stopped:
            yardstick.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_ids_with_spaces_do_not_go_into_a_run(tmp_path):
    with pytest.raises(InputError, match="spaces"):
        write_run(tmp_path / "x.trec", {"q": {"a b": 1.0}}, "tag")
    assert not (tmp_path / "x.trec").exists()


def test_the_script_runs_and_shows_every_flag(small, capsys):
    with pytest.raises(SystemExit) as stopped:
        yardstick.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "beir (default)" in " ".join(shown.split())
    assert all(f"  --{name.replace('_', '-')}" in shown for name in flags_of(yardstick.Settings))
    command = [sys.executable, str(ROOT / "eval.py"), "--dataset", str(small), "--model", "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
