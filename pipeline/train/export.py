"""A checkpoint of a run as a normal Hugging Face folder: sharded safetensors, config, generation config, tokenizer.

Needs no GPU and no process group, only host memory for the weights (twice while they are checked), and may run while
the run goes on.
"""

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from pipeline.data.packed_dataset import TOKENIZER_NAME
from pipeline.errors import DataError, RunError, UserError
from pipeline.model.build import transformers_config
from pipeline.plan import checkpoint_dir
from pipeline.plan.checkpoint_dir import DEEPSPEED_NAME, Checkpoint
from pipeline.plan.job import JobPlan, read_plan
from pipeline.plan.run_dir import RunDir

WHOLE_MODEL_FILE = "mp_rank_00_model_states.pt"  # DeepSpeed's; at ZeRO stages 0 to 2 every rank has whole weights
Weights = dict[str, torch.Tensor]
Say = Callable[[str], None]


def export(
    run_dir: RunDir,
    out: Path,
    *,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    checked: bool = True,
    say: Say = print,
) -> Checkpoint:
    """Write the weights of a checkpoint (the newest whole one, or that of `step`) to the new folder `out`.

    `dtype` is by default the recipe's. With `checked`, the folder is loaded again and every tensor compared. Raises
    UserError if there is no such checkpoint, or `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out} is there already; export into a new folder")
    checkpoint = find_checkpoint(run_dir, step, say=say)
    plan = read_plan(checkpoint.path / run_dir.plan.name)
    say(f"exporting {checkpoint.path}")
    weights = read_weights(checkpoint, getattr(torch, dtype or plan.recipe.model.dtype))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(plan, weights, partial, tokenizer=run_dir.packed(plan) / TOKENIZER_NAME)
        if checked:
            say("loading it again and comparing every tensor")
            check_equal(partial, weights)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; export to a folder that can be written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def find_checkpoint(run_dir: RunDir, step: int | None, *, say: Say) -> Checkpoint:
    """The checkpoint of a step, or the newest whole one. Raises UserError if there is none."""
    found = checkpoint_dir.step_folders(run_dir.checkpoints)
    wanted = [path for path in found if step is None or path.name == checkpoint_dir.folder_name(step)]
    problems = []
    for path in wanted:
        try:
            checkpoint = checkpoint_dir.read_checkpoint(path)
            problem = checkpoint_dir.damage(checkpoint, checksums=True)
        except (DataError, OSError) as error:
            problem = str(error)
        if problem is None:
            return checkpoint
        say(f"passed over: {problem}")
        problems.append(problem)
    there = ", ".join(path.name for path in found) or "none"
    asked = "whole checkpoint" if step is None else f"whole checkpoint of step {step}"
    raise UserError(f"{run_dir.path}: no {asked}; there: {there}" + "".join(f"\n  {problem}" for problem in problems))


def read_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Weights:
    """Every parameter of the model by name: as the model computes with it at ZeRO stages 0 to 2, at stage 3 the
    optimizer's wider one, gathered from the partitions one at a time."""
    folder = checkpoint.path / DEEPSPEED_NAME
    try:
        if checkpoint.record.zero_stage < 3:
            parts = torch.load(folder / WHOLE_MODEL_FILE, map_location="cpu", mmap=True, weights_only=False)["module"]
        else:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # pages of progress
                parts = get_fp32_state_dict_from_zero_checkpoint(checkpoint.path, DEEPSPEED_NAME, lazy_mode=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{checkpoint.path} went away while it was read: the run has newer ones; export again"
        ) from error
    return {name: part.contiguous().to(dtype) for name, part in parts.items()}


def _write(plan: JobPlan, weights: Weights, folder: Path, *, tokenizer: Path) -> None:
    model = _empty_model(plan)
    missing = set(dict(model.named_parameters())) - set(weights)
    if missing:
        raise RunError(f"the checkpoint lacks weights of the model: {', '.join(sorted(missing)[:5])}")
    model.to(next(iter(weights.values())).dtype).save_pretrained(folder, state_dict=dict(weights))
    if tokenizer.is_dir():
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def _empty_model(plan: JobPlan) -> PreTrainedModel:
    """The model without memory for its weights, with the config that it was trained with."""
    recipe = plan.recipe.model
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(transformers_config(recipe))
    if recipe.name_or_path is not None:
        with suppress(OSError):  # a model that comes without one: what its config says is written
            model.generation_config = GenerationConfig.from_pretrained(recipe.name_or_path, revision=recipe.revision)
    return model


def check_equal(folder: Path, weights: Weights) -> None:
    """Raises RunError if what transformers loads from `folder` is not `weights`, bit for bit."""
    dtype = next(iter(weights.values())).dtype
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    for name, trained in weights.items():
        if name not in loaded or not torch.equal(loaded[name], trained):
            raise RunError(f"{folder}: {name} loads with other values than were trained; nothing was exported")
