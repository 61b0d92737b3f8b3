"""Many tasks, one data set: the bytes do not depend on how many there are, when they die, or how they write."""

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import lock, sources, write
from pipeline.data.amounts import copies_of
from pipeline.data.batch import batch_of
from pipeline.data.direct_file import DirectFile, aligned_tokens
from pipeline.data.job import PackJob, Task
from pipeline.data.lock import shared_by_job
from pipeline.data.loss_runs import whole
from pipeline.data.order import LikeCosts, by_cost
from pipeline.data.pack import pack, task_of
from pipeline.data.packed_dataset import SLICE_TOKENS, PackedDataset, SampleContent, write_part
from pipeline.data.packing import seeded_order
from pipeline.direct_io import PAGE
from pipeline.errors import DataError
from pipeline.recipe.schema import JsonlSource, LengthWeight, Recipe
from tests.unit.data_support import (
    corpus_recipe,
    files_of,
    number_tokenizer,
    numbered_documents,
    packed,
    recipe_of,
    write_corpus,
)

LENGTHS = [3, 25, 8, 1, 14, 9, 40, 6, 2, 11] * 4


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of many token parts and part files."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 200)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(write, "PART_BYTES", 16 * 4 * 4)
    return corpus_recipe(tmp_path / "in", numbered_documents(LENGTHS), seq_len=16)


def in_tasks(recipe: Recipe, output: Path, *, counts: tuple[int, int], backwards: bool = False) -> None:
    """Packs with so many tasks to tokenize and to write."""
    for stage, count in zip(("tokenize", "plan", "write"), (counts[0], 1, counts[1]), strict=True):
        tasks = range(count)
        for index in reversed(tasks) if backwards else tasks:
            pack(recipe, output, stage=stage, task=Task(index, count))


@pytest.mark.parametrize(("counts", "backwards"), [((1, 1), False), ((3, 2), True), ((2, 5), False), ((40, 40), True)])
def test_any_number_of_tasks_makes_the_same_bytes_and_the_last_one_finishes(
    recipe: Recipe, tmp_path: Path, counts: tuple[int, int], backwards: bool
) -> None:
    manifest = pack(recipe, tmp_path / "one")
    assert len(manifest.contents) > 4
    assert len(manifest.parts) > 4
    in_tasks(recipe, tmp_path / "many", counts=counts, backwards=backwards)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


@pytest.mark.parametrize("count", [4, 40])
def test_tasks_at_the_same_time_make_the_same_bytes_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Some tasks have no part to write, and come when the last one is finishing."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60)
    pack(recipe, tmp_path / "one")
    with ThreadPoolExecutor(8) as threads:
        for stage, tasks in (("tokenize", count), ("plan", 1), ("write", count)):
            list(
                threads.map(
                    lambda i, s=stage, n=tasks: pack(recipe, tmp_path / "many", stage=s, task=Task(i, n)), range(tasks)
                )
            )
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_a_folder_that_another_task_has_just_taken_is_ours_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first task makes the work folder between our two looks."""
    output, listing = tmp_path / "out", Path.iterdir
    job = PackJob.of(recipe, output=output)

    def another_comes_first(folder: Path) -> Iterator[Path]:
        if folder == output:
            job.work.mkdir()
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", another_comes_first)
    job.claim()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    counts=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    unit_bytes=st.integers(20, 400),
)
@settings(max_examples=4, deadline=None)
def test_random_corpora_are_packed_alike_by_any_number_of_tasks(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], counts: tuple[int, int], unit_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", unit_bytes)
        patch.setattr(write, "PART_BYTES", 200)
        recipe = corpus_recipe(folder / "in", numbered_documents(lengths), seq_len=16)
        pack(recipe, folder / "one")
        in_tasks(recipe, folder / "many", counts=counts)
    assert files_of(folder / "many") == files_of(folder / "one")


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "a/b", "1/0", "1/4/2"])
def test_a_task_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match=r"must be I/N with I from 0 to N - 1; write e.g. 0/4"):
        task_of(text)
    assert task_of("3/4") == Task(3, 4)


def test_plan_and_finish_are_not_divided(recipe: Recipe, tmp_path: Path) -> None:
    for stage in ("plan", "finish", "all"):
        with pytest.raises(DataError, match=rf"stage {stage} is one task, not 2; only tokenize and write are divided"):
            pack(recipe, tmp_path / "out", stage=stage, task=Task(0, 2))


PACKING = """
import sys
from pathlib import Path
from pipeline.data import packed_dataset, sources, write
from pipeline.data.pack import pack
from tests.unit.data_support import corpus_recipe, numbered_documents
sources.UNIT_BYTES, write.PART_BYTES = 200, 16 * 4 * 4
folder = Path(sys.argv[1])
print("ready", flush=True)
corpus = numbered_documents([3, 25, 8, 1, 14, 9, 40, 6, 2, 11] * 4)
pack(corpus_recipe(folder / "in", corpus, seq_len=16), folder / "out")
"""


def test_a_process_killed_at_any_moment_and_run_again_makes_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    pack(recipe, tmp_path / "whole")
    unfinished = 0
    for delay in (0.0, 0.2, 0.5, 1.0):
        process = subprocess.Popen(
            [sys.executable, "-c", PACKING, str(tmp_path)],
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        unfinished += not (tmp_path / "out" / "manifest.json").exists()
    pack(recipe, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert unfinished > 0


def test_two_packers_on_one_folder_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    pack(recipe, tmp_path / "out", stage="tokenize")
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seed": 1})})
    work = tmp_path / "out" / ".alst-pack"
    with shared_by_job(work, key="of another recipe", alone=False):
        for asked, stage in ((recipe, "all"), (recipe, "plan"), (other, "plan")):
            with pytest.raises(DataError, match=r"out is being packed by another process; wait for it"):
                pack(asked, tmp_path / "out", stage=stage)
    with shared_by_job(work, key="alone", alone=True), pytest.raises(DataError, match=r"by another process"):
        pack(recipe, tmp_path / "out", stage="write", task=Task(0, 2))
    pack(recipe, tmp_path / "out")  # locks end with who holds them


def test_the_same_task_twice_at_once_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data import pack as module

    def again(*_: Any, **__: Any) -> None:
        pack(recipe, tmp_path / "out", stage="tokenize", task=Task(0, 2))

    monkeypatch.setattr(module, "tokenize", again)
    with pytest.raises(DataError, match=r"by another process"):
        pack(recipe, tmp_path / "out", stage="tokenize", task=Task(0, 2))


def test_tokens_are_kept_for_another_length_but_not_for_edited_files(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data import pack as module

    done: list[int] = []
    tokenize = module.tokenize
    monkeypatch.setattr(module, "tokenize", lambda unit, **kw: (done.append(unit.begin), tokenize(unit, **kw)))
    pack(recipe, tmp_path / "out", stage="tokenize")
    parts = len(done)
    longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": 32})})
    pack(longer, tmp_path / "out", stage="tokenize")
    path = Path(recipe.data.sources[0].path)
    path.write_text(path.read_text())  # newer, but the same
    pack(longer, tmp_path / "out", stage="tokenize")
    assert len(done) == parts > 4
    path.write_text(path.read_text().replace('"1 2 3"', '"1 2 4"'))  # as long as before
    with pytest.raises(DataError, match=r"lacks the tokens of 1 of \d+ parts"):
        pack(longer, tmp_path / "out", stage="plan")
    pack(longer, tmp_path / "out", stage="tokenize")
    assert len(done) == parts + 1


def test_a_source_edited_after_packing_is_seen_though_its_size_is_the_same(recipe: Recipe, tmp_path: Path) -> None:
    pack(recipe, tmp_path / "out")
    path = Path(recipe.data.sources[0].path)
    path.write_text(path.read_text())
    pack(recipe, tmp_path / "out")
    path.write_text(path.read_text().replace('"1 2 3"', '"1 2 4"'))
    with pytest.raises(DataError, match=r"other inputs .*corpus.jsonl has changed since"):
        pack(recipe, tmp_path / "out")


def test_a_part_cut_off_between_tasks_is_not_finished(recipe: Recipe, tmp_path: Path) -> None:
    for stage in ("tokenize", "plan"):
        pack(recipe, tmp_path / "out", stage=stage)
    pack(recipe, tmp_path / "out", stage="write", task=Task(0, 2))
    part = min((tmp_path / "out").glob("data-*.arrow"))
    os.truncate(part, part.stat().st_size - 8)
    with pytest.raises(DataError, match=rf"{part.name} has \d+ bytes, and \d+ were written; delete it, and run"):
        pack(recipe, tmp_path / "out", stage="write", task=Task(1, 2))
    part.unlink()
    pack(recipe, tmp_path / "out")


def test_tokens_cut_off_between_tasks_are_an_error(recipe: Recipe, tmp_path: Path) -> None:
    for stage in ("tokenize", "plan"):
        pack(recipe, tmp_path / "out", stage=stage)
    part = max((tmp_path / "out" / ".alst-pack").glob("*.u32"))
    os.truncate(part, 8)
    with pytest.raises(DataError, match=rf"{part.name} ends at byte 8"):
        pack(recipe, tmp_path / "out", stage="write")
    assert not (tmp_path / "out" / "manifest.json").exists()


# How much of what


def test_weights_and_budgets_decide_how_often_documents_are_taken(tmp_path: Path) -> None:
    tokenizer = number_tokenizer(tmp_path / "numbers")
    path, numbers = write_corpus(tmp_path / "c.jsonl", numbered_documents([10] * 20)), iter(range(9))

    def taken(**settings: Any) -> Counter[int]:
        source = JsonlSource.model_validate({"type": "jsonl", "path": str(path), **settings.pop("source", {})})
        output = tmp_path / str(next(numbers))
        manifest = pack(recipe_of([source], tokenizer=tokenizer, seq_len=32, **settings), output)
        dataset = PackedDataset.open(output)
        found = [dataset.read_tokens(s, 0, dataset.sample(s).n_tokens).tolist() for s in range(dataset.samples)]
        assert manifest.tokens_in == manifest.tokens == sum(map(len, found))
        assert manifest.tokens_read == 200
        return Counter(token for sample in found for token in sample)

    assert set(taken(source={"weight": 3}).values()) == {3}
    assert len(taken(source={"weight": 0.5})) == 100
    assert sorted(Counter(taken(source={"weight": 1.25}).values()).items()) == [(1, 150), (2, 50)]
    assert len(taken(source={"tokens": 74})) == 70
    assert len(taken(source={"tokens": 76})) == 80
    assert sum(taken(source={"tokens": 450}).values()) == 450


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    weight=st.floats(0.01, 4),
    short=st.floats(0, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_copies_add_up_to_what_weights_say(lengths: list[int], weight: float, short: float, seed: int) -> None:
    copies = copies_of(
        np.array(lengths),
        np.zeros(len(lengths), np.int32),
        sources=[JsonlSource(type="jsonl", path="a", weight=weight)],
        length_weights=[LengthWeight(to_tokens=20, weight=short)],
        seed=seed,
    )
    expected = [weight * (short if length < 20 else 1.0) for length in lengths]
    assert abs(copies.sum() - sum(expected)) <= 0.5 + 1e-6
    assert all(abs(copy - share) < 1 + 1e-6 for copy, share in zip(copies, expected, strict=True))


def test_a_budget_too_small_for_the_first_document_is_an_error() -> None:
    source = JsonlSource(type="jsonl", path="a.jsonl", tokens=10)
    with pytest.raises(DataError, match=r"a.jsonl: its first document has 100 tokens, and tokens: 10 leaves no room"):
        copies_of(np.array([100]), np.zeros(1, np.int32), sources=[source], length_weights=[], seed=0)


def test_filters_and_the_unfilled_sample_are_declared(tmp_path: Path) -> None:
    corpus = numbered_documents([3, 30, 12, 12, 5])
    settings = {"shortest_document_tokens": 4, "longest_document_tokens": 20, "unfilled_last": "drop"}
    recipe = corpus_recipe(tmp_path, corpus, seq_len=12, **settings)
    manifest = pack(recipe, tmp_path / "out")
    assert manifest.dropped == {"documents_too_short": 3, "documents_too_long": 30, "unfilled_last_sample": 5}
    assert (manifest.tokens_in, manifest.tokens, manifest.tokens_dropped, manifest.samples) == (62, 24, 38, 2)


def test_a_separator_ends_every_text_and_its_last_token_predicts_it(tmp_path: Path) -> None:
    corpus = numbered_documents([4, 6])
    plain = pack(corpus_recipe(tmp_path / "a", corpus, seq_len=16), tmp_path / "a" / "out")
    ended = pack(corpus_recipe(tmp_path / "a", corpus, seq_len=16, separator="4999"), tmp_path / "b")
    assert (ended.tokens, ended.valid_tokens) == (plain.tokens + 2, plain.valid_tokens + 2)
    dataset = PackedDataset.open(tmp_path / "b")
    ends = dataset.sample(0).cu_seqlens[1:] - 1
    assert dataset.read_tokens(0, 0, 16)[ends].tolist() == [4999, 4999]
    with pytest.raises(DataError, match=r"separator '<eos>' is no token of the tokenizer; set data.separator"):
        pack(corpus_recipe(tmp_path / "a", corpus, seq_len=16, separator="<eos>"), tmp_path / "c")


# Bytes


@given(sizes=st.lists(st.integers(0, 3 * PAGE) | st.just(2 << 20), max_size=8), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_direct_file_holds_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: Any
) -> None:
    path, expected = tmp_path_factory.mktemp("direct") / "file", b""
    with DirectFile(path) as file:
        for number, size in enumerate(sizes):
            aligned = aligned_tokens(size // 4 + 1).view(np.uint8)[data.draw(st.sampled_from([0, 4])) :][:size]
            aligned[:] = number + 1
            file.write(aligned)
            expected += aligned.tobytes()
            assert file.position == len(expected)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("where", ["open", "pwrite"])
def test_without_direct_io_the_same_bytes_are_written_with_one_warning(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    pack(recipe, tmp_path / "direct")
    call = getattr(os, where)

    def refusing(first: Any, second: Any, *rest: Any, **named: Any) -> Any:
        import fcntl

        asked = second if where == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if asked & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(first, second, *rest, **named)

    monkeypatch.setattr(os, where, refusing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        pack(recipe, tmp_path / "buffered")
    assert [str(warning.message).partition("; ")[0] for warning in caught] == [
        f"the file system of {tmp_path / 'buffered'} has no direct I/O"
    ]
    assert files_of(tmp_path / "buffered") == files_of(tmp_path / "direct")


def test_a_disk_that_fills_up_while_writing_is_an_error_and_goes_on_where_it_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(recipe, tmp_path / "whole")
    written, pwrite = 0, os.pwrite

    def filling(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += 1
        if written == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(DataError, match=r"No space left on device .*data-0000\d.*make room"):
        pack(recipe, tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert not (tmp_path / "out" / "manifest.json").exists()
    pack(recipe, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_tokens_begin_at_a_page_of_the_file_and_are_written_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, sizes, pwrite = 40_001, [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: sizes.append(len(data)) or pwrite(fd, data, at))
    tokens = aligned_tokens(length)
    tokens[:] = np.arange(length)
    sample = SampleContent(tokens, np.array([0, length], np.int32), np.zeros(1, np.int64), whole(length), length - 1)
    index = write_part(tmp_path / "part.arrow", samples=[sample] * 3).index
    assert (index.payload_offset % PAGE == 0).all()
    assert sizes.count(4 * length // PAGE * PAGE) == 3


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read from now on."""
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: asked.append(sum(map(len, into))) or preadv(fd, into, at))
    return asked


@pytest.fixture(scope="module")
def long_sample(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    """One sample, whose eighths are shards of 40,960 tokens and one."""
    folder, tokens = tmp_path_factory.mktemp("long"), np.arange(8 * 40_961) % 5000
    (folder / "a.jsonl").write_text(f'{{"ids": {tokens.tolist()}}}\n')
    source = {"type": "jsonl", "path": str(folder / "a.jsonl"), "columns": {"input_ids": "ids"}}
    pack(recipe_of([JsonlSource.model_validate(source)], tokenizer=None, seq_len=len(tokens)), folder / "out")
    return PackedDataset.open(folder / "out")


@pytest.mark.parametrize("sp", [1, 2, 4, 8])
def test_a_verified_shard_reads_at_most_five_percent_more_than_its_bytes(
    long_sample: PackedDataset, monkeypatch: pytest.MonkeyPatch, sp: int
) -> None:
    asked = bytes_read(monkeypatch)
    for rank in range(sp):
        asked.clear()
        batch_of(long_sample, 0, sp_rank=rank, sp=sp)
        assert sum(asked) <= 1.05 * 4 * long_sample.seq_len / sp


def disk_bytes() -> int:
    """That this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_shard_read_cold_has_the_disk_read_at_most_five_percent_more(long_sample: PackedDataset, rank: int) -> None:
    batch_of(long_sample, 0, sp_rank=rank, sp=8)  # the checksums, a page of another file, are in memory from now on
    part = os.open(long_sample.folder / long_sample.manifest.parts[0].name, os.O_RDONLY)
    os.fsync(part)
    os.posix_fadvise(part, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(part)
    before = disk_bytes()
    batch_of(long_sample, 0, sp_rank=rank, sp=8)
    if (read := disk_bytes() - before) == 0:
        pytest.skip("this file system keeps everything in memory")
    assert 4 * 40_961 <= read <= 1.05 * 4 * 40_961


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [700, 90, 2000, 5], seq_len=1500)
    part = dataset.folder / dataset.manifest.parts[0].name
    whole_file = part.read_bytes()
    for at in range(0, len(whole_file), 257):
        damaged = bytearray(whole_file)
        damaged[at] ^= 1 << at % 8
        part.write_bytes(damaged)
        with pytest.raises(DataError, match=r"not what was written.* in files data-00000-of-00001.arrow"):
            dataset.verify()
    part.write_bytes(whole_file)
    dataset.verify()
    sums = dataset.folder / "checksums.u64"
    sums.write_bytes(bytes([sums.read_bytes()[0] ^ 1]) + sums.read_bytes()[1:])
    with pytest.raises(DataError, match=r"sample 0 .*is not what was written.*copy the file again"):
        dataset.read_tokens(0, 0, 10, verify=True)


def test_verification_reads_the_damaged_slice_and_can_be_switched_off(tmp_path: Path) -> None:
    dataset = packed(tmp_path, [3000], seq_len=3000)
    part = dataset.folder / dataset.manifest.parts[0].name
    damaged = bytearray(part.read_bytes())
    damaged[int(dataset.index.payload_offset[0]) + 4 * 2050] ^= 1
    part.write_bytes(damaged)
    dataset.read_tokens(0, 0, 2 * SLICE_TOKENS, verify=True)
    with pytest.raises(DataError, match=r"sample 0 in .*the slices from byte"):
        dataset.read_tokens(0, 2 * SLICE_TOKENS - 1, 2 * SLICE_TOKENS + 1, verify=True)
    assert dataset.read_tokens(0, 2050, 2051)[0] != 2051


# Order


@given(samples=st.integers(1, 60), per_step=st.integers(1, 8), epoch=st.integers(0, 4), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_by_cost_every_sample_comes_once_and_whole_steps_are_neighbours(
    samples: int, per_step: int, epoch: int, seed: int
) -> None:
    costs = np.random.default_rng(seed).permutation(samples)
    shuffled = seeded_order(samples, seed=seed, stream=epoch)
    order = by_cost(shuffled, LikeCosts(costs, per_step), seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(samples))
    first = -epoch * samples % per_step
    steps = [order[at : at + per_step] for at in range(first, samples - per_step + 1, per_step)]
    assert all((np.diff(costs[step]) > 0).all() for step in steps)
    spans = sorted((costs[step].min(), costs[step].max()) for step in steps)
    assert all(before[1] < after[0] for before, after in pairwise(spans))


def test_by_cost_makes_steps_even_and_epochs_differ() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(0, 1.0, 800))
    like = LikeCosts((lengths * 1e6).astype(np.int64), 8)

    def efficiency(order: np.ndarray) -> float:
        steps = like.costs[order].reshape(-1, 8)
        return float(steps.mean() / steps.max(axis=1).mean())

    random = seeded_order(800, seed=0)
    evened = [by_cost(random, like, seed=0, epoch=epoch) for epoch in range(2)]
    assert efficiency(random) < 0.5 < 0.85 < efficiency(evened[0])
    assert evened[0].tolist() != evened[1].tolist()
