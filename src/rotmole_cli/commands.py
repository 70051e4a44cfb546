"""The verbs of the command line: names, options, help; each imports its work when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="rotmole",
    help="Train, evaluate and use mixtures of LoRA experts gated by scaling and rotation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file: training.max_steps=20"),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="A run folder, a run file or an adapter folder.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that came with the base model; read it first."
    ),
]


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"rotmole {version('rotmole')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; any verb.")] = False,
) -> None:
    """Train, evaluate and use mixtures of LoRA experts gated by scaling and rotation."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The run file to write.")] = Path("run.yaml"),
    template: Annotated[
        str, typer.Option("--template", "-t", help="One of the names that --list shows.")
    ] = "quickstart",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the templates and stop.")] = False,
) -> int:
    """Write a run file to start from."""
    from rotmole_cli.init import init as work

    return work(path, template, force=force, show=show)


@app.command()
def check(run: RunPath, overrides: Overrides = None, trust_remote_code: Trust = False) -> int:
    """Find every mistake in a run file; show what it will cost."""
    from rotmole.cli.check import check as work

    return work(run, overrides or [], trust_remote_code=trust_remote_code)


@app.command()
def methods(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN.yaml]", help="A run file: its model, modules and rank."),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A model, where there is no run file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> int:
    """List the presets: what each would train and cost in a model."""
    from rotmole.cli.methods import methods as work

    return work(run, overrides or [], model, json)


@app.command()
def train(
    run: RunPath,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            help="Go on from the newest complete checkpoint (auto) or from a folder.",
        ),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Resume with a fresh optimizer, if its state is lost."),
    ] = False,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change", help="Resume with other settings, data, versions or processes."
        ),
    ] = False,
    trust_remote_code: Trust = False,
) -> int:
    """Train an adapter as a run file says."""
    from rotmole.cli.train import train as work

    return work(
        run,
        overrides or [],
        resume,
        weights_only=weights_only,
        allow_change=allow_change,
        trust_remote_code=trust_remote_code,
    )


@app.command("eval")
def evaluate(
    target: Target,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Run file, for an adapter folder.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="train, validation or test.")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows per task and group.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    trust_remote_code: Trust = False,
) -> int:
    """Score a run or an adapter, before beside after."""
    from rotmole.cli.eval import evaluate as work

    return work(
        target, overrides or [], config, split, limit, json, trust_remote_code=trust_remote_code
    )


@app.command()
def generate(
    target: Target,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; without it --file or stdin is read, one prompt a line."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read prompts from a file, one a line.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    trust_remote_code: Trust = False,
) -> int:
    """Generate text with a trained adapter."""
    from rotmole.cli.generate import generate as work

    return work(
        target, prompt, file, max_new_tokens, temperature, top_p, seed, stream,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def doctor(
    adapter: Annotated[
        Path | None, typer.Argument(help="An adapter folder to examine as well.")
    ] = None,
) -> int:
    """Examine this installation, or an adapter folder."""
    from rotmole.cli.doctor import doctor as work

    return work(adapter)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Run folder.")] = Path("runs/demo"),
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Updates of each adapter, else 45.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything.")] = 0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")] = False,
) -> int:
    """Compare RotMoLE with its scalar-gated twin in minutes."""
    if not yes and _at_terminal():
        typer.confirm(
            "This downloads a 93 MB model once and trains for minutes. Go on?", abort=True
        )
    _import_beside("rotmole.cli.demo.worker")
    from rotmole.cli.demo.command import demo as work

    return work(output, steps, seed)


def _import_beside(module: str) -> None:
    """Let the process that the demo's workers fork from import while this one imports too."""
    import multiprocessing
    from multiprocessing import forkserver

    multiprocessing.set_forkserver_preload([module])
    forkserver.ensure_running()


def _at_terminal() -> bool:
    import sys

    return sys.stdin.isatty() and sys.stdout.isatty()
