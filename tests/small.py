"""A small dataset of random words, an embedder that can be computed by hand, and where the real data lies."""

import json
import random
from pathlib import Path

import torch
from conftest import ROOT
from torch import nn

from model import Embedder

SHARED = ROOT.parent / "shared" / "data" / "beir"
WORDS = "red blue green cats dogs berries heroes buses glass virus run runs tree trees of the a".split()


def random_texts(count: int, seed: int, longest: int = 30) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(count)]


def write_beir(folder: Path, documents: dict, queries: dict, qrels: dict, groups: dict | None = None) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": key, "title": "", "text": text} for key, text in documents.items()]
    asked = [{"_id": key, "text": text} for key, text in queries.items()]
    for query in asked if groups else []:
        query["metadata"] = {"entity": groups[query["_id"]]}
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{q}\t{d}\t{gain}\n" for q, judged in qrels.items() for d, gain in judged.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def small_dataset(folder: Path) -> Path:
    """A dataset of 300 documents, of which every tenth stands there twice, and 20 queries in two groups."""
    texts = random_texts(300, 1)
    for i in range(0, 300, 10):
        texts[i + 1] = texts[i]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"q{i}": text for i, text in enumerate(random_texts(20, 2, 6))}
    generator = random.Random(3)
    qrels = {q: {d: generator.randint(-1, 3) for d in generator.sample(list(documents), 30)} for q in queries}
    groups = {q: "seen" if i % 3 else "unseen" for i, q in enumerate(queries)}
    return write_beir(folder, documents, queries, qrels, groups)


class CountingEmbedder(Embedder):
    """An embedder that can be computed by hand: a token is a word, an embedding normalised word counts."""

    dim, device = len(WORDS), torch.device("cpu")

    def __init__(self):
        nn.Module.__init__(self)
        self.batches = []

    def tokenize(self, texts, kind):
        return [[WORDS.index(word) for word in text.split()] for text in texts]

    def embed(self, token_ids):
        self.batches.append([len(ids) for ids in token_ids])
        counts = torch.stack([torch.bincount(torch.tensor(ids), minlength=self.dim) for ids in token_ids])
        return nn.functional.normalize(counts.float(), dim=1)
