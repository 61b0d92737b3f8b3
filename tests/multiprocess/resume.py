"""Training that is interrupted and goes on, against training that is not. A worker of `test_resume`.

`python -m tests.multiprocess.resume CASES.json FOLDER save|resume|both`: every rank trains each case for STEPS steps
and saves after SAVED_STEP on the way (`save`), or starts from that checkpoint with a model of its own and trains on
(`resume`). Samples are those of the parity suite, taken by their position in the training order.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from pipeline.attention.function import NAME as ALST_ATTENTION
from pipeline.data.loader import Cursor
from pipeline.memory.apply import attach_features
from pipeline.metrics.meter import StepTimer
from pipeline.model.build import build_model
from pipeline.parallel.mesh import Mesh
from pipeline.plan.run_dir import RunDir
from pipeline.train.checkpoint import Checkpointer
from pipeline.train.engine import create_engine, zero3_config
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.resume import find_resume, load
from pipeline.train.self_check import self_check, shard_of_sample
from pipeline.train.step import Trainee, model_inputs, run_step
from tests.multiprocess.case import Case
from tests.multiprocess.parity import device_of, kernel_of, open_cases, plan_of, whole_sample

STEPS, SAVED_STEP = 5, 2


@dataclass
class Job:
    """One start of a run, as train.main makes it, but with samples of its own."""

    trainee: Trainee
    checkpointer: Checkpointer
    cursor: Cursor

    def train(self, *, save_after: int | None = None) -> Iterator[float]:
        """The loss of every step that is left."""
        plan, mesh = self.trainee.plan, self.trainee.mesh
        for step in range(self.cursor.step, STEPS):
            position = self.cursor.position + (step - self.cursor.step) * plan.samples_per_step
            batches = [whole_sample(position + offset, plan.seq_len) for offset in range(plan.samples_per_step)]
            mine = [
                model_inputs(shard_of_sample(batch, self.trainee.layout, mesh.sp_rank), self.trainee)
                for batch in batches[mesh.dp_rank :: mesh.dp]
            ]
            valid = sum(batch.n_valid for batch in batches)
            yield run_step(self.trainee, mine, valid_tokens=valid, learning_rate=1e-2, timer=StepTimer()).loss
            if step + 1 == save_after:
                self.checkpointer.save(Cursor(step + 1, position + plan.samples_per_step))
        self.checkpointer.finish()


def start(case: Case, mesh: Mesh, weights: Path, run_dir: RunDir) -> Job:
    plan = plan_of(case, weights)
    torch.use_deterministic_algorithms(plan.recipe.train.deterministic)
    resume = find_resume(plan, run_dir, mesh)
    model = build_model(plan.recipe.model, attention=ALST_ATTENTION, seed=0, zero3=zero3_config(plan))
    attached = attach_features(model, plan)
    engine = create_engine(model, plan, attached, load_universal=resume is not None and resume.universal)
    device = device_of(plan)
    trainee = Trainee(engine, plan, mesh, kernel_of(model, plan, device), device)
    if case.self_check:
        self_check(trainee, whole_sample(0, case.seq_len))
    if mesh.rank == 0 and resume is None:
        run_dir.path.mkdir(parents=True)
        run_dir.write_plan(plan)
    heartbeat = Heartbeat()
    if resume is not None:
        load(resume, engine, run_dir, mesh, beat=heartbeat.beat)
        assert (heartbeat.beats > 1) is resume.universal, "a conversion is seen to get on, on every rank"
    checkpointer = Checkpointer(trainee, run_dir, commit="test", beat=heartbeat.beat)
    return Job(trainee, checkpointer, Cursor() if resume is None else resume.cursor)


def keep_weights(job: Job, run_dir: RunDir) -> None:
    """What training goes on with, whole, in weights.pt: an export of the checkpoint must be the same."""
    whole = {}
    for name, parameter in job.trainee.engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if job.trainee.plan.recipe.zero.stage else parameter.detach()
        whole[name] = full.to("cpu", parameter.dtype, copy=True)
    if job.trainee.mesh.rank == 0:
        torch.save(whole, run_dir.path / "weights.pt")


def main(cases_path: str, folder: str, what: str) -> None:
    cases, weights, meshes = open_cases(cases_path, folder)
    losses: dict[str, dict[str, list[float]]] = {}
    for number, case in enumerate(cases):
        run_dir, mesh = RunDir(Path(folder) / f"run{number}"), meshes[case.sp]
        found = {}
        for phase in ("save", "resume"):
            if what in (phase, "both"):
                job = start(case, mesh, weights[case.architecture], run_dir)
                if phase == "resume":
                    keep_weights(job, run_dir)
                found[phase] = list(job.train(save_after=SAVED_STEP if phase == "save" else None))
                job.trainee.engine.destroy()
        losses[case.name] = found
        if dist.get_rank() == 0:
            (Path(folder) / f"{what}.json").write_text(json.dumps(losses))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo and DeepSpeed abort in about one orderly exit of eight


if __name__ == "__main__":
    main(*sys.argv[1:])
