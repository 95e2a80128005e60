"""The rows and the two test folders of this study, from questions about real passages.

    python studies/smollm2/prepare.py --shared ../shared/data --to runs/smollm2

Reads qa/corpus.jsonl {_id, title, text} and qa/train.jsonl, qa/dev.jsonl {id, query, answers, passage_id,
source} under --shared, and writes:

    rows.jsonl    training rows, one a question
    heads.jsonl   256 more such rows, to compare heads on
    texts.jsonl   the passages of these rows, {_id, title, text}: for rows from text alone
    dev/          300 questions over 1,000 passages, in BEIR's layout: every setting is chosen here
    test/         500 other questions over 2,000 other passages: scored once, at the end

No passage stands in two of rows, dev and test. Dev and test take questions of the dev split about as many
passages, and fill up with passages of the train split, which then are in no row. PubMedQA is left out of all
four: its answers are whole conclusions.

The documents of a row are windows of 45 words. First the source: of the windows that hold the answer, BM25's
best. Then two BM25 hits, a random window and more hits, up to 16: the first 4, 8 or 16 make rows of so many
candidates. Each is of another passage, and none but the source holds an answer. Answers have at most eight
words; the target is the shortest one.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from related.bm25 import BM25  # noqa: E402
from support.files import writing  # noqa: E402
from tools.questions import windows  # noqa: E402

LEFT_OUT = "pubmedqa"
MAX_ANSWER = 8  # words
CANDIDATES = 16
HEAD_ROWS = 256
Piece = tuple[str, dict[str, str]]  # the id of its passage; title and text
DEV, TEST = (300, 1000), (500, 2000)  # questions, passages


def read(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def write(path: Path, rows: list[dict]) -> None:
    with writing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,}", flush=True)


def write_dataset(folder: Path, split: str, questions: list[dict], passages: list[dict]) -> None:
    """Questions and passages in BEIR's layout. The qrels stand under "test" too, for `train --test`."""
    write(folder / "corpus.jsonl", passages)
    write(folder / "queries.jsonl", [{"_id": q["id"], "text": q["query"]} for q in questions])
    for name in {split, "test"}:
        with writing(folder / "qrels" / f"{name}.tsv") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            file.writelines(f"{q['id']}\t{q['passage_id']}\t1\n" for q in questions)


def holds(text: str, answers: list[str]) -> bool:
    return any(answer.lower() in text.lower() for answer in answers)


def others(pieces: list[Piece], numbers: list[int], answers: list[str], taken: set[str]) -> Iterator[int]:
    """Those of the numbered pieces that hold no answer and are not of a passage taken before."""
    for number in numbers:
        passage, piece = pieces[number]
        if passage not in taken and not holds(f"{piece['title']} {piece['text']}", answers):
            taken.add(passage)
            yield number


def make_rows(questions: list[dict], passages: list[dict], size: int, rng: random.Random) -> list[dict]:
    """A row for each question. Left out: those whose answer lies in no window or in too many passages."""
    pieces: list[Piece] = [
        (p["_id"], {"title": p["title"], "text": w}) for p in passages for w in windows(p["text"], size)
    ]
    of_passage: dict[str, list[int]] = {}
    for number, (passage, _) in enumerate(pieces):
        of_passage.setdefault(passage, []).append(number)
    index = BM25(f"{piece['title']} {piece['text']}" for _, piece in pieces)
    _, found = index.search([q["query"] for q in questions], 200, quiet=False)
    rows = []
    for question, hits in zip(questions, found.tolist(), strict=True):
        passage, answers = question["passage_id"], question["answers"]
        hits = [number for number in hits if number >= 0]  # -1 beyond the last hit
        rank = {number: place for place, number in enumerate(hits)}
        holders = [number for number in of_passage[passage] if holds(pieces[number][1]["text"], answers[:1])]
        if not holders:
            continue
        source = min(holders, key=lambda number: rank.get(number, len(hits)))
        taken = {passage}
        best = others(pieces, hits, answers, taken)
        drawn = others(pieces, [rng.randrange(len(pieces)) for _ in range(100)], answers, taken)
        chosen = [source, *islice(best, 2), *islice(drawn, 1), *islice(best, CANDIDATES - 4)]
        chosen += islice(drawn, CANDIDATES - len(chosen))
        if len(chosen) == CANDIDATES:
            row = {"query": question["query"], "target": answers[0], "source": question["source"]}
            rows.append({**row, "documents": [pieces[number][1] for number in chosen], "positive": 0})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", required=True, metavar="DIR", type=Path, help="the folder that holds qa/")
    parser.add_argument("--to", required=True, metavar="DIR", type=Path, help="where the files are written")
    parser.add_argument("--window", type=int, default=45, metavar="WORDS", help="of a candidate")
    args = parser.parse_args()
    if args.window < 2 * MAX_ANSWER:
        parser.error(f"--window {args.window}: an answer of {MAX_ANSWER} words needs {2 * MAX_ANSWER}")
    rng = random.Random(0)
    passages = {passage["_id"]: passage for passage in read(args.shared / "qa" / "corpus.jsonl")}
    splits = {}
    for split in ("train", "dev"):
        questions = read(args.shared / "qa" / f"{split}.jsonl")
        splits[split] = [q for q in questions if q["source"] != LEFT_OUT and q["passage_id"] in passages]
        rng.shuffle(splits[split])

    spare = list(dict.fromkeys(q["passage_id"] for q in splits["train"]))
    asked_about = list(dict.fromkeys(q["passage_id"] for q in splits["dev"]))
    share = len(asked_about) * DEV[0] // (DEV[0] + TEST[0])
    for split, (count, size), own in (
        ("dev", DEV, asked_about[:share]),
        ("test", TEST, asked_about[share:]),
    ):
        chosen = set(own)
        questions = [q for q in splits["dev"] if q["passage_id"] in chosen][:count]
        corpus, spare = own + spare[: size - len(own)], spare[size - len(own) :]
        write_dataset(args.to / split, split, questions, [passages[name] for name in sorted(corpus)])

    left = set(spare)
    short = [q for q in splits["train"] if len(q["answers"][0].split()) <= MAX_ANSWER]
    questions = [q for q in short if q["passage_id"] in left]
    texts = [passages[name] for name in sorted(left)]
    rows = make_rows(questions, texts, args.window, rng)
    print(f"{len(questions) - len(rows):,} of {len(questions):,} questions left out")
    write(args.to / "texts.jsonl", texts)
    write(args.to / "heads.jsonl", rows[:HEAD_ROWS])
    write(args.to / "rows.jsonl", rows[HEAD_ROWS:])


if __name__ == "__main__":
    main()
