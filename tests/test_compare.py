"""tools/compare.py: the statistics by brute force, tables of a bounded width."""

import itertools
import re

import numpy as np
import pytest

from tools.compare import compare, fold, holm, sign_flip_p, summary


def p_of(differences, *flips):
    return sign_flip_p(tuple(np.asarray(differences).tolist()), *flips)


@pytest.mark.parametrize("size", [1, 2, 5, 9, 12])
def test_sign_flips_against_all_of_them(size):
    generator = np.random.default_rng(size)
    differences = np.round(generator.normal(0.3, 1, size), 1)  # rounded: ties and zeros occur
    sums = np.array([np.dot(s, differences) for s in itertools.product((-1, 1), repeat=size)])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
    assert p_of(differences) == pytest.approx(exact, abs=5 * np.sqrt(0.25 / 100_000))


def test_sign_flips_of_known_p():
    assert p_of(np.zeros(7)) == 1.0
    assert p_of([0.5, -0.5]) == 1.0  # no sum is nearer to 0
    assert p_of(np.full(10, 0.1)) == pytest.approx(2 / 2**10, rel=0.3)  # all signs equal: 2 of 1024
    assert p_of(np.full(300, 0.1)) == 1 / 100_001  # none found, and yet not 0
    assert p_of(np.full(6, -0.1)) == p_of(np.full(6, 0.1))  # two-sided


def test_sign_flips_in_parts_and_where_nothing_differs():
    assert 0 < p_of(np.random.default_rng(0).normal(0.1, 1, 5000), 3000) < 1 / 1000  # several parts
    p = np.array([p_of(np.random.default_rng(i).normal(0, 1, 40), 2000) for i in range(200)])
    assert abs(p.mean() - 0.5) < 0.1 and (p <= 0.05).mean() < 0.1  # uniform


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_summary_is_the_sample_standard_deviation():
    assert summary([1.0, 2.0, 4.0]) == {"mean": pytest.approx(7 / 3), "deviation": pytest.approx(1.527525)}
    assert summary([1.0]) == {"mean": 1.0, "deviation": None}


def test_folding_keeps_every_column_within_the_width():
    rows = [["run", *(f"column {i}" for i in range(20))], ["a|name", *(str(i) * 9 for i in range(20))]]
    text = fold(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert re.findall(r"column \d+", text) == rows[0][1:] and text.count("a\\|name") > 1


def test_a_run_is_compared_with_the_same_seeds_of_the_first():
    def scores(value):
        after = {"ndcg@10": value, "groups": {}, "per_query": {f"q{i}": value + i / 100 for i in range(8)}}
        costs = {"dev": None, "retriever_tokens": 1, "seconds": 1.0}
        return {"state": "finished", "datasets": {"toy": {"after": after}}, **costs}

    first, one, none = entries = [
        {"name": "first", "seeds": {"0": scores(0.2), "1": scores(0.4), "2": {"state": "failed"}}},
        {"name": "one", "seeds": {"1": scores(0.45)}},
        {"name": "none", "seeds": {"2": scores(0.5)}},
    ]
    compare(entries)
    assert first["datasets"]["toy"]["mean"] == pytest.approx(0.3)
    assert one["datasets"]["toy"]["difference"] == pytest.approx(0.05)  # not 0.15
    assert one["datasets"]["toy"]["p_holm"] == one["datasets"]["toy"]["p"]  # a single comparison
    assert none["datasets"]["toy"]["mean"] == 0.5 and "difference" not in none["datasets"]["toy"]
