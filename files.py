"""Errors and messages, JSON, hashes, files that are written as a whole or not at all, locks: what every module needs and
no model has a part in. common.py passes all of it on: scripts write common.fail, common.write_json.
"""
from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def fail(message: str) -> NoReturn:
    """One clear error for a bad input: on stderr, exit code 2. Called before anything expensive or written."""
    if rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Degenerate(Exception):
    """Why a row can't be used (a null, an empty answer): it is dropped and counted."""


def say(message: str = "") -> None:
    """Print on rank 0; characters that the terminal's encoding lacks become question marks."""
    if rank() == 0:
        encoding = sys.stdout.encoding or "utf-8"
        print(message.encode(encoding, "replace").decode(encoding), flush=True)


def say_next(*command: Any, last: bool = False) -> None:
    """The next command to type, at a command's end; under make, which knows what comes next, only at its last one's."""
    if last or not os.environ.get("MAKELEVEL"):
        say(f"next: {shlex.join(map(str, command))}")


def sha256_json(obj: Any) -> str:
    """Hex sha256 of canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary_path)` in the target's folder, then rename it onto `path`: a reader sees all or nothing.
    Temporaries of this target that killed processes left are removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{host()}-{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    remove_temporaries(path.parent, path.name)


TEMPORARY = re.compile(r"\.(?P<target>.+)\.(?:(?P<host>[^.]+)-)?(?P<pid>\d+)\.tmp")


def remove_temporaries(directory: str | Path, target: str | None = None) -> None:
    """Remove temporary files that write_atomic of killed processes left in a directory: for one target, where others
    may be writing now, only those of this machine's processes that have ended; without a target, those of any process,
    since the caller holds the directory's lock."""
    with os.scandir(directory) if os.path.isdir(directory) else contextlib.nullcontext([]) as entries:
        for entry in entries:
            match = TEMPORARY.fullmatch(entry.name)
            if match and (not target or match["target"] == target and match["host"] == host()
                          and not is_running(int(match["pid"]))):
                Path(entry.path).unlink(missing_ok=True)


def scratch(prefix: str) -> tempfile.TemporaryDirectory:
    """A temporary directory, removed with the process; those that killed processes of this machine left go now."""
    begin = f"{prefix}-{host()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{begin}*"):
        pid = left.name.removeprefix(begin).partition("-")[0]
        if pid.isdecimal() and not is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{begin}{os.getpid()}-")


def host() -> str:
    """This machine's name, up to its first dot."""
    return platform.node().partition(".")[0] or "localhost"


def is_running(pid: int) -> bool:
    """Is there a process of that number on this machine?"""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # of file systems without flock(2)


class Lock:
    """A lock file, held by this process from `Lock(…)` to `release()`. If another holds it, the program ends with an
    error that says `busy` and who holds it.

    The kernel frees it when its holder ends, even by SIGKILL, so that a dead process keeps nobody out. It works between
    machines where the file system carries flock(2) from one to the other (NFS 4 does); where it has no locks at all,
    a note says so, and nothing but the user keeps two commands apart.
    """

    def __init__(self, path: Path, busy: str, wait: float = 0):
        """wait: seconds to wait for another holder."""
        self.lock, self.holder = FileLock(path), path.with_suffix(".holder")
        try:
            self.lock.acquire(timeout=wait)
        except Timeout:
            with contextlib.suppress(OSError):
                busy = f"{busy}: {self.holder.read_text()}"
            fail(busy)
        except OSError as e:
            if e.errno not in NO_LOCKS:
                fail(f"{path} can't be locked ({e.strerror})")
            say(f"note: the file system of {path.parent} has no locks ({e.strerror}): run one command at a time there")
        self.holder.write_text(f"process {os.getpid()} on {host()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")

    def release(self) -> None:
        self.holder.unlink(missing_ok=True)
        self.lock.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error) -> None:
        self.release()


def write_text(path: str | Path, text: str) -> None:
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object; fails on a file that holds none."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        fail(f"{path} is not JSON ({e})")
    return document if isinstance(document, dict) else fail(f"{path} is not a JSON object")


def to_json(obj: Any, indent: int | None = None) -> str:
    """JSON text. Infinity and NaN, which JSON doesn't have, are an error that names their place."""
    try:
        return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        broken = [(at, x) for at, x in leaves(obj) if isinstance(x, float) and not math.isfinite(x)]
        if not broken:
            raise
        raise FloatingPointError(f"{broken[0][0]} is {broken[0][1]}, which JSON can't hold") from None


def leaves(obj: Any, at: str = "") -> Iterable[tuple[str, Any]]:
    """(place such as metrics/loss, value) of all that a nest of dicts and lists holds."""
    items = obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, (list, tuple)) else None
    if items is None:
        yield at, obj
    else:
        for key, value in items:
            yield from leaves(value, f"{at}/{key}".lstrip("/"))


def nulled(obj: Any) -> Any:
    """A nest of dicts and lists with None for Infinity and NaN: for what others computed or wrote, where they may mean
    "no value"."""
    if isinstance(obj, dict):
        return {key: nulled(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [nulled(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def check_fields(where: str | Path, record: Any, fields: dict[str, Any]) -> None:
    """Fail unless a record has these fields, each of its type (or one of several)."""
    for name, kinds in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
            given = f"is {str(value)[:60]!r}" if isinstance(record, dict) and name in record else "is missing"
            fail(f"{where}: {name} {given}, want {wanted}; is it of another version, or edited?")


def write_json(path: str | Path, obj: Any) -> None:
    write_text(path, to_json(obj, indent=1) + "\n")


def without_places(record: dict[str, Any]) -> dict[str, Any]:
    """A record that may be published: of an absolute path, in a command too, only the last part is left."""
    return json.loads(re.sub(r'(?<=[" =])(/[^/" ]+)+/(?=[^" ])', "", json.dumps(record)))


def tensor_entries(file: Path) -> dict[str, dict]:
    """{tensor name: {dtype, shape, data_offsets in the file}} of a safetensors file; reads its header only."""
    with open(file, "rb") as f:
        head = f.read(8)
        n = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        try:
            entries = json.loads(f.read(n) if 0 < n < os.path.getsize(file) else b"")
        except ValueError:
            fail(f"{file} is not a safetensors file (an LFS pointer, or an interrupted download?)")
    entries.pop("__metadata__", None)
    return {name: {**e, "data_offsets": [8 + n + at for at in e["data_offsets"]]} for name, e in entries.items()}


def tensors_sha256(files: Iterable[Path]) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor in safetensors files, in order of name.

    Independent of sharding, file names and metadata, so it identifies weights, not files.
    """
    where = {name: (file, entry) for file in files for name, entry in tensor_entries(file).items()}
    digest = hashlib.sha256()
    for name in sorted(where):
        file, entry = where[name]
        begin, end = entry["data_offsets"]
        digest.update(f"{name}|{entry['dtype']}|{entry['shape']}|".encode())
        with open(file, "rb") as f:
            f.seek(begin)
            left = end - begin
            while left:
                chunk = f.read(min(left, 1 << 24))
                if not chunk:
                    fail(f"{file} is truncated: tensor {name} ends early")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content, decompressed when it ends in .gz."""
    digest = hashlib.sha256()
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def bucket(text: str) -> float:
    """A fixed place in [0, 1) for a text, by sha256: splits that no seed, order or file moves."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
