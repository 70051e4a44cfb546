"""Look into the built wheel and source distribution, and use the wheel in an empty environment.

    python tests/packed.py FOLDER [--constraint FILE]

`make dist` builds both into FOLDER, the wheel out of the source distribution. The source
distribution must hold every file under version control, and nothing else; the wheel everything
under src/. The empty environment gets the wheel and what it requires, and no extra.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
LEFT_OUT = {".gitignore", ".pre-commit-config.yaml"}  # hatchling adds .gitignore by itself
ADDED = {"PKG-INFO", ".gitignore"}
USED = """
import torch, rotmole
from pathlib import Path
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))

ids = torch.arange(7)[None]
model = get_peft_model(base(), rotmole.RotMoleConfig(r=4, num_experts=4))
for parameter in (p for p in model.parameters() if p.requires_grad):
    torch.nn.init.normal_(parameter, std=0.1)
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(base(), "adapter")
assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
print(Path(rotmole.__file__).resolve())
"""


def tracked(folder: str = "") -> set[str]:
    """Return the files under version control, as paths from the root of the project."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", folder or "."]
    return {name for name in subprocess.check_output(command, text=True).split("\0") if name}


def content_faults(wheel: Path, source: Path) -> Iterator[str]:
    """Yield what is missing in the two files, and what does not belong there."""
    with tarfile.open(source) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    yield from (f"{source.name} lacks {name}" for name in sorted(tracked() - LEFT_OUT - packed))
    yield from (f"{source.name} holds {name}" for name in sorted(packed - tracked() - ADDED))
    with zipfile.ZipFile(wheel) as parcel:
        names = {f"src/{name}" for name in parcel.namelist() if ".dist-info/" not in name}
    yield from (f"{wheel.name} lacks {name}" for name in sorted(tracked("src") - names))
    yield from (f"{wheel.name} holds {name}" for name in sorted(names - tracked("src")))


def use(wheel: Path, constraint: Path) -> None:
    """Install the wheel into an empty environment, and use the library and the command there."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with TemporaryDirectory() as folder:
        there = Path(folder).resolve()

        def done(*command: str | Path) -> str:
            words = [str(word) for word in command]
            run = subprocess.run(words, cwd=there, env=clean, text=True, stdout=-1, check=True)
            return run.stdout

        done(sys.executable, "-m", "venv", "--without-pip", "new")
        python = there / "new" / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "--quiet"]
        done(*pip, "install", "--no-compile", "--constraint", constraint, wheel)
        done(*pip, "check")
        assert done(python, "-c", USED).strip().startswith(str(there)), "not the installed package"
        command = python.with_name("rotmole")
        assert "Usage: rotmole" in done(command, "--help")
        assert wheel.name.split("-")[1] in done(command, "--version")
        assert "2605.25565" in done(command, "methods")


def main() -> int:
    """Check both files and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--constraint", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args()
    (wheel,) = options.folder.resolve().glob("*.whl")
    (source,) = options.folder.resolve().glob("*.tar.gz")
    faults = [*content_faults(wheel, source)]
    print("\n".join([*faults, f"{wheel.name}, {source.name}: {len(faults)} faults"]))
    use(wheel, options.constraint.resolve())
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
