"""Metrics against pytrec_eval, on deep runs where nearly everything is a tie."""

import random

import pytest

import eval as yardstick

pytrec_eval = pytest.importorskip("pytrec_eval")

CUTOFFS = (1, 3, 5, 10, 100, 1000)
NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}


def random_case(seed: int, levels: int) -> tuple[dict, dict]:
    """Runs of few distinct scores and unequal depths; graded, zero and negative judgements."""
    generator = random.Random(seed)
    docs = [str(i) for i in range(1200)] + [f"doc-{i}" for i in range(300)] + ["é", "ß-1", "Z", "z"]
    qrels, run = {}, {}
    for i in range(60):
        judged = generator.sample(docs, generator.choice((1, 5, 40, 300)))
        # No -2: pytrec_eval 0.5 crashes on a query whose highest judgement is -2.
        qrels[f"q{i}"] = {d: generator.choice((-1, 0, 0, 1, 1, 2, 3)) for d in judged}
        hits = generator.sample(docs, generator.choice((1, 7, 120, 1400)))
        # A step of 1e-9 is lost in float32: scores differ as float64 and tie as float32.
        run[f"q{i}"] = {d: 0.5 + generator.randrange(levels) * generator.choice((0.125, 1e-9)) for d in hits}
    qrels["zero"], run["zero"] = {"1": 0, "2": -1}, {"1": 1.0, "2": 0.5}
    run["unjudged"] = {"1": 1.0}
    return run, qrels


@pytest.mark.parametrize("levels", [1, 3, 50, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_pytrec_eval(seed, levels):
    run, qrels = random_case(seed, levels)
    measures = {f"{name}.{','.join(map(str, CUTOFFS))}" for name in NAMES.values()} | {"map", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    ours = yardstick.score_queries(run, qrels, CUTOFFS)
    assert set(theirs) == set(qrels)
    for row, query_id in enumerate(qrels):
        expected = theirs[query_id]
        for name, measure in NAMES.items():
            for k in CUTOFFS:
                assert ours[f"{name}@{k}"][row] == pytest.approx(expected[f"{measure}_{k}"], abs=1e-6)
        assert ours["map"][row] == pytest.approx(expected["map"], abs=1e-6)
        reciprocal = expected["recip_rank"]  # theirs has no cut: below 1/10 is beyond rank 10
        cut = reciprocal if reciprocal > 0.0999 else 0.0
        assert ours["mrr@10"][row] == pytest.approx(cut, abs=1e-6)


def test_a_query_missing_from_the_run_counts_zero_here_and_is_left_out_there():
    run, qrels = random_case(0, 50)
    del run["q3"]
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    assert "q3" not in theirs
    total = sum(values["ndcg_cut_10"] for values in theirs.values())
    assert yardstick.evaluate(run, qrels)["ndcg@10"] == pytest.approx(total / len(qrels), abs=1e-6)
