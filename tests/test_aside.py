"""The rows set aside: the temperature that is fitted on them."""

import json

import pytest
import torch

from attention import log_softmax_scores
from data import Document, Row
from related.aside import (
    EFFECTIVE_SHARE,
    candidate_scores,
    effective_candidates,
    score_aside,
    split_rows,
    temperature_for,
)


def test_scores_are_cosines_of_each_row():
    """Of its own candidates, -inf where there is none."""
    vectors = {text: torch.nn.functional.normalize(torch.randn(5), dim=0) for text in "q r a b c".split()}
    rows = [
        Row(0, "q", "", [Document("", text) for text in "abc"], 0),
        Row(1, "r", "", [Document("", text) for text in "ca"], 0),
    ]
    kinds = []

    def encode(texts, kind):
        kinds.append(kind)
        return torch.stack([vectors[text] for text in texts])

    found = candidate_scores(rows, encode)
    assert kinds == ["query", "document"] and found.shape == (2, 3)
    for row, name, texts in zip(found, "qr", ("abc", "ca"), strict=True):
        for number, text in enumerate(texts):
            torch.testing.assert_close(row[number], vectors[name] @ vectors[text])
    assert found[1, 2] == -torch.inf


def test_effective_candidates_are_exp_of_the_entropy():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    present = weights > 0
    found = effective_candidates(weights.log(), present)
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0, 1.0]))


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("candidates", [4, 8])
def test_the_fitted_temperature_gives_the_share(spread, candidates):
    """Whatever the spread of the cosines, to the two digits that are kept."""
    scores = 0.6 + spread * torch.randn(128, candidates, generator=torch.Generator().manual_seed(1))
    scores[:32, -1] = -torch.inf
    present = scores.isfinite()
    temperature = temperature_for(scores)
    effective = effective_candidates(log_softmax_scores(scores, present, temperature), present).mean()
    wanted = EFFECTIVE_SHARE * present.sum(-1).float().mean()
    assert abs(effective - wanted) < 0.03 * wanted
    assert float(f"{temperature:.2g}") == temperature


def test_two_candidates_keep_both_alive_and_equal_scores_end_the_search():
    scores = torch.randn(128, 2, generator=torch.Generator().manual_seed(1))
    present = scores.isfinite()
    log_weights = log_softmax_scores(scores, present, temperature_for(scores))
    assert effective_candidates(log_weights, present).mean() > 1.5
    assert temperature_for(torch.ones(4, 3)) == 0.001


def test_the_relevant_document_is_ranked_among_its_candidates(tmp_path, capsys):
    """First, third, and last of two equal ones. Rows without a known one, or a query, do not count."""
    texts = {"q": [1.0, 0.0], "good": [1.0, 0.0], "fair": [0.8, 0.6], "poor": [0.0, 1.0], "same": [0.8, 0.6]}

    def encode(given, kind):
        return torch.tensor([texts[text] for text in given])

    def row(positive, *names, query="q"):
        return Row(0, query, "no", [Document("", name) for name in names], positive)

    rows = [row(1, "fair", "good"), row(2, "good", "fair", "poor"), row(0, "fair", "same")]
    rows += [row(None, "good", "poor"), row(0, "good", "poor", query="")]
    results = tmp_path / "results.json"
    results.write_text('{"after": []}')
    found = score_aside(rows, encode, results, "step 3")
    assert found == pytest.approx({"first": 1 / 3, "mrr": (1 + 1 / 3 + 1 / 2) / 3})
    score_aside(rows, encode, results, "step 6")
    assert json.loads(results.read_text()) == {"after": [], "aside": {"step 3": found, "step 6": found}}
    told = "first among its candidates in 33.3% of 3 rows set aside (chance 44.4%), MRR 0.6111"
    assert capsys.readouterr().out.startswith(f"step 3: the relevant document is {told}\n")
    assert score_aside(rows[3:], encode, results, "step 9") == {}


@pytest.mark.parametrize(
    "count, most, batch, told",
    [
        (1500, 128, 32, []),
        (1200, 128, 32, ["note: --head-examples 128 lowered to 120, a tenth of the rows"]),
        (1500, 50, 32, ["warning: 50 rows set aside"]),
        (900, 90, 811, ["warning: 900 rows are too few", "warning: 90 rows set", "warning: rows repeat"]),
        (900, 90, 810, ["warning: 900 rows are too few", "warning: 90 rows set"]),
    ],
)
def test_too_few_rows_are_told(count, most, batch, told, capsys):
    aside, usable = split_rows(list(range(count)), most, 0, batch)
    assert sorted([*aside, *usable]) == list(range(count)) and len(aside) == min(most, count // 10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told) and all(map(str.startswith, lines, told))
