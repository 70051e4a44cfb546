"""Run PEFT's own tests against RotMoLE: ``python tests/conformance/run.py``.

Downloads the source distribution of the installed PEFT version through pip (once, into .cache/),
builds tiny models from config into folders named like the hub ids, and runs PEFT's tests on two
processes without a network, aimed at RotMoLE by conformance_plugin.py. Before that it proves that
the tests bite: it breaks our layer from outside in three ways, and each must be noticed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "conformance"
NEEDS = ("datasets", "diffusers", "pytest", "pytest_socket", "setuptools", "xdist")
SABOTAGE_NAMES = ("ignore-disable-adapters", "ignore-active-adapter", "empty-adapter-layer-names")
# Enough of upstream's tests to see each sabotage, and few enough to take seconds.
REDUCED = (
    "test_disable_adapters or test_multiple_active_adapters_forward or test_set_requires_grad"
    " or test_delete_adapter_properly_cleans_up_after_itself or test_loading_model_requires_grad"
)
# PEFT turns transformers' deprecations into errors. These two are raised by PEFT's own code, which
# still uses the old names, and fail PEFT's own methods just the same.
OUTDATED = ("is_gradient_checkpointing", "gradient_checkpointing_enable")


def main() -> int:
    """Prepare, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sabotage",
        choices=(*SABOTAGE_NAMES, "all", "none"),
        help="run only this proof that the tests bite; none: only the tests",
    )
    parser.add_argument("pytest_args", nargs="*", help="after --: passed on; turns the lists off")
    arguments = parser.parse_args()
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing: {', '.join(missing)}; run: pip install -e '.[conformance]'")
        return 2
    os.environ.update(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        TOKENIZERS_PARALLELISM="false",
    )
    sdist = download(importlib.metadata.version("peft"))
    with tempfile.TemporaryDirectory() as hub:
        from tiny_models import build_models

        before = Path.cwd()
        os.chdir(hub)  # from_pretrained("owner/name") now finds the folder of that name
        try:
            build_models()
            if arguments.sabotage in SABOTAGE_NAMES:
                return run_sabotages(sdist, (arguments.sabotage,))
            code = 0 if arguments.sabotage == "none" else run_sabotages(sdist, SABOTAGE_NAMES)
            if arguments.sabotage != "all":
                code = run_tests(sdist, arguments.pytest_args) or code
            return code
        finally:
            os.chdir(before)


def download(version: str) -> Path:
    """Return the folder with PEFT's tests, from the cache or else through pip."""
    folder = CACHE / f"peft-{version}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", *flags, "--dest", temporary]
        subprocess.run([*command, f"peft=={version}"], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            if hasattr(tarfile, "data_filter"):  # not in 3.11.2, which Debian 12 ships
                packed.extraction_filter = tarfile.data_filter
            packed.extractall(temporary)
        unpacked = Path(temporary) / f"peft-{version}"
        (unpacked / "tests" / "__init__.py").touch()  # the tests import each other relatively
        shutil.rmtree(unpacked / "src")  # the installed PEFT is what is tested
        unpacked.rename(folder)
    return folder


def options(sdist: Path) -> list[str]:
    """Return pytest's options: PEFT's own configuration, our plug-in, sockets closed."""
    plugins = ("conformance_plugin", "xdist", "pytest_socket", "no:cacheprovider")
    return [
        *("--rootdir", str(sdist), "-c", str(sdist / "pyproject.toml")),
        *("-o", "addopts="),  # PEFT's own ask for a coverage plug-in
        *(part for name in plugins for part in ("-p", name)),
        *("--disable-socket", "--allow-unix-socket", "--allow-hosts=127.0.0.1,localhost,::1"),
        *(
            part
            for name in OUTDATED
            for part in ("-W", f"ignore:`{name}` is deprecated:FutureWarning")
        ),
        *("-q", "--no-header", "--disable-warnings", "--tb=short", "--show-capture=no"),
    ]


def run_tests(sdist: Path, extra: list[str]) -> int:
    """Run everything that is aimed, on two processes, and compare with the committed lists."""
    import pytest
    from aims import MODULES
    from listed import LEFT_OUT

    present = {path.stem for path in (sdist / "tests").glob("test_*.py")}
    unlisted = sorted(present ^ (set(MODULES) | set(LEFT_OUT)))
    if unlisted:
        print(f"PEFT's test modules are not those that listed.py and aims.py name: {unlisted}")
        return 1
    paths = [str(sdist / "tests" / f"{module}.py") for module in MODULES]
    flags = ["--reduced", *extra] if extra else ["-n", "2"]
    return int(pytest.main([*options(sdist), *flags, *paths]))


def run_sabotages(sdist: Path, names: tuple[str, ...]) -> int:
    """Break the layer in each way; return 0 only if the sound layer passes and no other does."""
    import pytest

    path = str(sdist / "tests" / "test_custom_models.py")
    common = [*options(sdist), "--reduced", "--tb=no", "--no-summary", "-k", REDUCED, path]
    codes = {"none": pytest.main(common)}
    for name in names:
        codes[name] = pytest.main([*common, "--sabotage", name])
    failed, passed = pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK
    good = True
    for name, code in codes.items():
        wanted = passed if name == "none" else failed
        good = good and code == wanted
        verdict = {failed: "caught", passed: "nothing failed"}.get(
            code, f"pytest ended with {code}"
        )
        print(f"sabotage {name}: {verdict}{'' if code == wanted else '  <- WRONG'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
