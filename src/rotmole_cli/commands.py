"""The commands of the command line: names, options, help. Each imports its work when it runs."""

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
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that replace those of the run file, such as training.max_steps=20.",
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Target = Annotated[
    Path, typer.Argument(metavar="TARGET", help="A run folder, a run file or an adapter folder.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Allow Python code that comes with the base model to run. Read that code first.",
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
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; works with every command."),
    ] = False,
) -> None:
    """Train, evaluate and use mixtures of LoRA experts gated by scaling and rotation."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file to write.")] = Path(
        "run.yaml"
    ),
    template: Annotated[
        str, typer.Option("--template", "-t", help="The template; --list shows all.")
    ] = "quickstart",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the templates and exit.")] = False,
) -> int:
    """Write a run file to start from."""
    from rotmole_cli.init import init as work

    return work(path, template, force=force, show=show)


@app.command()
def check(run: RunPath, overrides: Overrides = None, trust_remote_code: Trust = False) -> int:
    """Check a run file or a study file: report every mistake at once, or show sizes and cost."""
    from rotmole.cli.check import check as work

    return work(run, overrides or [], trust_remote_code=trust_remote_code)


@app.command()
def methods(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN.yaml",
            help="A run file that gives the model, the target modules and the rank.",
        ),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A model to use if no run file is given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """List the presets and what each would train and cost in a model."""
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
            help="Continue from the newest complete checkpoint (auto) or from a given one.",
        ),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Resume the weights with a new optimizer, for example if its state is lost.",
        ),
    ] = False,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="Resume although settings, data, versions or the number of processes changed.",
        ),
    ] = False,
    trust_remote_code: Trust = False,
) -> int:
    """Train the adapter that a run file describes."""
    from rotmole.cli.train import train as work

    return work(
        run,
        overrides or [],
        resume,
        weights_only=weights_only,
        allow_change=allow_change,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def combine(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER... [KEY=VALUE]...",
            help="LoRA adapters, each one expert: adapter folders, run folders or ids on the hub; "
            "then settings of the run file.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="RUN.yaml",
            help="A run file or run folder that has tasks of each adapter; its sections model, "
            "data and evaluation are used.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="The run folder.")],
    names: Annotated[
        str | None,
        typer.Option(
            "--names", metavar="A,B,C", help="Names of the experts. [default: of the folders]"
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Train on at most this many rows of each task."),
    ] = None,
    trust_remote_code: Trust = False,
) -> int:
    """Make one mixture of trained LoRA adapters, and train its gates."""
    from rotmole.cli.combine import combine as work

    return work(words, data, output, names, rows, trust_remote_code=trust_remote_code)


@app.command("eval")
def evaluate(
    target: Target,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET...] [KEY=VALUE...]",
            help="More targets, which are compared with the first one on the same rows; and "
            "settings that replace those of the run file.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="The run file to take data from if TARGET is an adapter folder."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="train, validation or test. [default: as in the run file]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, help="Score at most this many rows for each task and group."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Score this task only; may be given again."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Folder for eval.json and predictions.jsonl. [default: the run folder; with "
            "several targets no files]",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Score on these tasks of lm_eval in place of the run's.",
        ),
    ] = None,
    harness_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder with more task files of lm_eval."),
    ] = None,
    trust_remote_code: Trust = False,
) -> int:
    """Score a model on the run's tasks, with and without the adapter; or compare several."""
    others = [word for word in more or [] if "=" not in word or Path(word).exists()]
    overrides = [word for word in more or [] if word not in others]
    if harness is not None:
        several = {"a second target": others or None}
        several |= {"--config": config, "--split": split, "--task": task or None}
        _refuse("--harness", several)
        from rotmole.cli.eval.harness import harness as run_harness

        return run_harness(
            target, harness,
            overrides=overrides, include=harness_path, limit=limit, output=output,
            as_json=json, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if harness_path is not None:
        raise typer.BadParameter("it needs --harness TASK,...", param_hint="--harness-path")
    if others:
        from rotmole.cli.eval.several import evaluate_several

        return evaluate_several(
            [target, *map(Path, others)], overrides, config, split, limit, json,
            tasks=task or [], output=output, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    from rotmole.cli.eval.command import evaluate as work

    return work(
        target, overrides, config, split, limit, json,
        tasks=task or [], output=output, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def inspect(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="TARGET...",
            help="Run folders, run files or adapter folders; the report shows the losses of "
            "further ones beside the first.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="RUN.yaml",
            help="Run file whose rows are looked at. [default: the target's own]",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="A text to show token by token; without --data, no rows."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="F", help="A text file, as --text; blank lines divide passages."
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", min=1, help="Tokens to look at, and as many to fit a static LoRA on."
        ),
    ] = 4000,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            metavar="PATTERN",
            help="Layers whose tokens are shown, such as 'layers.3.*q_proj'. [default: the mean]",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option("--figures", metavar="DIR", help="Write each figure as SVG and PDF, too."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for inspect.json and report.html. [default: the target's]",
        ),
    ] = None,
    trust_remote_code: Trust = False,
) -> int:
    """Say what the experts, weights and angles of a mixture do, and what is wrong with them."""
    if text is not None:
        _refuse("--text", {"--file": file})
    from rotmole.cli.inspect import Look
    from rotmole.cli.inspect import inspect as work

    look = Look(data, text, file, limit, layer, figures, output)
    return work(targets, look, trust_remote_code=trust_remote_code)


@app.command()
def prune(
    target: Target,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The adapter folder to write.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="RUN.yaml",
            help="Run file whose training rows decide. [default: the target's own]",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="At most this number of rows per task and group."),
    ] = None,
    similarity: Annotated[
        float | None,
        typer.Option(
            "--similarity",
            min=0.0,
            max=1.0,
            help="Merge experts that are alike to this degree, such as 0.98; 1 is equal. "
            "[default: none]",
        ),
    ] = None,
    max_difference: Annotated[
        float,
        typer.Option(
            "--max-difference",
            min=0.0,
            help="Write nothing if predictions change by more (mean KL, nats a learnt token).",
        ),
    ] = 0.01,
    trust_remote_code: Trust = False,
) -> int:
    """Write an adapter without the experts that rows do not use, and measure what changes."""
    from rotmole.cli.prune import prune_adapter as work

    return work(
        target,
        output,
        data=data,
        limit=limit,
        similarity=similarity,
        max_difference=max_difference,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that replace those of the study file, or of the run file it is based "
            "on, such as seeds=[0,1] or training.max_steps=20.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Processes that share the cells.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show methods and cells, and do nothing.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="Folder of the study. [default: its output_dir]"
        ),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            "--cell", metavar="NAME", help="Do this cell only, such as final/lora/seed-0."
        ),
    ] = None,
    print_cells: Annotated[
        bool,
        typer.Option("--print-cells", help="Print one command for each cell that is left."),
    ] = False,
    trust_remote_code: Trust = False,
) -> int:
    """Compare methods fairly: tune each one, train all with several seeds, score them once."""
    if not (dry_run or print_cells):
        _import_beside("rotmole.cli.compare.worker")
    from rotmole.cli.compare.command import compare as work

    return work(
        study, overrides or [],
        jobs=jobs, dry_run=dry_run, output=output, cell=cell, print_cells=print_cells,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def generate(
    target: Target,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The prompt. Without it, --file or standard input is the prompt.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="A file that is one prompt. If its name ends in .jsonl, each row is one: "
            '{"prompt": ...} or {"messages": [...]}.',
        ),
    ] = None,
    lines: Annotated[
        bool,
        typer.Option("--lines", help="Each line of the file or of standard input is a prompt."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Write the answers to this file; an incomplete one is continued.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts that are answered together if none is sampled.")
    ] = 8,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Send prompts by the model's chat template, or as they are. [default: --chat if "
            "the adapter was trained on chats]",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="A system message before each prompt."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens an answer may have.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample from the most likely tokens that hold this probability; 1 takes all.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of sampling.")] = 0,
    stream: Annotated[bool, typer.Option(help="Print tokens as they are generated.")] = True,
    trust_remote_code: Trust = False,
) -> int:
    """Generate text with a trained adapter."""
    from rotmole.cli.generate.command import Sampling
    from rotmole.cli.generate.command import generate as work

    return work(
        target, prompt, file,
        lines=lines, output=output, batch_size=batch_size, chat=chat, system=system,
        sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        stream=stream, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def grow(
    target: Target,
    experts: Annotated[
        int, typer.Option("--experts", "-n", min=1, help="How many experts each layer gets.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")
    ],
    freeze_old: Annotated[
        bool,
        typer.Option(
            "--freeze-old",
            help="Keep all that was there: --freeze-experts --freeze-router --freeze-shared.",
        ),
    ] = False,
    freeze_experts: Annotated[
        bool,
        typer.Option("--freeze-experts", help="Keep the old experts, their rotations included."),
    ] = False,
    freeze_router: Annotated[
        bool, typer.Option("--freeze-router", help="Keep how old experts are chosen and weighed.")
    ] = False,
    freeze_shared: Annotated[
        bool, typer.Option("--freeze-shared", help="Keep the expert that every token uses.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed of the new experts.")] = 0,
) -> int:
    """Add experts to a trained mixture; its outputs stay the same until it is trained on."""
    from rotmole.cli.grow import grow as work

    chosen = {
        "experts": freeze_experts,
        "router": freeze_router,
        "shared_expert": freeze_shared,
    }
    kept = [part for part, is_kept in chosen.items() if is_kept]
    return work(target, experts, output, freeze_old=kept, keep_all=freeze_old, seed=seed)


@app.command()
def chat(
    target: Target,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message before the conversation.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens an answer may have.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample from the most likely tokens that hold this probability; 1 takes all.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of sampling.")] = 0,
    trust_remote_code: Trust = False,
) -> int:
    """Talk to a model: each line is a message; /help lists the commands."""
    from rotmole.cli.chat import chat as work
    from rotmole.cli.generate.command import Sampling

    return work(
        target,
        system=system, sampling=Sampling(max_new_tokens, temperature, top_p, seed),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def execute(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- CMD ...",
            help="A console script, a file ending in .py, or -m MODULE, and its arguments.",
        ),
    ] = None,
) -> int:
    """Run a Python program with the method registered in it, such as lm_eval."""
    from rotmole_cli.exec import execute as work

    work(words or [])


@app.command()
def serve(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Run folders, run files or adapter folders of one base model. NAME=PATH names "
            "the model in requests; otherwise it is the folder's name.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen at; any but this computer's needs a key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen at; 0 takes a free one.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file with the key that clients must send."),
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=1024, help="Answers that are generated at the same time.")
    ] = 16,
    waiting: Annotated[
        int, typer.Option(min=0, help="Requests that wait for their turn; others are refused.")
    ] = 64,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that the key-value cache of each model holds. [default: by the free "
            "memory]",
        ),
    ] = None,
    batching: Annotated[
        bool,
        typer.Option(
            "--batching/--no-batching", help="Generate answers together, or one after the other."
        ),
    ] = True,
    trust_remote_code: Trust = False,
) -> int:
    """Serve a base model and its adapters to programs that speak OpenAI's interface."""
    from rotmole.cli.serve import serve as work

    return work(
        targets,
        host=host, port=port, api_key_file=api_key_file, parallel=parallel, waiting=waiting,
        cache_tokens=cache_tokens, batching=batching, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def export(
    target: Target,
    overrides: Overrides = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Write the nearest static LoRA, for programs without us.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write the adapted model as an ONNX graph.")
    ] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Refused: says why, and what to do instead.")
    ] = False,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="Write the adapter's model card, with its settings and scores."
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="NAME/REPO",
            help="Upload what was written, or the adapter with its card, to the hub.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A repository that --push makes is private.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="A new folder for --lora or --onnx."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=1,
            help="Rank of the static LoRA. [default: 16, or the adapter's if it is a LoRA]",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "--data",
            metavar="RUN.yaml",
            help="The run file whose rows the LoRA is fitted on. [default: the run's own]",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Other text that the LoRA is fitted on too, passages with a blank line between "
            "them. [default: a text of rotmole's]",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Rows of each task and group to fit on, and to judge by. [default: 50]",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            "--max-loss",
            min=0.0,
            help="Refuse a static LoRA whose predictions are farther from the mixture's, in nats "
            "for each token. [default: 0.1]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it all the same.")] = False,
    trust_remote_code: Trust = False,
) -> int:
    """Take an adapter out of rotmole: a static LoRA, an ONNX graph, a card, an upload."""
    from rotmole.cli.export import Kinds
    from rotmole.cli.export import export as work

    return work(
        target, overrides or [],
        kinds=Kinds(lora, onnx, merged, card, push, private),
        output=output, config=config, rank=rank, text=text, limit=limit,
        max_kl=max_kl, force=force, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def doctor(
    adapter: Annotated[
        Path | None, typer.Argument(metavar="ADAPTER", help="An adapter folder to check as well.")
    ] = None,
    laws: Annotated[
        bool,
        typer.Option(
            "--laws",
            help="Measure on the adapter's base model whether a row's output depends on what it "
            "may not: other rows, padding, the cache, later tokens, earlier calls.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="For --laws. [default: what the adapter names]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="FORMAT",
            help="For --laws: float32, bfloat16 or float16. [default: float32]",
        ),
    ] = None,
    trust_remote_code: Trust = False,
) -> int:
    """Check this installation and, if given, an adapter folder."""
    from rotmole.cli import doctor as verb
    from rotmole.errors import ConfigError

    if laws:
        return verb.laws(
            adapter, base=base, dtype=dtype or "float32", trust_remote_code=trust_remote_code
        )
    for name, value in {"base": base, "dtype": dtype}.items():
        if value is not None:
            raise ConfigError(f"--{name} has no effect without --laws.")
    return verb.doctor(adapter)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", help="The folder for the runs and the figures.")
    ] = Path("runs/demo"),
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Training updates of each adapter. [default: 45]"),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Random seed of data, initial weights and order.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")] = False,
) -> int:
    """Train LoRA, MoE-LoRA and RotMoLE of equal size on a small model, in minutes."""
    if not yes and _at_terminal():
        typer.confirm(
            "This downloads a model of 93 MB once and trains for a few minutes. Continue?",
            abort=True,
        )
    _import_beside("rotmole.cli.demo.worker")
    from rotmole.cli.demo.command import demo as work

    return work(output, steps, seed)


def _refuse(option: str, others: dict[str, object]) -> None:
    """Refuse options that have no effect with another one."""
    for name, value in others.items():
        if value is not None:
            raise typer.BadParameter(
                f"it has no effect with {option}; leave it out", param_hint=name
            )


def _import_beside(module: str) -> None:
    """Start the process that a command's workers fork from, to import while this one imports."""
    import multiprocessing
    from multiprocessing import forkserver

    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload([module])
        forkserver.ensure_running()


def _at_terminal() -> bool:
    import sys

    return sys.stdin.isatty() and sys.stdout.isatty()
