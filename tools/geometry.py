"""How embeddings lie on the sphere: alignment and uniformity (Wang and Isola 2020, arXiv 2005.10242).

    python -m tools.geometry --dataset demo
    python -m tools.geometry --dataset scifact nfcorpus --model runs/big --json geometry.json

For each dataset, up to 5,000 pairs of a query and a relevant document, and as many with a random document:
alignment, uniformity, mean cosines, how often a relevant pair's cosine exceeds a random one's (AUC), and the
cosines as two columns of bars.
"""

import json
import math
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats.catalogue import expand_names, resolve_datasets
from formats.datasets import RetrievalDataset
from formats.embedders import load_embedder
from model import Embedder
from support.files import check_writable, write_atomic
from support.flags import limited
from support.launch import ArgumentParser, pick_device, pick_dtype, run_command
from support.runs import DEFAULT_MODEL

GEOMETRY_PAIRS = 5000  # sampled from a dataset
COSINE_EDGES = np.arange(-20, 21) / 20  # of its histograms' bins: the same for all, to be compared


class PairSample(NamedTuple):
    """Query-document pairs of a dataset, in numbers of the lists beside them."""

    queries: list[str]  # ids, each once
    documents: list[int]  # numbers in the corpus, each once; all are relevant to some query of the sample
    relevant: np.ndarray  # (P, 2) int64
    random: np.ndarray  # (R, 2) int64, R <= P


def sample_pairs(dataset: RetrievalDataset, limit: int = GEOMETRY_PAIRS, seed: int = 0) -> PairSample:
    """Up to `limit` pairs of a query and a relevant document; for each, one more with the same query.

    Its document is drawn from the sample's that are not relevant to the query; a query to which all are has
    no such pair. A judgement above 0 is relevant. A document with the query's own id is in no pair.
    """
    judged = {q: {d for d, gain in own.items() if gain > 0 and d != q} for q, own in dataset.qrels.items()}
    wanted = set().union(*judged.values())
    numbers = {d: number for number, d in enumerate(dataset.documents.ids) if d in wanted}
    pairs = [(q, d) for q, own in judged.items() for d in sorted(own) if d in numbers]
    generator = np.random.default_rng(seed)
    pairs = [pairs[i] for i in np.sort(generator.permutation(len(pairs))[:limit])]
    queries = {q: i for i, q in enumerate(dict.fromkeys(q for q, _ in pairs))}
    documents = {d: i for i, d in enumerate(dict.fromkeys(d for _, d in pairs))}
    random = []
    for query, _ in pairs:
        excluded = [documents[d] for d in (*judged[query], query) if d in documents]
        if len(others := np.delete(np.arange(len(documents)), excluded)):
            random.append((queries[query], generator.choice(others)))
    relevant = [(queries[q], documents[d]) for q, d in pairs]
    both = (np.array(some, np.int64).reshape(-1, 2) for some in (relevant, random))
    return PairSample(list(queries), [numbers[d] for d in documents], *both)


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of the pairs x[i], y[i], (P, C) each (Wang and Isola 2020)."""
    return float((x - y).square().sum(-1).mean())


def uniformity(x: Tensor, tile: int = 512) -> float | None:
    """log of the mean of exp(-2 ||x_i - x_j||^2) over all pairs i < j of x (N, C) (Wang and Isola 2020).

    From 0, all in one point, to about -4, independent directions. None where there is no pair.
    """
    if len(x) < 2:
        return None
    total = x.new_zeros(())
    for start in range(0, len(x), tile):
        distances = torch.cdist(x[start : start + tile], x[start:])  # (tile, N - start)
        total += distances.square().mul(-2).exp().triu(1).sum()
    return math.log(float(total) * 2 / (len(x) * (len(x) - 1)))


def geometry(queries: Tensor, documents: Tensor, relevant: np.ndarray, random: np.ndarray) -> dict:
    """How embeddings lie on the sphere (Wang and Isola 2020, arXiv 2005.10242), as it stands in --json.

    queries (Q, C), documents (D, C): unit vectors; relevant (P, 2), random (R, 2): pairs of their numbers,
    P at least 1. auc: how often a relevant pair's cosine exceeds a random one's. What has no pair is None.
    Everything is computed in float64.
    """
    queries, documents = queries.double(), documents.double()
    x, y = queries[relevant[:, 0]], documents[relevant[:, 1]]  # (P, C)
    near = (x * y).sum(-1).clamp(-1, 1).cpu().numpy()  # (P,)
    far = (queries[random[:, 0]] * documents[random[:, 1]]).sum(-1).clamp(-1, 1).cpu().numpy()  # (R,)
    below, not_above = (np.searchsorted(np.sort(far), near, side) for side in ("left", "right"))  # (P,)
    return {
        "pairs": len(near),
        "random_pairs": len(far),
        "queries": len(queries),
        "documents": len(documents),
        "alignment": alignment(x, y),
        "uniformity": uniformity(torch.cat([queries, documents])),
        "uniformity_queries": uniformity(queries),
        "uniformity_documents": uniformity(documents),
        "cosine_relevant": float(near.mean()),
        "cosine_random": float(far.mean()) if len(far) else None,
        "auc": float((below + not_above).mean() / 2 / len(far)) if len(far) else None,  # ties count half
        "bin_edges": COSINE_EDGES.tolist(),
        "relevant_counts": np.histogram(near, COSINE_EDGES)[0].tolist(),
        "random_counts": np.histogram(far, COSINE_EDGES)[0].tolist(),
    }


def measure_geometry(
    embedder: Embedder, dataset: RetrievalDataset, batch_tokens: int | None = None
) -> dict | None:
    """`geometry` of a dataset's `sample_pairs`; None where fewer than two are relevant.

    Of the corpus, only the sample's documents are read and encoded.
    """
    sample = sample_pairs(dataset)
    if len(sample.relevant) < 2:
        return None
    texts = [dataset.documents[number][1].full_text for number in sample.documents]
    documents = embedder.encode(texts, "document", batch_tokens)  # (D, C)
    queries = embedder.encode([dataset.queries[q] for q in sample.queries], "query", batch_tokens)  # (Q, C)
    return geometry(queries, documents, sample.relevant, sample.random)


def print_geometry(results: list[dict], width: int) -> None:
    """A table of all datasets, then two columns of bars for each: cosines of relevant and of random pairs."""
    heads = "alignment", "all", "queries", "documents", "relevant", "random", "AUC"
    names = "alignment uniformity uniformity_queries uniformity_documents cosine_relevant cosine_random auc"
    print(f"\n{'geometry':{width + 17}} {'uniformity':^29} {'mean cosine':^19}".rstrip())
    print(f"{'dataset':{width}} {'pairs':>6} " + " ".join(f"{head:>9}" for head in heads))
    for result in results:
        figures = "fewer than two relevant pairs: nothing to measure"
        if found := result["geometry"]:
            values = (found[name] for name in names.split())
            figures = " ".join(f"{'-':>9}" if value is None else f"{value:9.4f}" for value in values)
            figures = f"{found['pairs']:6,} {figures}"
        print(f"{result['dataset']:{width}} {figures}")
    for result in results:
        if found := result["geometry"]:
            print(f"\n{result['dataset']}: cosines\n{'':17} {'relevant pairs':42}random pairs")
            counts = np.array([found["relevant_counts"], found["random_counts"]])  # (2, bins)
            used = np.flatnonzero(counts.sum(0))
            for i in range(used[0], used[-1] + 1):
                bars = (f"{'#' * math.ceil(30 * n / counts.max()):30} {n or '':>7}" for n in counts[:, i])
                print(f"  {COSINE_EDGES[i]:5.2f} to {COSINE_EDGES[i + 1]:5.2f}  {'    '.join(bars)}".rstrip())
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says."""
    parser = ArgumentParser("geometry", description=__doc__)
    add = parser.add_argument
    add("--dataset", nargs="+", required=True, metavar="NAME", help="named as in eval.py")
    add("--model", default=DEFAULT_MODEL, help="folder, or owner/name[@revision] (default: %(default)s)")
    add("--split", help="the judgements: qrels/SPLIT.tsv (default: test; msmarco: dev)")
    length = "tokens kept of each text (default: the checkpoint's)"
    add("--max-length", type=limited(int, 1), metavar="N", help=length)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="compute dtype: auto, float32, bfloat16, float16 (default: auto)")
    add("--json", metavar="FILE", help="write the figures and the histograms")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.json:
            check_writable(args.json)
        datasets = [d for name in expand_names(args.dataset) for d in resolve_datasets(name, args.split)]
        device = pick_device(args.device)
        embedder = load_embedder(args.model, device, pick_dtype(args.dtype, device)[0], args.max_length)
        results = [{"dataset": d.name, "geometry": measure_geometry(embedder, d)} for d in datasets]
        if args.json:
            settings = {"model": args.model, **embedder.describe()}
            content = {"results": results, "settings": settings}
            write_atomic(args.json, json.dumps(content, indent=1) + "\n")
        print_geometry(results, max(len(name) for name in ["dataset", *(d.name for d in datasets)]))

    return run_command("geometry", work)


if __name__ == "__main__":
    sys.exit(main())
