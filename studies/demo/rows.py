"""
The rows and the corpus of this study, from the facts of the demo's training rows.

    python studies/demo/rows.py --out FOLDER

rows.jsonl: 2,000 rows of 16 candidates, the source first, then up to two of its entity, three of its
attribute, the rest at random; so `--candidates 4` and `8` keep the source and what is nearest to it.
corpus.jsonl: one document for each fact, for rows made from text alone.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo import world  # noqa: E402
from demo.make import choose_candidates, draw_facts, write_jsonl  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", type=Path)
    out = parser.parse_args().out
    facts = draw_facts(random.Random(0))[0]["train"]  # as demo/make.py drew them
    rng = random.Random(1)
    asked = [(fact, query) for fact in facts for query in world.questions(fact, "train")]
    rows = []
    for fact, query in rng.sample(asked, 2000):
        candidates = choose_candidates(fact, facts, rng, 16, shuffle=False)
        documents = [world.write_document(other, rng) for other in candidates]
        rows.append({"query": query, "target": fact.answer, "documents": documents, "positive": 0})
    corpus = [{"_id": f"t{i}", **world.write_document(fact, rng)} for i, fact in enumerate(facts)]
    write_jsonl(out / "corpus.jsonl", corpus)
    write_jsonl(out / "rows.jsonl", rows)


if __name__ == "__main__":
    main()
