"""Upload a folder to a model hub: only what it does not have yet, and never a token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rotmole.errors import InputError, RotMoleError

PATTERNS = (
    "README.md", "*.json", "*.jinja", "*.safetensors", "*.onnx", "*.onnx.data", "*.model",
    "vocab.txt", "merges.txt",
)  # fmt: skip
"""Names of files that are uploaded; everything else in the folder, and hidden files, stay here."""
_TEXT = {".md", ".json", ".jinja", ".txt"}


@dataclass(frozen=True)
class Pushed:
    """What an upload did.

    Attributes:
        url: of the repository.
        sent: names of the files that were new or changed.
        kept: names of the files that the hub had already.
    """

    url: str
    sent: tuple[str, ...]
    kept: tuple[str, ...]


def push(folder: Path, repo: str, *, private: bool = False, message: str = "Upload") -> Pushed:
    """Upload the files of a folder to a model repository, which is made if it does not exist.

    The token is the one of HF_TOKEN or of `hf auth login`, the address that of HF_ENDPOINT.

    Args:
        repo: such as "name/my-adapter".
        private: a new repository is private; otherwise the owner's settings on the hub decide.
        message: of the commit.

    Raises:
        InputError: no token, a name that cannot be, a file that contains the token, or the hub
            refuses.
        RotMoleError: the hub cannot be reached.
    """
    token = _token(repo)
    files = {path.name: path for path in _files(folder)}
    if not files:
        raise InputError(f"{folder} contains no file to upload ({', '.join(PATTERNS)}).")
    for path in files.values():
        if path.suffix in _TEXT and token.encode() in path.read_bytes():
            raise InputError(f"{path} contains your hub token; remove it, and nothing was sent.")
    api = HfApi(token=token)
    try:
        # None, because False would make a repository public whose owner's default is private
        url = str(api.create_repo(repo, exist_ok=True, private=private or None))
        there = {entry.path: entry for entry in api.get_paths_info(repo, list(files))}
        sent = [name for name, path in files.items() if not _is_same(path, there.get(name))]
        if sent:
            adds = [CommitOperationAdd(name, str(files[name])) for name in sent]
            api.create_commit(repo, adds, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"--push {repo!r}: {_first_line(error)}") from error
    except Exception as error:  # while a large file is sent, the cause is inside a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError):
            raise InputError(_refusal(cause, repo)) from error
        if not type(cause).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise RotMoleError(_unreachable(cause)) from error
    kept = [name for name in files if name not in sent]
    return Pushed(url, tuple(sent), tuple(kept))


def _token(repo: str) -> str:
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"--push {repo!r}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it."
        )
    token = get_token()
    if not token:
        raise InputError(
            f"--push {repo!r}: there is no token of the hub; set HF_TOKEN, or run `hf auth login`."
        )
    return token


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        named = any(path.match(pattern) for pattern in PATTERNS)
        if path.is_file() and named and not path.name.startswith("."):
            yield path


def _is_same(path: Path, entry: object) -> bool:
    """Whether the hub's file has the content of this one: by SHA-256, or by git's blob id."""
    if entry is None:
        return False
    content = path.read_bytes()
    lfs = getattr(entry, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == hashlib.sha256(content).hexdigest())
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return bool(getattr(entry, "blob_id", None) == blob)


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"--push {repo!r}: the hub refused ({status}); use a token that may write to "
            f"{repo.partition('/')[0]!r}."
        )
    return f"--push {repo!r}: the hub refused ({status}): {_first_line(error)}"


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def _unreachable(error: BaseException | None) -> str:
    return (
        f"the hub at {constants.ENDPOINT} cannot be reached ({_first_line(error)}); check the "
        "network and HF_ENDPOINT, and run the same command again: what arrived is not sent twice."
    )
