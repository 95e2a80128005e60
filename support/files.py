"""Files: one line for what is wrong with one, and writes that are whole or not at all."""

import gzip
import hashlib
import json
import lzma
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, TextIO, overload

# RuntimeError: encrypted
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


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


def cache_folder() -> Path:
    """Where downloaded datasets are kept: $DREAM_CACHE, or ~/.cache/dream."""
    return Path(os.environ.get("DREAM_CACHE") or Path.home() / ".cache" / "dream")


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


def state_digest(files: Iterable[Path], more: str = "") -> str:
    """A digest of files by path, size and times of change (mtime, ctime), without reading them."""
    states = [(file.resolve(), file.stat()) for file in files]
    known = [(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in states]
    return hashlib.blake2b(f"{known}{more}".encode(), digest_size=12).hexdigest()


def open_seekable(path: Path, member: str | None = None) -> BinaryIO:
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


def part_name(part: Part) -> str:
    return f"{part[0]}:{part[1]}" if part[1] else str(part[0])


class JsonLines:
    """The objects of a JSON-lines file, which may be larger than memory; blank lines do not count.

    Also of several files, one after another, and of parquet tables. places: `offsets` and `numbers`, where
    they are known: then nothing is read here, and there is no fingerprint.
    """

    def __init__(self, *parts: Path | Part, places: Sequence[array] | None = None):
        first, *others = (part if isinstance(part, tuple) else (part, None) for part in parts)
        self.name = part_name(first) + (f" and {len(others)} more" if others else "")
        self._file = open_seekable(*first)
        if others:
            joined = tempfile.TemporaryFile()
            for file in (self._file, *(open_seekable(*part) for part in others)):
                with file:
                    shutil.copyfileobj(file, joined, 1 << 20)
                joined.write(b"\n")
            joined.seek(0)
            self._file = joined
        self.offsets, self.numbers = array("q"), array("q")  # of bytes before it, of its line
        if places is not None:
            self.offsets, self.numbers = places
            return
        offset, digest = 0, hashlib.blake2b(digest_size=16)
        for number, line in enumerate(self._file, 1):
            digest.update(line)
            if line.strip():
                self.offsets.append(offset)
                self.numbers.append(number)
            offset += len(line)
        self.fingerprint = digest.hexdigest()

    def keep(self, indices: Iterable[int]) -> None:
        """Forget all objects but these."""
        indices = list(indices)
        self.offsets = array("q", (self.offsets[i] for i in indices))
        self.numbers = array("q", (self.numbers[i] for i in indices))

    def __len__(self) -> int:
        return len(self.offsets)

    def where(self, index: int) -> str:
        """FILE, line N: how messages name an object."""
        return f"{self.name}, line {self.numbers[index]}"

    def __getitem__(self, index: int) -> dict:
        self._file.seek(self.offsets[index])
        line = self._file.readline()
        try:
            value = _parse_json(line.decode("utf-8-sig" if self.numbers[index] == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:  # also covers UnicodeError
            table = not line.lstrip().startswith((b"{", b"[")) and (b"," in line or b"\t" in line)
            told = "; it looks like a table (CSV, TSV): write one JSON object a line" if table else ""
            raise InputError(f"{self.where(index)}: not JSON in UTF-8 ({error}){told}") from error
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
