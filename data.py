"""The inputs: training rows, judge prompts with document spans, retrieval datasets, batches.

Everything read from outside is checked here, once, with the file and the line in the message; inside, data is
trusted. Large files stay on disk: a JSON-lines file is an array of line offsets, and a line is parsed when it
is asked for. This file never scores or trains.

A training row, one JSON object a line (.jsonl, also .gz and .xz):
    {"query": "...", "target": "...", "documents": ["...", {"title": "...", "text": "..."}], "positive": 0}
`target` is the output that the judge predicts; `positive`, the index of the relevant document, is optional:
no training loss of DREAM reads it, only the selection of heads and the reports do. Rows of FlagEmbedding
("pos", "neg") and Tevatron ("positive_passages", "negative_passages") are read too, when they have a target:
their candidates are the first positive, then the negatives.

A retrieval dataset is a folder or a zip in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv.
"""

import errno
import gzip
import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, TextIO, overload

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)  # RuntimeError: encrypted


class InputError(Exception):
    """Bad input: one line that names the file, the line and the field, and says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def _parse_json(text: str) -> object:
    """json.loads; half a surrogate, which no tokenizer and no UTF-8 takes, is a ValueError too."""
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


@overload
def read_json(path: Path) -> dict: ...
@overload
def read_json(path: Path, kind: type[list]) -> list: ...
def read_json(path: Path, kind: type[dict] | type[list] = dict) -> dict | list:
    """The JSON object (or list) of a file. Raises InputError."""
    try:
        content = _parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, kind):
        raise InputError(f"{path}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content


def inside(folder: Path, name: object, where: Path) -> Path:
    """FOLDER/NAME for a name that the file `where` gives: never outside of the folder. Raises InputError."""
    path = PurePosixPath(name) if isinstance(name, str) and "\0" not in name and len(name) < 200 else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: refused, {name!r} is not the name of something inside of {folder}")
    return folder / path


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file so that a reader finds the old content or the new, never a part."""
    path = Path(path)
    with writing(path) as file:
        file.write(text)


def check_writable(path: str | Path, folder: bool = False) -> None:
    """Tell before hours of work that a result could not be written there. Raises InputError."""
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        raise InputError(f"{path}: is a {'file' if folder else 'folder'}; choose another name")
    places = (path.absolute(), *path.absolute().parents)[not folder :]
    above = next(place for place in places if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"{path}: cannot be written, {above} is {'read-only' if above.is_dir() else 'a file'}"
        )


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A text file that appears whole when the block ends, or not at all. Raises InputError."""
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write the same file
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name, owner/name@revision


def fetch_repository(name: str, patterns: list[str], kind: str = "model") -> Path:
    """The local copy of a Hugging Face repository, `owner/name` or `owner/name@revision`.

    Fetches the files that match `patterns` and are not there yet, with progress, into the hub's own cache:
    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count. kind: model, dataset. The folder's name is the
    commit. Raises InputError.
    """
    # Here, so that only who names a repository waits for it.
    from huggingface_hub import constants, errors, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, repo_type=kind, revision=revision or None, allow_patterns=patterns
        )
        return Path(folder)
    except errors.GatedRepoError:
        reason = "is gated: accept its terms on its page, then set HF_TOKEN or run `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "is not there, or private: check the name, or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
        reason = f"is not, or not wholly, in {constants.HF_HUB_CACHE} ({offline}); fetch it once while online"
    except Exception as error:  # the network library's own; what is fetched so far is kept
        reason = f"could not be fetched ({' '.join(str(error).split())[:200]}); run again"
    where = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    raise InputError(f"{name}: no such folder here, and {where} {reason}")


def cache_folder() -> Path:
    """Where downloaded datasets are kept: $DREAM_CACHE, or ~/.cache/dream."""
    return Path(os.environ.get("DREAM_CACHE") or Path.home() / ".cache" / "dream")


def fetch_zip(url: str, folder: Path, md5: str | None = None) -> Path:
    """Download a zip once and unpack its retrieval dataset to `folder`; nothing is done where that exists.

    An interrupted download goes on where it stopped; `folder` appears whole or not at all. Raises InputError.
    """
    with FileLock(_beside(folder, ".lock")):  # two jobs on one machine fetch it once
        if not folder.is_dir():
            archive = _beside(folder, ".zip")
            if not archive.exists():
                download(url, archive, md5)
            unpack(archive, folder)
            archive.unlink()
    return folder


def _beside(folder: Path, suffix: str) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(folder.name + suffix)


def _request(url: str, **options: Any) -> urllib.request.Request:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise InputError(f"{url}: only https is fetched, or what this machine itself serves")
    return urllib.request.Request(url, **options)


def remote_size(url: str) -> int | None:
    """Bytes behind an address; None where the server does not say."""
    try:
        with urllib.request.urlopen(_request(url, method="HEAD"), timeout=30) as response:
            return int(response.headers.get("Content-Length") or 0) or None
    except (OSError, http.client.HTTPException):
        return None


def download(url: str, path: Path, md5: str | None = None, patience: int = 5) -> None:
    """Fetch a file, with progress. What comes is kept in PATH.part, from where any later call goes on.

    patience: how many breaks of the connection in a row are forgiven. Raises InputError.
    """
    part, breaks, complete = _beside(path, ".part"), 0, False
    while not complete:
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        reason = "the connection broke"
        try:
            with urllib.request.urlopen(_request(url, headers=headers), timeout=60) as response:
                have = have if response.status == 206 else 0  # some servers begin anew
                length = response.headers.get("Content-Length")
                total = have + int(length) if length else None
                bar = tqdm(desc=path.name, total=total, initial=have, unit="B", unit_scale=True)
                with bar, open(part, "ab" if have else "wb") as file:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
            complete = total is None or part.stat().st_size >= total
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise InputError(f"{url}: the server answers {error.code} {error.reason}") from error
            complete = True  # nothing is missing
        except (OSError, http.client.HTTPException) as error:
            unwritable = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
            if isinstance(error, OSError) and error.errno in unwritable:
                raise InputError(f"{part}: cannot be written ({error.strerror})") from error
            reason = str(getattr(error, "reason", error)) or reason
        if not complete:
            breaks = 0 if part.exists() and part.stat().st_size > have else breaks + 1
            if breaks == patience:
                raise InputError(f"{url}: {reason}; run again, what came is kept in {part}")
            time.sleep(min(2**breaks - 1, 10))
    if md5 is not None:
        digest = hashlib.md5(usedforsecurity=False)
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != md5:
            part.unlink()
            raise InputError(
                f"{url}: its md5 is {digest.hexdigest()}, published is {md5}; deleted. Run again, or "
                "fetch it by hand and give its path"
            )
    os.replace(part, path)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the dataset files of a zip to `folder`, whole or not at all. Raises InputError."""
    temporary = _beside(folder, ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [m for m in safe_members(archive, zipped) if m.filename.endswith((".jsonl", ".tsv"))]
            size, free = sum(m.file_size for m in members), shutil.disk_usage(folder.parent).free
            if size > free:
                raise InputError(
                    f"{archive}: unpacks to {size / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB free"
                )
            for member in tqdm(members, desc=f"unpack {folder.name}", unit="file", disable=size < 1e9):
                zipped.extract(member, temporary)
        roots = {Path(m.filename).parts[0] for m in members}
        inner = temporary / roots.pop() if len(roots) == 1 else temporary
        os.replace(inner if inner.is_dir() else temporary, folder)
    except BAD_ZIP as error:
        archive.unlink()
        raise InputError(
            f"{archive}: not a whole zip ({error}); deleted, run again to fetch it anew"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def safe_members(archive: Path, zipped: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in a zip. One whose name leaves the folder, a link, or an absurd size: the zip is refused."""
    members = [m for m in zipped.infolist() if not (m.is_dir() or m.filename.startswith("__MACOSX/"))]
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in path.parts[0]:
            raise InputError(f"{archive}: refused, its member {member.filename!r} would leave the folder")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{archive}: refused, its member {member.filename!r} is a link")
    if sum(member.file_size for member in members) > 200 * max(archive.stat().st_size, 1 << 20):
        raise InputError(f"{archive}: refused, it would unpack to more than 200 times its size")
    return members


def sync(folder: Path) -> None:
    """Have the disk hold a folder's files before anything points at them."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _open_seekable(path: Path, member: str | None = None) -> BinaryIO:
    """A file, opened seekable; a compressed one, a table or a zip's member goes to a temporary file first."""
    try:
        if member is not None:
            stream: IO[bytes] | gzip.GzipFile | lzma.LZMAFile = zipfile.ZipFile(path).open(member)
        elif path.suffix == ".parquet":
            return _parquet_lines(path)
        elif path.suffix in (".gz", ".xz"):
            stream = (gzip.open if path.suffix == ".gz" else lzma.open)(path, "rb")
        else:
            return open(path, "rb")
        unpacked = tempfile.TemporaryFile()
        with stream:
            shutil.copyfileobj(stream, unpacked, 1 << 20)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, lzma.LZMAError, *BAD_ZIP) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    unpacked.seek(0)
    return unpacked


def _parquet_lines(path: Path) -> BinaryIO:
    """The rows of a parquet file as JSON lines."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs one more package: pip install pyarrow") from error
    lines = tempfile.TemporaryFile()
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            lines.writelines((json.dumps(row, default=str) + "\n").encode() for row in batch.to_pylist())
    except ArrowInvalid as error:
        raise InputError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from error
    lines.seek(0)
    return lines


Part = tuple[Path, str | None]  # a file, or a zip and the name of its member


def _name(part: Part) -> str:
    return f"{part[0]}:{part[1]}" if part[1] else str(part[0])


class JsonLines:
    """The objects of a JSON-lines file, which may be larger than memory; blank lines do not count.

    Also of several files, one after another, and of parquet tables.
    """

    def __init__(self, *parts: Path | Part):
        first, *others = (part if isinstance(part, tuple) else (part, None) for part in parts)
        self.name = _name(first) + (f" and {len(others)} more" if others else "")
        self._file = _open_seekable(*first)
        if others:
            joined = tempfile.TemporaryFile()
            for file in (self._file, *(_open_seekable(*part) for part in others)):
                with file:
                    shutil.copyfileobj(file, joined, 1 << 20)
                joined.write(b"\n")
            joined.seek(0)
            self._file = joined
        self._offsets, self._lines = array("q"), array("q")
        offset, digest = 0, hashlib.blake2b(digest_size=16)
        for number, line in enumerate(self._file, 1):
            digest.update(line)
            if line.strip():
                self._offsets.append(offset)
                self._lines.append(number)
            offset += len(line)
        self.fingerprint = digest.hexdigest()

    def keep(self, indices: Iterable[int]) -> None:
        """Forget all objects but these."""
        indices = list(indices)
        self._offsets = array("q", (self._offsets[i] for i in indices))
        self._lines = array("q", (self._lines[i] for i in indices))

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        """FILE, line N: how messages name an object."""
        return f"{self.name}, line {self._lines[index]}"

    def __getitem__(self, index: int) -> dict:
        self._file.seek(self._offsets[index])
        line = self._file.readline()
        try:
            value = _parse_json(line.decode("utf-8-sig" if self._lines[index] == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:  # also covers UnicodeError
            raise InputError(f"{self.where(index)}: not JSON in UTF-8 ({error})") from error
        if not isinstance(value, dict):
            raise InputError(f"{self.where(index)}: expected a JSON object, found {type(value).__name__}")
        return value

    def text(self, index: int, value: dict, key: str, default: str | None = None, strip: bool = True) -> str:
        """The string at `key` of object `index`; an empty one counts as missing."""
        text = value.get(key)
        if text is not None and not isinstance(text, str):
            raise InputError(f"{self.where(index)}: {key!r} is {type(text).__name__}, expected a string")
        if not text or not text.strip():
            text = default
        if text is None:
            raise InputError(f"{self.where(index)}: {key!r} is missing or empty")
        return text.strip() if strip else text


@dataclass(frozen=True)
class Document:
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """What the retriever embeds, as BEIR joins them."""
        return f"{self.title} {self.text}".strip()


@dataclass
class Row:
    index: int
    query: str
    target: str
    documents: list[Document]
    positive: int | None  # index into documents
    where: str = ""  # file and line, for messages


class Rows:
    """Training rows from a file; all are checked at the start, parsed again when used.

    num_candidates: at most so many documents of a row are used, the first ones (a mined row lists its best
    first). Equal documents count once. A row that keeps fewer than two candidates teaches nothing: it is left
    out, and counted in `skipped`. documents_only: rows need no query and no target (Revela reads neither).
    Raises InputError for anything malformed.
    """

    def __init__(self, path: str | Path, num_candidates: int | None = None, documents_only: bool = False):
        self.path, self.num_candidates, self.documents_only = Path(path), num_candidates, documents_only
        self._lines = JsonLines(self.path)
        self.fingerprint = self._lines.fingerprint
        rows = (self._parse(i) for i in range(len(self._lines)))
        self._kept = array("q", (row.index for row in rows if len(row.documents) > 1))
        self.skipped = len(self._lines) - len(self._kept)
        if not self._kept:
            raise InputError(
                f"{self.path}: no row with a query, a target and at least two different documents"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Row:
        return self._parse(self._kept[index])

    def _parse(self, index: int) -> Row:
        lines, value = self._lines, self._lines[index]
        where = lines.where(index)
        target = next((value[key] for key in ("target", "answer", "output") if value.get(key)), None)
        if isinstance(target, list) and target:
            target = target[0]
        if self.documents_only:
            target = ""
        elif not isinstance(target, str) or not target.strip():
            raise InputError(
                f"{where}: no target; give the output to predict as 'target' (or 'answer' or 'output')"
            )
        given, positive = self._candidates(where, value)
        position: dict[Document, int] = {}
        group = self.documents_only and "query" not in value  # of passages that belong together: all of them
        limit = None if group else self.num_candidates
        for number, document in enumerate(given):
            if isinstance(document, str):
                document = Document("", document.strip())
            elif isinstance(document, dict):
                title = document.get("title") or ""
                if not isinstance(title, str):
                    raise InputError(f"{where}: the title of document {number} is not a string")
                document = Document(title.strip(), lines.text(index, document, "text", default=""))
            else:
                raise InputError(f"{where}: document {number} is neither a string nor an object with 'text'")
            if not document.full_text:
                raise InputError(f"{where}: document {number} is empty")
            if limit is None or len(position) < limit or document in position:
                position.setdefault(document, len(position))
            if number == positive:
                positive_document = document
        documents = list(position)
        if positive is not None:
            positive = position.get(positive_document)  # None where num_candidates cut it off
        query = "" if self.documents_only else lines.text(index, value, "query")
        return Row(index, query, target.strip(), documents, positive, where)

    @staticmethod
    def _candidates(where: str, value: dict) -> tuple[list, int | None]:
        """The candidates of a row in any of the three forms, and which of them is known to be relevant."""
        for positives, negatives in (("pos", "neg"), ("positive_passages", "negative_passages")):
            if "documents" in value or positives not in value:
                continue
            relevant, others = value[positives], value.get(negatives) or []
            if not isinstance(relevant, list) or not relevant or not isinstance(others, list):
                raise InputError(
                    f"{where}: {positives!r} and {negatives!r} must be lists, the first not empty"
                )
            return [relevant[0], *others], 0
        given, positive = value.get("documents"), value.get("positive")
        if not isinstance(given, list) or not given:
            raise InputError(
                f"{where}: no candidates; give them as 'documents', a list of strings or title/text "
                "(or as 'pos' and 'neg', or 'positive_passages' and 'negative_passages')"
            )
        if positive is not None and (type(positive) is not int or not 0 <= positive < len(given)):
            raise InputError(
                f"{where}: 'positive' is {positive!r}, expected an index into {len(given)} documents"
            )
        return given, positive


class CandidatePool:
    """Every distinct document of some rows, by number: what candidates are mined from anew.

    Texts stay in the rows' file; 16 bytes a document stay in memory, and 8 more until the pool is made.
    """

    def __init__(self, rows: Rows, indices: Iterable[int]):
        self._rows, self._last = rows, (-1, list[Document]())
        owners, places, digests = array("q"), array("q"), array("q")
        for index in indices:
            for place, document in enumerate(rows[index].documents):
                owners.append(index)
                places.append(place)
                digests.append(text_digest(document.full_text))
        _, first = np.unique(np.frombuffer(digests, np.int64), return_index=True)
        first.sort()  # in the file's order, which is read from the disk in one go
        self._owners, self._places = (np.frombuffer(x, np.int64)[first] for x in (owners, places))
        self.ids: Sequence = range(len(first))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> tuple[str, Document]:
        owner = int(self._owners[number])
        last, documents = self._last
        if last != owner:
            documents = self._rows[owner].documents
            self._last = (owner, documents)
        return str(number), documents[self._places[number]]


# Rows from raw text (`mine --from-text`)

PASSAGE_WORDS = 100  # of whole sentences; a longer sentence is a passage by itself


def sentences(text: str) -> list[str]:
    """Cut after a full stop, question or exclamation mark, a space, and before a capital or a figure."""
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])", text.strip()) if part]


def passages(text: str, words: int = PASSAGE_WORDS) -> Iterator[str]:
    """A text in passages of whole sentences of about so many words."""
    held, count = list[str](), 0
    for sentence in sentences(text):
        length = len(sentence.split())
        if held and count + length > words:
            yield " ".join(held)
            held, count = [], 0
        held.append(sentence)
        count += length
    if held:
        yield " ".join(held)


def text_question(text: str, recipe: str, *seed: int) -> tuple[str, str, str] | None:
    """A query and a target out of a passage, and the passage as a candidate may show it; None if it has none.

    "next": a sentence asks, the sentence after it is the target, and the passage shows all but the one that
    asks. "rest": the first words of a sentence ask, its last third (up to eight words) is the target, and the
    passage stays whole. Which sentence is drawn by the seed. A target that the query gives away (it occurs
    there, or they share four words in a row) is passed over.
    """
    parts = sentences(text)
    for number in shuffled(len(parts), *seed):
        words = parts[number].split()
        if recipe == "next" and number + 1 < len(parts):
            query, target = parts[number], parts[number + 1]
            shown = " ".join(part for part in parts if part != parts[number])
        elif recipe == "rest":
            cut = len(words) - min(max(len(words) // 3, 1), 8)
            query, target, shown = " ".join(words[:cut]), " ".join(words[cut:]), text
        else:
            continue
        if len(query.split()) >= 4 and not _gives_away(query, target):
            return query, target, shown
    return None


def _gives_away(query: str, target: str) -> bool:
    query_words, target_words = (re.findall(r"\w+", text.lower()) for text in (query, target))
    size = min(4, len(target_words))
    runs = {tuple(query_words[i : i + size]) for i in range(len(query_words) - size + 1)}
    return not size or any(
        tuple(target_words[i : i + size]) in runs for i in range(len(target_words) - size + 1)
    )


def text_digest(text: str) -> int:
    """A 64-bit number that tells texts apart, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token; of a text that is cut, so many per kept token are all that matter."""
    return max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)


# The prompt begins with words of no document: language models park attention on their first tokens, and were
# those in a document's span, that document's share would be nothing but the park.
TEMPLATE = "Read the documents and answer the question.\n\n{documents}Question: {query}\nAnswer: {target}"

_TASK = "Read the documents and answer the question with a few words only.\n\n{documents}Question: {query}"
_CHATML = f"<|im_start|>user\n{_TASK}<|im_end|>\n<|im_start|>assistant\n"
# The chat formats of instruct judges, as their own templates write a first turn; the builder puts the BOS.
TEMPLATES = {
    "plain": TEMPLATE,
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"{_CHATML}{{target}}"
    ),
    "qwen3": f"{_CHATML}<think>\n\n</think>\n\n{{target}}",
    "llama": (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{_TASK}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{{target}}"
    ),
}


def read_template(name: str) -> str:
    """A judge template: one of TEMPLATES by its name, a file's content, or the text itself."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{documents}" in name:
        return name
    try:
        return Path(name).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        choices = ", ".join(TEMPLATES)
        raise InputError(f"--judge-template {name}: not {choices}, and not a text file ({error})") from error


def document_block(document: Document) -> str:
    """A document as the judge reads it; all of it lies inside the document's span."""
    title = f"{document.title}\n" if document.title else ""
    return f"Document: {title}{document.text}\n\n"


@dataclass
class Prompt:
    """One query's prompt as token ids. spans[i] = [start, end) of candidate i, wherever it stands."""

    input_ids: list[int]  # instruction, documents, question, target
    spans: list[tuple[int, int]]
    question_start: int  # the first token after the documents
    target_start: int  # the first token of the target
    target_cut: bool  # the target was longer than max_target
    tokens_cut: int  # document tokens dropped to fit the context
    isolated: bool = False  # no document sees another


class PromptBuilder:
    """Builds judge prompts from token ids, segment by segment, and records spans while it does.

    Each segment (instruction, each document, question, target) is tokenised on its own, without special
    tokens; a BOS, if the judge has one, stands once at the front. Documents are cut to fit `context`, longest
    first; the query and the instruction never are. Raises InputError where a prompt cannot fit.
    """

    MIN_DOCUMENT_TOKENS = 16  # below this a block holds little more than its marker and its title

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        max_target: int = 32,
        template: str = TEMPLATE,
        bos_id: int | None = None,
        isolate_documents: bool = False,
    ):
        self.tokenizer, self.context, self.max_target = tokenizer, context, max_target
        self.template, self.isolate_documents = template, isolate_documents
        self._characters = (context + 1) * longest_token(tokenizer)
        if any(template.count(name) != 1 for name in ("{documents}", "{query}", "{target}")):
            raise InputError("the judge template must hold {documents}, {query} and {target} once each")
        instruction, rest = template.split("{documents}")
        if "{query}" not in rest or not rest.split("{query}")[1].endswith("{target}"):
            raise InputError("the judge template must hold {documents}, then {query}, and end with {target}")
        if not instruction.strip():
            raise InputError("the judge template must begin with words of its own, before {documents}")
        for marker in re.findall(r"<\|\w+\|>", template):
            if tokenizer.token_to_id(marker) is None:
                raise InputError(
                    f"the judge template holds {marker}, which the judge's tokenizer does not know; "
                    "choose the --judge-template of this judge's family"
                )
        # Only the template may hold special tokens: a document that spells one out gets its letters' tokens.
        # They also end a segment, so the words next to the query are tokenised together with it.
        before, after = rest.removesuffix("{target}").split("{query}")
        added = tokenizer.get_added_tokens_decoder().values()
        pattern = re.compile("|".join(re.escape(t.content) for t in added if t.special) or "(?!)")
        last = max((match.end() for match in pattern.finditer(before)), default=0)
        first = match.start() if (match := pattern.search(after)) else len(after)
        self._before_query, self._after_query = before[last:], after[:first]
        self._target_space = ""
        if first == len(after):  # byte-level tokens carry the space in front of a word
            self._after_query = after.rstrip(" ")
            self._target_space = after[len(self._after_query) :]
            # Llama 2's tokenizer puts a space before every text by itself: one is enough.
            bare, spaced = self._encode(["a", " a"])
            if bare != spaced and bare and str(tokenizer.id_to_token(bare[0])).startswith("\u2581"):
                self._target_space = self._target_space[1:]
        self._block_end = self._encode(["\n\n"])[0]
        self._bos = [bos_id] if bos_id is not None else []
        self._start = self._bos + self._encode([instruction], special=True)[0]
        self._question_ends = self._encode([before[:last], after[first:]], special=True)

    def _encode(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Token ids of each text; `special`: as the template's own, in which special tokens count."""
        self.tokenizer.encode_special_tokens = not special
        texts = [text[: self._characters] for text in texts]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def build(self, rows: Sequence[Row], orders: list[list[int]] | None = None) -> list[Prompt]:
        """One prompt a row; orders[b] lists row b's candidates as they stand in it (default: as given)."""
        orders = orders or [list(range(len(row.documents))) for row in rows]
        documents = list(dict.fromkeys(document for row in rows for document in row.documents))
        blocks = dict(zip(documents, self._encode(list(map(document_block, documents))), strict=True))
        return [
            self._assemble(row, order, [blocks[document] for document in row.documents], *ends)
            for row, order, ends in zip(rows, orders, self._ends(rows), strict=True)
        ]

    def plain(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Each text by itself as a language model reads it, no template; at most max_length tokens."""
        return [(self._bos + ids)[:max_length] for ids in self._encode(texts)]

    def _ends(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], list[int]]]:
        """Each row's question and target, in tokens. Raises InputError for a target without any."""
        questions = self._questions([row.query for row in rows])
        targets = self._encode([self._target_space + row.target for row in rows])
        for row, question, target in zip(rows, questions, targets, strict=True):
            if not target:
                raise InputError(f"{row.where}: the target {row.target!r} has no tokens")
            yield question, target

    def _questions(self, queries: list[str]) -> list[list[int]]:
        """All that stands between the documents and the target, in tokens."""
        front, end = self._question_ends
        encoded = self._encode([self._before_query + query + self._after_query for query in queries])
        return [front + ids + end for ids in encoded]

    def check(self, rows: Sequence[Row], later: int = 0) -> int:
        """Raise InputError for a row whose prompt cannot be built; return how many targets will be cut.

        later: how many other documents a row may get, of any length.
        """
        cut = 0
        for row, (question, target) in zip(rows, self._ends(rows), strict=True):
            cut += len(target) > self.max_target
            taken = len(self._start) + len(question) + min(len(target), self.max_target)
            if taken + len(row.documents) * self.MIN_DOCUMENT_TOKENS > self.context:
                self.build([row])  # fits only if its documents are short
            if taken + later * self.MIN_DOCUMENT_TOKENS > self.context:
                raise self._no_room(row, self.context - taken, later)
        return cut

    def with_query(self, prompts: list[Prompt], query: str) -> list[Prompt]:
        """The same prompts, documents and targets, with another query (QRHead's calibration asks "N/A")."""
        question = self._questions([query])[0]
        changed = []
        for prompt in prompts:
            head = prompt.input_ids[: prompt.question_start] + question
            target = prompt.input_ids[prompt.target_start :]
            changed.append(replace(prompt, input_ids=head + target, target_start=len(head)))
        return changed

    def _no_room(self, row: Row, room: int, documents: int) -> InputError:
        return InputError(
            f"{row.where}: the judge's context of {self.context} tokens leaves {max(room, 0)} for its "
            f"{documents} documents; use fewer --candidates or a larger --judge-context"
        )

    def _assemble(
        self, row: Row, order: list[int], blocks: list[list[int]], question: list[int], target: list[int]
    ) -> Prompt:
        target_cut, target = len(target) > self.max_target, target[: self.max_target]
        room = self.context - len(self._start) - len(question) - len(target)
        lengths = [len(block) for block in blocks]
        limit = fit_longest_first(lengths, room)
        if limit < min(self.MIN_DOCUMENT_TOKENS, max(lengths)):
            raise self._no_room(row, room, len(blocks))
        input_ids = list(self._start)
        spans = [(0, 0)] * len(blocks)
        for candidate in order:
            block = blocks[candidate]
            if len(block) > limit:  # what is cut still ends as a block does
                block = block[: limit - len(self._block_end)] + self._block_end
            spans[candidate] = (len(input_ids), len(input_ids) + len(block))
            input_ids += block
        question_start = len(input_ids)
        input_ids += question
        cut = sum(max(length - limit, 0) for length in lengths)
        ends = (question_start, len(input_ids), target_cut, cut)
        return Prompt(input_ids + target, spans, *ends, self.isolate_documents)


def fit_longest_first(lengths: list[int], room: int) -> int:
    """The largest limit with sum(min(length, limit)) <= room: long documents share what short ones leave."""
    left, limit = room, 0
    for index, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - index)
        if length > share:
            return max(share, 0)
        left, limit = left - length, length
    return limit


def shuffled(count: int, *seed: int) -> list[int]:
    """A permutation of range(count) that depends on the seed numbers alone."""
    return np.random.default_rng(seed).permutation(count).tolist()


@dataclass
class JudgeBatch:
    """Prompts as tensors, split where the graph begins: a prefix read without a graph, a suffix of injected
    rows.

    P, T: longest prefix and suffix; N: most candidates of a prompt; K: target tokens of all prompts together.
    All on one device, right-padded.
    """

    prefix_ids: Tensor  # (B, P)
    prefix_lengths: Tensor  # (B,)
    suffix_ids: Tensor  # (B, T) the rows after the prefix, up to the one that predicts the last target token
    documents: Tensor  # (B, P) the candidate each key belongs to, N for none
    present: Tensor  # (B, N) bool, which candidates exist
    target_rows: Tensor  # (K,) which of the B*T suffix rows predict target tokens
    target_ids: Tensor  # (K,) the tokens they predict
    target_owner: Tensor  # (B, K) float32: 1 where the prompt owns the target token
    num_tokens: int  # real tokens of prefixes and suffixes
    isolated: bool  # no document sees another


def collate(prompts: Sequence[Prompt], device: torch.device, rows: str = "target") -> JudgeBatch:
    """Tensors of some prompts. rows: "target": the query is in the prefix; "suffix": in the injected rows."""
    num_documents = max(len(prompt.spans) for prompt in prompts)
    starts = [prompt.target_start - 1 if rows == "target" else prompt.question_start for prompt in prompts]
    prefixes = [prompt.input_ids[:start] for prompt, start in zip(prompts, starts, strict=True)]
    suffixes = [prompt.input_ids[start:-1] for prompt, start in zip(prompts, starts, strict=True)]
    width = max(map(len, suffixes))
    documents, target_rows, target_ids = [], list[int](), []
    counts = [len(prompt.input_ids) - prompt.target_start for prompt in prompts]
    for number, (prompt, suffix, count) in enumerate(zip(prompts, suffixes, counts, strict=True)):
        owner = [num_documents] * len(prefixes[number])
        for candidate, (first, end) in enumerate(prompt.spans):
            owner[first:end] = [candidate] * (end - first)
        documents.append(owner)
        target_rows += range(number * width + len(suffix) - count, number * width + len(suffix))
        target_ids += prompt.input_ids[prompt.target_start :]
    present = torch.arange(num_documents) < torch.tensor([[len(prompt.spans)] for prompt in prompts])
    target_owner = torch.zeros(len(prompts), len(target_ids))
    owners = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))  # (K,)
    target_owner[owners, torch.arange(len(target_ids))] = 1.0
    prefix_ids, prefix_lengths = pad(prefixes, device)
    return JudgeBatch(
        prefix_ids,
        prefix_lengths,
        pad(suffixes, device)[0],
        pad(documents, device, value=num_documents)[0],
        to_device(present, device),
        to_device(torch.tensor(target_rows), device),
        to_device(torch.tensor(target_ids), device),
        to_device(target_owner, device),
        sum(map(len, prefixes)) + sum(map(len, suffixes)),
        prompts[0].isolated,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without making the host wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad(
    token_ids: Sequence[Sequence[int] | np.ndarray], device: torch.device, value: int = 0
) -> tuple[Tensor, Tensor]:
    """Right-pad lists of ids: (B, T) int64 and their lengths (B,) int64."""
    lengths = [len(ids) for ids in token_ids]
    padded = np.full((len(lengths), max(lengths)), value, np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    return to_device(torch.from_numpy(padded), device), to_device(torch.tensor(lengths), device)


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of texts in batches of similar length, longest first, each at most max_tokens when padded.

    A text longer than max_tokens is a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = max(lengths[index], 1)
        batches[-1].append(index)
    return batches


@dataclass
class RetrievalDataset:
    """Queries with judgements, and a corpus that stays on disk."""

    name: str
    split: str
    path: Path
    queries: dict[str, str]  # only those with judgements
    qrels: dict[str, dict[str, int]]
    groups: dict[str, set[str]] = field(default_factory=dict)  # of queries, from their metadata
    fingerprint: str = ""  # of documents, queries and judgements
    benchmark: str = ""  # what this is a part of: cqadupstack, CUREv1
    task: str = ""  # mteb's name of it
    subset: str = "default"  # of mteb's task
    revision: str = ""  # of the copy that was read
    documents: "Corpus | CandidatePool" = field(kw_only=True)

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    def corpus(self, start: int = 0, end: int | None = None) -> Iterator[tuple[str, str]]:
        """(document id, text) in the file's order, streamed from disk; text as BEIR joins title and text."""
        for index in range(start, self.num_documents if end is None else end):
            doc_id, document = self.documents[index]
            yield doc_id, document.full_text


class Ids(Sequence[str]):
    """The ids of a corpus, in its order: eight bytes each beside their letters, where a list takes sixty."""

    def __init__(self) -> None:
        self._letters, self._ends = bytearray(), array("q", [0])

    def append(self, identifier: str) -> None:
        self._letters += identifier.encode()
        self._ends.append(len(self._letters))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._letters[self._ends[index] : self._ends[index + 1]].decode()


class Corpus:
    """The documents of a corpus.jsonl {_id, title, text}: streamed, or fetched by number.

    Every line is read once at the start; what stays in memory are ids and offsets, about 40 bytes a document.
    repeats: a document that stands there again is left out; otherwise that is an error. Raises InputError.
    """

    def __init__(self, *parts: Path | Part, repeats: bool = False):
        self._lines = JsonLines(*parts)
        self.name, self.ids = self._lines.name, Ids()
        digest, hashes, seen, kept = hashlib.blake2b(digest_size=16), array("q"), set(), array("q")
        own = os.environ.get("RANK", "0") == "0"  # of several processes, the first shows what it does
        bar = tqdm(self, desc=f"read {self.name}", unit="doc", unit_scale=True, delay=3, disable=not own)
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

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[str, Document]:
        """Its id, and its title and text as they stand there: BEIR strips them only when they are joined."""
        lines, value = self._lines, self._lines[index]
        title, text = (lines.text(index, value, key, default="", strip=False) for key in ("title", "text"))
        return _identifier(lines, index, value), Document(title, text)

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        return (self[index] for index in range(len(self)))


def _identifier(lines: JsonLines, index: int, value: dict, *keys: str) -> str:
    key = next((key for key in keys or ("_id", "id") if key in value), "_id")
    identifier = value.get(key)
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        return str(identifier)
    if not isinstance(identifier, str) or not identifier:
        raise InputError(f"{lines.where(index)}: {key!r} is missing or not a string")
    return identifier


def load_dataset(
    path: str | Path, split: str = "test", subset: str = "", queries_config: str = "queries"
) -> RetrievalDataset:
    """Read a folder or zip in BEIR's or mteb's layout. Raises InputError.

    BEIR: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv. mteb: the same with qrels/SPLIT.jsonl, or parquet, or
    whatever files the card's `configs` name. split "all": all splits there are, repeated documents once.
    subset: the prefix of mteb's configs (a language). Judgements of documents that are not in the corpus are
    kept, as BEIR keeps them: such a document cannot be found.
    """
    path = Path(path)
    configs = _configs(path)
    front = f"{subset}-" if subset else ""

    def files(part: str, *names: str) -> list[Part]:
        splits = next((configs[front + name] for name in names if configs.get(front + name)), None)
        if splits is None:
            there = ", ".join(sorted(configs)) or "nothing"
            raise InputError(f"{path}: no {part}; expected BEIR's or mteb's layout, found {there}")
        if split == "all":
            splits = {split: [file for found in splits.values() for file in found]}
        if split not in splits and (part == "qrels" or len(splits) > 1):
            raise InputError(
                f"{path}: no {part} for split {split!r}; splits there: {', '.join(sorted(splits))}"
            )
        found = splits.get(split) or next(iter(splits.values()))
        if not found:
            raise InputError(f"{path}: the card names files for {part} that are not there; fetch them again")
        return found

    several = split == "all"
    qrels = _read_qrels(files("qrels", "default", "qrels"))
    lines = JsonLines(*files("queries", queries_config))
    queries: dict[str, str] = {}
    groups: dict[str, set[str]] = {}
    for index in range(len(lines)):
        value = lines[index]
        query_id = _identifier(lines, index, value)
        if query_id not in qrels or several and query_id in queries:
            continue
        if query_id in queries:
            raise InputError(f"{lines.where(index)}: _id {query_id!r} occurs twice")
        queries[query_id] = lines.text(index, value, "text", strip=False)
        metadata = value.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("entity"), str):
            groups.setdefault(metadata["entity"], set()).add(query_id)
    missing = next((query_id for query_id in qrels if query_id not in queries), None)
    if missing is not None:
        raise InputError(f"{lines.name}: query {missing!r} has judgements in {split} but no text here")
    corpus = Corpus(*files("corpus", "corpus"), repeats=several)
    judged = [[query_id, queries[query_id], sorted(qrels[query_id].items())] for query_id in sorted(qrels)]
    fingerprint = hashlib.blake2b(
        (corpus.fingerprint + json.dumps(judged)).encode(), digest_size=16
    ).hexdigest()
    name = path.resolve().name.removesuffix(".zip")
    return RetrievalDataset(
        name, split, path, queries, qrels, groups, fingerprint, task=name, documents=corpus
    )


def _configs(path: Path) -> dict[str, dict[str, list[Part]]]:
    """The tables of a dataset, {config: {split: files}}, by its card, else by the names of its files."""
    if path.is_dir():
        if card := card_configs(path):
            try:
                return {
                    config: {
                        split: [(file, None) for pattern in patterns for file in sorted(path.glob(pattern))]
                        for split, patterns in splits.items()
                    }
                    for config, splits in card.items()
                }
            except (OSError, ValueError, LookupError, NotImplementedError) as error:
                raise InputError(
                    f"{path / 'README.md'}: data_files cannot be looked for ({error})"
                ) from error
        files = [*sorted(path.glob("*")), *sorted(path.glob("*/*"))]
        names: dict[str, Part] = {str(file.relative_to(path)): (file, None) for file in files}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [member.filename for member in safe_members(path, archive)]
        top = {name.partition("/")[0] for name in members}
        front = f"{top.pop()}/" if len(top) == 1 and all("/" in name for name in members) else ""
        names = {name.removeprefix(front): (path, name) for name in sorted(members)}
    else:
        raise InputError(f"{path}: neither a folder nor a zip; give a dataset in BEIR's or mteb's layout")
    configs: dict[str, dict[str, list[Part]]] = {}
    for name, part in names.items():
        match = TABLE_FILE.fullmatch(name)
        if match and not (match["kind"].startswith("jsonl") and re.sub(r"\.jsonl.*", ".tsv", name) in names):
            config, split = match["config"], match["split"] or match["config"]
            configs.setdefault(config, {}).setdefault(split, []).append(part)
    return configs


# corpus.jsonl, qrels/test.tsv, corpus/test-00000-of-00002.parquet
TABLE_FILE = re.compile(
    r"(?P<config>[\w-]+?)(/(?P<split>[\w-]+?)(-\d+-of-\d+)?)?\.(?P<kind>jsonl(\.gz|\.xz)?|tsv|parquet)"
)


def card_configs(folder: Path) -> dict[str, dict[str, list[str]]]:
    """What a dataset's card (README.md) says of its files: {config: {split: patterns}}; {} without one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    import yaml  # huggingface_hub brings it

    try:
        header = yaml.safe_load(text[4:].split("\n---")[0])
        configs: dict[str, dict[str, list[str]]] = {}
        for entry in (header or {}).get("configs") or []:
            files = entry["data_files"]
            files = [{"split": "train", "path": files}] if isinstance(files, str) else files
            for file in files:
                paths = [file["path"]] if isinstance(file["path"], str) else file["path"]
                if any(path.startswith("/") or ".." in path.split("/") for path in paths):
                    raise InputError(f"{folder / 'README.md'}: refused, data_files outside of the folder")
                configs.setdefault(str(entry["config_name"]), {})[str(file["split"])] = paths
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, yaml.YAMLError) and (folder / "corpus.jsonl").exists():  # no card is needed
            return {}
        raise InputError(
            f"{folder / 'README.md'}: its header's configs cannot be read ({error!r})"
        ) from error
    return configs


def _read_qrels(parts: list[Part]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for part in parts:
        judgements = _tsv_judgements if _name(part).endswith(".tsv") else _json_judgements
        for query_id, doc_id, grade in judgements(part):
            qrels.setdefault(query_id, {})[doc_id] = grade
    if not qrels:
        raise InputError(f"{', '.join(map(_name, parts))}: no judgements")
    return qrels


def _json_judgements(part: Part) -> Iterator[tuple[str, str, int]]:
    lines = JsonLines(part)
    for index in range(len(lines)):
        value = lines[index]
        score = value.get("score")
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not -1e9 < score < 1e9
            or score % 1
        ):
            raise InputError(f"{lines.where(index)}: 'score' is {score!r}, expected a whole number")
        query_id = _identifier(lines, index, value, "query-id")
        yield query_id, _identifier(lines, index, value, "corpus-id"), int(score)


def _tsv_judgements(part: Part) -> Iterator[tuple[str, str, int]]:
    name = _name(part)
    with _open_seekable(*part) as file:
        for number, line in enumerate(file, 1):
            try:
                fields = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise InputError(f"{name}, line {number}: not UTF-8") from error
            if fields == [""]:
                continue
            try:
                query_id, doc_id, score = fields
                if not -(10**9) < (grade := int(score)) < 10**9:
                    raise ValueError(score)
                yield query_id, doc_id, grade
            except ValueError as error:
                if number == 1 and not any(map(str.isdigit, fields[-1])):
                    continue  # the header
                raise InputError(
                    f"{name}, line {number}: expected query-id, corpus-id and a whole score with tabs between"
                ) from error
