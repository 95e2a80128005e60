"""The yardstick: encode a corpus, search it exactly, score it the way pytrec_eval and BEIR do.

    python eval.py --dataset demo                            the demo's test set, model runs/demo
    python eval.py --dataset demo --model bm25               the same without learning
    python eval.py --dataset scifact nfcorpus --model runs/big bm25 --json scores.json
    python eval.py --dataset beir13 --model yixuantt/DREAM-0.5B --device cuda --batch-tokens 131072
    python eval.py --dataset rteb --model Qwen/Qwen3-Embedding-0.6B --max-length 8192 --mteb results
    torchrun --nproc-per-node 8 eval.py --dataset beir --model runs/big --embeddings kept
    python eval.py --dataset path/to/folder other.zip --split dev --trec {dataset}.trec

Public datasets are fetched once, by their names: BEIR's fifteen (groups beir, beir13, beir9; cqadupstack is
the mean of its twelve parts) from $BEIR_URL into $DREAM_CACHE (~/.cache/dream), RTEB's open tasks (rteb)
through the Hugging Face hub. Anything else is the path of a folder or zip in BEIR's or mteb's layout; write
./scifact for a folder that bears a public name.

The commands are the same on a CPU and on a GPU, which is taken when there is one; raise --batch-tokens as its
memory allows. A corpus is streamed from disk: in memory are its ids, the texts and embeddings of one block of
documents, and the best hits so far of every query.

The order of hits is pytrec_eval's: score descending, compared as float32, then document id descending as a
string. Gains are linear, and a judgement below 1 is not relevant. Every judged query counts: one missing from
the run scores 0 (pytrec_eval leaves it out of the mean), as does one without a relevant document. A document
with the query's own id is dropped, as in BEIR (--identical-ids).
"""

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats.catalogue import GROUPS, check_names, members, read_datasets
from formats.datasets import RetrievalDataset
from formats.embedders import hidden_size, load_embedder
from formats.kept import STORED, EmbeddingStore, fingerprint
from formats.results import MTEB_DROPS, Outputs, average
from model import BATCH_TOKENS, Embedder
from related.bm25 import BM25
from support import launch
from support.files import InputError
from support.flags import add_flags, flag
from support.runs import DEFAULT_MODEL, locate
from support.show import print_averages, print_header, print_result, print_told, progress

CUTOFFS = (1, 3, 5, 10, 100, 1000)
DOCUMENT_BLOCK = 32_768  # documents read, sorted by length and encoded at a time
MARGIN = 128  # hits kept beyond k: top-k breaks ties arbitrarily, the final sort by id needs the tied ones
IDENTICAL_IDS = "documents with the query's id: beir (default) drops all, mteb (default with --mteb) some"
MODELS = f"folder, owner/name[@revision], or bm25; several in one table (default: {DEFAULT_MODEL})"
DATASETS = f"demo, {', '.join(GROUPS)}, names of BEIR or RTEB, folders or .zip in their layouts"
GONE = {
    "--geometry": "is now a command of its own: python -m tools.geometry",
    "--compile": "was removed: its gain was never measured",
}


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
    Returns scores (Q, k) float32, descending, and indices (Q, k) int64 into `documents`, plus `offset`; fewer
    columns where there are fewer documents. Of documents tied at the cut, arbitrary ones are kept. `best` is
    an earlier result to go on from: so a corpus is searched block by block.
    """
    none = torch.empty(len(queries), 0, device=queries.device)
    scores, indices = best or (none, none.long())  # (Q, K)
    with launch.full_precision():
        for first in range(0, len(documents), document_tile):
            tile = documents[first : first + document_tile].to(queries.device).float()  # (n, C)
            parts = []
            for start in range(0, len(queries), query_tile):
                rows = slice(start, start + query_tile)
                top = (queries[rows].float() @ tile.T).topk(min(k, len(tile)), dim=1)  # (q, n')
                candidates = torch.cat([scores[rows], top.values], dim=1)  # (q, K + n')
                numbers = torch.cat([indices[rows], top.indices + first + offset], dim=1)
                values, kept = candidates.topk(min(k, candidates.shape[1]), dim=1)
                parts.append((values, numbers.gather(1, kept)))
            scores, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return scores, indices


class Hits(NamedTuple):
    """What a search found for each query of a dataset, in the order of its queries."""

    scores: np.ndarray  # (Q, K) float32, descending; -inf where there is no hit
    indices: np.ndarray  # (Q, K) int64 into doc_ids; -1 where there is no hit
    doc_ids: Sequence[str]  # the ids of the whole corpus


def dense_hits(
    embedder: Embedder,
    dataset: RetrievalDataset,
    k: int,
    batch_tokens: int | None = None,
    document_block: int = DOCUMENT_BLOCK,
    quiet: bool = False,
    store: "EmbeddingStore | None" = None,
) -> Hits:
    """Exact search over a streamed corpus; texts and embeddings of one block at a time are in memory.

    Several processes (torchrun) each encode and search every so-manieth block, and all get the same hits.
    store: keeps the embeddings; blocks that it holds are not encoded again.
    """
    rank, processes = launch.join_processes()
    queries = embedder.encode(list(dataset.queries.values()), "query", batch_tokens)  # (Q, C)
    total = dataset.num_documents
    # Blocks that are kept are the same for any number of processes.
    size = document_block if store is not None else min(document_block, math.ceil(total / processes))
    blocks = [(start, min(start + size, total)) for start in range(0, total, size)][rank::processes]

    def tokenized(missing: list[tuple[int, int]]) -> Iterator[list[np.ndarray]]:
        for block in missing:
            token_ids = embedder.tokenize([text for _, text in dataset.corpus(*block)], "document")
            yield [np.array(ids, np.int32) for ids in token_ids]  # lists take ten times the memory

    # Asked once: another process that fills the same store must not change what is read ahead.
    missing = [block for block in blocks if store is None or not store.holds(*block)]
    remaining = sum(end - start for start, end in missing)
    best = None
    with progress(
        desc=f"{dataset.name}: encode", unit="tok", unit_scale=True, hidden=quiet or rank > 0
    ) as bar:
        ahead = launch.one_ahead(tokenized(missing))
        for start, end in blocks:
            if store is not None and (start, end) not in missing:
                documents = store.read(start, end)
            else:
                block = next(ahead)
                # As far as can be told: what remains is like this block.
                bar.total = bar.n + round(sum(map(len, block)) * remaining / (end - start))
                documents = embedder.embed_all(block, batch_tokens, bar)  # (n, C)
                remaining -= end - start
                if store is not None:
                    documents = store.write(start, end, documents)
            best = search(queries, documents, k, offset=start, best=best)
    # With more processes than blocks, some have found nothing.
    scores, indices = best or search(queries, queries[:0], k)
    if processes > 1:
        scores, indices = launch.merge_hits(scores, indices, k, processes)
    return Hits(scores.cpu().numpy(), indices.cpu().numpy(), dataset.documents.ids)


def bm25_hits(dataset: RetrievalDataset, k: int, quiet: bool = False) -> Hits:
    """BM25 over a streamed corpus; the index is in memory, the texts are not."""
    name, total = f"{dataset.name}: index", dataset.num_documents
    texts = (text for _, text in progress(dataset.corpus(), desc=name, total=total, unit="doc", hidden=quiet))
    scores, indices = BM25(texts).search(list(dataset.queries.values()), k, quiet)
    return Hits(scores, indices, dataset.documents.ids)


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
    dataset: RetrievalDataset, hits: Hits, k: int, keep_identical_ids: bool = False, per_query: bool = False
) -> tuple[dict, dict[str, dict[str, float]]]:
    """The result of one dataset as it stands in --json, and its run cut at k."""
    run, ambiguous = make_run(dataset.queries, hits, k, keep_identical_ids)
    table = score_queries(run, dataset.qrels, [cutoff for cutoff in CUTOFFS if cutoff <= k])
    result: dict = {
        "dataset": dataset.name,
        "split": dataset.split,
        "queries": len(dataset.qrels),
        "documents": len(hits.doc_ids),
        "fingerprint": dataset.fingerprint,
        "revision": dataset.revision,
        "part_of": dataset.benchmark,
        "identical_ids": "kept" if keep_identical_ids else "dropped",
        "metrics": {name: round(float(values.mean()), 5) for name, values in table.items()},
        "queries_without_hits": sum(not found for found in run.values()),
        "queries_with_ties_beyond_k": int(ambiguous),
    }
    if dataset.groups:
        result["groups"] = {}
        for group, members in dataset.groups.items():
            rows = np.array([query_id in members for query_id in dataset.qrels])  # (Q,)
            means = {name: round(float(values[rows].mean()), 5) for name, values in table.items()}
            result["groups"][group] = {"queries": int(rows.sum()), **means}
    if per_query:
        scores = map(float, table["ndcg@10"])
        result["ndcg@10_per_query"] = {q: round(x, 5) for q, x in zip(dataset.qrels, scores, strict=True)}
    return result, run


def evaluate_embedder(
    embedder: Embedder,
    dataset: RetrievalDataset,
    k: int = 100,
    batch_tokens: int | None = None,
    keep_identical_ids: bool = False,
    quiet: bool = True,
    per_query: bool = False,
) -> dict:
    """Encode, search and score one dataset: {"dataset", "split", "queries", "documents", "metrics", ...}."""
    hits = dense_hits(embedder, dataset, k + MARGIN, batch_tokens, quiet=quiet)
    return evaluate_hits(dataset, hits, k, keep_identical_ids, per_query)[0]


@dataclass
class Settings:
    """What `eval.py` is told, a flag a line. 0 and "" stand for "not given"."""

    dataset: list[str] = flag([], DATASETS, "what is scored")
    model: list[str] = flag([DEFAULT_MODEL], MODELS)
    split: str = flag("", "the judgements: qrels/SPLIT.tsv (default: test; msmarco: dev)")
    max_length: int = flag(0, "tokens kept of each text (default: the checkpoint's)", "how it embeds")
    query_prompt: str | None = flag(None, "text put before every query (default: the checkpoint's)")
    document_prompt: str | None = flag(None, "text put before every document (default: the checkpoint's)")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1", "memory and speed")
    dtype: str = flag("auto", "compute dtype: auto, float32, bfloat16, float16")
    batch_tokens: int = flag(0, "padded tokens a batch (default: 2048 on a CPU, 16384 on a GPU)")
    k: int = flag(1000, "hits kept for each query, at least 100", "what is written", least=100)
    identical_ids: str = flag("", IDENTICAL_IDS, choices=("beir", "mteb", "keep"))
    json: str = flag("", "write results and settings; rewritten after each dataset", metavar="FILE")
    per_query: bool = flag(False, "with each query's NDCG@10 in --json")
    trec: str = flag("", "write a TREC run; {dataset} and {model} in FILE are their names", metavar="FILE")
    mteb: str = flag("", "write result files that mteb reads", metavar="DIR")
    embeddings: str = flag("", "keep the documents' embeddings there, and reuse them", metavar="DIR")
    embeddings_dtype: str = flag("float32", "as what; half precision halves the disk", choices=tuple(STORED))


def outputs_of(settings: Settings) -> Outputs:
    return Outputs(settings.json, settings.trec, settings.mteb, settings.embeddings)


def parse_arguments(argv: list[str] | None) -> Settings:
    usage = "eval.py --dataset NAME ... [flags]"
    parser = launch.ArgumentParser("eval.py", usage=usage, description=__doc__, gone=GONE)
    add_flags(parser, Settings)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    settings = Settings(**given)
    if not settings.dataset:
        parser.error("the following arguments are required: --dataset")
    for flag_, prompt in (("query", settings.query_prompt), ("document", settings.document_prompt)):
        if prompt and not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            parser.error(f"--{flag_}-prompt: not UTF-8")
    settings.identical_ids = settings.identical_ids or ("mteb" if settings.mteb else "beir")
    settings.model = list(dict.fromkeys(settings.model))
    try:
        outputs_of(settings).check_names(members(settings.dataset), settings.model)
    except InputError as error:
        parser.error(str(error))
    return settings


def open_model(name: str, folder: Path | None, settings: Settings) -> tuple[Embedder | None, dict]:
    """What embeds, and what --json says of it; BM25 has no folder, and nothing embeds. Raises InputError."""
    told = {"model": name, "k": settings.k, "identical_ids": settings.identical_ids}
    embedder, revision = None, "no_revision_available"
    if folder is None:
        told |= BM25([]).describe()
    else:
        device = launch.pick_device(settings.device)
        dtype, reason = launch.pick_dtype(settings.dtype, device, hidden_size(folder))
        embedder = load_embedder(folder, device, dtype, settings.max_length or None)
        prompts = {"query": settings.query_prompt, "document": settings.document_prompt}
        embedder.prompts |= {kind: text for kind, text in prompts.items() if text is not None}
        told |= {"checkpoint": str(folder), "device": str(device), "processes": launch.join_processes()[1]}
        told |= {"batch_tokens": settings.batch_tokens or BATCH_TOKENS[device.type]}
        if settings.embeddings:
            told |= {"embeddings_dtype": settings.embeddings_dtype, "weights": fingerprint(embedder)}
        told |= {**embedder.describe(), "dtype_reason": reason}
        if others := sorted(set(embedder.prompts) - {"query", "document"}):
            print(f"note: {name}: prompts that are not used: {', '.join(others)}; see --query-prompt")
        revision = folder.name if folder.parent.name == "snapshots" else revision
    told |= {"model_revision": revision, "code": launch.code_version(), "torch": torch.__version__}
    return embedder, told


def run_evaluation(settings: Settings) -> dict[str, list[dict]]:
    """Evaluate models on datasets, print the table, write what is asked for: {model: results as in --json}.

    Raises InputError.
    """
    rank, _ = launch.join_processes()
    check_names(members(settings.dataset))  # before anything is fetched
    outputs = outputs_of(settings)
    outputs.check_writable()
    folders = {name: None if name == "bm25" else locate(name) for name in settings.model}
    models = {name: open_model(name, folder, settings) for name, folder in folders.items()}
    datasets = read_datasets(settings.dataset, settings.split or None)
    names = [dataset.name for dataset in datasets]
    outputs.check_names(names, settings.model)
    told = {name: how for name, (_, how) in models.items()}
    print_told(list(told.values()))
    form = print_header(names, settings.model)
    results: dict[str, list[dict]] = {name: [] for name in models}
    for dataset, (name, (embedder, how)) in itertools.product(datasets, models.items()):
        started = time.perf_counter()
        wanted = min(settings.k + MARGIN, dataset.num_documents)
        if embedder is None:
            hits = bm25_hits(dataset, wanted)
        else:
            store = None
            if settings.embeddings:
                kept_as = STORED[settings.embeddings_dtype]
                store = EmbeddingStore(Path(settings.embeddings), embedder, dataset, kept_as, how["weights"])
            hits = dense_hits(embedder, dataset, wanted, settings.batch_tokens, store=store)
        rule = settings.identical_ids
        keep = rule == "keep" or rule == "mteb" and dataset.task not in MTEB_DROPS
        result, run = evaluate_hits(dataset, hits, settings.k, keep, settings.per_query)
        results[name].append(result | {"seconds": round(time.perf_counter() - started, 1)})
        if rank == 0:  # the others neither write nor print
            outputs.write(name, run, datasets, results, told)
            print_result(result, form.format(dataset.name, name))
    print_averages({name: average(own) for name, own in results.items()})
    return results


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    settings = parse_arguments(argv)

    def work() -> None:
        run_evaluation(settings)

    return launch.run_command("eval.py", work)


if __name__ == "__main__":
    sys.exit(main())
