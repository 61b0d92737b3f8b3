"""Makes a packed data set out of a recipe, in four stages that can be run one by one, killed, and run again.

    tokenize   units of the sources -> token parts                    any number of tasks
    plan       lengths -> which pieces make which sample              one task
    write      plan, tokens -> part files                             any number of tasks; the last one goes on to
    finish     part files -> index, manifest; from here on the data set exists

A piece of work that finds its own completion record, made from the same inputs, is not done again. What stages keep for
each other lies in `.alst-pack/` inside the output folder until finish removes it. Which bytes are made does not depend
on the number of tasks: sources decide the token parts, the plan decides the part files.
"""

import re
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Literal, overload

from pipeline.data.amounts import copies_of
from pipeline.data.files import read_json
from pipeline.data.finish import finish
from pipeline.data.job import WHOLE_STAGE, PackJob, Task
from pipeline.data.lock import held, one_after_another, one_task, shared_by_job
from pipeline.data.manifest import Manifest
from pipeline.data.packed_dataset import TOKENIZER_NAME
from pipeline.data.packing import Selection, plan_packing, save_plan
from pipeline.data.progress import ReportProgress
from pipeline.data.token_parts import TokenReader
from pipeline.data.tokenize import Encoder, tokenize
from pipeline.data.tokenizer import load_tokenizer, save_tokenizer, token_id, tokenizer_hash, train_tokenizer
from pipeline.data.write import all_written, write_parts
from pipeline.errors import DataError
from pipeline.files import write_json
from pipeline.recipe.schema import Recipe, TrainTokenizer

TASK = re.compile(r"(\d+)/(\d+)")


class Stage(StrEnum):
    """What `pack` can be asked to do; `all` is the others in order."""

    TOKENIZE = "tokenize"
    PLAN = "plan"
    WRITE = "write"
    FINISH = "finish"
    ALL = "all"


@overload
def pack(
    recipe: Recipe, output: Path, *, stage: Literal["all", "finish"] = "all", vocab_size: int | None = None,
    progress: ReportProgress | None = None,
) -> Manifest: ...  # fmt: skip


@overload
def pack(
    recipe: Recipe, output: Path, *, stage: str, task: Task = ..., vocab_size: int | None = None,
    progress: ReportProgress | None = None,
) -> Manifest | None: ...  # fmt: skip


def pack(
    recipe: Recipe,
    output: Path,
    *,
    stage: str = "all",
    task: Task = WHOLE_STAGE,
    vocab_size: int | None = None,
    progress: ReportProgress | None = None,
) -> Manifest | None:
    """Runs `stage` of packing `recipe.data` into the folder `output`; the manifest, once the data set is complete.

    `vocab_size` is the model's; without it, what `recipe.model.config` says. A complete data set of the same inputs is
    reused at once. Raises DataError if `output` holds another data set or other files, if it cannot be written, if
    another process packs there, if a stage's predecessor is missing, and for anything wrong with the sources.
    """
    if stage not in list(Stage):
        raise DataError(f"stage {stage!r} is not known; use one of {', '.join(Stage)}")
    if task.count > 1 and stage not in (Stage.TOKENIZE, Stage.WRITE):
        raise DataError(f"stage {stage} is one task, not {task.count}; only tokenize and write are divided")
    job = PackJob.of(recipe, output=output, vocab_size=vocab_size, progress=progress)
    try:
        return _run(job, Stage(stage), task)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"cannot write the packed data set {output}: {error.strerror or error}{where}; "
            "choose another --output, or make room and give yourself write permission there"
        ) from error


def _run(job: PackJob, stage: Stage, task: Task) -> Manifest | None:
    """The stage, unless the data set is complete already, or another task completes it and takes the work folder away.

    The manifest comes before the work folder goes: whoever misses a file and then finds no manifest has a real error.
    """
    try:
        with ExitStack() as locks:
            if not job.reusable():
                job.claim()
                locks.enter_context(shared_by_job(job.work, key=job.plan_key, alone=stage == Stage.ALL))
                locks.enter_context(one_task(job.work, f"{stage}-{task.index}-of-{task.count}"))
            if complete := job.reusable():  # asked again: another task may have finished it meanwhile
                job.remove_work()
                return complete
            for step in (_tokenize, _plan, _write) if stage == Stage.ALL else (_STEPS[stage],):
                complete = step(job, task)
            return complete
    except (FileNotFoundError, DataError):
        if complete := job.reusable():
            return complete
        raise


def task_of(text: str) -> Task:
    """`I/N` as a Task: number I, from 0, of N. Raises DataError for anything else."""
    found = TASK.fullmatch(text)
    if not found or int(found[1]) >= int(found[2]):
        raise DataError(f"--task {text}: must be I/N with I from 0 to N - 1; write e.g. 0/4")
    return Task(int(found[1]), int(found[2]))


def _tokenize(job: PackJob, mine: Task) -> None:
    """Stage tokenize: the tokenizer, then the tokens of this task's units."""
    encoder = _encoder(job)
    progress = job.stage_progress("tokenize", sum(job.units[number].size for number in mine.of(len(job.units))))
    for number in mine.of(len(job.units)):
        unit, part, key = job.units[number], job.token_parts[number], job.tokens_keys[number]
        if record := part.record(key=key, unit=unit):
            progress.advance(record.documents, record.tokens, unit.size)
            continue
        part.forget()
        source = job.recipe.data.sources[unit.source]
        tokenize(unit, source=source, encoder=encoder, part=part, key=key, advance=progress.advance)


def _encoder(job: PackJob) -> Encoder:
    """What every task encodes with; the first one trains and saves the tokenizer, the others wait for it."""
    data, folder, record = job.recipe.data, job.output / TOKENIZER_NAME, job.work / "tokenizer.json"
    if data.tokenizer is None:
        return Encoder(None, vocab_limit=job.vocab_limit)
    with one_after_another(job.work, "tokenizer"):
        if not _has_key(record, key=job.tokenizer_key):
            record.unlink(missing_ok=True)
            if isinstance(data.tokenizer, TrainTokenizer):
                tokenizer = train_tokenizer(data.sources, settings=data.tokenizer)
            else:
                tokenizer = load_tokenizer(data.tokenizer, revision=data.tokenizer_revision)
            save_tokenizer(tokenizer, folder, chat_template=job.chat.template if job.chat else None)
            write_json(record, {"key": job.tokenizer_key, "hash": tokenizer_hash(tokenizer)})
    tokenizer = load_tokenizer(str(folder))
    separator_id = token_id(tokenizer, data.separator) if data.separator else None
    known = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return Encoder(tokenizer, job.chat, separator_id, known if job.vocab_limit is None else job.vocab_limit)


def _plan(job: PackJob, _: Task) -> None:
    """Stage plan: one task, whatever the number of parts."""
    record = job.work / "plan.json"
    if _has_key(record, key=job.plan_key):
        return
    tokens = sum(record.tokens for record in job.tokens_records())
    record.unlink(missing_ok=True)
    data, settings = job.recipe.data, job.recipe.data.packing
    with TokenReader(job.token_parts) as reader:
        if not tokens or tokens != int(reader.lengths.sum()):
            raise DataError(f"{len(data.sources)} sources hold no token ({tokens}); set data.sources to texts")
        copies = copies_of(
            reader.lengths,
            reader.sources,
            sources=data.sources,
            length_weights=settings.length_weights,
            seed=data.seed,
        )
        plan = plan_packing(
            reader.lengths,
            seq_len=data.sample_tokens,
            seed=data.seed,
            copies=copies,
            selection=Selection(
                shortest=settings.shortest_document_tokens,
                longest=settings.longest_document_tokens,
                drop_last=settings.unfilled_last == "drop",
            ),
        )
    save_plan(plan, job.work / "plan.npz")
    write_json(record, {"key": job.plan_key, "samples": plan.samples, "tokens_read": tokens})


def _write(job: PackJob, mine: Task) -> Manifest | None:
    """Stage write: this task's part files; the task that completes the last one finishes the data set."""
    write_parts(job, mine)
    with held(job.work, "finish") as free:
        if free and all_written(job):
            return finish(job)
    return job.reusable()  # another task has finished it, or is about to


def _finish(job: PackJob, _: Task) -> Manifest:
    return finish(job)


_STEPS = {Stage.TOKENIZE: _tokenize, Stage.PLAN: _plan, Stage.WRITE: _write, Stage.FINISH: _finish}


def _has_key(record: Path, *, key: str) -> bool:
    value = read_json(record)
    return value is not None and value.get("key") == key
