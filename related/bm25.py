"""BM25, the yardstick without learning."""

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from support.files import InputError
from support.show import progress


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
        for row, query in enumerate(progress(queries, desc="BM25: search", unit="query", hidden=quiet)):
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
