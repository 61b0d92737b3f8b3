"""Stage write: the plan says which pieces make which sample, and every part file is written on its own.

Between packing and packed_dataset in the data path: PackingPlan, token parts -> part files.
"""

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.direct_file import aligned_tokens
from pipeline.data.files import read_json
from pipeline.data.job import PackJob, Task
from pipeline.data.loss_runs import Runs, joined, whole
from pipeline.data.manifest import PartFile
from pipeline.data.packed_dataset import TOKEN_BYTES, SampleContent, WrittenPart, save_index, write_part
from pipeline.data.packing import PackingPlan, load_plan
from pipeline.data.token_ids import largest_id
from pipeline.data.token_parts import TokenReader
from pipeline.errors import DataError
from pipeline.files import replaced, write_json

WRITERS = 2  # parts at a time: one sample is gathered while the other is written, so two are in memory
PART_BYTES = 256 << 20  # what is written again after a kill, and what tasks divide


@dataclass(frozen=True)
class PlannedPart:
    """Samples `[first, stop)` of the plan, in one file."""

    name: str
    first: int
    stop: int


def planned_parts(plan: PackingPlan) -> list[PlannedPart]:
    """How samples are divided over files; the plan alone decides it, so every task agrees."""
    per_part = max(1, PART_BYTES // (TOKEN_BYTES * plan.seq_len))
    firsts = range(0, plan.samples, per_part)
    return [
        PlannedPart(f"data-{number:05d}-of-{len(firsts):05d}.arrow", first, min(first + per_part, plan.samples))
        for number, first in enumerate(firsts)
    ]


def planned(job: PackJob) -> PackingPlan:
    """The job's plan. Raises DataError if it is not made yet."""
    record = read_json(job.work / "plan.json")
    if record is None or record.get("key") != job.plan_key:
        raise DataError(f"{job.output} has no packing plan for this recipe; run the stage plan first")
    return load_plan(job.work / "plan.npz")


def write_parts(job: PackJob, mine: Task) -> None:
    """Writes this task's part files, but for those that have their completion record."""
    plan = planned(job)
    job.tokens_records()
    parts = planned_parts(plan)
    own = [parts[number] for number in mine.of(len(parts))]
    sample_bytes = TOKEN_BYTES * plan.seq_len
    progress = job.stage_progress("write", sum(part.stop - part.first for part in own) * sample_bytes)
    with TokenReader(job.token_parts) as reader:
        threads = ThreadPoolExecutor(WRITERS)
        try:
            works = {threads.submit(_write_part, job, part, plan=plan, reader=reader): part for part in own}
            for work in as_completed(works):
                work.result()
                part = works[work]
                rows = slice(int(plan.sample_offsets[part.first]), int(plan.sample_offsets[part.stop]))
                tokens = int((plan.stop[rows] - plan.start[rows]).sum())
                progress.advance(rows.stop - rows.start, tokens, (part.stop - part.first) * sample_bytes)
        finally:
            threads.shutdown(cancel_futures=True)


def _write_part(job: PackJob, part: PlannedPart, *, plan: PackingPlan, reader: TokenReader) -> None:
    """Writes a part file, unless it has its completion record."""
    if finished_part(job, part) is not None:
        return
    record = job.work / f"{part.name}.json"
    record.unlink(missing_ok=True)
    path = job.output / part.name
    written = write_part(path, samples=_contents(plan, reader=reader, part=part, vocab_limit=job.vocab_limit))
    save_index(written.index, job.work / f"{part.name}.npz")
    _save_checksums(written, job.work / f"{part.name}.u64")
    file = PartFile(
        part.name, part.stop - part.first, path.stat().st_size, written.frame_checksum, written.max_token_id
    )
    write_json(record, {"key": job.plan_key, **asdict(file)})


def _save_checksums(written: WrittenPart, path: Path) -> None:
    with replaced(path) as temporary:
        temporary.write_bytes(written.checksums.tobytes())


def _contents(
    plan: PackingPlan, *, reader: TokenReader, part: PlannedPart, vocab_limit: int | None
) -> Iterator[SampleContent]:
    """The samples of a part, one after the other in the same memory."""
    input_ids = aligned_tokens(plan.seq_len)
    cold = True
    for sample in range(part.first, part.stop):
        before = _blocks_read()
        if cold and sample + 1 < part.stop:
            document, start, stop = plan.pieces(sample + 1)
            reader.prefetch(document=document, start=start, stop=stop)
        document, start, stop = plan.pieces(sample)
        ends = np.cumsum(stop - start)
        reader.read_into(input_ids, document=document, start=start, ends=ends)
        cold = _blocks_read() > before
        largest = largest_id(
            input_ids[: ends[-1]], limit=vocab_limit, name_of=partial(_name_at, reader, document=document, ends=ends)
        )
        input_ids[ends[-1] :] = 0
        runs = _loss_runs(reader, document=document, start=start, stop=stop)
        yield SampleContent(input_ids, np.concatenate([[0], ends]).astype(np.int32), document, runs, largest)


def _name_at(reader: TokenReader, token: int, *, document: NDArray[np.int64], ends: NDArray[np.int64]) -> str:
    """The document of a token of a sample."""
    return reader.name(int(document[np.searchsorted(ends, token, side="right")]))


def _loss_runs(
    reader: TokenReader, *, document: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64]
) -> Runs:
    """Which tokens of a sample count; all arrays [pieces]."""
    ends = np.cumsum(stop - start)
    if reader.every_token_counts(document):
        return whole(int(ends[-1]))
    pieces = zip(document.tolist(), start.tolist(), stop.tolist(), strict=True)
    found = [reader.loss_runs(row, start=first, stop=last) for row, first, last in pieces]
    return joined(found, offsets=ends - (stop - start))


def _blocks_read() -> int:
    """That this thread had to be read from a disk; where there are none, asking ahead only costs."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


def finished_part(job: PackJob, part: PlannedPart) -> PartFile | None:
    """What the part's completion record says of it, if it is written.

    Raises DataError if the file is not as it was written.
    """
    record = read_json(job.work / f"{part.name}.json")
    path = job.output / part.name
    if record is None or record.pop("key") != job.plan_key or not path.exists():
        return None
    file = PartFile(**record)
    if path.stat().st_size != file.size_bytes:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, and {file.size_bytes} were written; delete it, and run the stage "
            "write again"
        )
    return file


def all_written(job: PackJob) -> bool:
    """Whether every part of every task has its completion record."""
    return all((job.work / f"{part.name}.json").exists() for part in planned_parts(planned(job)))
