"""The rows set aside: the temperature that is fitted on them."""

import pytest
import torch

from attention import log_softmax_scores
from data import Document, Row
from related.aside import EFFECTIVE_SHARE, candidate_scores, effective_candidates, fit_temperature


def test_scores_are_cosines_of_each_row(monkeypatch):
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
def test_the_fitted_temperature_gives_the_share(spread, candidates, capsys):
    """Whatever the spread of the cosines, to the two digits that are kept."""
    scores = 0.6 + spread * torch.randn(128, candidates, generator=torch.Generator().manual_seed(1))
    scores[:32, -1] = -torch.inf
    present = scores.isfinite()
    temperature = fit_temperature(scores)
    effective = effective_candidates(log_softmax_scores(scores, present, temperature), present).mean()
    wanted = EFFECTIVE_SHARE * present.sum(-1).float().mean()
    assert abs(effective - wanted) < 0.03 * wanted
    assert float(f"{temperature:.2g}") == temperature
    assert capsys.readouterr().out.startswith(f"temperature {temperature:g}, fitted: ")


def test_two_candidates_keep_both_alive_and_equal_scores_end_the_search():
    scores = torch.randn(128, 2, generator=torch.Generator().manual_seed(1))
    present = scores.isfinite()
    log_weights = log_softmax_scores(scores, present, fit_temperature(scores))
    assert effective_candidates(log_weights, present).mean() > 1.5
    assert fit_temperature(torch.ones(4, 3)) == 0.001
