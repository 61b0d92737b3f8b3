"""Makes a packed data set out of a recipe, in four stages that can be run one by one, killed, and run again.

    tokenize   sources -> tokens and document lengths
    plan       lengths -> which pieces make which sample
    write      plan, tokens -> part files
    finish     part files -> index, manifest; from here on the data set exists

A stage that finds its own completion record, made from the same inputs, does nothing. What stages keep for each other
lies in `.alst-pack/` inside the output folder until finish removes it.
"""

import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Literal, overload

import numpy as np
import pyarrow as pa

from pipeline.data import packed_dataset
from pipeline.data.files import digest, file_digest, read_json
from pipeline.data.manifest import FORMAT_VERSION, Manifest, PackingInputs, PartFile, read_manifest, write_manifest
from pipeline.data.packed_dataset import SampleContent, SampleIndex, joined_index, load_index, save_index, write_part
from pipeline.data.packing import PLANNER_VERSION, PackingPlan, load_plan, plan_packing, save_plan
from pipeline.data.progress import PackProgress, ReportProgress
from pipeline.data.sources import fingerprint
from pipeline.data.tokenize import (
    DOCUMENT_SCHEMA,
    TokenPart,
    TokenReader,
    TokenRecord,
    load_tokenizer,
    read_document_rows,
    save_tokenizer,
    tokenize,
    tokenizer_hash,
    train_tokenizer,
)
from pipeline.errors import DataError
from pipeline.files import replaced, write_json
from pipeline.recipe.schema import Recipe, TrainTokenizer

SAMPLES_PER_PART = 64
PART_BYTES = 1 << 30  # a part is what is written again after a kill
PART_NAME = re.compile(r"data-\d{5}-of-\d{5}\.arrow")
VERSIONED = ("numpy", "pyarrow", "tokenizers")


class Stage(StrEnum):
    """What `pack` can be asked to do; `all` is the others in order."""

    TOKENIZE = "tokenize"
    PLAN = "plan"
    WRITE = "write"
    FINISH = "finish"
    ALL = "all"


@overload
def pack(
    recipe: Recipe, output: Path, *, stage: Literal["all", "finish"] = "all", progress: ReportProgress | None = None
) -> Manifest: ...


@overload
def pack(recipe: Recipe, output: Path, *, stage: str, progress: ReportProgress | None = None) -> Manifest | None: ...


def pack(
    recipe: Recipe, output: Path, *, stage: str = "all", progress: ReportProgress | None = None
) -> Manifest | None:
    """Runs `stage` of packing `recipe.data` into the folder `output`; the manifest, once the data set is complete.

    A complete data set of the same inputs is reused at once. Raises DataError if `output` holds another data set or
    other files, if it cannot be written, if a stage's predecessor is missing, and for anything wrong with the sources.
    """
    if stage not in list(Stage):
        raise DataError(f"stage {stage!r} is not known; use one of {', '.join(Stage)}")
    job = _Job.of(recipe, output=output, progress=progress)
    try:
        if complete := job.reusable():
            job.remove_work()
            return complete
        job.claim()
        for step in _STEPS if stage == Stage.ALL else (Stage(stage),):
            complete = _STEPS[step](job)
        return complete
    except OSError as error:
        raise DataError(
            f"cannot write the packed data set {output}: {error.strerror or error} ({error.filename}); "
            "choose another --output, or make room and give yourself write permission there"
        ) from error


@dataclass(frozen=True)
class _Job:
    """A recipe, a folder, and what identifies the work between them."""

    recipe: Recipe
    output: Path
    inputs: PackingInputs
    progress: ReportProgress | None

    @classmethod
    def of(cls, recipe: Recipe, *, output: Path, progress: ReportProgress | None) -> "_Job":
        data = recipe.data
        match data.tokenizer:
            case TrainTokenizer(vocab_size=size, sample_mib=sample_mib):
                tokenizer = f"trained: vocab_size {size}, sample_mib {sample_mib}"
            case name:
                tokenizer = f"sha256:{tokenizer_hash(load_tokenizer(name))}"
        inputs = PackingInputs(
            sources=tuple(fingerprint(source) for source in data.sources),
            tokenizer=tokenizer,
            seq_len=data.seq_len,
            seed=data.seed,
            planner_version=PLANNER_VERSION,
        )
        return cls(recipe, output, inputs, progress)

    @property
    def work(self) -> Path:
        return self.output / packed_dataset.WORK_NAME

    @property
    def tokens_key(self) -> str:
        """Tokens do not depend on the sample's length: a new seq_len tokenizes nothing again."""
        return digest([FORMAT_VERSION, self.inputs.sources, self.inputs.tokenizer])

    @property
    def plan_key(self) -> str:
        return digest([FORMAT_VERSION, asdict(self.inputs)])

    @property
    def vocab_limit(self) -> int | None:
        return self.recipe.model.config.get("vocab_size")

    @property
    def token_parts(self) -> list[TokenPart]:
        return [TokenPart(self.work)]

    def reusable(self) -> Manifest | None:
        """The manifest of the finished data set that this job would make, if it is there.

        Raises DataError if the one that is there was made from other inputs, or does not fit the model.
        """
        manifest = read_manifest(self.output)
        if manifest is None:
            return None
        found, asked = asdict(manifest.inputs), asdict(self.inputs)
        differences = [f"{key} {found[key]}, asked for {asked[key]}" for key in asked if found[key] != asked[key]]
        if differences:
            raise DataError(
                f"{self.output} holds a data set of other inputs ({'; '.join(differences)}); it is not overwritten: "
                "choose another --output, or delete it"
            )
        _check_vocabulary(manifest.max_token_id, limit=self.vocab_limit, where=self.output)
        return manifest

    def claim(self) -> None:
        """Makes the output folder ours. Raises DataError if it holds anything else, for finish removes files in it."""
        self.output.mkdir(parents=True, exist_ok=True)
        if not self.work.exists() and any(self.output.iterdir()):
            raise DataError(f"{self.output} is not empty and holds no packed data set; choose another --output")
        self.work.mkdir(exist_ok=True)

    def remove_work(self) -> None:
        if self.work.exists():
            rmtree(self.work)

    def tokens_record(self) -> TokenRecord:
        records = [part.record(key=self.tokens_key) for part in self.token_parts]
        if records[0] is None:
            raise DataError(f"{self.output} has no tokens of these sources; run the stage tokenize first")
        return records[0]


def _check_vocabulary(token_id: int, *, limit: int | None, where: Path) -> None:
    if limit is not None and token_id >= limit:
        raise DataError(
            f"token id {token_id} in {where} is outside the model's vocabulary of {limit}; set data.tokenizer to the "
            "model's own, or raise model.config.vocab_size"
        )


def _tokenize(job: _Job) -> None:
    """Stage tokenize: the tokenizer, then every source's tokens."""
    (part,) = job.token_parts
    if part.record(key=job.tokens_key):
        return
    part.forget()
    data = job.recipe.data
    if isinstance(data.tokenizer, TrainTokenizer):
        tokenizer = train_tokenizer(data.sources, settings=data.tokenizer)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    save_tokenizer(tokenizer, job.output / packed_dataset.TOKENIZER_NAME)
    tokenize(
        data.sources,
        tokenizer=tokenizer,
        part=part,
        key=job.tokens_key,
        vocab_limit=job.vocab_limit,
        progress=job.progress,
    )


def _plan(job: _Job) -> None:
    """Stage plan: one task, whatever the number of parts."""
    record = job.work / "plan.json"
    if _has_key(record, key=job.plan_key):
        return
    job.tokens_record()
    record.unlink(missing_ok=True)
    with TokenReader(job.token_parts) as reader:
        plan = plan_packing(reader.lengths, seq_len=job.inputs.seq_len, seed=job.inputs.seed)
    save_plan(plan, job.work / "plan.npz")
    write_json(record, {"key": job.plan_key, "samples": plan.samples})


def _write(job: _Job) -> None:
    """Stage write: every part file that has no completion record yet."""
    plan = _planned(job)
    job.tokens_record()
    parts = _parts(plan)
    with TokenReader(job.token_parts) as reader:
        for part in parts:
            record = job.work / f"{part.name}.json"
            if not _has_key(record, key=job.plan_key):
                record.unlink(missing_ok=True)
                index = write_part(job.output / part.name, samples=_contents(plan, reader=reader, part=part))
                save_index(index, job.work / f"{part.name}.npz")
                write_json(record, {"key": job.plan_key, "size_bytes": (job.output / part.name).stat().st_size})
            _report_written(job, plan=plan, part=part)


def _finish(job: _Job) -> Manifest:
    """Stage finish: gathers the parts' records; the manifest is the last file and makes the data set whole."""
    plan, record = _planned(job), job.tokens_record()
    parts = [_finished_part(job, part=part) for part in _parts(plan)]
    index = joined_index([load_index(job.work / f"{part.name}.npz") for part in parts])
    _check_counts(plan, index=index, record=record)
    _remove_stale_files(job.output, keep={part.name for part in parts})
    _write_documents(job)
    packed_dataset.write_datasets_files(
        job.output, part_names=[part.name for part in parts], fingerprint=job.plan_key[:16]
    )
    save_index(index, job.output / packed_dataset.INDEX_NAME)
    manifest = _manifest(job, plan=plan, record=record, index=index, parts=tuple(parts))
    write_manifest(manifest, job.output)
    job.remove_work()
    return manifest


_STEPS = {Stage.TOKENIZE: _tokenize, Stage.PLAN: _plan, Stage.WRITE: _write, Stage.FINISH: _finish}


def _has_key(record: Path, *, key: str) -> bool:
    value = read_json(record)
    return value is not None and value.get("key") == key


def _planned(job: _Job) -> PackingPlan:
    if not _has_key(job.work / "plan.json", key=job.plan_key):
        raise DataError(f"{job.output} has no packing plan for this recipe; run the stage plan first")
    return load_plan(job.work / "plan.npz")


@dataclass(frozen=True)
class _Part:
    """Samples `[first, stop)` of the plan, in one file."""

    name: str
    first: int
    stop: int


def _parts(plan: PackingPlan) -> list[_Part]:
    """How samples are divided over files; the plan alone decides it, so every task agrees."""
    per_part = max(1, min(SAMPLES_PER_PART, PART_BYTES // (packed_dataset.TOKEN_BYTES * plan.seq_len)))
    firsts = range(0, plan.samples, per_part)
    return [
        _Part(f"data-{number:05d}-of-{len(firsts):05d}.arrow", first, min(first + per_part, plan.samples))
        for number, first in enumerate(firsts)
    ]


def _contents(plan: PackingPlan, *, reader: TokenReader, part: _Part) -> Iterator[SampleContent]:
    """The samples of a part, one in memory at a time."""
    for sample in range(part.first, part.stop):
        document, start, stop = plan.pieces(sample)
        cu_seqlens = np.concatenate([[0], np.cumsum(stop - start)])
        input_ids = np.zeros(plan.seq_len, np.uint32)
        for row in range(len(document)):
            reader.read_into(
                input_ids[cu_seqlens[row] : cu_seqlens[row + 1]], document=int(document[row]), start=int(start[row])
            )
        yield SampleContent(input_ids, cu_seqlens.astype(np.int32), document)


def _report_written(job: _Job, *, plan: PackingPlan, part: _Part) -> None:
    if job.progress:
        pieces = int(plan.sample_offsets[part.stop])
        sample_bytes = packed_dataset.TOKEN_BYTES * plan.seq_len
        tokens = int((plan.stop[:pieces] - plan.start[:pieces]).sum())
        job.progress(PackProgress("write", pieces, tokens, part.stop * sample_bytes, plan.samples * sample_bytes))


def _finished_part(job: _Job, *, part: _Part) -> PartFile:
    record = read_json(job.work / f"{part.name}.json")
    path = job.output / part.name
    if record is None or record["key"] != job.plan_key or not path.exists():
        raise DataError(f"{path} is not written yet; run the stage write first")
    if path.stat().st_size != record["size_bytes"]:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, and {record['size_bytes']} were written; delete it, "
            f"and {job.work / part.name}.json, and run the stage write again"
        )
    return PartFile(part.name, part.stop - part.first, record["size_bytes"])


def _check_counts(plan: PackingPlan, *, index: SampleIndex, record: TokenRecord) -> None:
    """Tokens in = tokens out + declared drops, or no data set."""
    written = int(index.n_tokens.sum())
    if record.tokens != written + plan.tokens_dropped or len(index.part) != plan.samples:
        raise DataError(
            f"{record.tokens} tokens went in, {written} came out and {plan.tokens_dropped} were dropped, and these "
            f"must agree ({len(index.part)} of {plan.samples} samples); delete the output folder and pack again"
        )


def _remove_stale_files(output: Path, *, keep: set[str]) -> None:
    """Part files of an earlier, unfinished packing with another length, and temporary files of a killed one."""
    for path in output.iterdir():
        stale = PART_NAME.fullmatch(path.name) and path.name not in keep
        if stale or (path.name.startswith(".") and path.name.endswith(".tmp")):
            rmtree(path) if path.is_dir() else path.unlink()


def _write_documents(job: _Job) -> None:
    """The documents of all token parts as one table; its row numbers are the data set's document ids."""
    with (
        replaced(job.output / packed_dataset.DOCUMENTS_NAME) as path,
        pa.ipc.new_stream(str(path), DOCUMENT_SCHEMA) as stream,
    ):
        for part in job.token_parts:
            stream.write_table(read_document_rows(part.documents_path))


def _manifest(
    job: _Job, *, plan: PackingPlan, record: TokenRecord, index: SampleIndex, parts: tuple[PartFile, ...]
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        seq_len=plan.seq_len,
        samples=plan.samples,
        texts=record.texts,
        texts_without_tokens=record.texts_without_tokens,
        files_skipped=record.files_skipped,
        documents=plan.documents,
        tokens_in=plan.tokens_in,
        tokens_dropped=plan.tokens_dropped,
        tokens=plan.tokens,
        valid_tokens=int(index.n_valid.sum()),
        documents_cut=plan.documents_cut,
        unfilled_fraction=plan.unfilled_fraction,
        vocab_size=record.vocab_size,
        max_token_id=record.max_token_id,
        tokenizer_hash=record.tokenizer_hash,
        inputs=job.inputs,
        versions={"python": platform.python_version()} | {name: version(name) for name in VERSIONED},
        parts=parts,
        index_sha256=file_digest(job.output / packed_dataset.INDEX_NAME),
        complete=True,
    )
