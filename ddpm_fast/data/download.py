"""One file over HTTP: resumed by Range, checked by MD5, renamed into place, once for all ranks."""

from __future__ import annotations

import hashlib
import http.client
import os
from contextlib import ExitStack
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ddpm_fast.data.disk import CHUNK_BYTES, digest_file, lock, sync, sync_folder, writing
from ddpm_fast.data.image_set import DataError
from ddpm_fast.data.progress import OnProgress, reporting

TIMEOUT_S = 30.0  # without a byte
MAX_CONNECTIONS = 20  # each must bring the file further than the ones before


def download(
    url: str, path: Path, *, md5: str, hint: str = "", on_progress: OnProgress | None = None
) -> None:
    """Have `path` hold the file at `url` whose MD5 is `md5`; a file already there is only checked.

    Bytes go to `<path>.part`, which the next call resumes. A file with the wrong checksum is kept
    aside as `<path>.bad` and never used. A lock makes parallel ranks download once.

    url          http or https
    md5          32 hexadecimal digits, lower case
    hint         what else the user can do without a network, for the error line
    on_progress  see progress.reporting, in bytes
    raises       DataError  bad URL, no network, wrong checksum, disk full
    """
    if path.exists():
        _check_present(path, md5)
        return
    with lock(path.with_name(path.name + ".lock")):
        if path.exists():  # another rank was first
            _check_present(path, md5)
            return
        part = path.with_name(path.name + ".part")
        ways = ("run again to go on", hint, f"or put the file at {path} by hand (MD5 {md5})")
        _fetch_all(url, part, ", ".join(filter(None, ways)), on_progress)
        got = _md5(part)
        if got != md5:
            bad = _set_aside(part, path)
            raise DataError(
                f"{url} has MD5 {got}, expected {md5}; it is kept as {bad} and not used:"
                " run again to download it anew"
            )
        with writing(path):
            with open(part, "ab") as file:
                sync(file)
            os.replace(part, path)
            sync_folder(path.parent)


def _md5(path: Path) -> str:
    try:
        return digest_file(path, hashlib.md5(usedforsecurity=False))
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}); allowed: a readable file"
        ) from error


def _check_present(path: Path, md5: str) -> None:
    got = _md5(path)
    if got != md5:
        raise DataError(
            f"{path} has MD5 {got}, expected {md5}; it is left as it is:"
            " move it away to download it anew, or put the right file there"
        )


def _set_aside(part: Path, path: Path) -> Path:
    bad = path.with_name(path.name + ".bad")
    number = 1
    while bad.exists():
        bad = path.with_name(f"{path.name}.bad-{number}")
        number += 1
    with writing(bad):
        os.rename(part, bad)
    return bad


def _fetch_all(url: str, part: Path, ways_out: str, on_progress: OnProgress | None) -> None:
    """Connect until the file is whole, as long as every connection brings it further."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise DataError(f"cannot download {url!r}; allowed: an http:// or https:// address")
    furthest = _size(part)
    for _ in range(MAX_CONNECTIONS):
        try:
            if _fetch(url, part, on_progress):
                return
            reason = "the connection ended early"
        except HTTPError as error:
            error.close()
            if error.code == 416 and _size(part):  # the part is no beginning of this file
                with writing(part):
                    part.unlink()
                furthest = -1
            reason = f"HTTP {error.code} {error.reason}"
        except URLError as error:
            reason = str(error.reason)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        if _size(part) <= furthest:
            break
        furthest = _size(part)
    raise DataError(f"cannot download {url} ({reason}; {_size(part)} bytes so far): {ways_out}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(url: str, part: Path, on_progress: OnProgress | None) -> bool:
    """Add what one connection gives to `part`; True when the file is whole.

    raises  OSError, HTTPException  the network's;  DataError  the disk's, or an unusable answer
    """
    have = _size(part)
    headers = {"User-Agent": "ddpm_fast"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            error.close()
            return True  # killed between the last byte and the rename
        raise
    with response:
        answer = response.headers.get("Content-Range", "")
        if response.status == 206 and not answer.startswith(f"bytes {have}-"):
            raise DataError(
                f"{url} answered Content-Range {answer!r}, asked for bytes {have}-;"
                f" delete {part} to start again from its beginning"
            )
        if response.status != 206:
            have = 0  # Range ignored: the whole file comes again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else 0
        what = f"downloading {url}"
        with ExitStack() as stack:
            with writing(part):
                file = stack.enter_context(open(part, "ab" if have else "wb", buffering=0))
            update = stack.enter_context(
                reporting(what, total, unit="bytes", on_progress=on_progress)
            )
            while chunk := response.read(CHUNK_BYTES):
                have += len(chunk)
                while chunk:  # a disk that fills up takes a piece first and fails at the next
                    with writing(part):
                        chunk = chunk[file.write(chunk) :]
                update(have)
    return have == total or not total
