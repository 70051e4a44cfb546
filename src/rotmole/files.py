"""Writing files so that a crash, a full disk or a second process never leaves half a file."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rotmole.errors import StorageError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.ENOENT: "the folder does not exist; create it first",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder, not a file; choose another path",
    errno.EIO: "the disk reports an input/output error; check it before going on",
}


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn every OSError of the block into a StorageError that names the path and the fix.

    Args:
        path: the file or folder that the block writes.

    Raises:
        StorageError: the block raised an OSError, such as on a full or read-only disk.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(f"cannot write {str(path)!r}: {reason}.") from error


def atomic_write_bytes(path: str | Path, data: bytes) -> Path:
    """Write the whole file or nothing: temporary file in the same folder, fsync, rename.

    Args:
        path: the file; its folder must exist.

    Raises:
        StorageError: the file cannot be written; an existing file is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)
    return path


def atomic_write_text(path: str | Path, text: str) -> Path:
    r"""Write UTF-8 text as `atomic_write_bytes` does; line ends stay as given (``\n``)."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def share(folder: Path) -> None:
    """Give files that only their owner may read the mode that new files get in their folder.

    Some libraries, such as safetensors, write 0600 whatever the umask is.

    Raises:
        StorageError: a mode cannot be changed.
    """
    with storage_errors(folder):
        probe = folder.parent / f".mode.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        probe.touch()
        try:
            mode = probe.stat().st_mode  # the umask itself can only be read by changing it
        finally:
            probe.unlink()
        for path in folder.rglob("*"):
            if path.is_file() and not path.stat().st_mode & 0o077:
                path.chmod(mode & 0o777)


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents if they are missing.

    Raises:
        StorageError: the folder cannot be created.
    """
    path = Path(path)
    with storage_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise OSError(errno.ENOTDIR, "a file of that name exists") from error
    return path


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it gets its name when the block ends, all or nothing.

    Args:
        path: the folder to be; it must not exist, or be empty.

    Raises:
        StorageError: it cannot be written, or something is in it.
    """
    path = Path(path)
    make_folder(path.parent)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StorageError(
                f"{str(path)!r} exists and is no empty folder; choose another name or remove it."
            )
        try:
            fresh.mkdir()
            yield fresh
            share(fresh)
            for file in (*fresh.rglob("*"), fresh):
                sync(file)
            if path.is_dir():
                path.rmdir()
            fresh.rename(path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        sync(path.parent)


def check_writable(folder: str | Path, *names: str) -> None:
    """Try whether files of these names could be written into a folder, which is made if missing.

    Raises:
        StorageError: the folder cannot be made, takes no file, or has a folder of such a name.
    """
    folder = make_folder(folder)
    for name in names:
        with storage_errors(folder / name):
            if (folder / name).is_dir():
                raise OSError(errno.EISDIR, "a folder of that name exists")
    with storage_errors(folder), tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(bytes(1 << 16))  # also a full disk may take an empty file


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk if the platform supports it."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems have no fsync
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
