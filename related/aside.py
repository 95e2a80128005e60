"""The rows set aside, which are never trained on; the temperature is fitted on them.

    mean over rows of exp(H(softmax(s / tau))) = EFFECTIVE_SHARE * candidates,    s of the untrained retriever

exp(H) is the number of candidates that have weight. SNE (Hinton and Roweis, 2002) fits its bandwidths to such
a number in the same way. Below it, one random candidate has most of the weight at the start and the others
teach nothing; above it, the scores hardly matter.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import log_softmax_scores
from data import Row, Rows, shuffled
from support.files import InputError

EFFECTIVE_SHARE = 0.6  # of the candidates: 2.4 of 4
LEAST = 1.6  # of two or three candidates
TEMPERATURES = 0.001, 10.0


def split_rows(rows: Rows, most: int, seed: int) -> tuple[list[Row], list[int]]:
    """The rows set aside, at most so many and a tenth of all; the numbers of the others, to train on."""
    order, aside = shuffled(len(rows), seed), min(most, len(rows) // 10)
    if not aside:
        raise InputError(f"{rows.path}: {len(rows)} rows are too few, at least 10 are needed")
    return [rows[i] for i in order[:aside]], sorted(order[aside:])


def effective_candidates(log_weights: Tensor, present: Tensor) -> Tensor:
    """exp(H(w)), (B,): how many candidates have weight. log_weights, present: (B, N)."""
    return (-(log_weights.exp() * log_weights.masked_fill(~present, 0.0)).sum(-1)).exp()


def candidate_scores(rows: list[Row], encode: Callable[[list[str], str], Tensor]) -> Tensor:
    """Cosines of each row's query with its candidates, (R, N); -inf where there is none.

    encode: texts and their kind to unit vectors, (texts, C), as eval.encode of a retriever.
    """
    queries = encode([row.query for row in rows], "query")  # (R, C)
    documents = encode([document.full_text for row in rows for document in row.documents], "document")
    parts = documents.split([len(row.documents) for row in rows])
    cosines = [part @ query for part, query in zip(parts, queries, strict=True)]
    return pad_sequence(cosines, batch_first=True, padding_value=-math.inf)


def fit_temperature(scores: Tensor) -> float:
    """The tau at which EFFECTIVE_SHARE of the candidates have weight, to two digits; scores: (R, N)."""
    scores, present = scores.double(), scores.isfinite()
    counts = present.sum(-1, dtype=torch.float64)  # (R,)
    wanted = (EFFECTIVE_SHARE * counts).clamp(min=LEAST).mean()
    low, high = map(math.log, TEMPERATURES)
    for _ in range(40):  # effective candidates grow with tau
        middle = (low + high) / 2
        found = effective_candidates(log_softmax_scores(scores, present, math.exp(middle)), present).mean()
        low, high = (low, middle) if found > wanted else (middle, high)
    temperature = float(f"{math.exp(middle):.2g}")
    share = f"{found:.2f} of {counts.mean():.3g} candidates"
    print(f"temperature {temperature:g}, fitted: {share} have weight before training", flush=True)
    return temperature
