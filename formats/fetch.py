"""Zips fetched from a server, once, and unpacked."""

import errno
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from support.files import BAD_ZIP, InputError, safe_members
from support.show import progress


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
                bar = progress(desc=path.name, total=total, initial=have, unit="B", unit_scale=True)
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
            for member in progress(members, desc=f"unpack {folder.name}", unit="file", hidden=size < 1e9):
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
