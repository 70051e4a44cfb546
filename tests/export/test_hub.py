from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from fake_hub import TOKEN, FakeHub, fake_hub
from rotmole.errors import InputError, RotMoleError
from rotmole.export.hub import push

# huggingface_hub 2.4 sends large files by an argument that httpx calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

CONTENTS = {
    "README.md": b"---\nlibrary_name: peft\n---\n# A card\n",
    "adapter_config.json": b'{"r": 4}',
    "adapter_model.safetensors": bytes(range(256)) * 40,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "optimizer.pt").write_bytes(b"of no use to others")
    (tmp_path / ".hidden.json").write_bytes(b"{}")
    return tmp_path


def test_the_files_arrive_and_nothing_else(hub: FakeHub, folder: Path) -> None:
    done = push(folder, "me/adapter", private=True)
    assert hub.files == {"me/adapter": CONTENTS}
    assert hub.private == {"me/adapter": True}
    assert done.url == f"{hub.url}/me/adapter"
    assert done.sent == tuple(sorted(CONTENTS))


def test_nothing_is_sent_twice(hub: FakeHub, folder: Path) -> None:
    push(folder, "me/adapter")
    assert hub.private == {"me/adapter": None}
    before = hub.sent
    done = push(folder, "me/adapter")
    assert done.sent == ()
    assert done.kept == tuple(sorted(CONTENTS))
    assert (hub.sent, hub.commits) == (before, 1)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Another\n", encoding="utf-8")
    assert push(folder, "me/adapter").sent == ("README.md",)
    assert hub.sent == before + len((folder / "README.md").read_bytes())
    (folder / "adapter_model.safetensors").write_bytes(b"other weights of the same adapter")
    assert push(folder, "me/adapter").sent == ("adapter_model.safetensors",)
    content = hub.files["me/adapter"]["adapter_model.safetensors"]
    assert content == b"other weights of the same adapter"


def test_a_token_in_a_file_stays_here(hub: FakeHub, folder: Path) -> None:
    (folder / "generation_config.json").write_text(f'{{"token": "{TOKEN}"}}', encoding="utf-8")
    with pytest.raises(InputError, match=r"generation_config\.json contains your hub token"):
        push(folder, "me/adapter")
    assert not hub.files


def test_no_token_no_upload(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="set HF_TOKEN"):
        push(folder, "me/adapter")


def test_offline_is_said(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        push(folder, "me/adapter")


@pytest.mark.parametrize(("status", "words"), [(403, "may write to 'me'"), (422, r"\(422\)")])
def test_a_refusal_is_one_sentence(hub: FakeHub, folder: Path, status: int, words: str) -> None:
    hub.refuse = status
    with pytest.raises(InputError, match=words) as caught:
        push(folder, "me/adapter")
    assert "\n" not in str(caught.value)


def test_a_large_file_that_is_refused(hub: FakeHub, folder: Path) -> None:
    hub.refuse_large = True
    with pytest.raises(InputError, match="may write to 'me'"):
        push(folder, "me/adapter")
    assert hub.files == {"me/adapter": {}}
    hub.refuse_large = False
    assert push(folder, "me/adapter").sent == tuple(sorted(CONTENTS))


def test_a_name_that_cannot_be(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(InputError, match="--push 'a/b/c'"):
        push(folder, "a/b/c")


def test_a_hub_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(monkeypatch):
        pass  # its port is closed now
    with pytest.raises(RotMoleError, match="cannot be reached"):
        push(folder, "me/adapter")


def test_an_empty_folder(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file to upload"):
        push(tmp_path, "me/adapter")
