"""Stage finish: gathers what the tasks recorded. The manifest is the last file and makes the data set whole."""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from shutil import copyfileobj, rmtree
from typing import Any

import pyarrow as pa

from pipeline.data import packed_dataset
from pipeline.data.files import file_digest, read_json
from pipeline.data.job import PackJob
from pipeline.data.manifest import FORMAT_VERSION, Manifest, PartFile, write_manifest
from pipeline.data.packed_dataset import SampleIndex, joined_index, load_index, save_index
from pipeline.data.packing import PackingPlan
from pipeline.data.token_parts import DOCUMENT_SCHEMA, TokenRecord, read_document_rows
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.write import PlannedPart, finished_part, planned, planned_parts
from pipeline.errors import DataError
from pipeline.files import replaced

PART_NAME = re.compile(r"data-\d+-of-\d+\.arrow")
VERSIONED = ("numpy", "pyarrow", "tokenizers", "xxhash")


def finish(job: PackJob) -> Manifest:
    """Makes the data set of what was written. Raises DataError if a part is missing or a token was lost."""
    plan, records = planned(job), job.tokens_records()
    parts = [_written(job, part) for part in planned_parts(plan)]
    index = joined_index([load_index(job.work / f"{part.name}.npz") for part in parts])
    _check_counts(job, plan=plan, index=index, records=records)
    _remove_stale_files(job.output, keep={part.name for part in parts})
    _write_documents(job)
    _write_checksums(job, parts=parts)
    packed_dataset.write_datasets_files(
        job.output, part_names=[part.name for part in parts], fingerprint=job.plan_key[:16]
    )
    save_index(index, job.output / packed_dataset.INDEX_NAME)
    manifest = _manifest(job, plan=plan, records=records, index=index, parts=tuple(parts))
    write_manifest(manifest, job.output)
    job.remove_work()
    return manifest


def _written(job: PackJob, part: PlannedPart) -> PartFile:
    found = finished_part(job, part)
    if found is None:
        raise DataError(f"{job.output / part.name} is not written yet; run the stage write first")
    return found


def _check_counts(job: PackJob, *, plan: PackingPlan, index: SampleIndex, records: Sequence[TokenRecord]) -> None:
    """Tokens in = tokens out + declared drops, or no data set."""
    read = sum(record.tokens for record in records)
    planned_for = read_json(job.work / "plan.json") or {}
    written = int(index.n_tokens.sum())
    if read != planned_for.get("tokens_read") or len(index.part) != plan.samples:
        raise DataError(
            f"{read} tokens were read and the plan is for {planned_for.get('tokens_read')}, {len(index.part)} samples "
            f"were written and it has {plan.samples}; delete {job.work} and pack again"
        )
    if plan.tokens_in != written + plan.tokens_dropped:
        raise DataError(
            f"{plan.tokens_in} tokens went in, {written} came out and {plan.tokens_dropped} were dropped, and these "
            f"must agree; delete {job.work} and pack again"
        )


def _remove_stale_files(output: Path, *, keep: set[str]) -> None:
    """Part files of an earlier, unfinished packing with another length, and temporary files of a killed one."""
    for path in output.iterdir():
        stale = PART_NAME.fullmatch(path.name) and path.name not in keep
        if stale or (path.name.startswith(".") and path.name.endswith(".tmp")):
            rmtree(path) if path.is_dir() else path.unlink()


def _write_documents(job: PackJob) -> None:
    """The documents of all token parts as one table; its row numbers are the data set's document ids."""
    with (
        replaced(job.output / packed_dataset.DOCUMENTS_NAME) as path,
        pa.ipc.new_stream(str(path), DOCUMENT_SCHEMA) as stream,
    ):
        for part in job.token_parts:
            stream.write_table(read_document_rows(part.documents_path).select(DOCUMENT_SCHEMA.names))


def _write_checksums(job: PackJob, *, parts: Sequence[PartFile]) -> None:
    with replaced(job.output / packed_dataset.CHECKSUMS_NAME) as path, path.open("wb") as file:
        for part in parts:
            with (job.work / f"{part.name}.u64").open("rb") as own:
                copyfileobj(own, file)


def _manifest(
    job: PackJob,
    *,
    plan: PackingPlan,
    records: Sequence[TokenRecord],
    index: SampleIndex,
    parts: tuple[PartFile, ...],
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        seq_len=plan.seq_len,
        samples=plan.samples,
        **{
            name: sum(getattr(record, name) for record in records)
            for name in ("texts", "texts_without_tokens", "files_skipped")
        },
        documents=plan.documents,
        documents_read=sum(record.documents for record in records),
        tokens_read=sum(record.tokens for record in records),
        tokens_in=plan.tokens_in,
        tokens_dropped=plan.tokens_dropped,
        dropped=plan.dropped,
        tokens=plan.tokens,
        valid_tokens=int(index.n_valid.sum()),
        documents_cut=plan.documents_cut,
        unfilled_fraction=plan.unfilled_fraction,
        max_token_id=max(part.max_token_id for part in parts),
        **_tokenizer_facts(job),
        inputs=job.inputs,
        contents=tuple(record.content for record in records),
        versions={"python": platform.python_version()} | {name: version(name) for name in VERSIONED},
        parts=parts,
        index_sha256=file_digest(job.output / packed_dataset.INDEX_NAME),
        complete=True,
        sum_len_squared=sum(map(int, index.cost)),  # int64 would not hold the sum of many long samples
    )


def _tokenizer_facts(job: PackJob) -> dict[str, Any]:
    record = read_json(job.work / "tokenizer.json")
    if record is None:
        return {"vocab_size": None, "tokenizer_hash": None}
    tokenizer = load_tokenizer(str(job.output / packed_dataset.TOKENIZER_NAME))
    return {"vocab_size": tokenizer.get_vocab_size(with_added_tokens=True), "tokenizer_hash": record["hash"]}
