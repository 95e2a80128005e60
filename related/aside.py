"""The rows set aside, never trained on: heads are chosen on them, and without --dev they score the run."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import Row, Rows, shuffled
from related.qrhead import relevant_document
from support.files import InputError, read_json, write_atomic

ENOUGH_ROWS, ENOUGH_ASIDE = 1000, 100  # guesses


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
