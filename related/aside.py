"""The rows set aside, which are never trained on; the temperature is fitted on them.

    mean over rows of exp(H(softmax(s / tau))) = EFFECTIVE_SHARE * candidates,    s of the untrained retriever

exp(H) is the number of candidates that have weight. SNE (Hinton and Roweis, 2002) fits its bandwidths to such
a number in the same way. Below it, one random candidate has most of the weight at the start and the others
teach nothing; above it, the scores hardly matter.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from attention import log_softmax_scores
from data import Row, Rows, shuffled
from related.qrhead import relevant_document
from support.files import InputError, read_json, write_atomic

EFFECTIVE_SHARE = 0.6  # of the candidates: 2.4 of 4
LEAST = 1.6  # of two or three candidates
ENOUGH_ROWS, ENOUGH_ASIDE = 1000, 100  # guesses
TEMPERATURES = 0.001, 10.0


def split_rows(rows: Rows, most: int, seed: int, batch: int) -> tuple[list[Row], list[int]]:
    """The rows set aside, at most so many and a tenth of all; the numbers of the others, to train on.

    Prints what too few rows lead to. batch: rows in a step.
    """
    order, aside = shuffled(len(rows), seed), min(most, len(rows) // 10)
    if not aside:
        raise InputError(f"{rows.path}: {len(rows)} rows are too few, at least 10 are needed")
    usable = sorted(order[aside:])
    if aside < most:
        print(f"note: --head-examples {most} lowered to {aside}, a tenth of the rows")
    if len(rows) < ENOUGH_ROWS:
        print(f"warning: {len(rows)} rows are too few to expect much; {ENOUGH_ROWS:,} are a beginning")
    if aside < ENOUGH_ASIDE:
        print(f"warning: {aside} rows set aside: heads and scores that rest on them are uncertain")
    if len(usable) < batch:
        print(f"warning: rows repeat within a step: {len(usable)} to train on, --batch {batch}")
    return [rows[i] for i in order[:aside]], usable


def effective_candidates(log_weights: Tensor, present: Tensor) -> Tensor:
    """exp(H(w)), (B,): how many candidates have weight. log_weights, present: (B, N)."""
    return (-(log_weights.exp() * log_weights.masked_fill(~present, 0.0)).sum(-1)).exp()


def candidate_scores(rows: list[Row], encode: Callable[[list[str], str], Tensor]) -> Tensor:
    """Cosines of each row's query with its candidates, (R, N); -inf where there is none.

    encode: texts and their kind to unit vectors, (texts, C), as Embedder.encode.
    """
    queries = encode([row.query for row in rows], "query")  # (R, C)
    documents = encode([document.full_text for row in rows for document in row.documents], "document")
    parts = documents.split([len(row.documents) for row in rows])
    cosines = [part @ query for part, query in zip(parts, queries, strict=True)]
    return pad_sequence(cosines, batch_first=True, padding_value=-math.inf)


def score_aside(
    rows: list[Row], encode: Callable[[list[str], str], Tensor], results: Path, when: str
) -> dict[str, float]:
    """How a retriever ranks the relevant document among its candidates: the share of rows where it is first,
    and the mean reciprocal rank. Printed, and kept in results.json; {} where no row tells its document."""
    known = [(row, document) for row in rows if (document := relevant_document(row)[0]) is not None]
    known = [(row, document) for row, document in known if row.query]  # Revela's rows ask nothing
    if not known:
        return {}
    scores = candidate_scores([row for row, _ in known], encode)  # (R, N)
    own = scores.gather(1, torch.tensor([[document] for _, document in known], device=scores.device))
    ranks = (scores >= own).sum(1).double()  # of equal scores, the last
    found = {"first": (ranks == 1).double().mean().item(), "mrr": (1 / ranks).mean().item()}
    chance = sum(1 / len(row.documents) for row, _ in known) / len(known)
    told = f"the relevant document is first among its candidates in {found['first']:.1%}"
    tqdm.write(f"{when}: {told} of {len(known)} rows set aside (chance {chance:.1%}), MRR {found['mrr']:.4f}")
    content = read_json(results)
    content["aside"] = content.get("aside", {}) | {when: found}
    write_atomic(results, json.dumps(content, indent=1) + "\n")
    return found


def fit_temperature(rows: list[Row], encode: Callable[[list[str], str], Tensor]) -> float:
    """The tau at which EFFECTIVE_SHARE of these rows' candidates have weight; printed."""
    scores = candidate_scores(rows, encode)
    temperature = temperature_for(scores)
    present = scores.isfinite()
    effective = effective_candidates(log_softmax_scores(scores, present, temperature), present).mean()
    share = f"{effective:.2f} of {present.sum() / len(rows):.3g} candidates"
    print(f"temperature {temperature:g}, fitted: {share} have weight before training", flush=True)
    return temperature


def temperature_for(scores: Tensor) -> float:
    """The tau at which EFFECTIVE_SHARE of the candidates have weight, to two digits. scores: (R, N)."""
    scores, present = scores.double(), scores.isfinite()
    wanted = (EFFECTIVE_SHARE * present.sum(-1, dtype=torch.float64)).clamp(min=LEAST).mean()
    low, high = map(math.log, TEMPERATURES)
    for _ in range(40):  # effective candidates grow with tau
        middle = (low + high) / 2
        found = effective_candidates(log_softmax_scores(scores, present, math.exp(middle)), present).mean()
        low, high = (low, middle) if found > wanted else (middle, high)
    return float(f"{math.exp(middle):.2g}")
