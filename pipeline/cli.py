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
from pipeline.errors import AlstError, UserError

if TYPE_CHECKING:
    from pipeline.launch.submit import SubmittedJob
    from pipeline.plan.estimate import Estimate
    from pipeline.plan.job import JobPlan
    from pipeline.plan.run_dir import RunDir
    from pipeline.recipe.schema import Recipe

app = typer.Typer(
    name="alst",
    help="Train Hugging Face language models on sequences of millions of tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

cluster_app = typer.Typer(help="Look at clusters.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")
track_app = typer.Typer(help="Bring runs into MLflow.", no_args_is_help=True)
app.add_typer(track_app, name="track")

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a path, or a name under configs/ (e.g. tiny).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides of the recipe, e.g. train.steps=50 memory.tiled_mlp=null")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name under ./runs.")]
PackStage = Literal["tokenize", "plan", "write", "finish", "all"]
TaskOption = Annotated[str, typer.Option(metavar="I/N", help="Task I of N, from 0, of stage tokenize or write.")]
NodesOption = Annotated[int | None, typer.Option(help="Nodes, instead of hardware.nodes.")]
ClusterOption = Annotated[
    str | None, typer.Option(help="A profile: its GPUs, host memory and time limit instead of the recipe's.")
]
RungsOption = Annotated[
    str,
    typer.Option(
        help="Feature sets, each the one before and more: baseline, tiled-loss, tiled-mlp, offload, and on to `all`; "
        "`recipe`: as the recipe has them. A wrong name lists them."
    ),
]
EnginesOption = Annotated[
    str,
    typer.Option(help="Who trains: alst, reference (DeepSpeed's own tiles and exchange), plain (HF and DeepSpeed)."),
]
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
    nodes: NodesOption = None,
    cluster: ClusterOption = None,
    explain: Annotated[
        str | None, typer.Option(metavar="ITEM", help="The formula of one item with its numbers, e.g. tiled_loss.")
    ] = None,
    compare: Annotated[str | None, typer.Option(metavar="RECIPE", help="Put this recipe beside the other.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Plot memory against length, with the limits.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what a job will take before it runs: bytes, seconds, MFU, what binds, and what to change. Needs no GPU."""
    from pipeline.plan import table

    jobs = [_plan(name, overrides, nodes=nodes, cluster=cluster) for name in (compare, recipe) if name is not None]
    estimates = [_estimate(job, cluster) for job in jobs]
    if plot is not None:
        from pipeline.metrics.memory_plot import plot_memory

        plot_memory(jobs[-1], plot)
    if explain is not None:
        table.print_explanation(estimates[-1], explain)
    elif as_json:
        told = [_told(estimate) for estimate in estimates]
        typer.echo(json.dumps(told[0] if compare is None else told, indent=2))
    elif compare is not None:
        table.print_comparison(*estimates)
    else:
        from pipeline.plan.advice import advise

        table.print_estimate(estimates[0], advise(jobs[0]))


@app.command()
def fit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    nodes: NodesOption = None,
    cluster: ClusterOption = None,
    features: Annotated[
        Literal["recipe", "auto"],
        typer.Option(
            help="`auto` also chooses the memory features: the fastest that fit data.seq_len, or the longest."
        ),
    ] = "recipe",
    as_json: JsonOption = False,
) -> None:
    """Find the longest sequence that fits and say what binds. With `--features auto data.seq_len=N`, how to fit N."""
    from pipeline.plan.advice import choose
    from pipeline.plan.table import print_fit

    asked = list(overrides or [])
    wanted = next((override for override in asked if override.startswith("data.seq_len=")), None)
    if wanted is None:
        asked.append("data.seq_len=auto")
    elif features == "recipe" and wanted != "data.seq_len=auto":
        raise UserError(f"{wanted}: `alst fit` finds the length; leave it out, or add --features auto to fit this one")
    job = choose(_recipe(recipe, asked, nodes=nodes, cluster=cluster), features=features)
    estimate = _estimate(job, cluster)
    if as_json:
        typer.echo(json.dumps(_told(estimate), indent=2))
    else:
        print_fit(estimate, chosen=features == "auto")


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
def stage(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(help="Whose environment and secrets file say where and with which token.")
    ] = None,
) -> None:
    """On a node with internet: fetch what the recipe names on the hub into HF_HOME, where jobs find it offline."""
    from pipeline.launch.entry import secrets_in
    from pipeline.launch.stage import stage as stage_recipe
    from pipeline.plan.cluster import LOCAL, default_cluster, load_cluster
    from pipeline.plan.hub_cache import hub_cache
    from pipeline.recipe.load import load

    name = cluster or default_cluster()
    profile = None if name == LOCAL else load_cluster(name)
    secrets = secrets_in(Path(profile.secrets).expanduser()) if profile and profile.secrets else {}
    cache = hub_cache(os.environ) if profile is None else profile.hub_cache()
    token = os.environ.get("HF_TOKEN") or secrets.get("HF_TOKEN")
    for line in stage_recipe(load(recipe, overrides=overrides or []), cache=cache, token=token):
        typer.echo(line)


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="A profile: a name under slurm/clusters/, or a path; `local` is this machine. $ALST_CLUSTER"),
    ] = None,
    nodes: NodesOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print everything, submit nothing.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same jobs, but 3 steps at 8,192 tokens; wait, and show their cost.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also if the plan says that it will not fit or end.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Each node reads its whole image before it starts.")] = False,
    chain: Annotated[
        int, typer.Option(min=1, help="Train jobs in a row, each to go on where time ended the last.")
    ] = 1,
) -> None:
    """Pack and train on a Slurm cluster. Everything lands in one run folder."""
    from pipeline.launch.rehearsal import rehearsal_of, wait_lines
    from pipeline.launch.watch import steps_done
    from pipeline.plan.cluster import LOCAL, default_cluster, load_cluster
    from pipeline.plan.seen import seen_lines

    name = cluster or default_cluster()
    job = _plan(recipe, overrides, nodes=nodes, cluster=name)
    if rehearse:
        job = _plan(recipe, [*(overrides or []), *rehearsal_of(job)], nodes=nodes, cluster=name)
    _print_estimate(job, name)
    if name == LOCAL:
        if not dry_run:
            run_dir = _train_here(job)
            for line in seen_lines(steps_done(run_dir), job, run_dir.packed(job)) if rehearse else ():
                typer.echo(line)
        return
    from pipeline.launch.entry import VERIFY_IMAGE
    from pipeline.launch.submit import prepare, read_jobs, submit_new

    if verify:
        os.environ[VERIFY_IMAGE] = "1"

    profile = load_cluster(name)
    run_dir = prepare(job, profile) if dry_run else submit_new(job, profile, force=force, chain=chain)
    typer.echo(f"run folder: {run_dir.path}")
    if dry_run:
        for text in sorted(run_dir.slurm.glob("*.sbatch")):
            typer.echo(f"\n# {text}\n{text.read_text()}")
        return
    _tell_jobs(read_jobs(run_dir))
    for line in wait_lines(run_dir) if rehearse else ():
        typer.echo(line)


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
        run_dir.stop_switch.unlink(missing_ok=True)
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
def save(run_folder: RunArgument) -> None:
    """Ask a run for a checkpoint after the step under way. The same is: touch RUN/save"""
    from pipeline.launch.resume import find_run
    from pipeline.plan.run_dir import runs_root

    switch = find_run(run_folder, runs=runs_root()).save_switch
    switch.touch()
    typer.echo(f"{switch}: a checkpoint is saved after the step under way, and then this file is gone")


@app.command()
def stop(run_folder: RunArgument) -> None:
    """Ask a run to end after the step under way, saved, until it is resumed. The same is: touch RUN/stop"""
    from pipeline.launch.resume import find_run
    from pipeline.plan.run_dir import runs_root

    switch = find_run(run_folder, runs=runs_root()).stop_switch
    switch.touch()
    typer.echo(f"{switch}: while this file is there no step is begun; `alst resume {switch.parent.name}` goes on")


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


@app.command()
def report(
    run_folder: RunArgument,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where to; by default report.html in the run folder.")
    ] = None,
) -> None:
    """Write a run as one page that needs nothing else: loss, throughput, memory, restarts, the plan against it all."""
    from pipeline.launch.resume import find_run
    from pipeline.launch.watch import steps_done
    from pipeline.metrics.report import write_report
    from pipeline.plan.job import read_plan
    from pipeline.plan.run_dir import runs_root
    from pipeline.plan.seen import figures

    run_dir = find_run(run_folder, runs=runs_root())
    rows, job = steps_done(run_dir), read_plan(run_dir.plan)
    out = output or run_dir.report
    write_report(run_dir, out, compared=figures(rows, job, run_dir.packed(job)) if rows else ())
    typer.echo(f"{out}: {len(rows):,} steps; any browser opens it")


@track_app.command("sync")
def track_sync(
    run_folder: RunArgument,
    uri: Annotated[
        str | None, typer.Option(help="A server's URL, or sqlite:////FILE; by default the recipe's tracking.uri.")
    ] = None,
) -> None:
    """Tell MLflow what it has not heard of a run, out of its folder; as often as you like, also while it goes on."""
    from pipeline.launch.resume import find_run
    from pipeline.metrics.sync import sync
    from pipeline.plan.run_dir import runs_root

    where, told = sync(find_run(run_folder, runs=runs_root()), uri=uri)
    typer.echo(
        f"MLflow at {where}: run {told.run_id}; told {told.steps:,} steps, {told.checkpoints:,} checkpoints"
        + (f", uploaded {told.uploads:,}" if told.uploads else "")
    )


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
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also the next version of this model in MLflow's registry.")
    ] = None,
) -> None:
    """Write a run's weights as a normal Hugging Face folder, also while the run goes on."""
    from pipeline.launch.resume import find_run
    from pipeline.plan.run_dir import runs_root

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no GPU is asked for; DeepSpeed would warn of that
    from pipeline.train.export import export as export_weights

    run_dir = find_run(run_folder, runs=runs_root())
    checkpoint = export_weights(run_dir, out, step=step, dtype=dtype, checked=check)
    typer.echo(
        f"{out}: the weights after {checkpoint.record.step} steps; AutoModelForCausalLM.from_pretrained opens it"
    )
    if register is not None:
        from pipeline.metrics.sync import register as register_model

        typer.echo(f"registered as {register} version {register_model(run_dir, out, name=register)}")


@app.command()
def bench(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    lengths: Annotated[
        str, typer.Option(help="Speed: tokens per sample, e.g. 32K,128K. One document each, in steps that are timed.")
    ] = "",
    find_max: Annotated[
        bool, typer.Option("--find-max", help="Length: the longest sample that runs, of each feature set.")
    ] = False,
    rungs: RungsOption = "all",
    engines: EnginesOption = "alst",
    model: Annotated[
        str | None, typer.Option(help="Shapes of this model, e.g. meta-llama/Llama-3.1-8B; nothing is downloaded.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="How many of its layers. With two numbers speeds are extrapolated along the line.")
    ] = "2",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured in a run, after one that is not.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each speed; engines and feature sets take turns.")] = 1,
    most: Annotated[str, typer.Option(metavar="TOKENS", help="--find-max looks no further.")] = "8M",
    grain: Annotated[str, typer.Option(metavar="TOKENS", help="--find-max tries multiples of it.")] = "16K",
    minutes: Annotated[float | None, typer.Option(help="No run is begun after so long; --resume goes on.")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="After which a run is a row that says so.")] = 1800,
    data: Annotated[
        Path | None, typer.Option(help="A packed data set to train on, instead of the bench's own.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; by default <runs>/bench.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the results that are there.")] = False,
) -> None:
    """Measure a recipe in short runs over lengths and feature sets, each run in a process of its own.

    Out of memory, an illegal access and no end are rows like others. Weights are random, text is real, and the machine
    is found out. Results, with their conditions: results.json, results.md, memory.png and speed.png in the output.

    alst bench tiny --lengths 1K,4K                          on this CPU, in two minutes

    alst bench llama8b --lengths 32K,128K --layers 2,4       the ladder, extrapolated to 32 layers

    alst bench llama8b --lengths 128K --rungs offload,recipe --engines alst,reference --repeats 3

    alst bench llama8b --find-max --rungs offload,recipe --layers 1
    """
    from pipeline.bench.command import Options, run_bench

    asked = Options(
        recipe, tuple(overrides or ()), lengths, find_max, rungs, engines, model, layers, steps, repeats, most, grain
    )
    page = run_bench(
        asked, data=data, output=output, minutes=minutes, timeout_seconds=timeout, resume=resume, tell=typer.echo
    )
    typer.echo(f"\n{page.read_text(encoding='utf-8')}\nresults: {page.parent}")


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


def _recipe(recipe: str, overrides: list[str] | None, *, nodes: int | None, cluster: str | None) -> "Recipe":
    """With what a cluster's profile says, the overrides, `--nodes`, and the commits of what is staged there."""
    from pipeline.plan.cluster import LOCAL, load_cluster
    from pipeline.plan.hub_cache import pinned
    from pipeline.recipe.load import load

    said = [] if cluster in (None, LOCAL) else load_cluster(cluster).overrides(nodes=None)
    asked = [*said, *(overrides or [])]
    if nodes is not None:
        asked.append(f"hardware.nodes={nodes}")
    loaded = load(recipe, overrides=asked)
    return loaded if cluster in (None, LOCAL) else pinned(loaded, load_cluster(cluster).hub_cache())


def _plan(
    recipe: str, overrides: list[str] | None, *, nodes: int | None = None, cluster: str | None = None
) -> "JobPlan":
    from pipeline.plan.job import plan_job

    return plan_job(_recipe(recipe, overrides, nodes=nodes, cluster=cluster))


def _estimate(job: "JobPlan", cluster: str | None) -> "Estimate":
    """With the documents of the job's packed data set, if it is there, and the time limit of the cluster."""
    from pipeline.plan.cluster import LOCAL, load_cluster
    from pipeline.plan.estimate import estimate
    from pipeline.plan.run_dir import packed_folder, runs_root

    limit = None if cluster in (None, LOCAL) else 60 * load_cluster(cluster).train.time_minutes
    return estimate(job, packed=packed_folder(runs_root(), job), time_limit_seconds=limit)


def _print_estimate(job: "JobPlan", cluster: str | None) -> None:
    from pipeline.plan.advice import advise
    from pipeline.plan.table import print_estimate

    print_estimate(_estimate(job, cluster), advise(job))


def _told(estimate: "Estimate") -> dict[str, object]:
    """A plan that a job can run, with what it is expected to take beside it."""
    from pipeline.plan.advice import advise

    return {**estimate.plan.to_json(), **estimate.to_json(advise(estimate.plan))}


def _train_here(job: "JobPlan") -> "RunDir":
    from pipeline.launch.local import check_one_node, run_local
    from pipeline.launch.snapshot import take_snapshot
    from pipeline.plan.run_dir import create_run_dir

    check_one_node(job)
    run_dir = create_run_dir(job)
    take_snapshot(run_dir)
    typer.echo(f"run folder: {run_dir.path}")
    run_local(job, run_dir)
    return run_dir


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
