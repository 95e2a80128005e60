"""The rows set aside, and how they score a retriever."""

import json

import pytest
import torch

from data import Document, Row
from related.aside import candidate_scores, score_aside, split_rows


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
