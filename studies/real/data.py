"""
The questions, passages and dev dataset of this study, out of a folder of questions about passages.

    python studies/real/data.py --qa ../shared/data/qa --out FOLDER

The folder holds corpus.jsonl {_id, title, text} and {train,dev}.jsonl {id, query, answers, passage_id,
source}, split by passage: SQuADShifts and PubMedQA. Written are corpus.jsonl without any passage of the dev
split, train.jsonl and dev.jsonl without PubMedQA (its answers stand in no passage), and qa/, a BEIR folder:
500 questions of the dev split over its passages and others, 1,500 in all.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo.make import write_jsonl  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qa", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    args = parser.parse_args()

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in open(args.qa / f"{name}.jsonl", encoding="utf-8")]

    corpus, dev_passages = read("corpus"), {question["passage_id"] for question in read("dev")}
    train, dev = (
        [question for question in read(split) if question["source"] != "pubmedqa"]
        for split in ("train", "dev")
    )
    write_jsonl(args.out / "corpus.jsonl", [d for d in corpus if d["_id"] not in dev_passages])
    write_jsonl(args.out / "train.jsonl", [q for q in train if q["passage_id"] not in dev_passages])
    write_jsonl(args.out / "dev.jsonl", dev)
    rng = random.Random(0)
    asked = rng.sample(dev, 500)
    documents = [d for d in corpus if d["_id"] in dev_passages]
    documents += rng.sample([d for d in corpus if d["_id"] not in dev_passages], 1500 - len(documents))
    rng.shuffle(documents)
    write_jsonl(args.out / "qa" / "corpus.jsonl", documents)
    queries = [{"_id": q["id"], "text": q["query"], "metadata": {"source": q["source"]}} for q in asked]
    write_jsonl(args.out / "qa" / "queries.jsonl", queries)
    qrels = args.out / "qa" / "qrels" / "test.tsv"
    qrels.parent.mkdir(exist_ok=True)
    judged = (f"{q['id']}\t{q['passage_id']}\t1\n" for q in asked)
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    print(f"{len(train):,} training questions, {len(documents):,} dev passages, {len(asked)} dev queries")


if __name__ == "__main__":
    main()
