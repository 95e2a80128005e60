"""
The rows and the test dataset of this study, out of a folder of questions about passages.

    python studies/real/data.py --qa ../shared/data/qa --out FOLDER

The folder holds corpus.jsonl {_id, title, text} and {train,dev}.jsonl {id, query, answers, passage_id,
source}, split by passage: SQuADShifts and PubMedQA, of which PubMedQA's questions are left out (its answers
stand in no passage). Written are

rows.jsonl   8,000 training questions, each with a window of about 60 words around its answer as source and
             three such windows of other passages, drawn at random, none of the dev split's
dev.jsonl    200 rows of the dev split likewise, for `dream.py heads`
qa/          a BEIR folder: 500 questions of the dev split over its passages and others, 1,500 in all
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import sentences  # noqa: E402
from demo.make import write_jsonl  # noqa: E402

WORDS = 60


def window(text: str, around: int) -> str:
    """Whole sentences, about 60 words, around the character at that place."""
    parts = sentences(text)
    starts, place = [], 0
    for part in parts:
        place = text.index(part, place)
        starts.append(place)
        place += len(part)
    first = last = max((i for i, start in enumerate(starts) if start <= around), default=0)
    while len(" ".join(parts[first : last + 1]).split()) < WORDS and (first > 0 or last < len(parts) - 1):
        if last < len(parts) - 1:
            last += 1
        elif first > 0:
            first -= 1
    return " ".join(parts[first : last + 1])


def make_rows(questions: list[dict], passages: dict[str, dict], rng: random.Random) -> list[dict]:
    """A row for each question whose answer stands in its passage: source first, then three at random."""
    rows, names = [], sorted(passages)
    for question in questions:
        source, answer = passages[question["passage_id"]], question["answers"][0]
        others = [passages[name] for name in rng.sample(names, 4) if name != source["_id"]][:3]
        places = [source["text"].find(answer), *(rng.randrange(len(d["text"])) for d in others)]
        if places[0] >= 0:
            documents = [
                {"title": document.get("title", ""), "text": window(document["text"], place)}
                for document, place in zip([source, *others], places, strict=True)
            ]
            rows.append({"query": question["query"], "target": answer, "documents": documents, "positive": 0})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qa", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in open(args.qa / f"{name}.jsonl", encoding="utf-8")]

    corpus = [document for document in read("corpus") if document["text"].strip()]
    dev_passages = {question["passage_id"] for question in read("dev")}
    train, dev = ([q for q in read(split) if q["source"] != "pubmedqa"] for split in ("train", "dev"))
    held_out = [document for document in corpus if document["_id"] in dev_passages]
    others = [document for document in corpus if document["_id"] not in dev_passages]
    rng = random.Random(0)
    own = {document["_id"]: document for document in others}
    asked = rng.sample([q for q in train if q["passage_id"] in own], 9000)
    write_jsonl(args.out / "rows.jsonl", make_rows(asked, own, rng)[:8000])
    asked = rng.sample(dev, 500)
    own = {document["_id"]: document for document in held_out}
    write_jsonl(args.out / "dev.jsonl", make_rows(asked, own, rng)[:200])
    documents = held_out + rng.sample(others, 1500 - len(held_out))
    rng.shuffle(documents)
    write_jsonl(args.out / "qa" / "corpus.jsonl", documents)
    queries = [{"_id": q["id"], "text": q["query"], "metadata": {"source": q["source"]}} for q in asked]
    write_jsonl(args.out / "qa" / "queries.jsonl", queries)
    qrels = args.out / "qa" / "qrels" / "test.tsv"
    qrels.parent.mkdir(exist_ok=True)
    judged = (f"{q['id']}\t{q['passage_id']}\t1\n" for q in asked)
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    print(f"{len(documents):,} passages, {len(asked)} queries")


if __name__ == "__main__":
    main()
