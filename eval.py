"""The yardstick: encode a corpus, search it exactly, score it the way pytrec_eval and BEIR do.

    python eval.py --dataset demo                            the demo's test set, model runs/demo
    python eval.py --dataset demo --model bm25               the same without learning
    python eval.py --dataset beir/scifact beir/nfcorpus.zip --model runs/big --json scores.json
    python eval.py --dataset beir/msmarco --split dev --model runs/big --run msmarco.trec
    python eval.py --dataset beir/nq --model runs/big --device cuda --dtype bfloat16 --batch-tokens 131072

The commands are the same on a CPU and on a GPU, which is taken when there is one; raise --batch-tokens as its
memory allows. A corpus is streamed from disk: in memory are its ids, the texts and embeddings of one block of
documents, and the best hits so far of every query.

The order of hits is pytrec_eval's: score descending, compared as float32, then document id descending as a
string. Gains are linear, and a judgement below 1 is not relevant. Every judged query counts: one missing from
the run scores 0 (pytrec_eval leaves it out of the mean), as does one without a relevant document. A document
with the query's own id is dropped, as in BEIR (--keep-identical-ids keeps it).
"""

import argparse
import json
import math
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import InputError, RetrievalDataset, load_beir, token_batches, write_atomic
from model import Embedder, load_embedder, pick_device, pick_dtype, resolve_run

CUTOFFS = (1, 3, 5, 10, 100, 1000)
BATCH_TOKENS = 16_384
DOCUMENT_BLOCK = 32_768  # documents read, sorted by length and encoded at a time
MARGIN = 128  # hits kept beyond k: top-k breaks ties arbitrarily, the final sort by id needs the tied ones
DEFAULT_MODEL = "runs/demo"


@torch.no_grad()
def encode(
    embedder: Embedder,
    texts: list[str],
    kind: str,
    batch_tokens: int = BATCH_TOKENS,
    bar: tqdm | None = None,
    share: float = 1.0,
) -> Tensor:
    """Embeddings (N, C) of at least one text, float32, unit length, on the embedder's device.

    kind: "query" or "document". Each distinct text is encoded once, in batches of similar length whose padded
    size is at most `batch_tokens`. `bar` counts tokens; `share`, the part of its remaining work that these
    texts are, gives its total. Raises InputError when an embedding is not finite.
    """
    distinct = list(dict.fromkeys(texts))
    token_ids = embedder.tokenize(distinct, kind)
    lengths = [len(ids) for ids in token_ids]
    if bar is not None:
        bar.total = bar.n + round(sum(lengths) / share)
    parts, order = [], []
    training = embedder.training
    embedder.eval()  # no dropout, also when asked in the middle of a training
    for batch in token_batches(lengths, batch_tokens):
        parts.append(embedder.embed([token_ids[i] for i in batch]))  # (B, C)
        order += batch
        if bar is not None:
            bar.update(sum(lengths[i] for i in batch))
    embedder.train(training)
    row_of = {distinct[i]: row for row, i in enumerate(order)}
    embeddings = torch.cat(parts)[[row_of[text] for text in texts]]  # (N, C), back in the order of `texts`
    if not embeddings.isfinite().all():
        raise InputError(f"the model's {kind} embeddings are not all finite numbers; try --dtype float32")
    return embeddings


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: no TF32, whatever a caller has set for its training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def search(
    queries: Tensor,
    documents: Tensor,
    k: int,
    query_tile: int = 1024,
    document_tile: int = 32_768,
    offset: int = 0,
    best: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k documents of largest dot product for each query, exactly, tiled over both sides.

    queries (Q, C), documents (N, C): any float type (the products are float32), documents on any device.
    Returns scores (Q, k) float32, descending, and indices (Q, k) int64 into `documents`, plus `offset`; -inf
    and -1 where there are fewer documents. Of documents tied at the cut, arbitrary ones are kept. `best` is
    an earlier result to go on from: so a corpus is searched block by block.
    """
    device = queries.device
    if best is None:
        scores = torch.full((len(queries), k), -math.inf, device=device)  # (Q, k)
        indices = torch.full((len(queries), k), -1, device=device)  # (Q, k)
    else:
        scores, indices = (part.clone() for part in best)
    with _full_precision():
        for first in range(0, len(documents), document_tile):
            tile = documents[first : first + document_tile].to(device).float()  # (n, C)
            for start in range(0, len(queries), query_tile):
                rows = slice(start, start + query_tile)
                products = queries[rows].float() @ tile.T  # (q, n)
                top = products.topk(min(k, len(tile)), dim=1)
                candidates = torch.cat([scores[rows], top.values], dim=1)  # (q, k + n')
                numbers = torch.cat([indices[rows], top.indices + first + offset], dim=1)
                scores[rows], kept = candidates.topk(k, dim=1)
                indices[rows] = numbers.gather(1, kept)
    return scores, indices


class Hits(NamedTuple):
    """What a search found for each query of a dataset, in the order of its queries."""

    scores: np.ndarray  # (Q, K) float32, descending; -inf where there is no hit
    indices: np.ndarray  # (Q, K) int64 into doc_ids; -1 where there is no hit
    doc_ids: list[str]  # the ids of the whole corpus


def dense_hits(
    embedder: Embedder,
    dataset: RetrievalDataset,
    k: int,
    batch_tokens: int = BATCH_TOKENS,
    document_block: int = DOCUMENT_BLOCK,
    quiet: bool = False,
) -> Hits:
    """Exact search over a streamed corpus; texts and embeddings of one block at a time are in memory."""
    queries = encode(embedder, list(dataset.queries.values()), "query", batch_tokens)  # (Q, C)
    doc_ids: list[str] = []
    best = None
    with tqdm(desc=f"{dataset.name}: encode", unit="tok", unit_scale=True, disable=quiet) as bar:
        for block in _blocks(dataset.corpus(), document_block):
            share = len(block) / max(dataset.num_documents - len(doc_ids), len(block))
            documents = encode(embedder, [text for _, text in block], "document", batch_tokens, bar, share)
            best = search(queries, documents, k, offset=len(doc_ids), best=best)
            doc_ids.extend(doc_id for doc_id, _ in block)
    scores, indices = best
    return Hits(scores.cpu().numpy(), indices.cpu().numpy(), doc_ids)


def _blocks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` consecutive items; holds one list at a time."""
    items = iter(items)
    while block := list(islice(items, size)):
        yield block


def stem(word: str) -> str:
    """Harman's S-stemmer (1991): three rules for the English plural; the first whose ending fits decides."""
    if len(word) < 3 or not word.endswith("s"):
        return word
    if word.endswith("ies"):
        return word if word.endswith(("eies", "aies")) else word[:-3] + "y"
    if word.endswith("es"):
        return word if word.endswith(("aes", "ees", "oes")) else word[:-1]
    return word if word.endswith(("us", "ss")) else word[:-1]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class _Vocabulary(dict):
    """word -> number of its stem; a new word gets its number when it is first looked up."""

    size = 0

    def __missing__(self, word: str) -> int:
        stemmed = stem(word)
        if stemmed != word:
            number = self[stemmed]
        else:
            number, self.size = self.size, self.size + 1
        self[word] = number
        return number


class BM25:
    """BM25 with Lucene's idf over an inverted index in one integer array; numpy only.

        score(q, d) = sum over words w of q:  idf(w) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))
        idf(w)      = log(1 + (N - n(w) + 0.5) / (n(w) + 0.5))

    `texts` is read once and not kept. A posting is one int64: 25 bits stem, 26 bits document, 12 bits term
    frequency (tf stops at 4095), so sorting the integers builds the index. Eight bytes a posting, no second
    copy: 2 GB for five million documents of 50 distinct words. Raises InputError when the bits are too few.
    """

    ANALYSER = r"lower-cased \w+ words, S-stemmer (Harman 1991), no stop words"
    STEM_BITS, DOC_BITS, TF_BITS = 25, 26, 12

    def __init__(self, texts: Iterable[str], k1: float = 1.2, b: float = 0.75):
        self.k1, self.b = k1, b
        self.vocabulary = _Vocabulary()
        postings, lengths = array("q"), array("i")
        for block in _blocks(texts, 1024):
            first = len(lengths)
            stems = array("q")
            for text in block:
                before = len(stems)
                stems.extend(map(self.vocabulary.__getitem__, words(text)))
                lengths.append(len(stems) - before)
            documents = np.repeat(np.arange(first, len(lengths)), lengths[first:])  # one per word
            pairs, counts = np.unique(self._posting(np.array(stems, np.int64), documents), return_counts=True)
            postings.frombytes((pairs | np.minimum(counts, 2**self.TF_BITS - 1)).tobytes())
        if len(lengths) > 2**self.DOC_BITS or self.vocabulary.size > 2**self.STEM_BITS:
            raise InputError(f"BM25: {len(lengths):,} documents or their words are too many for the index")
        self.postings = np.frombuffer(postings, np.int64) if postings else np.empty(0, np.int64)  # no copy
        self.postings.sort()
        lengths = np.array(lengths, np.float32)  # (N,) words in each document
        mean = max(float(lengths.mean(dtype=np.float64)), 1.0) if len(lengths) else 1.0
        self.norms = k1 * (1 - b + b * lengths / mean)  # (N,) float32

    def describe(self) -> dict:
        return {"analyser": self.ANALYSER, "k1": self.k1, "b": self.b}

    def search(self, queries: list[str], k: int, quiet: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Of the texts that share a word with a query, the k best; of tied ones, the earlier.

        Returns scores (Q, k) float32, descending, and indices (Q, k) int64; -inf and -1 beyond them.
        """
        scores = np.full((len(queries), k), -np.inf, np.float32)
        indices = np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(tqdm(queries, desc="BM25: search", unit="query", disable=quiet)):
            total = self._scores(query)  # (N,)
            found = np.flatnonzero(total)
            if len(found) > k:
                cut = np.partition(total[found], -k)[-k]
                found = found[total[found] >= cut]  # k, and those tied with the last of them
            best = found[np.argsort(-total[found], kind="stable")[:k]]
            scores[row, : len(best)] = total[best]
            indices[row, : len(best)] = best
        return scores, indices

    def _posting(self, stem_number, document):
        return stem_number << (self.DOC_BITS + self.TF_BITS) | document << self.TF_BITS

    def _scores(self, query: str) -> np.ndarray:
        """(N,) float32; 0 where no word is shared."""
        total = np.zeros(len(self.norms), np.float32)
        for stemmed, count in Counter(map(stem, words(query))).items():
            number = self.vocabulary.get(stemmed)
            if number is None:
                continue
            ends = np.searchsorted(self.postings, [self._posting(number, 0), self._posting(number + 1, 0)])
            postings = self.postings[slice(*ends)]
            documents = (postings >> self.TF_BITS) & (2**self.DOC_BITS - 1)  # distinct, so += adds each
            tf = (postings & (2**self.TF_BITS - 1)).astype(np.float32)
            idf = math.log(1 + (len(self.norms) - len(postings) + 0.5) / (len(postings) + 0.5))
            total[documents] += count * idf * tf / (tf + self.norms[documents])
        return total


def bm25_hits(dataset: RetrievalDataset, k: int, quiet: bool = False) -> Hits:
    """BM25 over a streamed corpus; the index is in memory, the texts are not."""
    doc_ids: list[str] = []

    def texts() -> Iterator[str]:
        name, total = f"{dataset.name}: index", dataset.num_documents
        for doc_id, text in tqdm(dataset.corpus(), name, total, unit="doc", disable=quiet):
            doc_ids.append(doc_id)
            yield text

    scores, indices = BM25(texts()).search(list(dataset.queries.values()), k, quiet)
    return Hits(scores, indices, doc_ids)


def ranking(hits: dict[str, float]) -> list[str]:
    """Document ids, best first, in pytrec_eval's order: score as float32 descending, then id descending."""
    scores = np.fromiter(hits.values(), np.float32, len(hits)).tolist()
    return [doc_id for _, doc_id in sorted(zip(scores, hits, strict=True), reverse=True)]


def make_run(
    query_ids: Iterable[str], hits: Hits, k: int, keep_identical_ids: bool = False
) -> tuple[dict[str, dict[str, float]], int]:
    """{query id: {document id: score}}, best first, at most k each; `hits` should hold MARGIN more than k.

    Also returns for how many queries the documents tied at rank k go on beyond the margin: which of them are
    in the run is arbitrary.
    """
    run, ambiguous = {}, 0
    more_documents = len(hits.doc_ids) > hits.scores.shape[1]
    for query_id, scores, indices in zip(query_ids, hits.scores, hits.indices, strict=True):
        pairs = zip(indices.tolist(), scores.tolist(), strict=True)
        found = {hits.doc_ids[i]: score for i, score in pairs if i >= 0}
        if not keep_identical_ids:
            found.pop(query_id, None)
        run[query_id] = {doc_id: found[doc_id] for doc_id in ranking(found)[:k]}
        if more_documents and len(run[query_id]) == k:
            ambiguous += min(run[query_id].values()) == scores[-1]
    return run, ambiguous


def score_queries(
    run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]], cutoffs: Iterable[int] = CUTOFFS
) -> dict[str, np.ndarray]:
    """Every metric for every judged query: {metric: (Q,) float64} in the order of `qrels`.

    ndcg@k, map@k, recall@k and precision@k for each cutoff, map over all hits of the run, and mrr@10, with
    pytrec_eval's definitions: linear gain, log2 discount, precision@k divided by k even if hits are fewer. A
    query without a relevant document, or missing from the run, has 0 throughout.
    """
    cutoffs = np.array(sorted(cutoffs))
    names = [f"{metric}@{k}" for metric in ("ndcg", "map", "recall", "precision") for k in cutoffs]
    names += ["map", "mrr@10"]
    table = np.zeros((len(qrels), len(names)))
    for row, (query_id, judged) in zip(table, qrels.items(), strict=True):
        relevant = {doc_id: gain for doc_id, gain in judged.items() if gain > 0}
        ranked = enumerate(ranking(run.get(query_id, {})), 1)
        found = [(rank, relevant[doc_id]) for rank, doc_id in ranked if doc_id in relevant]
        if not found:
            continue
        ranks, gains = np.array(found, np.float64).T  # (n,) each: the relevant hits, best first
        within = np.searchsorted(ranks, cutoffs, side="right")  # (cutoffs,) how many of them are at rank <= k
        ideal = np.array(sorted(relevant.values(), reverse=True), np.float64)  # (R,)
        ideal_dcg = _cumulative(ideal / np.log2(1 + np.arange(1, len(ideal) + 1)))
        ndcg = _cumulative(gains / np.log2(1 + ranks))[within] / ideal_dcg[np.minimum(cutoffs, len(ideal))]
        precisions = _cumulative(np.arange(1, len(ranks) + 1) / ranks) / len(ideal)
        reciprocal = 1 / ranks[0] if ranks[0] <= 10 else 0.0
        found_shares = within / len(ideal), within / cutoffs
        row[:] = np.concatenate([ndcg, precisions[within], *found_shares, [precisions[-1], reciprocal]])
    return dict(zip(names, table.T, strict=True))


def _cumulative(terms: np.ndarray) -> np.ndarray:
    """(n + 1,): the sum of the first 0, 1, ..., n terms."""
    return np.concatenate([[0.0], np.cumsum(terms)])


def evaluate(
    run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]], cutoffs: Iterable[int] = CUTOFFS
) -> dict[str, float]:
    """The mean of every metric of `score_queries` over all judged queries."""
    return {name: float(values.mean()) for name, values in score_queries(run, qrels, cutoffs).items()}


def evaluate_hits(
    dataset: RetrievalDataset, hits: Hits, k: int, keep_identical_ids: bool = False
) -> tuple[dict, dict[str, dict[str, float]]]:
    """The result of one dataset as it stands in --json, and its run cut at k. Raises InputError."""
    if len(set(hits.doc_ids)) < len(hits.doc_ids):
        ((twice, _),) = Counter(hits.doc_ids).most_common(1)
        raise InputError(f"{dataset.path}: corpus.jsonl holds _id {twice!r} more than once")
    run, ambiguous = make_run(dataset.queries, hits, k, keep_identical_ids)
    per_query = score_queries(run, dataset.qrels, [cutoff for cutoff in CUTOFFS if cutoff <= k])
    result = {
        "dataset": dataset.name,
        "split": dataset.split,
        "queries": len(dataset.qrels),
        "documents": len(hits.doc_ids),
        "metrics": {name: round(float(values.mean()), 5) for name, values in per_query.items()},
        "queries_without_hits": sum(not found for found in run.values()),
        "queries_with_ties_beyond_k": int(ambiguous),
    }
    if dataset.groups:
        result["groups"] = {}
        for group, members in dataset.groups.items():
            rows = np.array([query_id in members for query_id in dataset.qrels])  # (Q,)
            means = {name: round(float(values[rows].mean()), 5) for name, values in per_query.items()}
            result["groups"][group] = {"queries": int(rows.sum()), **means}
    return result, run


def evaluate_embedder(
    embedder: Embedder,
    dataset: RetrievalDataset,
    k: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    keep_identical_ids: bool = False,
    quiet: bool = True,
) -> dict:
    """Encode, search and score one dataset: {"dataset", "split", "queries", "documents", "metrics", ...}."""
    hits = dense_hits(embedder, dataset, k + MARGIN, batch_tokens, quiet=quiet)
    return evaluate_hits(dataset, hits, k, keep_identical_ids)[0]


def write_run(path: Path, run: dict[str, dict[str, float]], tag: str) -> None:
    """A TREC run file: `qid Q0 docid rank score tag`, scores with the nine digits that restore a float32."""
    parts = []
    for query_id, hits in run.items():
        if len(" ".join([query_id, *hits]).split()) != 1 + len(hits):
            raise InputError(f"--run: query {query_id!r}: a TREC run cannot hold ids with spaces")
        ranked = enumerate(hits.items(), 1)
        lines = (f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n" for rank, (doc_id, score) in ranked)
        parts.append("".join(lines))
    write_atomic(path, "".join(parts))


def resolve_dataset(name: str, split: str) -> RetrievalDataset:
    """A BEIR folder or .zip by its path, or the demo's test set by its name. Raises InputError."""
    if name == "demo":
        dataset = load_beir(Path(__file__).parent / "demo" / "test", split)
        dataset.name = "demo"
        return dataset
    if not Path(name).exists():
        raise InputError(f"--dataset {name}: no such folder or .zip; give a BEIR dataset's path, or demo")
    return load_beir(Path(name), split)


def print_result(result: dict, width: int) -> None:
    metrics = result["metrics"]
    figures = "  ".join(f"{metrics[name]:10.4f}" for name in ("ndcg@10", "recall@100", "map", "mrr@10"))
    counts = f"{result['split']:8}  {result['queries']:8,}  {result['documents']:10,}"
    print(f"{result['dataset']:{width}}  {counts}  {figures}", flush=True)
    for group, means in result.get("groups", {}).items():
        print(f"  {group}: {means['queries']:,} queries, NDCG@10 {means['ndcg@10']:.4f}")
    if number := result["queries_without_hits"]:
        print(
            f"  note: {number:,} queries found nothing and count 0; from a run file, pytrec_eval omits them"
        )
    if number := result["queries_with_ties_beyond_k"]:
        print(f"  note: {number:,} queries tie at rank k with documents beyond the margin: an arbitrary cut")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", nargs="+", required=True, metavar="PATH", help="BEIR folders or .zip files, or demo")
    add("--model", default=DEFAULT_MODEL, help="checkpoint folder, or bm25 (default: %(default)s)")
    add("--split", default="test", help="the judgements: qrels/SPLIT.tsv (default: test; msmarco has dev)")
    add("--max-length", type=int, help="tokens kept of each text (default: the checkpoint's)")
    add("--query-prompt", help="text put before every query (default: the checkpoint's)")
    add("--document-prompt", help="text put before every document (default: the checkpoint's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="compute dtype: auto, float32, bfloat16, float16 (default: auto)")
    add("--batch-tokens", type=int, default=BATCH_TOKENS, help="padded tokens a batch (default: %(default)s)")
    add("--k", type=int, default=1000, help="hits kept for each query, at least 100 (default: %(default)s)")
    add("--run", metavar="FILE", help="write a TREC run; {dataset} in FILE stands for the dataset's name")
    add("--json", metavar="FILE", help="write results and settings; rewritten after each dataset")
    add("--keep-identical-ids", action="store_true", help="keep documents that have the query's id")
    args = parser.parse_args(argv)
    for name, least in (("k", 100), ("batch_tokens", 1), ("max_length", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.run and len(args.dataset) > 1 and "{dataset}" not in args.run:
        parser.error(f"--run {args.run}: several datasets need {{dataset}} in the file's name")
    return args


def run_evaluation(args: argparse.Namespace) -> list[dict]:
    """Everything `main` does, InputError not caught; the results as in --json."""
    if args.model == DEFAULT_MODEL and not Path(args.model).exists():
        raise InputError(f"{args.model} does not exist: train it (`python dream.py train`) or pass --model")
    # Every dataset is checked before the first is encoded: a typing error should not wait for hours of work.
    datasets = [resolve_dataset(name, args.split) for name in args.dataset]
    settings = {name: getattr(args, name) for name in ("model", "split", "k", "keep_identical_ids")}
    if args.model == "bm25":
        settings |= BM25([]).describe()
    else:
        device = pick_device(args.device)
        dtype, reason = pick_dtype(args.dtype, device)
        embedder = load_embedder(args.model, device, dtype, args.max_length)
        for kind, prompt in (("query", args.query_prompt), ("document", args.document_prompt)):
            if prompt is not None:
                embedder.prompts[kind] = prompt
        settings |= {"checkpoint": str(resolve_run(args.model)), "device": str(device)}
        settings["batch_tokens"] = args.batch_tokens
        settings |= {**embedder.describe(), "dtype_reason": reason}
    settings["torch"] = torch.__version__
    for name, value in settings.items():
        print(f"{name}: {value}")

    width = max(len(name) for name in ["dataset", *(dataset.name for dataset in datasets)])
    columns = "  ".join(f"{name:>10}" for name in ("documents", "NDCG@10", "recall@100", "MAP", "MRR@10"))
    print(f"\n{'dataset':{width}}  {'split':8}  {'queries':>8}  {columns}", flush=True)
    results = []
    for dataset in datasets:
        started = time.perf_counter()
        if args.model == "bm25":
            hits = bm25_hits(dataset, args.k + MARGIN)
        else:
            hits = dense_hits(embedder, dataset, args.k + MARGIN, args.batch_tokens)
        result, run = evaluate_hits(dataset, hits, args.k, args.keep_identical_ids)
        results.append(result | {"seconds": round(time.perf_counter() - started, 1)})
        print_result(result, width)
        if args.run:
            tag = "_".join(Path(args.model).name.split()) or "dream"
            write_run(Path(args.run.replace("{dataset}", dataset.name)), run, tag)
        if args.json:
            content = {"results": results, "settings": settings}
            write_atomic(Path(args.json), json.dumps(content, indent=2) + "\n")
    if len(results) > 1:
        average = np.mean([result["metrics"]["ndcg@10"] for result in results])
        print(f"mean NDCG@10 of {len(results)} datasets: {average:.4f}")
    return results


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    args = parse_arguments(argv)
    try:
        run_evaluation(args)
    except InputError as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
