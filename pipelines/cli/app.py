"""The command line `sdlora`: what people call. What dvc.yaml calls is in `pipelines.cli.stages`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.place import enter_project
from pipelines.cli.stages import StageGroup, stage_commands
from pipelines.project.errors import GateClosedError, InputError

# Everything else is imported by the command that needs it: `--help` and `status` load no torch, no Prefect.

app = typer.Typer(
    name="sdlora",
    cls=StageGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
audit = typer.Typer(
    help="Prove that nothing was touched; see what changed, and why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(audit, name="audit")


def main() -> None:
    """Run the command line. An error that the user can mend is one line and exit status 2."""
    from pipelines.runtime.deadline import end_if_given_up
    from pipelines.runtime.progress import show_progress
    from pipelines.runtime.progress_bar import ProgressBar

    show_progress(ProgressBar)
    try:
        app(prog_name="sdlora")
    except SystemExit as end:
        if end.code == 130:
            sys.stderr.write("interrupted; the same command goes on from here\n")
        end_if_given_up(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception as error:
        status = report_error(error)
        end_if_given_up(status)
        raise SystemExit(status) from None


def report_error(error: Exception) -> int:
    """Print an error as one line if the user can mend it, else with its traceback. Return the exit status."""
    from pipelines.project.error_text import one_line, user_message
    from pipelines.runtime.stage_outcome import BUG, GATE, INPUT, StageOutcome, leave_outcome

    line = user_message(error)
    if line is None:
        traceback.print_exception(error)
        outcome = StageOutcome(1, BUG, f"bug: {type(error).__name__}: {one_line(error)}")
    else:
        kind = GATE if isinstance(error, GateClosedError) else INPUT
        outcome = StageOutcome(2, kind, f"error: {line}")
    if not leave_outcome(outcome):  # `sdlora run` prints it, as its own last line
        sys.stderr.write(outcome.line + "\n")
    return outcome.status


def show_version(wanted: bool) -> None:
    """Print version and fingerprint, and stop."""
    if wanted:
        from importlib.metadata import version

        from pipelines.project.fingerprints import program_fingerprint

        typer.echo(f"sdlora {version('sdlora')}, code {program_fingerprint()[:12]}")
        raise typer.Exit


@app.callback(
    help="Teach an image classifier new classes, task by task, without touching what it knows. "
    f"Stages of dvc.yaml, each with its --help: {' '.join(stage_commands())}."
)
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=show_version,
            is_eager=True,
            help="Print version and fingerprint of the code.",
        ),
    ] = False,
) -> None:
    """Take the options that go before a command."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make, or one that has no project yet.")],
    example: Annotated[
        bool, typer.Option("--example", help="With five tasks of handwritten digits, to run at once.")
    ] = False,
) -> None:
    """Start a project of your own: parameters, stages, a Git repository."""
    from pipelines.planning.new_project import new_project

    for line in new_project(folder, example=example):
        typer.echo(line)


@app.command()
def run(
    task: Annotated[
        str | None, typer.Argument(help="Only up to this task, such as t03; all tasks if not given.")
    ] = None,
    params: Annotated[
        Path | None, typer.Option(help="First lay this parameter set (experiments/*.yaml) over params.yaml.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --params: another seed than the set's.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="With --params: write params.yaml, and stop.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="With --params: overwrite what is not committed, or trained otherwise."),
    ] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again what older code has trained; see sdlora keep.")
    ] = False,
) -> None:
    """Bring everything up to date: train new tasks, test, report.

    Only stages whose inputs changed run; what was made before comes from the cache. What an older version of this
    program has trained is trained again with --retrain only. Killed at any moment, the same command goes on. Each stage
    is a Prefect flow run on the server of PREFECT_API_URL; without one see sdlora history.
    """
    from pipelines.cli.machines import on_all_machines

    caller = enter_project()
    with on_all_machines():
        if params is not None:
            from pipelines.planning.experiments import lay_over

            for line in lay_over(caller.path(params), seed=seed, force=force):
                typer.echo(line)
            if dry:
                return
        elif seed is not None or dry or force:
            raise InputError(
                "run: --seed, --dry and --force go with --params; give the file of a parameter set"
            )
        from pipelines.orchestration.run import run_pipeline

        raise SystemExit(run_pipeline(retrain=retrain, until=task))


@app.command()
def keep() -> None:
    """Keep what older code of this program has trained, although the code has changed.

    For after an upgrade: nothing is computed, and ledger/kept says what was kept. Only stages of which nothing but the
    code changed are kept.
    """
    enter_project()
    from pipelines.planning.keep import keep as work

    for line in work():
        typer.echo(line)


@app.command()
def status(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Show which stages are done, which are stale, and why."""
    enter_project()
    from pipelines.orchestration.status import show_status

    show_status(as_json=as_json)


@app.command()
def history(
    port: Annotated[
        int, typer.Option(help="Where the server of this project listens.", min=1, max=65535)
    ] = 4201,
) -> None:
    """Look at past runs in Prefect's pages: states, times, tables.

    Where PREFECT_API_URL is not set `sdlora run` leaves notes. They are entered into the database of a Prefect server
    of this project, which listens on the loopback interface until Ctrl-C.
    """
    enter_project()
    from pipelines.orchestration.history import show_history

    show_history(port)


@app.command()
def plan(
    source: Annotated[
        Path | None, typer.Argument(help="Folder of images or shards, a manifest, or a pattern.")
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="Instead: a data set of the papers, such as imagenet-r; also adds it to fetch."),
    ] = None,
    tasks: Annotated[int | None, typer.Option(help="Number of tasks.")] = None,
    classes_per_task: Annotated[int | None, typer.Option(help="Instead: classes in each task.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the order of the classes.")] = 1993,
    force: Annotated[
        bool, typer.Option("--force", help="Even if steps of the old plan are trained.")
    ] = False,
) -> None:
    """Divide the classes of a folder, or of a benchmark, into tasks."""
    caller = enter_project()
    if (source is None) == (benchmark is None):
        raise InputError("plan: give either a folder of images or --benchmark NAME")
    if benchmark is not None:
        from pipelines.planning.experiments import plan_benchmark

        lines = plan_benchmark(
            benchmark, tasks=tasks, classes_per_task=classes_per_task, seed=seed, force=force
        )
    else:
        from pipelines.planning import tasks as edit

        assert source is not None
        lines = edit.plan(
            caller.path(source), tasks=tasks, classes_per_task=classes_per_task, seed=seed, force=force
        )
    for line in lines:
        typer.echo(line)


@app.command("add-task")
def add_task(
    source: Annotated[Path, typer.Argument(help="Folder of images or shards, a manifest, or a pattern.")],
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="Class of the folder, repeatable; if not given all new ones, with `--kind more` all.",
        ),
    ] = None,
    kind: Annotated[
        Literal["classes", "more"],
        typer.Option(
            help="classes: new ones; more: images of known classes, with new ones among them or not."
        ),
    ] = "classes",
) -> None:
    """Append a task for new classes, or for more images of known ones, to params.yaml.

    `sdlora run` then trains that task only.
    """
    caller = enter_project()
    from pipelines.planning import tasks as edit

    for line in edit.add_task(caller.path(source), classes=classes, kind=kind):
        typer.echo(line)


@app.command()
def pin(
    urls: Annotated[
        list[str],
        typer.Argument(
            help="Parquet or tar files, or folders or patterns of them: s3://…, https://…, hf://datasets/OWNER/NAME/…"
        ),
    ],
    source: Annotated[
        Path, typer.Argument(help="Folder of the project that stands for them, such as data/birds.")
    ],
) -> None:
    """Read images that lie elsewhere once, and note the hash of each file.

    Give the folder to `sdlora add-task` then. The same again says what has changed there since.
    """
    caller = enter_project()
    from pipelines.planning.tasks import pin_source

    for line in pin_source(urls, caller.path(source)):
        typer.echo(line)


@app.command()
def merge(
    branch: Annotated[str, typer.Argument(help="Branch to merge into this one, such as origin/main.")],
) -> None:
    """Merge somebody's branch, where both have added tasks too.

    Their tasks come after ours, and `sdlora run` then learns those only. What both changed otherwise is refused in one
    line, and everything is as it was before.
    """
    enter_project()
    from pipelines.planning.merge import merge as work

    for line in work(branch):
        typer.echo(line)


@app.command()
def approve(
    task: Annotated[str, typer.Argument(help="Step that broke a limit of `gate`, such as t03.")],
    by: Annotated[str, typer.Option(help="Who decides.")],
    why: Annotated[str, typer.Option(help="The reason, for those who audit it later.")],
) -> None:
    """Let a step through its gate although a limit is broken.

    Written to params.yaml, and from there into the ledger; it holds for the results that are there now, and for no
    others. Look at them first: `sdlora audit diff`.
    """
    enter_project()
    from pipelines.planning.approvals import approve as write
    from pipelines.planning.approvals import keep_other_gates

    for line in write(task, by=by, why=why):
        typer.echo(line)
    keep_other_gates()


@app.command()
def retire(
    task: Annotated[str, typer.Argument(help="Task whose step is done, such as t01.")],
    by: Annotated[str | None, typer.Option(help="Who has it deleted.")] = None,
    why: Annotated[str | None, typer.Option(help="The reason, for those who audit it later.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Say what would go, and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a task's images for good. Its model stays, and a receipt.

    Raw images and packed training images go from the project, DVC's cache and every DVC remote. Packed test images
    stay. Ended anywhere, the same command goes on. The receipt is ledger/retired/TASK/receipt.json.
    """
    enter_project()
    from pipelines.audits.retire.command import retire as work

    raise SystemExit(work(task, by=by, why=why, dry=dry, yes=yes))


@app.command()
def deploy() -> None:
    """Have a Prefect server run the chain on GPU workers.

    On the server of PREFECT_API_URL it makes or renews what `workers` in params.yaml describes: work pool, deployment,
    schedule, and the rules that start again what has died.
    """
    enter_project()
    from pipelines.orchestration.deploy import deploy as make
    from pipelines.orchestration.deploy import require_server

    require_server()  # before Prefect is loaded
    from pipelines.orchestration.worker_flows import learn, watchdog
    from pipelines.sweeps.flow import sweep

    for line in make(learn, sweep, watchdog):
        typer.echo(line)


@app.command()
def sweep(
    values: Annotated[
        list[str],
        typer.Argument(metavar="KEY=A,B…", help="Parameter and its values, such as seed=1993,1994."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the table; sweep/NAME, named after the keys, if not given."),
    ] = None,
    local: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Compute here, N chains at a time, not on workers.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Even if they are many.")] = False,
) -> None:
    """Train a chain for every combination of values. Put all in one table.

    On the workers of PREFECT_API_URL, or here if it is not set. Stages that chains have in common are computed once.
    Killed at any moment, the same command goes on. Exit status 1 says that some chain failed.
    """
    caller = enter_project()
    from pipelines.sweeps.command import run_sweep as work

    raise SystemExit(work(values, out=caller.optional(out), local=local, yes=yes))


@audit.command("verify")
def audit_verify(
    signers: Annotated[
        Path | None, typer.Option(help="File of allowed signers (ssh-keygen): whose the signatures are.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="HEAD", help="Head that the chain must have, now or at an earlier step."),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Read the objects in DVC's cache too, and ask its remotes.")
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute", help="Derive again all that follows without training, and compare every byte."
        ),
    ] = False,
    retrain: Annotated[
        list[str] | None,
        typer.Option(help="Learn this step again and compare every byte; repeatable; all for all steps."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Verify the whole chain from its files: ledger, frozen tensors, dvc.lock, journal.

    One line for each step; exit status 1 at the first thing that does not hold, with step, file and tensor. What is
    not in the workspace is read from DVC's cache or remote. --recompute and --retrain work in a folder of their own;
    ended anywhere, the same command goes on.
    """
    caller = enter_project()
    from pipelines.audits.outcome import Checks, show_verification

    checks = Checks(
        signers=caller.optional(signers),
        expect=expect,
        cache=cache,
        recompute=recompute,
        retrain=retrain or (),
    )
    raise SystemExit(show_verification(checks, as_json=json))


@audit.command("sign")
def audit_sign(
    key: Annotated[Path, typer.Option(help="Private SSH key, or the public one of a key in ssh-agent.")],
) -> None:
    """Sign the head of the ledger, once the whole chain has been verified."""
    caller = enter_project()
    from pipelines.audits.sign import sign

    for line in sign(caller.path(key)):
        typer.echo(line)


@audit.command("bundle")
def audit_bundle(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write, such as chain.intoto.jsonl.")],
    key: Annotated[
        Path | None, typer.Option(help="Private key to sign with: Ed25519 or ECDSA, of OpenSSH or PEM.")
    ] = None,
    model_signatures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also sign each model folder as OpenSSF Model Signing does."),
    ] = None,
    certificates: Annotated[
        Path | None, typer.Option(help="PEM file to put into them: the key's own certificate first.")
    ] = None,
) -> None:
    """Write the ledger for somebody who has not got this program, once the whole chain has been verified.

    One in-toto statement for each step, each in a DSSE envelope. docs/reference/verify_bundle.py checks them
    with Python alone.
    """
    caller = enter_project()
    from pipelines.audits.bundle import bundle

    lines = bundle(
        caller.path(file),
        key=caller.optional(key),
        certificates=caller.optional(certificates),
        signatures=caller.optional(model_signatures),
    )
    for line in lines:
        typer.echo(line)


@audit.command("bom")
def audit_bom(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write, such as model.cdx.json.")],
    step: Annotated[
        str | None, typer.Option(help="Step, such as t03; that of the export, or the last, if not given.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What `sdlora export` left: its files are listed too."),
    ] = None,
) -> None:
    """Write a bill of materials of a step (CycloneDX ML-BOM), once its chain has been verified.

    Backbone with licence and hash, images of every task by digest, steps, versions of libraries.
    """
    caller = enter_project()
    from pipelines.audits.bom import bill

    for line in bill(caller.path(file), step=step, export=caller.optional(export)):
        typer.echo(line)


@audit.command("diff")
def audit_diff(
    then: Annotated[str, typer.Argument(metavar="A", help="Step (t03, 3), or any artifacts/model/t03.")],
    now: Annotated[str, typer.Argument(metavar="B", help="The step to compare with it.")],
    features: Annotated[
        bool, typer.Option("--features/--no-features", help="Run both models on the test images.")
    ] = True,
    html: Annotated[Path | None, typer.Option(help="Write all of it to a page, too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what changed from step A to step B, or between two runs of a step.

    Accuracy with intervals, flipped images with exact tests (corrected for many
    looks), where errors went, calibration, features, magnitudes and weights.
    """
    caller = enter_project()
    from pipelines.audits.diff import diff

    then, now = caller.path_or_name(then), caller.path_or_name(now)
    diff(then, now, features=features, as_json=json, page=caller.optional(html))


@audit.command("show")
def audit_show(
    class_name: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="A class through all steps since it came.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="FILE|ID", help="What each step says of a picture, or a test image.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="What a task's step was, and what became of it.")
    ] = None,
    files: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What each image in a folder went into, as JSON.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show the history of one class, one image or one task, and what images went into."""
    caller = enter_project()
    if sum(given is not None for given in (class_name, image, task, files)) != 1:
        raise InputError("audit show: give one of --class, --image, --task and --files")
    from pipelines.audits.show.class_history import show_class
    from pipelines.audits.show.image_history import show_image
    from pipelines.audits.show.lineage import show_files
    from pipelines.audits.show.task_history import show_task

    if class_name is not None:
        show_class(class_name, as_json=json)
    elif image is not None:
        show_image(caller.path_or_name(image), as_json=json)
    elif files is not None:
        show_files(caller.path(files))
    else:
        assert task is not None
        show_task(task, as_json=json)


@app.command()
def doctor(
    source: Annotated[
        Path | None,
        typer.Argument(help="Folder or manifest that would be the next task; all tasks if not given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every file and class.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at files only, not through the backbone.")
    ] = False,
) -> None:
    """Check images before any training: faults, duplicates, leaks.

    Ends with status 2 if there is an error, with 0 if there are warnings only.
    """
    caller = enter_project()
    from pipelines.planning.doctor.command import doctor as examine

    raise SystemExit(examine(caller.optional(source), as_json=as_json, quick=quick))


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Model folder, or a step of this project: t03 or 3.")],
    images: Annotated[
        list[str],
        typer.Argument(help="Files, folders (with all in them), or - for a list on standard input."),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes of each image.")] = 1,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="Say which images look like none of the classes.")
    ] = False,
    format: Annotated[Literal["table", "jsonl", "csv"], typer.Option(help="What is written.")] = "table",
    out: Annotated[Path | None, typer.Option(help="File to write instead of standard output.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; 64, on a GPU 256.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto is bf16 on a GPU that is fast at it.")
    ] = "auto",
    backbone: Annotated[
        Path | None, typer.Option(help="Folder of step t00; the one beside MODEL if not given.")
    ] = None,
) -> None:
    """Name the class of images, as soon as they are read.

    Exit status 1 says that some image could not be read (named, the others are done), 2 that nothing was done.
    """
    from pipelines.ledger.find_step import find_model
    from pipelines.serving.predict import PredictionSettings
    from pipelines.serving.predict import predict as work

    settings = PredictionSettings(
        top=top,
        batch_size=batch_size,
        device=device,
        precision=precision,
        format=format,
        out=out,
        unknown=unknown,
    )
    raise SystemExit(work(find_model(model), backbone, images, settings))


@app.command()
def export(
    format: Annotated[
        Literal["timm", "peft", "onnx", "hub"], typer.Argument(help="hub is timm with a model card.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to leave; an earlier export is replaced.")],
    step: Annotated[str | None, typer.Option(help="Step, such as 3; the latest if not given.")] = None,
    model: Annotated[Path | None, typer.Option(help="Model folder instead of a step.")] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="Folder of step t00; the one beside the model if not given.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images for the check; the step's test images if not given.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images the check takes.")] = 64,
) -> None:
    """Write a step's model for other programs, checked on images.

    Exit status 1 says that the check failed and nothing was kept.
    """
    if step is not None and model is not None:
        raise InputError("--step and --model: give one of them")
    from pipelines.ledger.find_step import find_model
    from pipelines.serving.export import run as work

    folder = find_model(str(model) if model else step)
    raise SystemExit(work(format, out, model=folder, backbone=backbone, images=images, count=count))
