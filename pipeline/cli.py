"""The `alst` command. A subcommand's modules are imported when it runs, so that `--help` and planning need no torch."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline import __version__
from pipeline.errors import AlstError

if TYPE_CHECKING:
    from pipeline.launch.submit import SubmittedJob
    from pipeline.plan.job import JobPlan

app = typer.Typer(
    name="alst",
    help="Train Hugging Face language models on sequences of millions of tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

cluster_app = typer.Typer(help="Look at clusters.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a path, or a name under configs/ (e.g. tiny).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides of the recipe, e.g. train.steps=50 memory.tiled_mlp=null")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name under ./runs.")]
PackStage = Literal["tokenize", "plan", "write", "finish", "all"]
TaskOption = Annotated[str, typer.Option(metavar="I/N", help="Task I of N, from 0, of stage tokenize or write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print version and commit.")] = False,
) -> None:
    """Train Hugging Face language models on sequences of millions of tokens."""
    if version:
        from pipeline.launch.snapshot import commit

        typer.echo(f"alst {__version__} ({commit()})")
        raise typer.Exit


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes, instead of hardware.nodes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show every derived number of a job: mesh, lengths, tiles, FLOPs. Needs no GPU and no torch."""
    job = _plan(recipe, overrides, nodes=nodes)
    if as_json:
        typer.echo(json.dumps(job.to_json(), indent=2))
        return
    from pipeline.plan.table import print_plan

    print_plan(job)


@app.command()
def pack(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(help="Folder of the packed data set.")],
    overrides: Overrides = None,
    stage: Annotated[PackStage, typer.Option(help="One stage alone; tokenize and write can be divided.")] = "all",
    task: TaskOption = "0/1",
    as_json: JsonOption = False,
) -> None:
    """Tokenize the recipe's sources and pack them into samples of data.seq_len tokens."""
    from pipeline.launch.entry import run_pack

    job = _plan(recipe, overrides)
    if run_pack(job, output, stage=stage, task=task):
        inspect(output, as_json=as_json)
    elif as_json:
        typer.echo(json.dumps({"stage": stage, "task": task, "complete": False}, indent=2))
    else:
        typer.echo(f"{stage} {task} is done; {output} is not complete yet")


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A packed data set.")],
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot lengths, fill and cost.")] = None,
    sample: Annotated[int | None, typer.Option(help="Show how each document of this sample begins.")] = None,
    verify: Annotated[bool, typer.Option(help="Read everything and check it.")] = True,
) -> None:
    """Look at a packed data set: lengths, fill, cuts, cost, checksums."""
    from pipeline.data.inspect import beginnings, describe, print_beginnings, print_description

    if sample is not None:
        found = beginnings(directory, sample=sample)
        typer.echo(json.dumps(found, indent=2)) if as_json else print_beginnings(found)
        return
    if plot is not None:
        from pipeline.data.plots import plot_packed

        plot_packed(directory, plot)
    description = describe(directory, verify=verify)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        print_description(description)


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Pack what is not packed yet, and train on this machine. Everything lands in one run folder."""
    _train_here(_plan(recipe, overrides))


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="A profile: a name under slurm/clusters/, or a path; `local` is this machine. $ALST_CLUSTER"),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes, instead of hardware.nodes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print everything, submit nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Each node reads its whole image before it starts.")] = False,
) -> None:
    """Pack and train on a Slurm cluster. Everything lands in one run folder."""
    from pipeline.plan.cluster import LOCAL, default_cluster, load_cluster
    from pipeline.plan.table import print_plan

    name = cluster or default_cluster()
    if name == LOCAL:
        job = _plan(recipe, overrides, nodes=nodes)
        print_plan(job)
        if not dry_run:
            _train_here(job)
        return
    from pipeline.launch.entry import VERIFY_IMAGE
    from pipeline.launch.submit import prepare, read_jobs, submit_new

    if verify:
        os.environ[VERIFY_IMAGE] = "1"

    profile = load_cluster(name)
    job = _plan(recipe, [*profile.overrides(nodes=nodes), *(overrides or [])])
    print_plan(job)
    run_dir = prepare(job, profile) if dry_run else submit_new(job, profile)
    typer.echo(f"run folder: {run_dir.path}")
    if dry_run:
        for text in sorted(run_dir.slurm.glob("*.sbatch")):
            typer.echo(f"\n# {text}\n{text.read_text()}")
    else:
        _tell_jobs(read_jobs(run_dir))


@app.command()
def resume(
    run_folder: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="What changes, e.g. train.steps=200 hardware.gpus_per_node=4 parallel.sp=4"),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Another cluster than it was submitted to; `local` is this machine.")
    ] = None,
) -> None:
    """Go on with a run from its newest whole checkpoint; with other ranks if you say so. Nothing is done twice."""
    from pipeline.launch.local import check_one_node, run_local
    from pipeline.launch.resume import check_can_go_on, find_run, resumed_plan
    from pipeline.launch.snapshot import take_snapshot
    from pipeline.plan.cluster import cluster_of
    from pipeline.plan.run_dir import runs_root

    run_dir = find_run(run_folder, runs=runs_root())
    profile = cluster_of(run_dir, named=cluster)
    said = profile.overrides(nodes=None) if profile is not None and cluster is not None else []
    job = resumed_plan(run_dir, [*said, *(overrides or [])])
    check_can_go_on(job, run_dir)
    if profile is None:
        check_one_node(job)
        run_dir.check_free()
        run_dir.write_plan(job)
        take_snapshot(run_dir)
        typer.echo(f"run folder: {run_dir.path}")
        run_local(job, run_dir)
        return
    from pipeline.launch.submit import submit_again
    from pipeline.launch.watch import check_not_queued

    check_not_queued(run_dir)
    _tell_jobs(submit_again(job, profile, run_dir))


@app.command()
def status(run_folder: RunArgument) -> None:
    """Show what has become of a submitted run: its jobs, the step, the loss, the time left; failures first."""
    from pipeline.launch.resume import find_run
    from pipeline.launch.status import status_lines
    from pipeline.plan.run_dir import runs_root

    for line in status_lines(find_run(run_folder, runs=runs_root())):
        typer.echo(line)


@app.command()
def logs(
    run_folder: RunArgument,
    rank: Annotated[int, typer.Option(help="Whose log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job has ended.")] = False,
) -> None:
    """Show the end of a rank's log, of the newest start of the newest job."""
    from pipeline.launch.resume import find_run
    from pipeline.launch.watch import read_log
    from pipeline.plan.run_dir import runs_root

    for line in read_log(find_run(run_folder, runs=runs_root()), rank=rank, follow=follow):
        typer.echo(line, nl=False)


@app.command()
def cancel(run_folder: RunArgument) -> None:
    """Cancel the jobs of a run that wait or run. Its checkpoints stay; `alst resume` goes on."""
    from pipeline.launch.resume import find_run
    from pipeline.launch.watch import cancel as cancel_jobs
    from pipeline.plan.run_dir import runs_root

    cancelled = cancel_jobs(find_run(run_folder, runs=runs_root()))
    typer.echo(f"cancelled: {', '.join(cancelled)}" if cancelled else "no job of it waits or runs")


@app.command()
def run(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN.json", help="The plan in a run folder.")],
    stage: Annotated[
        Literal["pack", "tokenize", "plan", "write", "finish", "train", "check"],
        typer.Option(
            help="`train` is one rank: RANK, WORLD_SIZE and MASTER_ADDR say which, or Slurm's variables. "
            "`pack` is all of packing. `check` looks at the cluster alone."
        ),
    ],
    task: TaskOption = "0/1",
) -> None:
    """What a job runs: one stage of a plan, in this process."""
    from pipeline.launch.entry import run_stage

    run_stage(plan_path, stage, task=task)


@cluster_app.command("check")
def cluster_check(
    name: Annotated[str, typer.Argument(help="A profile: a name under slurm/clusters/, or a path.")],
    nodes: Annotated[int, typer.Option(help="On how many nodes.")] = 2,
) -> None:
    """Try a profile with a short job: folders, image, GPUs, a collective between all ranks and its bandwidth."""
    from pipeline.launch.cluster_check import check_lines
    from pipeline.plan.cluster import load_cluster

    profile = load_cluster(name)
    for line in check_lines(_plan("tiny", [*profile.overrides(nodes=nodes), "name=check"]), profile):
        typer.echo(line)


@app.command()
def export(
    run_folder: RunArgument,
    out: Annotated[Path, typer.Argument(help="The new folder, for from_pretrained.")],
    step: Annotated[int | None, typer.Option(help="Of which checkpoint; by default the newest whole one.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights; by default the recipe's.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Load the folder again and compare every tensor.")] = True,
) -> None:
    """Write a run's weights as a normal Hugging Face folder, also while the run goes on."""
    from pipeline.launch.resume import find_run
    from pipeline.plan.run_dir import runs_root

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU is asked for; DeepSpeed would warn of that
    from pipeline.train.export import export as export_weights

    checkpoint = export_weights(find_run(run_folder, runs=runs_root()), out, step=step, dtype=dtype, checked=check)
    typer.echo(
        f"{out}: the weights after {checkpoint.record.step} steps; AutoModelForCausalLM.from_pretrained opens it"
    )


@app.command()
def models(
    probe: Annotated[str | None, typer.Option(metavar="TYPE", help="Measure this model type now.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Measure, and replace rows of the committed table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the model types that train exactly, and why the others do not."""
    from pipeline.plan.model_support import supported_models, write_table

    found = supported_models()
    if probe is not None or write:
        from pipeline.model.support import model_types
        from pipeline.model.support import probe as measure

        found = {model_type: measure(model_type) for model_type in (model_types() if probe is None else [probe])}
    if write:
        write_table(found if probe is None else supported_models() | found)
    if as_json:
        typer.echo(json.dumps({name: asdict(support) for name, support in found.items()}, indent=2))
        return
    from pipeline.plan.models_table import print_models

    print_models(found)


def _plan(recipe: str, overrides: list[str] | None, *, nodes: int | None = None) -> "JobPlan":
    from pipeline.plan.job import plan_job
    from pipeline.recipe.load import load

    asked = list(overrides or [])
    if nodes is not None:
        asked.append(f"hardware.nodes={nodes}")
    return plan_job(load(recipe, overrides=asked))


def _train_here(job: "JobPlan") -> None:
    from pipeline.launch.local import check_one_node, run_local
    from pipeline.launch.snapshot import take_snapshot
    from pipeline.plan.run_dir import create_run_dir

    check_one_node(job)
    run_dir = create_run_dir(job)
    take_snapshot(run_dir)
    typer.echo(f"run folder: {run_dir.path}")
    run_local(job, run_dir)


def _tell_jobs(submitted: "Sequence[SubmittedJob]") -> None:
    for job in submitted:
        typer.echo(f"{job.stage} job: {job.id}")


def main() -> None:
    """Entry point: errors become one message and an exit code, never a traceback."""
    try:
        app()
    except AlstError as error:
        typer.echo(f"alst: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("alst: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
