"""The train job, as its own table of contents: mesh, data, model, engine, tracker, check, train.

Runs in every rank; started by `launch.local` or by a job, through `launch.entry`.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.attention.function import register
from pipeline.attention.kernels.choice import Choice, choose
from pipeline.attention.kernels.interface import Needs, needs_of
from pipeline.data.batch import batch_of
from pipeline.data.inspect import describe
from pipeline.data.loader import Cursor, PackedLoader
from pipeline.data.packed_dataset import PackedDataset
from pipeline.data.plots import plot_packed
from pipeline.errors import RunError, UserError
from pipeline.files import write_json
from pipeline.memory.apply import Attached, attach_features
from pipeline.metrics.console import ProgressLine, gib, warn
from pipeline.metrics.environment import environment_found
from pipeline.metrics.meter import peak_device_bytes
from pipeline.metrics.plots import plot_training
from pipeline.metrics.report import write_report
from pipeline.metrics.rows import read_steps
from pipeline.metrics.spikes import SpikeDetector
from pipeline.metrics.summary import print_summary, summarize
from pipeline.metrics.tracker import RunStatus, Tracker, open_tracker
from pipeline.model.build import build_model, check_shape, transformers_config
from pipeline.parallel.mesh import Mesh, create_mesh, limit_collectives
from pipeline.plan.estimate import estimate
from pipeline.plan.job import JobPlan
from pipeline.plan.patience import WITHOUT_LIMIT_SECONDS, Patience, patience_of
from pipeline.plan.queue import Queue, Request
from pipeline.plan.run_dir import RunDir
from pipeline.plan.savings import savings_lines
from pipeline.plan.seen import figures
from pipeline.recipe.schema import Gpu
from pipeline.train.checkpoint import Checkpointer, NotSavedError
from pipeline.train.engine import create_engine, init_distributed, zero3_config
from pipeline.train.evaluate import HeldOut, is_due, open_held_out
from pipeline.train.fabric import check_fabric
from pipeline.train.guard import Guard, NotFiniteError
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.loop import Outcome, Reporting, Watch, train
from pipeline.train.resume import Resume, find_resume, load
from pipeline.train.self_check import self_check
from pipeline.train.step import Trainee
from pipeline.train.step_costs import step_costs
from pipeline.train.stopping import RECENT_STEPS, Stopping
from pipeline.train.watchdog import Watchdog


@dataclass(frozen=True)
class _Started:
    """All that training takes."""

    trainee: Trainee
    loader: PackedLoader
    attached: Attached
    watch: Watch
    checkpointer: Checkpointer
    tracker: Tracker


def run(plan: JobPlan, run_dir: RunDir, queue: Queue) -> bool:
    """Train as planned, from the newest checkpoint if there is one; whether the job is to be started again.

    What `queue` asks for on any rank, all do after the step. Collective over the ranks of torch's variables.
    """
    dataset = PackedDataset.open(run_dir.packed(plan))
    held_out = open_held_out(plan, dataset)
    device = _device(plan)
    torch.use_deterministic_algorithms(plan.recipe.train.deterministic)  # operations that cannot are refused
    config = transformers_config(plan.recipe.model)
    check_shape(config, plan.model)
    attention = _attention(plan, config, device)
    if os.environ["RANK"] == "0":
        run_dir.hold()
    patience = patience_of(plan, packed=run_dir.packed(plan))
    init_distributed(plan, timeout=timedelta(seconds=patience.collective_seconds(None)))
    _check_same_kernel(attention)
    heartbeat = Heartbeat()
    watchdog = Watchdog(heartbeat, patience, queue, run_dir, rank=dist.get_rank())
    with watchdog.watching():
        started = _start(plan, run_dir, queue, dataset, held_out, device, attention, patience, heartbeat)
    mesh = started.trainee.mesh
    outcome = _train(started, watchdog, run_dir)
    if outcome.peak_host_rss_bytes:
        _tell_memory(plan, outcome, mesh)
    if outcome.ended_by:
        _say(mesh, _stopped(outcome, plan))
    elif mesh.rank == 0:
        _summary(plan, run_dir, dataset, started.tracker)
    return outcome.ended_by is Request.REQUEUE


def _start(
    plan: JobPlan,
    run_dir: RunDir,
    queue: Queue,
    dataset: PackedDataset,
    held_out: HeldOut | None,
    device: torch.device,
    attention: Choice,
    patience: Patience,
    heartbeat: Heartbeat,
) -> _Started:
    """Everything before the first step; each part of it is a beat.

    Collectives may take any time: a rank waits in one while another reads weights, and the watchdog looks at all.
    """
    any_time = timedelta(seconds=WITHOUT_LIMIT_SECONDS)
    limit_collectives(any_time)
    mesh = create_mesh(plan.sp, timeout=any_time)
    heartbeat.beat("trying the fabric")
    rate = check_fabric(device, least_bytes_per_second=queue.least_bus_bytes_per_second)
    heartbeat.beat("looking for a checkpoint")
    resume = find_resume(plan, run_dir, mesh)
    heartbeat.beat("loading the model")
    register()
    model = build_model(
        plan.recipe.model, attention=ALST_ATTENTION, seed=plan.recipe.train.seed, zero3=zero3_config(plan)
    )
    attached = attach_features(model, plan)
    heartbeat.beat("making the engine")
    engine = create_engine(model, plan, attached, load_universal=resume is not None and resume.universal)
    heartbeat.attach(engine.module)
    limit_collectives(any_time)  # of the engine's groups too
    trainee = Trainee(engine, plan, mesh, attention.kernel, device)
    loader = _loader(plan, mesh, dataset, start=Cursor() if resume is None else resume.cursor)
    _tell_start(trainee, attention, rate, dataset, loader, held_out)
    heartbeat.beat("self-check")
    _check(trainee, dataset, loader)
    if resume is not None:
        heartbeat.beat("loading the checkpoint")
        load(resume, engine, run_dir, mesh, beat=heartbeat.beat)
        _say(mesh, _resumed(resume, plan))
    checkpointer = Checkpointer(trainee, run_dir, commit=_commit(run_dir), beat=heartbeat.beat)
    guard = Guard(trainee, dataset, run_dir, lambda step: checkpointer.save_aside(loader.cursor(step - 1)))
    before = _steps_before(run_dir.metrics, loader.start)
    alike = before if resume is not None and not resume.universal else []  # other ranks took another time
    stopping = _stopping(queue, trainee, run_dir, checkpointer, loader, alike)
    spikes = SpikeDetector([row["loss"] for row in before if row["loss"] is not None])
    watch = Watch(guard, spikes, held_out, stopping, heartbeat, patience)
    heartbeat.beat("opening the tracker")
    tracker = _tracker(plan, run_dir, mesh, dataset, resume)
    return _Started(trainee, loader, attached, watch, checkpointer, tracker)


def _train(started: _Started, watchdog: Watchdog, run_dir: RunDir) -> Outcome:
    """`train`, with what was recorded plotted and the tracker closed, however it ends.

    For that nobody waits but rank 0, without a watchdog: uploads may take hours.
    """
    trainee, tracker = started.trainee, started.tracker
    mesh = trainee.mesh
    status: RunStatus = "FAILED"
    failed: NotFiniteError | NotSavedError | None = None
    outcome = Outcome((), Request.NOTHING)
    try:
        progress = ProgressLine(trainee.plan.recipe.train.steps) if mesh.rank == 0 else None
        reporting = Reporting(tracker, progress)
        with watchdog.watching(started.watch.stopping):
            outcome = train(trainee, started.loader, started.attached, started.watch, started.checkpointer, reporting)
            dist.barrier()  # each process ends hard: none may leave while another still needs it
        status = "KILLED" if outcome.ended_by else "FINISHED"
    except (NotFiniteError, NotSavedError) as error:
        failed = error
    finally:
        tracker.log_end(status)
        _show(trainee.plan, run_dir, mesh)
        tracker.close(stopped=bool(outcome.ended_by))
    if failed is not None:
        dist.barrier()  # every rank comes here; the first to leave would end rank 0 before its last words are written
        raise failed
    return outcome


def _tell_start(
    trainee: Trainee,
    attention: Choice,
    rate: float | None,
    dataset: PackedDataset,
    loader: PackedLoader,
    held_out: HeldOut | None,
) -> None:
    """What will run, as far as it is known before the first step."""
    mesh = trainee.mesh
    for reason in attention.passed_over:
        _say(mesh, f"attention: passed over {reason}")
    _say(mesh, f"attention: {attention.kernel.name} ({attention.detail})")
    _say(mesh, f"mesh: dp={mesh.dp} x sp={mesh.sp}, {trainee.plan.local_seq_len:,} tokens per rank")
    if rate is not None:
        _say(mesh, f"fabric: an all-reduce over all ranks reaches {rate / 1e9:.2f} GB/s of bus bandwidth")
    _say(mesh, _first_sample(dataset, loader))
    if held_out is not None:
        _say(mesh, f"held out: {len(held_out.samples):,} samples with {held_out.valid_tokens:,} labels")


def _tell_memory(plan: JobPlan, outcome: Outcome, mesh: Mesh) -> None:
    """What the steps took, and what each feature saves of it."""
    peaks = enumerate(outcome.peak_host_rss_bytes)
    _say(mesh, "peak RSS per process: " + ", ".join(f"rank {rank} {gib(peak)}" for rank, peak in peaks))
    _say(mesh, "\n".join(savings_lines(plan, peak_bytes=peak_device_bytes() or max(outcome.peak_host_rss_bytes))))


def _device(plan: JobPlan) -> torch.device:
    if plan.recipe.hardware.gpu is Gpu.CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"hardware.gpu = {plan.recipe.hardware.gpu.value}: this machine has no CUDA device; run where one is, "
            "or set hardware.gpu=cpu"
        )
    asked, local_rank = plan.recipe.hardware.gpu.value, int(os.environ["LOCAL_RANK"])
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"hardware.gpus_per_node = {plan.recipe.hardware.gpus_per_node}: this machine has "
            f"{torch.cuda.device_count()}; set hardware.gpus_per_node={torch.cuda.device_count()}"
        )
    name = torch.cuda.get_device_name(local_rank)
    if asked.partition("-")[0] not in name:
        raise UserError(f"hardware.gpu = {asked}: this machine has {name}; name it, or MFU would be of another GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _attention(plan: JobPlan, config: Any, device: torch.device) -> Choice:
    """The kernel that the recipe asks for and the model needs; refused here, before weights load, if there is none."""
    return choose(plan.recipe.model.attention, device=device, needs=attention_needs(plan, config))


def attention_needs(plan: JobPlan, config: Any) -> Needs:
    """What the model, its dtype, the mesh, chunks and `train.deterministic` ask of a kernel."""
    return needs_of(
        config,
        dtype=getattr(torch, plan.recipe.model.dtype),
        deterministic=plan.recipe.train.deterministic,
        sp=plan.sp,
        earlier_keys=plan.recipe.memory.sequence_chunks is not None,
    )


def _check_same_kernel(attention: Choice) -> None:
    """Raises RunError if a rank found other kernels than the rest, and the parts of a sequence would differ."""
    mine = f"{attention.kernel.name} ({attention.detail})"
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if len(set(found)) > 1:
        told = ", ".join(f"rank {rank}: {name}" for rank, name in enumerate(found))
        raise RunError(f"ranks found different attention kernels ({told}); name one as model.attention")


def _loader(plan: JobPlan, mesh: Mesh, dataset: PackedDataset, *, start: Cursor) -> PackedLoader:
    recipe = plan.recipe
    return PackedLoader(
        dataset,
        sp_rank=mesh.sp_rank,
        sp=mesh.sp,
        dp_rank=mesh.dp_rank,
        dp=mesh.dp,
        grad_accumulation=recipe.train.grad_accumulation,
        steps=recipe.train.steps,
        seed=recipe.data.seed,
        cross_document_attention=recipe.data.cross_document_attention,
        chunk_tokens=plan.chunk_tokens,
        order=recipe.data.order,
        prefetch=recipe.data.prefetch,
        verify=recipe.data.verify_checksums,
        start=start,
        held_out=plan.held_out,
    )


def _first_sample(dataset: PackedDataset, loader: PackedLoader) -> str:
    sample = dataset.sample(loader.sample_at(0).sample)
    documents = len(sample.cu_seqlens) - 1
    return (
        f"first sample: {sample.n_tokens:,} tokens in {documents:,} documents, sum of len² {sample.cost:.3e} "
        f"(one document of this length: {float(sample.n_tokens) ** 2:.3e})"
    )


def _check(trainee: Trainee, dataset: PackedDataset, loader: PackedLoader) -> None:
    """Run the self-check, if the recipe has one, on the first tokens of the first sample."""
    recipe = trainee.plan.recipe
    if recipe.train.self_check is None:
        _say(trainee.mesh, "self-check: off (train.self_check is null)")
        return
    length = min(recipe.train.self_check.tokens, trainee.plan.seq_len)
    check = self_check(trainee, batch_of(dataset, loader.sample_at(0).sample, length=length))
    _say(
        trainee.mesh,
        f"self-check on {length:,} tokens: loss {check.loss:.6f} at sp={trainee.mesh.sp}, "
        f"{check.stock_loss:.6f} at sp=1 (stock); gradient norm {check.grad_norm:.6f} and "
        f"{check.stock_grad_norm:.6f}: equal within {check.difference:.0e}",
    )


def _tracker(plan: JobPlan, run_dir: RunDir, mesh: Mesh, dataset: PackedDataset, resume: Resume | None) -> Tracker:
    """The run folder's writers and MLflow, on rank 0, which also describes what the run stands on."""
    tracking = plan.recipe.tracking
    if mesh.rank == 0:
        write_json(run_dir.environment, environment_found())
        _describe_data(dataset, run_dir)
    tracker = open_tracker(run_dir, tracking, experiment=tracking.experiment or plan.recipe.name, rank=mesh.rank)
    tracker.log_start(
        {
            "job": os.environ.get("SLURM_JOB_ID", "local"),
            "host": socket.gethostname(),
            "commit": _commit(run_dir),
            "image_digest": None if plan.image is None else plan.image.digest,
            "world_size": plan.world_size,
            "after_step": 0 if resume is None else resume.checkpoint.record.step,
        }
    )
    return tracker


def _describe_data(dataset: PackedDataset, run_dir: RunDir) -> None:
    """The packing report and its plots, once per run: a row per document is read for them."""
    if not run_dir.packing_report.is_file():
        plot_packed(dataset.folder, run_dir.packing_plot)
        write_json(run_dir.packing_report, describe(dataset.folder, verify=False))


def _commit(run_dir: RunDir) -> str:
    return run_dir.commit.read_text().strip() if run_dir.commit.exists() else "unknown"


def _resumed(resume: Resume, plan: JobPlan) -> str:
    record = resume.checkpoint.record
    how = f", converted from {record.world_size} ranks" if resume.universal else ""
    return (
        f"resumed from {resume.checkpoint.path.name} of {plan.recipe.train.steps} steps "
        f"({record.samples_seen:,} samples seen){how}"
    )


def _show(plan: JobPlan, run_dir: RunDir, mesh: Mesh) -> None:
    """The plot and the report of what was recorded, also of a run that failed; a full disk costs these alone."""
    if mesh.rank != 0 or not _has_rows(run_dir.metrics):
        return
    try:
        plot_training(run_dir.metrics, run_dir.plot, title=run_dir.path.name)
        write_report(run_dir, run_dir.report, compared=figures(read_steps(run_dir.metrics), plan, run_dir.packed(plan)))
    except Exception as error:  # whatever a picture lacks, the run has ended as it has
        warn(f"no plot or report: {error}; `alst report {run_dir.path.name}` makes it later")


def _summary(plan: JobPlan, run_dir: RunDir, dataset: PackedDataset, tracker: Tracker) -> None:
    """The last words: what was trained, where everything lies, what to try next."""
    manifest = dataset.manifest
    paths = {"run folder": str(run_dir.path), "packed data": str(run_dir.packed(plan)), "report": str(run_dir.report)}
    if tracker.store is not None:
        paths["MLflow"] = tracker.store.removeprefix("sqlite:///")
    print_summary(
        summarize(
            run_dir.path,
            samples=manifest.samples,
            fill_fraction=1.0 - manifest.unfilled_fraction,
            paths=paths,
            next_steps=(
                "make mlflow                       all runs in a browser",
                "alst inspect PACKED_DATA          what the samples are made of",
                "alst train tiny train.steps=100   any key of a recipe can be overridden",
                "alst resume RUN train.steps=100   train this run longer; `alst export RUN OUT` writes its weights",
                "make demo-million                 one step on one sample of 1,048,576 tokens",
            ),
        )
    )


def _steps_before(metrics: Path, start: Cursor) -> list[dict[str, Any]]:
    """Those that earlier starts of this run have done, and this one will not do again."""
    rows = read_steps(metrics) if _has_rows(metrics) else []
    return [row for row in rows if row["step"] <= start.step]


def _stopping(
    queue: Queue,
    trainee: Trainee,
    run_dir: RunDir,
    checkpointer: Checkpointer,
    loader: PackedLoader,
    before: list[dict[str, Any]],
) -> Stopping:
    plan = trainee.plan
    foreseen = estimate(plan).checkpoint_seconds or 0.0
    # At another number of ranks, long ago, the places of samples were others.
    known = [row for row in before[1:] if loader.cursor(row["step"] - 1).position >= 0]
    return Stopping(
        queue,
        run_dir,
        saves=plan.recipe.checkpoint is not None,
        save_seconds=lambda: checkpointer.longest_seconds or foreseen,
        step_seconds=[(row["step"], row["step_seconds"]) for row in known[-RECENT_STEPS:]],
        done=loader.start.step,
        cost=step_costs(plan, loader),
        evaluates=partial(is_due, plan),
        rank=trainee.mesh.rank,
    )


def _stopped(outcome: Outcome, plan: JobPlan) -> str:
    saved = "what is done is saved" if plan.recipe.checkpoint is not None else "nothing is saved: checkpoint is null"
    on = (
        "" if outcome.ended_by is Request.REQUEUE else "; the file `stop` lies in the run folder, `alst resume` goes on"
    )
    return f"stopped as asked; {saved}{on}"


def _has_rows(metrics: Path) -> bool:
    return metrics.exists() and metrics.stat().st_size > 0


def _say(mesh: Mesh, text: str) -> None:
    if mesh.rank == 0:
        print(text, flush=True)
