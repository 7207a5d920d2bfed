"""Buckets: what ``gs://`` paths need beside ``epath``: local copies, staged writes, rewritten logs.

In a bucket an object appears whole when its upload ends, and nothing else is atomic: a folder
cannot be renamed and a file not be appended to. So single files are uploaded, folders are made on
the local disk and uploaded with the file that marks them complete last, and logs are written anew.
Libraries that want a local file get a copy, kept in a cache on the local disk.

Environment: ``UNIVLA_CACHE`` is the folder of the cache, ``UNIVLA_CACHE_GB`` its size (half of what
is free by default). ``STORAGE_EMULATOR_HOST`` and ``TENSORSTORE_GCS_HTTP_URL`` name another server
than Google's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

# epath and Orbax then reach buckets through gcsfs, as this module does, whether TensorFlow is
# installed or not; and gcsfs asks no second API about the kind of every bucket.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

from etils import epath

from univla_jax.errors import UserError

PathLike = str | os.PathLike[str]
_SECONDS_PER_REQUEST = 120.0  # then a request counts as failed and is tried again
_REWRITE_SECONDS = 5.0  # between two uploads of a log; a bucket takes one per second and object
_REWRITE_BYTES_PER_SECOND = 2 << 20  # long logs are uploaded less often
_TRANSIENT = ("RetryError", "ClientError", "ServerDisconnectedError", "TransportError")


def is_remote(path: PathLike) -> bool:
    """Whether a path is of a bucket."""
    return "://" in os.fspath(path)


@functools.cache
def filesystem() -> Any:
    """gcsfs without listings cached: other processes write into the same folders.

    Raises:
      UserError: it is not installed.
    """
    import fsspec

    settings = {"use_listings_cache": False, "requests_timeout": _SECONDS_PER_REQUEST}
    fsspec.config.conf["gcs"] = settings | fsspec.config.conf.get("gcs", {})
    try:
        return fsspec.filesystem("gcs", finalize_on_close=True)
    except ImportError as error:
        raise UserError("gs:// paths need gcsfs; pip install 'univla_jax[gcs]'") from error


def check_access(path: PathLike) -> None:
    """Checks that a bucket can be reached and is there.

    Raises:
      UserError: no such bucket, no credentials, no permission, or gcsfs is not installed.
    """
    path = os.fspath(path)
    scheme, _, rest = path.partition("://")
    bucket = rest.partition("/")[0]
    if scheme != "gs" or not bucket:
        raise UserError(f"{path}: expected a local path or gs://BUCKET/...")
    try:
        filesystem().call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no bucket {bucket!r}; make it, or mend the name") from (
            error
        )
    except Exception as error:  # libraries of Google, aiohttp and gcsfs each have their own
        if is_transient(error):
            raise
        raise UserError(
            f"{path}: the bucket {bucket!r} cannot be read ({str(error).strip()[:200]}); log in "
            "with `gcloud auth application-default login`, or give this machine's service account "
            "the role Storage Object User"
        ) from error


def require_local(path: PathLike, what: str) -> None:
    """Refuses a path of a bucket where only a local one will do.

    Raises:
      UserError: names the path and the remedy.
    """
    if is_remote(path):
        raise UserError(
            f"{path}: {what} must be a local folder; copy it with `gcloud storage cp -r`, or mount "
            "the bucket with Cloud Storage FUSE"
        )


def is_transient(error: BaseException) -> bool:
    """Whether an error of gcsfs or the network below it may be gone at the next start."""
    if getattr(error, "code", None) in {408, 429, 500, 502, 503, 504}:
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & set(_TRANSIENT)) or isinstance(error, (TimeoutError, ConnectionError))


# ----------------------------------------------------------------------------
# Reading.


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of every file in a folder by name, with one request; empty where there is none."""
    if is_remote(folder):
        try:
            entries = filesystem().ls(os.fspath(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def local_file(path: PathLike) -> str:
    """A local file with the content of ``path``: itself, or a copy in the cache.

    Raises:
      FileNotFoundError: there is no such object.
      UserError: no room on the local disk.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return path
    # Generation and size are part of the copy's name, so that an object written anew is fetched
    # anew. Processes that fetch the same object at once each write their own partial file.
    info = filesystem().info(path)
    if info["type"] != "file":
        raise FileNotFoundError(path)
    version = f"{path}\0{info['size']}\0{info.get('generation') or info.get('mtime')}"
    folder = cache_folder()
    copy = folder / f"{hashlib.sha256(version.encode()).hexdigest()}-{path.rpartition('/')[2]}"
    if copy.is_file() and copy.stat().st_size == info["size"]:
        with contextlib.suppress(OSError):
            os.utime(copy)  # the least recently used go first
        return str(copy)
    _make_room(folder, info["size"], path)
    partial = folder / f".{uuid.uuid4().hex}"
    try:
        filesystem().get_file(path, str(partial))
        if partial.stat().st_size != info["size"]:
            raise OSError(f"{path}: {partial.stat().st_size} of {info['size']} bytes arrived")
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
    return str(copy)


def cache_folder() -> pathlib.Path:
    """The folder of the copies; made where it is absent."""
    default = pathlib.Path(tempfile.gettempdir(), f"univla_jax_cache_{os.getuid()}")
    folder = pathlib.Path(os.environ.get("UNIVLA_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make_room(folder: pathlib.Path, size: int, path: str) -> None:
    """Removes the least recently used copies until ``size`` bytes fit."""
    copies = []
    for copy in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            copies.append((copy.stat().st_mtime, copy.stat().st_size, copy))
    held, free = sum(size for _, size, _ in copies), shutil.disk_usage(folder).free
    limit = float(os.environ.get("UNIVLA_CACHE_GB") or (held + free) / 2e9) * 1e9
    for _, own, copy in sorted(copies):
        if held + size <= limit:
            return
        copy.unlink(missing_ok=True)  # who has it open keeps it
        held -= own
    if size > limit:
        raise UserError(
            f"{path} has {size / 1e9:.1f} GB, the cache {folder} room for {limit / 1e9:.1f}; make "
            "room, or set UNIVLA_CACHE and UNIVLA_CACHE_GB"
        )


# ----------------------------------------------------------------------------
# Writing.


def create(path: PathLike, content: bytes) -> bool:
    """Writes an object unless there is one; of several writers at once one succeeds."""
    try:
        filesystem().pipe_file(os.fspath(path), content, mode="create")
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def staged_folder(path: epath.Path) -> Iterator[epath.Path]:
    """Context of a local folder that is uploaded to ``path`` when the body ends.

    Files in inner folders go first, those at the top last: what marks a folder complete lies there.
    """
    with tempfile.TemporaryDirectory(prefix="univla_jax_") as temporary:
        folder = epath.Path(temporary) / path.name
        folder.mkdir()
        yield folder
        files = [file for file in pathlib.Path(folder).rglob("*") if file.is_file()]
        depth = {file: len(file.relative_to(folder).parts) for file in files}
        for file in sorted(files, key=lambda file: (-depth[file], file.name)):
            upload(file, path / file.relative_to(folder).as_posix())


@contextlib.contextmanager
def staged_file(path: PathLike) -> Iterator[pathlib.Path]:
    """Context of a local file that is uploaded to ``path`` when the body ends."""
    with tempfile.TemporaryDirectory(prefix="univla_jax_") as temporary:
        file = pathlib.Path(temporary, os.fspath(path).rpartition("/")[2])
        yield file
        upload(file, path)


def upload(file: pathlib.Path, path: PathLike) -> None:
    """Uploads a local file."""
    filesystem().put_file(str(file), os.fspath(path))


class RewrittenFile:
    """An append-only log in a bucket: the whole object is uploaded anew, every few seconds.

    A killed process loses what it wrote since the last upload; ``sync`` uploads now.
    """

    def __init__(self, path: PathLike, content: bytes = b"") -> None:
        """Begins with ``content``, which is there already or will be with the next upload."""
        self._path, self._content = os.fspath(path), bytearray(content)
        self._uploaded, self._last = len(content), time.monotonic()
        self._lock = threading.Lock()

    def write(self, data: bytes) -> int:
        """Adds to the end."""
        with self._lock:
            self._content += data
        return len(data)

    def flush(self) -> None:
        """Uploads where the last upload is long enough ago."""
        pause = _REWRITE_SECONDS + len(self._content) / _REWRITE_BYTES_PER_SECOND
        if time.monotonic() - self._last >= pause:
            self.sync()

    def sync(self) -> None:
        """Uploads what is new."""
        with self._lock:
            if len(self._content) > self._uploaded:
                filesystem().pipe_file(self._path, bytes(self._content))
                self._uploaded, self._last = len(self._content), time.monotonic()

    def close(self) -> None:
        """Uploads the rest."""
        self.sync()
