"""A corpus that stays on disk: its ids, its documents by number, and an index to open it without reading."""

import hashlib
import os
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data import Document
from support.files import InputError, JsonLines, Part, state_digest
from support.show import progress


class Ids(Sequence[str]):
    """The ids of a corpus, in its order: eight bytes each beside their letters, where a list takes sixty."""

    def __init__(self, letters: bytes = b"", ends: array | None = None) -> None:
        self.letters, self.ends = bytearray(letters), ends or array("q", [0])

    def append(self, identifier: str) -> None:
        self.letters += identifier.encode()
        self.ends.append(len(self.letters))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.letters[self.ends[index] : self.ends[index + 1]].decode()


IDS = ("_id", "id", "docid")
TEXTS = ("text", "contents", "body", "passage")  # BEIR's name, then those of Pyserini and others


class Corpus:
    """The documents of a corpus.jsonl {_id, title, text}: streamed, or fetched by number.

    An id may also be called id or docid, a text contents, body or passage.

    Every line is read once at the start, or once and for all (`indexed`); what stays in memory are ids and
    offsets, about 40 bytes a document.
    repeats: a document that stands there again is left out; otherwise that is an error. Raises InputError.
    """

    def __init__(self, *parts: Path | Part, repeats: bool = False):
        self._lines = JsonLines(*parts)
        self.name, self.ids = self._lines.name, Ids()
        digest, hashes, seen, kept = hashlib.blake2b(digest_size=16), array("q"), set(), array("q")
        own = os.environ.get("RANK", "0") == "0"  # of several processes, the first shows what it does
        bar = progress(self, desc=f"read {self.name}", unit="doc", unit_scale=True, delay=3, hidden=not own)
        for index, (doc_id, document) in enumerate(bar):
            if repeats:
                if doc_id in seen:
                    continue
                seen.add(doc_id)
            kept.append(index)
            hashes.append(hash(doc_id))
            self.ids.append(doc_id)
            digest.update("\0".join((doc_id, document.title, document.text, "")).encode())
        if not kept:
            raise InputError(f"{self.name}: no documents")
        if len(kept) < len(self):
            self._lines.keep(kept)
        self.fingerprint = digest.hexdigest()
        order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
        equal = np.diff(np.frombuffer(hashes, np.int64)[order]) == 0
        for first, second in zip(order[:-1][equal].tolist(), order[1:][equal].tolist(), strict=True):
            if self.ids[first] == self.ids[second]:
                where = self._lines.where(first).rsplit(", ", 1)[-1]
                raise InputError(
                    f"{self._lines.where(second)}: _id {self.ids[second]!r} stands already on {where}"
                )

    @classmethod
    def indexed(cls, file: Path, folder: Path) -> "Corpus":
        """A file's corpus, read whole once: a folder keeps ids and offsets while the file stays as it is."""
        index = folder / f"corpus-{state_digest([file])}.npz"
        try:
            with np.load(index) as kept:
                fingerprint, letters, *places = (kept[f"arr_{number}"] for number in range(5))
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            corpus = cls(file)  # there is no index yet, or it is broken
            folder.mkdir(parents=True, exist_ok=True)
            temporary = index.with_suffix(f".{os.getpid()}.tmp")
            letters, lines = np.frombuffer(corpus.ids.letters, np.uint8), corpus._lines
            with open(temporary, "wb") as written:
                np.savez(written, corpus.fingerprint, letters, corpus.ids.ends, lines.offsets, lines.numbers)
            os.replace(temporary, index)
            return corpus
        ends, *places = (array("q", part.tobytes()) for part in places)
        corpus = cls.__new__(cls)
        corpus._lines, corpus.ids = JsonLines(file, places=places), Ids(letters.tobytes(), ends)
        corpus.name, corpus.fingerprint = corpus._lines.name, str(fingerprint)
        return corpus

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[str, Document]:
        """Its id, and its title and text as they stand there: BEIR strips them only when they are joined."""
        lines, value = self._lines, self._lines[index]
        doc_id = identifier(lines, index, value)
        key = next((key for key in TEXTS if key in value), "text")
        if key not in value and "title" not in value:
            found = ", ".join(map(repr, value)) or "nothing"
            raise InputError(
                f"{lines.where(index)}: no text; expected '_id', 'title' and 'text', found {found}"
            )
        title, text = (lines.text(index, value, name, default="", strip=False) for name in ("title", key))
        return doc_id, Document(title, text)

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        return (self[index] for index in range(len(self)))


def identifier(lines: JsonLines, index: int, value: dict, *keys: str) -> str:
    key = next((key for key in keys or IDS if key in value), "_id")
    identifier = value.get(key)
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        return str(identifier)
    if not isinstance(identifier, str) or not identifier:
        raise InputError(f"{lines.where(index)}: {key!r} is missing or not a string")
    return identifier
