"""The yardstick: encode a corpus, search it exactly, score it the way pytrec_eval and BEIR do.

    python eval.py --dataset demo                            the demo's test set, model runs/demo
    python eval.py --dataset demo --model bm25               the same without learning
    python eval.py --dataset scifact nfcorpus --model runs/big --json scores.json
    python eval.py --dataset beir13 --model yixuantt/DREAM-0.5B --device cuda --batch-tokens 131072
    python eval.py --dataset rteb --model Qwen/Qwen3-Embedding-0.6B --max-length 8192 --mteb results
    torchrun --nproc-per-node 8 eval.py --dataset beir --model runs/big --embeddings kept
    python eval.py --dataset path/to/folder other.zip --split dev --trec {dataset}.trec
    python eval.py --dataset scifact --model runs/big --geometry      alignment and uniformity as well

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

import argparse
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from data import (
    Corpus,
    InputError,
    RetrievalDataset,
    cache_folder,
    card_configs,
    check_writable,
    fetch_repository,
    fetch_zip,
    load_dataset,
    remote_size,
    to_device,
    token_batches,
    write_atomic,
)
from model import (
    Embedder,
    find_folder,
    join_processes,
    load_embedder,
    pick_device,
    pick_dtype,
    resolve_run,
    run_command,
)

CUTOFFS = (1, 3, 5, 10, 100, 1000)
# Padded tokens a batch: on a CPU small batches of equal lengths stay in its caches, a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
DOCUMENT_BLOCK = 32_768  # documents read, sorted by length and encoded at a time
MARGIN = 128  # hits kept beyond k: top-k breaks ties arbitrarily, the final sort by id needs the tied ones
DEFAULT_MODEL = "runs/demo"
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GEOMETRY_PAIRS = 5000  # sampled from a dataset for --geometry
COSINE_EDGES = np.arange(-20, 21) / 20  # of its histograms' bins: the same for all, to be compared
MTEB_LAYOUT = "2.26.24"  # the mteb whose result files --mteb writes
MTEB_DROPS = {"MSMARCO", "FiQA2018", "ArguAna", "QuoraRetrieval", "FEVER"}  # identical ids, elsewhere kept

# What is public under a name. BEIR: the task's name in mteb, and the md5 that its authors list for the zip.
BEIR_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
BEIR = {
    "msmarco": ("MSMARCO", "444067daf65d982533ea17ebd59501e4"),
    "trec-covid": ("TRECCOVID", "ce62140cb23feb9becf6270d0d1fe6d1"),
    "nfcorpus": ("NFCorpus", "a89dba18a62ef92f7d323ec890a0d38d"),
    "nq": ("NQ", "d4d3d2e48787a744b6f6e691ff534307"),
    "hotpotqa": ("HotpotQA", "f412724f78b0d91183a0e86805e16114"),
    "fiqa": ("FiQA2018", "17918ed23cd04fb15047f73e6c3bd9d9"),
    "arguana": ("ArguAna", "8ad3e3c2a5867cdced806d6503f29b99"),
    "webis-touche2020": ("Touche2020", "46f650ba5a527fc69e0a6521c5a23563"),
    "cqadupstack": ("CQADupstack", "4e41456d7df8ee7760a7f866133bda78"),
    "quora": ("QuoraRetrieval", "18fb154900ba42a600f84b839c173167"),
    "dbpedia-entity": ("DBPedia", "c2a39eb420a3164af735795df012ac2c"),
    "scidocs": ("SCIDOCS", "38121350fc3a4d2f48850f6aff52e4a9"),
    "fever": ("FEVER", "5a818580227bfb4b35bb6fa46d9b6c03"),
    "climate-fever": ("ClimateFEVER", "8b66f0a9126c521bae2bde127b4dc99d"),
    "scifact": ("SciFact", "5f7d1de60b170fc8027bb7898e2efca1"),
}
# RTEB's open tasks by mteb's names: repository and the revision that mteb pins.
RTEB = {
    "AILACasedocs": ("mteb/AILA_casedocs", "4106e6bcc72e0698d714ea8b101355e3e238431a"),
    "AILAStatutes": ("mteb/AILA_statutes", "ebfcd844eadd3d667efa3c57fc5c8c87f5c2867e"),
    "LegalSummarization": ("mteb/legal_summarization", "3bb1a05c66872889662af04c5691c14489cebd72"),
    "FinanceBenchRetrieval": ("mteb/FinanceBenchRetrieval", "c5215673492044833ff5e0dfd9b5fa848d5df0f2"),
    "HC3FinanceRetrieval": ("mteb/HC3FinanceRetrieval", "f7674417d3552fd20e071762bff049137f17b075"),
    "FinQARetrieval": ("mteb/FinQARetrieval", "18dbd07c4e9dc8328d10a53b98f3caad6b7e07d9"),
    "AppsRetrieval": ("CoIR-Retrieval/apps", "f22508f96b7a36c2415181ed8bb76f76e04ae2d5"),
    "DS1000Retrieval": ("mteb/DS1000Retrieval", "26779eaf6daa2b7984cb33ec450817fd188aab30"),
    "HumanEvalRetrieval": ("embedding-benchmark/HumanEval", "ed1f48aca747f10bac146795328e2f03326e7625"),
    "MBPPRetrieval": ("embedding-benchmark/MBPP", "586a1fd6a0c63fdeda3b49c0293559a81c79cdec"),
    "WikiSQLRetrieval": ("mteb/WikiSQLRetrieval", "add6c3faf0d972ebb139b30fa6c4f955d99635c5"),
    "FreshStackRetrieval": ("mteb/FreshStackRetrieval", "6faa3e4ff1c7d31824c32ee0a9dd580aba8bad11"),
    "ChatDoctorRetrieval": (
        "embedding-benchmark/ChatDoctor_HealthCareMagic",
        "50c2986fedffa33b38afd5c1752026f8e9e5ed1d",
    ),
    "CUREv1": ("clinia/CUREv1", "3bcf51c91e04d04a8a3329dfbe988b964c5cbe83"),
    "SWEbenchCodeRetrieval": (
        "embedding-benchmark/SWEbenchCodeRetrieval",
        "440b0e732b8d02c16df2c95352ab6770abe997da",
    ),
    "LegalQuAD": ("mteb/LegalQuAD", "37aa6cfb01d48960b0f8e3f17d6e3d99bf1ebc3e"),
    "MIRACLRetrievalHardNegatives": (
        "mteb/MIRACLRetrievalHardNegatives",
        "d7d94fa4b946cec4a27c84653aa0cf6b33f74a3c",
    ),
}


class Tokenized(NamedTuple):
    """Texts as token ids, each distinct text once."""

    token_ids: list[np.ndarray]  # int32, of the distinct texts
    rows: np.ndarray  # (N,) int64: which of them each text is

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


def tokenize(embedder: Embedder, texts: Iterable[str], kind: str) -> Tokenized:
    """kind: "query" or "document", which decides the prompt."""
    numbers: dict[str, int] = {}
    rows = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    return Tokenized([np.array(ids, np.int32) for ids in embedder.tokenize(list(numbers), kind)], rows)


@torch.no_grad()
def embed_all(
    embedder: Embedder, tokenized: Tokenized, batch_tokens: int | None = None, bar: tqdm | None = None
) -> Tensor:
    """Embeddings (N, C) of at least one text, float32, unit length, on the embedder's device.

    In batches of similar length whose padded size is at most `batch_tokens` (default: by device); one that
    the device's memory does not hold is halved. `bar` counts tokens. Raises InputError when an embedding is
    not finite, or memory does not hold a single text.
    """
    lengths = [len(ids) for ids in tokenized.token_ids]
    batch_tokens = batch_tokens or BATCH_TOKENS[embedder.device.type]
    embeddings = torch.empty(len(lengths), embedder.dim, device=embedder.device)  # (distinct texts, C)
    training = embedder.training
    embedder.eval()  # no dropout, also when asked in the middle of a training
    batches = deque(token_batches(lengths, batch_tokens))
    while batches:
        batch = batches.popleft()
        rows = to_device(torch.tensor(batch), embedder.device)
        try:
            embeddings[rows] = embedder.embed([tokenized.token_ids[i] for i in batch])  # (B, C)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                told = str(error).splitlines()[0][:200]
                raise InputError(
                    f"out of memory with one text of {lengths[batch[0]]} tokens ({told})"
                ) from error
            half = len(batch) // 2
            batches.extendleft((batch[half:], batch[:half]))
            continue
        if bar is not None:
            bar.update(sum(lengths[i] for i in batch))
    embedder.train(training)
    if not embeddings.isfinite().all():
        raise InputError("the model's embeddings are not all finite numbers; try --dtype float32")
    return embeddings[to_device(torch.from_numpy(tokenized.rows), embedder.device)]


def encode(embedder: Embedder, texts: list[str], kind: str, batch_tokens: int | None = None) -> Tensor:
    """`embed_all` of `tokenize`: (N, C) float32 unit vectors of texts of one kind, "query" or "document"."""
    return embed_all(embedder, tokenize(embedder, texts, kind), batch_tokens)


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
    rank, processes = join_processes()
    queries = encode(embedder, list(dataset.queries.values()), "query", batch_tokens)  # (Q, C)
    total = dataset.num_documents
    # Blocks that are kept are the same for any number of processes.
    size = document_block if store is not None else min(document_block, math.ceil(total / processes))
    blocks = [(start, min(start + size, total)) for start in range(0, total, size)][rank::processes]

    def tokenized(missing: list[tuple[int, int]]) -> Iterator[Tokenized]:
        return (tokenize(embedder, (t for _, t in dataset.corpus(*block)), "document") for block in missing)

    # Asked once: another process that fills the same store must not change what is read ahead.
    missing = [block for block in blocks if store is None or not store.holds(*block)]
    remaining = sum(end - start for start, end in missing)
    best = None
    with tqdm(desc=f"{dataset.name}: encode", unit="tok", unit_scale=True, disable=quiet or rank > 0) as bar:
        ahead = one_ahead(tokenized(missing))
        for start, end in blocks:
            if store is not None and (start, end) not in missing:
                documents = store.read(start, end)
            else:
                block = next(ahead)
                # As far as can be told: what remains is like this block.
                bar.total = bar.n + round(block.num_tokens * remaining / (end - start))
                documents = embed_all(embedder, block, batch_tokens, bar)  # (n, C)
                remaining -= end - start
                if store is not None:
                    documents = store.write(start, end, documents)
            best = search(queries, documents, k, offset=start, best=best)
    # With more processes than blocks, some have found nothing.
    scores, indices = best or search(queries, queries[:0], k)
    if processes > 1:
        scores, indices = _merge(scores, indices, k, processes)
    return Hits(scores.cpu().numpy(), indices.cpu().numpy(), dataset.documents.ids)


def _merge(scores: Tensor, indices: Tensor, k: int, processes: int) -> tuple[Tensor, Tensor]:
    """The k best of every process's hits, (Q, k) each."""
    parts = [torch.empty_like(scores) for _ in range(processes)]
    numbers = [torch.empty_like(indices) for _ in range(processes)]
    torch.distributed.all_gather(parts, scores)
    torch.distributed.all_gather(numbers, indices)
    scores, kept = torch.cat(parts, dim=1).topk(k, dim=1)
    return scores, torch.cat(numbers, dim=1).gather(1, kept)


def one_ahead(items: Iterable) -> Iterator:
    """The items, each made in a background thread while the one before it is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, iterator, end)
            yield item


class EmbeddingStore:
    """Embeddings of a corpus on disk: a file a block, written whole or not at all, memory-mapped when read.

    A store belongs to one corpus, one model and one way of embedding: the folder's name is a digest of all of
    that, so nothing stale is ever read, and an encoding that was interrupted goes on where it stopped. Raises
    InputError where the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        embedder: Embedder,
        dataset: RetrievalDataset,
        dtype: torch.dtype,
        fingerprint: str | None = None,  # the embedder's, where it is known: it takes reading all weights
    ):
        how = {**embedder.describe(), "model": fingerprint or embedder.fingerprint(), "stored_as": str(dtype)}
        assert isinstance(dataset.documents, Corpus)  # candidates of a training are not kept
        key = json.dumps(how | {"corpus": dataset.documents.fingerprint}, sort_keys=True)
        self.folder = folder / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        self.dtype, self.dim = dtype, embedder.dim
        self.folder.mkdir(parents=True, exist_ok=True)
        have = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        need, free = dataset.num_documents * self.dim * dtype.itemsize, shutil.disk_usage(self.folder).free
        if need - have > free:
            raise InputError(f"{folder}: {need / 1e9:.1f} GB of embeddings, {free / 1e9:.1f} GB free")
        write_atomic(self.folder / "key.json", key + "\n")

    def _path(self, start: int, end: int) -> Path:
        return self.folder / f"{start:010d}-{end:010d}.safetensors"

    def holds(self, start: int, end: int) -> bool:
        return self._path(start, end).exists()

    def read(self, start: int, end: int) -> Tensor:
        """(end - start, C), a view of the file."""
        path = self._path(start, end)
        try:
            return load_file(path)["embeddings"]
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{path}: not a whole file of embeddings ({error}); delete it") from error

    def write(self, start: int, end: int, embeddings: Tensor) -> Tensor:
        """Keep a block; returns it as it will be read, (end - start, C)."""
        path = self._path(start, end)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        embeddings = embeddings.to("cpu", self.dtype)
        save_file({"embeddings": embeddings}, temporary)
        os.replace(temporary, path)
        return embeddings


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
        sizes = np.array(lengths, np.float32)  # (N,) words in each document
        mean = max(float(sizes.mean(dtype=np.float64)), 1.0) if len(sizes) else 1.0
        self.norms = k1 * (1 - b + b * sizes / mean)  # (N,) float32

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

    def _posting(self, stem_number: int | np.ndarray, document: int | np.ndarray) -> Any:
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
    name, total = f"{dataset.name}: index", dataset.num_documents
    texts = (text for _, text in tqdm(dataset.corpus(), name, total, unit="doc", disable=quiet))
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
    documents = encode(embedder, texts, "document", batch_tokens)  # (D, C)
    queries = encode(embedder, [dataset.queries[q] for q in sample.queries], "query", batch_tokens)  # (Q, C)
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


def write_run(path: Path, run: dict[str, dict[str, float]], tag: str) -> None:
    """A TREC run file: `qid Q0 docid rank score tag`, scores with the nine digits that restore a float32."""
    parts = []
    for query_id, hits in run.items():
        if len(" ".join([query_id, *hits]).split()) != 1 + len(hits):
            raise InputError(f"--trec: query {query_id!r}: a TREC run cannot hold ids with spaces")
        ranked = enumerate(hits.items(), 1)
        lines = (f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n" for rank, (doc_id, score) in ranked)
        parts.append("".join(lines))
    write_atomic(path, "".join(parts))


MIRACL = dict(  # subset and language
    pair.split(":")
    for pair in (
        "ar:ara-Arab bn:ben-Beng de:deu-Latn en:eng-Latn es:spa-Latn fa:fas-Arab fi:fin-Latn fr:fra-Latn "
        "hi:hin-Deva id:ind-Latn ja:jpn-Jpan ko:kor-Kore ru:rus-Cyrl sw:swa-Latn te:tel-Telu th:tha-Thai "
        "yo:yor-Latn zh:zho-Hans"
    ).split()
)
CODE = {  # what RTEB's tasks hold beside English
    **dict.fromkeys(("AppsRetrieval", "DS1000Retrieval", "HumanEvalRetrieval"), ["python-Code"]),
    **dict.fromkeys(("MBPPRetrieval", "SWEbenchCodeRetrieval"), ["python-Code"]),
    "FreshStackRetrieval": ["python-Code", "javascript-Code", "go-Code"],
    "WikiSQLRetrieval": ["sql-Code"],
    "CUREv1": ["eng-Latn"],  # of queries and of documents
}
CURE = (
    "all dentistry_and_oral_health dermatology gastroenterology genetics neuroscience_and_neurology "
    "orthopedic_surgery otorhinolaryngology plastic_surgery psychiatry_and_psychology pulmonology"
).split()
REVELA = (  # the thirteen that Revela reports
    "arguana climate-fever dbpedia-entity fever fiqa hotpotqa nfcorpus nq quora scidocs scifact trec-covid "
    "webis-touche2020"
).split()
GROUPS = {
    "beir": list(BEIR),
    "beir13": REVELA,
    # Which nine DREAM reports is not known to us: these are the nine with fewer than a million documents.
    "beir9": "arguana cqadupstack fiqa nfcorpus quora scidocs scifact trec-covid webis-touche2020".split(),
    # The fourteen open English tasks, most likely those that DREAM reports.
    "rteb": list(RTEB)[:14],
}


def beir_url() -> str:
    """Where BEIR's zips are: $BEIR_URL, or its authors' server."""
    return os.environ.get("BEIR_URL", BEIR_URL).rstrip("/")


def expand_names(names: Iterable[str]) -> list[str]:
    """Groups replaced by their members, each name once; what is missing of BEIR's is told with its size."""
    expanded = list(dict.fromkeys(member for name in names for member in GROUPS.get(name, [name])))
    cache = cache_folder()
    missing = [name for name in expanded if name in BEIR and not (cache / name).is_dir()]
    if missing:
        sizes = {name: remote_size(f"{beir_url()}/{name}.zip") or 0 for name in missing}
        told = ", ".join(f"{n} {size / 1e6:,.0f} MB" if size else f"{n} (?)" for n, size in sizes.items())
        cache.mkdir(parents=True, exist_ok=True)
        free, total = shutil.disk_usage(cache).free, sum(sizes.values())
        print(
            f"to fetch into {cache}: {told}; unpacked about {4 * total / 1e9:.1f} GB, free {free / 1e9:.1f}",
            flush=True,
        )
        if total > free:
            raise InputError(f"{cache}: too little space; set DREAM_CACHE to a folder on a larger disk")
    return expanded


def resolve_datasets(name: str, split: str | None = None, flag: str = "--dataset") -> list[RetrievalDataset]:
    """The dataset of a path or a public name, fetched first if need be; several where it has parts.

    name: `demo`, one of BEIR's names, one of RTEB's tasks, else a folder or .zip in BEIR's or mteb's layout.
    split: None: the usual one (msmarco: dev; else test). Raises InputError, which names `flag`.
    """
    if name == "demo":
        dataset = load_dataset(Path(__file__).parent / "demo" / "test", split or "test")
        dataset.name = dataset.task = "demo"
        return [dataset]
    if name in BEIR:
        task, md5 = BEIR[name]
        folder = fetch_zip(f"{beir_url()}/{name}.zip", cache_folder() / name, md5)
        datasets = _load_parts(folder, name, split or ("dev" if name == "msmarco" else None))
        for dataset in datasets:
            part = dataset.name.removeprefix(name).strip("-")
            dataset.task = f"{task}{part.capitalize()}Retrieval" if part else task
            dataset.revision = f"md5-{md5}"
        return datasets
    if name in RTEB:
        return [_load_task(name, *part) for part in _task_parts(name, split)]
    if name and Path(name).exists():
        return _load_parts(Path(name), Path(name).resolve().name.removesuffix(".zip"), split)
    known = ["demo", *GROUPS, *BEIR, *RTEB]
    close = [other for other in known if name and other.lower().startswith(name.lower())]
    close = close or difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"names: {', '.join(known)}"
    raise InputError(
        f"{flag} {name or repr(name)}: no such folder or .zip, and not a name of a public dataset; {hint}"
    )


def _load_parts(path: Path, name: str, split: str | None) -> list[RetrievalDataset]:
    """The dataset of a folder or zip, or those of its sub-folders (cqadupstack)."""
    parts = sorted(file.parent for file in path.glob("*/corpus.jsonl")) if path.is_dir() else []
    if (path / "corpus.jsonl").exists() or not parts:
        dataset = load_dataset(path, split or "test")
        dataset.name = dataset.task = name
        return [dataset]
    datasets = [load_dataset(part, split or "test") for part in parts]
    for dataset in datasets:
        dataset.benchmark, dataset.name = name, f"{name}-{dataset.name}"
        dataset.task = dataset.name
    return datasets


def _task_parts(name: str, split: str | None) -> list[tuple[str, str, str, str]]:
    """(split, subset in mteb, prefix of its configs, config of its queries) of each part of an RTEB task."""
    if name == "CUREv1":
        return [(part, "en", "", "queries-en") for part in ([split] if split else CURE)]
    if name == "MIRACLRetrievalHardNegatives":
        return [(split or "dev", language, language, "queries") for language in MIRACL]
    return [(split or "test", "default", "", "queries")]


def _load_task(name: str, split: str, subset: str, prefix: str, queries_config: str) -> RetrievalDataset:
    """A part of an RTEB task from the hub: its card first, then only the files that the card names for it."""
    repository, revision = RTEB[name]
    folder = fetch_repository(f"{repository}@{revision}", ["README.md"], "dataset")
    wanted = [
        f"{prefix}-{part}" if prefix else part for part in ("corpus", queries_config, "qrels", "default")
    ]
    patterns = [
        path
        for config, splits in card_configs(folder).items()
        for path in itertools.chain(*splits.values())
        if config in wanted
    ]
    patterns = ["README.md", *(patterns or ["*.jsonl", "*.tsv", "*.parquet"])]
    folder = fetch_repository(f"{repository}@{revision}", patterns, "dataset")
    dataset = load_dataset(folder, split, prefix, queries_config)
    dataset.name, dataset.task, dataset.subset = name, name, subset
    if name in ("CUREv1", "MIRACLRetrievalHardNegatives"):
        dataset.benchmark, dataset.name = name, f"{name}-{prefix or split}"
    dataset.revision = revision
    return dataset


def _languages(dataset: RetrievalDataset) -> list[str]:
    """As mteb names them: language and script."""
    if dataset.task == "MIRACLRetrievalHardNegatives":
        return [MIRACL[dataset.subset]]
    return ["deu-Latn"] if dataset.task == "LegalQuAD" else ["eng-Latn", *CODE.get(dataset.task, [])]


def average(results: list[dict]) -> dict[str, dict[str, float]]:
    """Unweighted means: of each benchmark over its parts, and, as "mean", over benchmarks and datasets."""
    members: dict[str, list[dict]] = {}
    for result in results:
        members.setdefault(result["part_of"] or result["dataset"], []).append(result["metrics"])
    means = {name: _mean(metrics) for name, metrics in members.items()}
    averages = {name: means[name] for name, metrics in members.items() if len(metrics) > 1}
    return averages | ({"mean": _mean(list(means.values()))} if len(means) > 1 else {})


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(m[name] for m in metrics) / len(metrics), 5) for name in metrics[0]}


def write_mteb(folder: Path, model: str, revision: str, results: list[tuple[RetrievalDataset, dict]]) -> None:
    """Result files as mteb writes and reads them: FOLDER/results/MODEL/REVISION/TASK.json."""
    folder = folder / "results" / model.replace("/", "__").replace(" ", "_") / revision
    tasks: dict[str, list[tuple[RetrievalDataset, dict]]] = {}
    for dataset, result in results:
        tasks.setdefault(dataset.task, []).append((dataset, result))
    for task, parts in tasks.items():
        scores: dict[str, list[dict]] = {}
        for dataset, result in parts:
            metrics = {name.replace("@", "_at_"): value for name, value in result["metrics"].items()}
            row = {**metrics, "main_score": metrics["ndcg_at_10"], "hf_subset": dataset.subset}
            scores.setdefault(dataset.split, []).append(row | {"languages": _languages(dataset)})
        content = {
            "dataset_revision": parts[0][0].revision or parts[0][0].fingerprint,
            "task_name": task,
            "mteb_version": MTEB_LAYOUT,
            "scores": scores,
            "evaluation_time": sum(result["seconds"] for _, result in parts),
        }
        write_atomic(folder / f"{task}.json", json.dumps(content, indent=2) + "\n")
    write_atomic(folder / "model_meta.json", json.dumps({"name": model, "revision": revision}) + "\n")


def code_version() -> str | None:
    """The commit of this code, with -dirty where it was changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, which takes no abbreviations and names the flag that a mistyped one may stand for."""

    def __init__(self, prog: str | None = None, **options: Any):
        super().__init__(prog, allow_abbrev=False, **options)

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        for flag in (text.partition("=")[0] for text in unknown if text.startswith("-")):
            known = [name for action in self._actions for name in action.option_strings]
            if close := difflib.get_close_matches(flag, known, 1):
                self.error(f"unrecognized arguments: {flag}; did you mean {close[0]}?")
        return namespace, unknown


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("eval.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    names = f"demo, {', '.join(GROUPS)}, a BEIR name, an RTEB task, or a folder or .zip in their layout"
    add("--dataset", nargs="+", required=True, metavar="NAME", help=names)
    add(
        "--model", default=DEFAULT_MODEL, help="folder, owner/name[@revision], or bm25 (default: %(default)s)"
    )
    add("--split", help="the judgements: qrels/SPLIT.tsv (default: test; msmarco: dev)")
    add("--max-length", type=int, help="tokens kept of each text (default: the checkpoint's)")
    add("--query-prompt", help="text put before every query (default: the checkpoint's)")
    add("--document-prompt", help="text put before every document (default: the checkpoint's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="compute dtype: auto, float32, bfloat16, float16 (default: auto)")
    add(
        "--compile",
        action="store_true",
        help="torch.compile the model, which takes minutes; its gain on a GPU is not measured",
    )
    sizes = ", ".join(f"{number} on {device}" for device, number in BATCH_TOKENS.items())
    add("--batch-tokens", type=int, help=f"padded tokens a batch (default: {sizes})")
    add("--k", type=int, default=1000, help="hits kept for each query, at least 100 (default: %(default)s)")
    add("--trec", metavar="FILE", help="write a TREC run; {dataset} in FILE stands for the dataset's name")
    add("--json", metavar="FILE", help="write results and settings; rewritten after each dataset")
    add("--per-query", action="store_true", help="with each query's NDCG@10 in --json")
    pairs = f"alignment, uniformity and cosines of up to {GEOMETRY_PAIRS:,} query-document pairs as well"
    add("--geometry", action="store_true", help=pairs)
    add("--embeddings", metavar="DIR", help="keep the documents' embeddings there, and reuse them")
    kept = "as what they are kept (default: float32; half precision halves the disk)"
    add("--embeddings-dtype", choices=list(STORED), default="float32", help=kept)
    add("--mteb", metavar="DIR", help="write result files that mteb reads")
    rules = "documents that have the query's id: beir drops them, mteb only in some tasks (default: beir, or "
    rules += "mteb with --mteb)"
    add("--identical-ids", choices=["beir", "mteb", "keep"], help=rules)
    args = parser.parse_args(argv)
    for name, least in (("k", 100), ("batch_tokens", 1), ("max_length", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.trec and "{dataset}" not in args.trec and (len(args.dataset) > 1 or args.dataset[0] in GROUPS):
        parser.error(f"--trec {args.trec}: several datasets need {{dataset}} in the file's name")
    for flag, prompt in (("query", args.query_prompt), ("document", args.document_prompt)):
        if prompt and not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            parser.error(f"--{flag}-prompt: not UTF-8")
    args.identical_ids = args.identical_ids or ("mteb" if args.mteb else "beir")
    return args


def run_evaluation(args: argparse.Namespace) -> list[dict]:
    """Everything `main` does, InputError not caught; the results as in --json."""
    rank, processes = join_processes()
    if args.model == DEFAULT_MODEL and not Path(args.model).exists():
        raise InputError(f"{args.model} does not exist: train it (`python dream.py train`) or pass --model")
    # Every dataset is checked before the first is encoded: a typing error should not wait for hours of work.
    datasets = [d for name in expand_names(args.dataset) for d in resolve_datasets(name, args.split)]
    names = Counter(dataset.name for dataset in datasets)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"--dataset: several are called {twice[0]!r}; give each folder a name of its own")
    for path in (args.json, *(args.trec.replace("{dataset}", d.name) for d in datasets if args.trec)):
        if path:
            check_writable(path)
    for path in (args.mteb, args.embeddings):
        if path:
            check_writable(path, folder=True)
    if args.trec and len(datasets) > 1 and "{dataset}" not in args.trec:
        raise InputError(f"--trec {args.trec}: several datasets need {{dataset}} in the file's name")
    settings = {name: getattr(args, name) for name in ("model", "k", "identical_ids")}
    revision = "no_revision_available"
    if args.model == "bm25":
        settings |= BM25([]).describe()
    else:
        device = pick_device(args.device)
        dtype, reason = pick_dtype(args.dtype, device)
        folder = find_folder(resolve_run(args.model))
        embedder = load_embedder(folder, device, dtype, args.max_length)
        if args.compile:
            embedder.decoder.compile(dynamic=True)
        for kind, prompt in (("query", args.query_prompt), ("document", args.document_prompt)):
            if prompt is not None:
                embedder.prompts[kind] = prompt
        settings |= {"checkpoint": str(folder), "device": str(device), "processes": processes}
        args.batch_tokens = args.batch_tokens or BATCH_TOKENS[device.type]
        settings |= {"batch_tokens": args.batch_tokens, "compiled": args.compile}
        if args.embeddings:
            settings["embeddings_dtype"] = args.embeddings_dtype
            fingerprint = embedder.fingerprint()
        settings |= {**embedder.describe(), "dtype_reason": reason}
        revision = folder.name if folder.parent.name == "snapshots" else revision
    settings |= {"model_revision": revision, "code": code_version(), "torch": torch.__version__}
    for name, value in settings.items():
        print(f"{name}: {value}")
    if args.model != "bm25" and (others := sorted(set(embedder.prompts) - {"query", "document"})):
        print(f"note: prompts that are not used: {', '.join(others)}; --query-prompt takes a prompt's text")

    width = max(len(name) for name in ["dataset", *(dataset.name for dataset in datasets)])
    columns = "  ".join(f"{name:>10}" for name in ("documents", "NDCG@10", "recall@100", "MAP", "MRR@10"))
    print(f"\n{'dataset':{width}}  {'split':8}  {'queries':>8}  {columns}", flush=True)
    results = []
    for dataset in datasets:
        started = time.perf_counter()
        wanted = min(args.k + MARGIN, dataset.num_documents)
        if args.model == "bm25":
            hits = bm25_hits(dataset, wanted)
        else:
            store = None
            if args.embeddings:
                kept_as = STORED[args.embeddings_dtype]
                store = EmbeddingStore(Path(args.embeddings), embedder, dataset, kept_as, fingerprint)
            hits = dense_hits(embedder, dataset, wanted, args.batch_tokens, store=store)
        keep = args.identical_ids == "keep" or args.identical_ids == "mteb" and dataset.task not in MTEB_DROPS
        result, run = evaluate_hits(dataset, hits, args.k, keep, args.per_query)
        results.append(result | {"seconds": round(time.perf_counter() - started, 1)})
        if rank:  # the first process alone writes
            continue
        if args.geometry and args.model != "bm25":
            results[-1]["geometry"] = measure_geometry(embedder, dataset, args.batch_tokens)
        if args.trec:
            tag = "_".join(Path(args.model).name.split()) or "dream"
            write_run(Path(args.trec.replace("{dataset}", dataset.name)), run, tag)
        if args.json:
            content = {"results": results, "averages": average(results), "settings": settings}
            write_atomic(Path(args.json), json.dumps(content, indent=2) + "\n")
        if args.mteb:
            name, own = args.model.partition("@")[0], Path(args.model).resolve()
            if own.exists():
                name = f"local/{own.parent.name}-{own.name}" if own.match("step-*") else f"local/{own.name}"
            write_mteb(Path(args.mteb), name, revision, list(zip(datasets, results, strict=False)))
        print_result(result, width)
    for name, metrics in average(results).items():
        print(
            f"{name}: NDCG@10 {metrics['ndcg@10']:.4f}, the mean of its parts"
            if name != "mean"
            else f"mean NDCG@10: {metrics['ndcg@10']:.4f}, each benchmark counted once"
        )
    if args.geometry and args.model == "bm25":
        print("--geometry measures embeddings, and bm25 has none")
    elif args.geometry and not rank:
        print_geometry(results, width)
    return results


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    args = parse_arguments(argv)

    def work() -> None:
        run_evaluation(args)

    return run_command("eval.py", work)


if __name__ == "__main__":
    sys.exit(main())
