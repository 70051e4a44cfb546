"""Which checkpoint counts, what is wrong with one that does not, and which ones go."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_cases import FILES, STATE, checkpoint, unfinished
from rotmole.errors import InputError, StorageError
from rotmole.training.checkpoints.find import checkpoints, find_resume, prune
from rotmole.training.checkpoints.seal import COMPLETE, begin, faults, remove, seal
from rotmole.training.checkpoints.write import nothing_half_written


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


DAMAGE = {
    empty: "has 0 bytes in place of",
    truncate: "bytes in place of",
    flip: "is not what was saved",
    lambda path: path.unlink(): "is missing",
}


def test_the_seal_lists_every_file_also_in_folders(tmp_path):
    folder = unfinished(tmp_path, 5)
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "shard.distcp").write_bytes(b"abc")
    seal(folder, {"facts": {"seed": 3}})
    content = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    assert set(content["files"]) == {*FILES, "optimizer_0/shard.distcp"}
    assert content["files"]["optimizer_0/shard.distcp"] == {
        "size": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert (content["step"], content["facts"]) == (5, {"seed": 3})
    assert faults(folder) == []


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    folder = checkpoint(tmp_path, 5)
    damage(folder / name)
    (fault,) = faults(folder)
    assert fault.startswith(name)
    assert DAMAGE[damage] in fault
    with pytest.raises(InputError, match=name):
        find_resume(tmp_path, str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_part_that_was_never_there_is_a_fault(tmp_path, name):
    (fault,) = faults(checkpoint(tmp_path, 5, leave_out=name))
    assert fault.startswith("it has no")


@pytest.mark.parametrize("name", FILES)
def test_weights_only_does_without_the_state_of_the_optimisation(tmp_path, name):
    for step, damage in enumerate(DAMAGE):
        folder = checkpoint(tmp_path, step)
        damage(folder / name)
        assert (faults(folder, weights_only=True) == []) == (name in STATE)
    whole = checkpoint(tmp_path, 9, leave_out=name)
    assert (faults(whole, weights_only=True) == []) == (name in STATE)


def test_a_file_that_was_slipped_in_is_a_fault(tmp_path):
    folder = checkpoint(tmp_path, 5)
    (folder / "notes.txt").write_text("fine", encoding="utf-8")
    assert faults(folder) == []
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert faults(folder) == ["pytorch_model.bin was not there when it was saved"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read"), ("[]", "does not list"), ('{"files": 3}', "does not list"),
        ('{"files": {"../x": {"size": 1, "sha256": ""}}}', "does not list"),
        ('{"files": {"/x": {"size": 1, "sha256": ""}}}', "does not list"),
        ('{"files": {"": {"size": 1, "sha256": ""}}}', "does not list"),
        ('{"files": {"x": 1}}', "does not list"), ("\udcff", "cannot be read"),
        ('{"format": 2, "files": {}}', "has format 2, this version reads 1"),
    ],
)  # fmt: skip
def test_a_broken_seal_counts_as_none(tmp_path, text, told):
    folder = checkpoint(tmp_path, 5)
    (folder / COMPLETE).write_bytes(text.encode("utf-8", "surrogateescape"))
    (fault,) = faults(folder)
    assert told in fault
    (folder / COMPLETE).unlink()
    assert faults(folder) == ["COMPLETE.json is missing, so it was never finished"]


def test_auto_takes_the_newest_complete_one_and_names_those_it_skipped(tmp_path, caplog):
    checkpoint(tmp_path, 90)
    right = checkpoint(tmp_path, 100)
    truncate(checkpoint(tmp_path, 110) / "adapter_model.safetensors")
    unfinished(tmp_path, 120)
    (checkpoint(tmp_path, 130) / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-140").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        f"checkpoint-{step}" for step in (90, 100, 110, 120, 130, 140)
    ]
    assert find_resume(tmp_path, "auto") == right
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0][-3:] for text in said] == ["140", "130", "120", "110"]
    assert "optimizer.pt is missing, or add --weights-only" in said[1]
    assert "never finished" in said[2]
    assert "adapter_model.safetensors has" in said[3]
    assert "--weights-only" not in said[3]
    assert find_resume(tmp_path, "auto", weights_only=True).name == "checkpoint-130"


def test_auto_starts_anew_where_there_is_nothing(tmp_path):
    assert find_resume(tmp_path / "missing", "auto") is None
    assert find_resume(tmp_path, None) is None
    begin(tmp_path / "checkpoint-5")  # and where a process died in its first checkpoint
    assert find_resume(tmp_path, "auto") is None


def test_auto_does_not_start_over_what_was_damaged_or_is_of_another_version(tmp_path):
    flip(checkpoint(tmp_path, 5) / "adapter_model.safetensors")
    unfinished(tmp_path, 4)
    with pytest.raises(InputError, match=r"checkpoint-5: .*\. checkpoint-4: COMPLETE.json is mis"):
        find_resume(tmp_path, "auto")


def test_a_named_checkpoint_must_be_there_and_be_the_newest(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_resume(tmp_path, str(tmp_path / "nowhere"))
    older, newer = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    unfinished(tmp_path, 15)
    assert find_resume(tmp_path, str(newer)) == newer
    with pytest.raises(InputError, match=r"checkpoint-10 there would mix"):
        find_resume(tmp_path, str(older))
    assert find_resume(tmp_path / "other", str(older)) == older
    checkpoint(tmp_path / "other", 1)
    with pytest.raises(InputError, match=r"checkpoint-1 there would mix"):
        find_resume(tmp_path / "other", str(older))


@pytest.mark.parametrize(
    ("keep", "best", "stay"),
    [
        (None, None, [10, 20, 25, 30, 40]), (1, None, [40]), (2, None, [30, 40]),
        (1, 10, [10, 40]), (2, 10, [10, 40]), (3, 10, [10, 30, 40]), (3, 40, [20, 30, 40]),
        (9, None, [10, 20, 30, 40]),
    ],
)  # fmt: skip
def test_the_newest_and_the_best_stay(tmp_path, keep, best, stay):
    for step in (10, 20, 30, 40):
        checkpoint(tmp_path, step)
    unfinished(tmp_path, 25)
    place = str(tmp_path / f"checkpoint-{best}") if best else None
    prune(tmp_path, keep, tmp_path / "checkpoint-40", place)
    assert [int(path.name[11:]) for path in checkpoints(tmp_path)] == stay


def test_a_damaged_one_after_the_newest_takes_no_place(tmp_path):
    for step in (10, 20, 40):  # 40 was damaged, so training went on from 20
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 30)
    prune(tmp_path, 2, tmp_path / "checkpoint-30", None)
    assert [int(path.name[11:]) for path in checkpoints(tmp_path)] == [20, 30]


def test_removing_takes_the_seal_first(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, 5)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)  # killed right here
    remove(folder)
    assert folder.is_dir()
    assert faults(folder)


def fill_up(folder):
    (folder / "half.bin").write_bytes(b"x")
    raise OSError(errno.ENOSPC, "No space left on device")


def safetensors_on_a_missing_folder(folder):
    save_file({"a": torch.ones(2)}, folder / "missing" / "x.safetensors")


def torch_on_a_missing_folder(folder):
    torch.save({"a": torch.ones(2)}, folder / "missing" / "x.pt")


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (fill_up, "the disk is full"),
        (safetensors_on_a_missing_folder, "the folder does not exist"),
        (torch_on_a_missing_folder, "does not exist"),
    ],
)
def test_whatever_says_that_the_disk_refused_nothing_half_written_stays(tmp_path, write, told):
    folder = unfinished(tmp_path, 5)
    with pytest.raises(StorageError, match=told), nothing_half_written(folder):
        write(folder)
    assert not folder.exists()


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="of its own"), nothing_half_written(tmp_path):
        raise RuntimeError("of its own")
