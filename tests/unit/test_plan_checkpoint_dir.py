"""A folder counts as a checkpoint only when it is whole; what is kept, what goes, and who may write."""

import json
import multiprocessing
import os
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import DataError, UserError
from pipeline.launch.resume import check_can_go_on, find_run, resumed_plan
from pipeline.plan import checkpoint_dir
from pipeline.plan.checkpoint_dir import Checkpoint, CheckpointRecord, SavedFile
from pipeline.plan.job import plan_job, read_plan
from pipeline.plan.resumable import check_resumable
from pipeline.plan.run_dir import RunDir, create_run_dir
from pipeline.recipe.load import load

CONTENT = b"weights"


def save(folder: Path, step: int, **changes) -> Checkpoint:
    path = folder / checkpoint_dir.folder_name(step)
    (path / "deepspeed").mkdir(parents=True)
    (path / "deepspeed" / "part.pt").write_bytes(CONTENT)
    record = CheckpointRecord(
        step=step,
        samples_seen=2 * step,
        world_size=2,
        dp=1,
        sp=2,
        zero_stage=3,
        packing_key="128-abc",
        sample_order="shuffled, 0 held out",
        commit="0123",
        saved_at=1.5,
        files=(SavedFile("deepspeed/part.pt", len(CONTENT), zlib.crc32(CONTENT)),),
    )
    record = replace(record, **changes)
    checkpoint_dir.write_record(path, record)
    return Checkpoint(path, record)


def steps(folder: Path) -> list[int]:
    return [checkpoint_dir.read_checkpoint(path).record.step for path in checkpoint_dir.step_folders(folder)]


def test_what_was_written_is_read_newest_first(tmp_path):
    saved = [save(tmp_path, step) for step in (9, 10, 1_000_000)]
    found = [checkpoint_dir.read_checkpoint(path) for path in checkpoint_dir.step_folders(tmp_path)]
    assert found == saved[::-1]
    assert found[0].record.size_bytes == len(CONTENT)


def test_without_a_folder_there_is_none(tmp_path):
    assert checkpoint_dir.step_folders(tmp_path / "none") == []
    assert checkpoint_dir.remove_unfinished(tmp_path / "none") == []


def test_only_whole_folders_count_and_the_rest_is_cleared_away(tmp_path):
    save(tmp_path, 2)
    for name in (checkpoint_dir.writing_name(Path("step-000003")), ".deleting-step-000001", ".universal-step-000002"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged-step-000001").mkdir()
    assert steps(tmp_path) == [2]
    assert len(checkpoint_dir.remove_unfinished(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-000001", "step-000002"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, None, [6]), (2, None, [6, 5]), (9, None, [6, 5, 4, 3, 2, 1]), (1, 2, [6, 4, 2]), (2, 3, [6, 5, 3])],
)
def test_pruning_keeps_the_newest_and_every_nth(tmp_path, keep_last, keep_every, left):
    for step in range(1, 7):
        save(tmp_path, step)
    gone = checkpoint_dir.prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert steps(tmp_path) == left
    assert len(gone) == 6 - len(left)
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_whole_checkpoint_has_no_damage(tmp_path):
    assert checkpoint_dir.damage(save(tmp_path, 1), checksums=True) is None


def test_damage_is_named(tmp_path):
    checkpoint = save(tmp_path, 1)
    part = checkpoint.path / "deepspeed" / "part.pt"
    part.write_bytes(b"wEights")
    assert checkpoint_dir.damage(checkpoint, checksums=False) is None
    assert "checksum differs" in checkpoint_dir.damage(checkpoint, checksums=True)
    part.write_bytes(b"weight")
    assert "has 6 bytes, not 7" in checkpoint_dir.damage(checkpoint, checksums=False)
    part.unlink()
    assert "is not there" in checkpoint_dir.damage(checkpoint, checksums=False)


def test_each_rank_looks_at_its_share_and_together_they_look_at_all(tmp_path):
    checkpoint = save(tmp_path, 1)
    names = [f"file{number}" for number in range(5)]
    for name in names:
        (checkpoint.path / name).write_bytes(CONTENT)
    files = tuple(SavedFile(name, len(CONTENT), zlib.crc32(CONTENT)) for name in names)
    checkpoint = replace(checkpoint, record=replace(checkpoint.record, files=files))
    for number, name in enumerate(names):
        (checkpoint.path / name).write_bytes(b"")
        found = [checkpoint_dir.damage(checkpoint, checksums=False, share=share, shares=2) for share in range(2)]
        assert name in found[number % 2]
        assert found[1 - number % 2] is None
        (checkpoint.path / name).write_bytes(CONTENT)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"record_version": 1}', '{"record_version": 1, "crc32": 0}', "null", "\x00"],
)
def test_a_record_that_is_not_whole_is_refused(tmp_path, text):
    checkpoint = save(tmp_path, 1)
    (checkpoint.path / checkpoint_dir.RECORD_NAME).write_text(text)
    with pytest.raises(DataError, match=r"checkpoint\.json"):
        checkpoint_dir.read_checkpoint(checkpoint.path)


@pytest.mark.parametrize(("field", "value"), [("samples_seen", 15), ("zero_stage", 2), ("step", 8)])
def test_a_flipped_bit_of_the_record_is_seen(tmp_path, field, value):
    file = save(tmp_path, 7).path / checkpoint_dir.RECORD_NAME
    raw = json.loads(file.read_text())
    assert raw[field] != value
    file.write_text(json.dumps(raw | {field: value}))
    with pytest.raises(DataError, match="is not what was written"):
        checkpoint_dir.read_checkpoint(file.parent)


def test_a_record_under_another_name_is_not_taken(tmp_path):
    path = save(tmp_path, 7).path
    with pytest.raises(DataError, match="is not what was written"):
        checkpoint_dir.read_checkpoint(path.rename(tmp_path / "step-000009"))


def test_another_version_is_no_damage(tmp_path):
    file = save(tmp_path, 7).path / checkpoint_dir.RECORD_NAME
    file.write_text(file.read_text().replace('"record_version": 1', '"record_version": 2'))
    with pytest.raises(UserError, match="go on with the code that wrote it") as refused:
        checkpoint_dir.read_checkpoint(file.parent)
    assert not isinstance(refused.value, DataError)


def test_damaged_ones_are_kept_under_names_of_their_own(tmp_path):
    for number in range(3):
        save(tmp_path, 7)
        aside = checkpoint_dir.set_aside(tmp_path / "step-000007")
        assert aside.is_dir()
        assert steps(tmp_path) == [], number
    assert len(list(tmp_path.iterdir())) == 3


# Going on with a run


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> RunDir:
    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    return create_run_dir(plan_job(load("tiny")))


def test_a_run_is_found_by_path_and_by_name(run_dir):
    assert find_run(str(run_dir.path), runs=Path("elsewhere")).path == run_dir.path
    assert find_run(run_dir.path.name, runs=run_dir.root).path == run_dir.path


def test_what_is_no_run_is_refused_with_those_that_are(run_dir):
    with pytest.raises(UserError, match=run_dir.path.name):
        find_run("tiny-typo", runs=run_dir.root)


def test_without_overrides_the_plan_is_the_one_in_the_folder(run_dir):
    assert resumed_plan(run_dir) == read_plan(run_dir.plan)


def test_steps_and_ranks_may_change(run_dir):
    plan = resumed_plan(run_dir, ["train.steps=40", "hardware.gpus_per_node=4", "parallel.sp=4"])
    assert (plan.recipe.train.steps, plan.world_size, plan.sp) == (40, 4, 4)
    assert plan.packing_key == read_plan(run_dir.plan).packing_key


@pytest.mark.parametrize(
    "override",
    [
        "model.config.num_hidden_layers=3",
        "model.config.vocab_size=9000",
        "model.config.rms_norm_eps=0.1",
        "model.config.rope_parameters={rope_type: linear, factor: 2.0, rope_theta: 10000.0}",
        "model.dtype=bfloat16",
    ],
)
def test_another_model_is_refused(run_dir, override):
    with pytest.raises(UserError, match="of another model"):
        resumed_plan(run_dir, [override])


@pytest.mark.parametrize("override", ["data.seed=1", "data.seq_len=65536", "evaluation.samples=3", "evaluation=null"])
def test_other_samples_are_refused(run_dir, override):
    with pytest.raises(UserError, match="place in the data"):
        resumed_plan(run_dir, [override])


def test_an_order_by_cost_needs_steps_of_as_many_samples(tmp_path, monkeypatch):
    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    run_dir = create_run_dir(plan_job(load("tiny", overrides=["data.order=by_cost", "train.grad_accumulation=2"])))
    same = resumed_plan(run_dir, ["parallel.sp=1", "train.grad_accumulation=1"])
    assert same.samples_per_step == 2
    with pytest.raises(UserError, match="2 a step"):
        resumed_plan(run_dir, ["train.grad_accumulation=1"])


@pytest.mark.parametrize("override", ["optimizer.name=sgd", "optimizer.weight_decay_on=all"])
def test_another_optimizer_is_refused(run_dir, override):
    with pytest.raises(UserError, match="of another optimizer"):
        resumed_plan(run_dir, [override])


def test_rates_and_decay_may_change(run_dir):
    assert resumed_plan(run_dir, ["optimizer.lr=1e-4", "optimizer.weight_decay=0.5"]).recipe.optimizer.lr == 1e-4


def of_plan(plan, **changes) -> dict:
    """What a checkpoint of this plan's job says of itself."""
    names = {"packing_key": plan.packing_key, "sample_order": plan.sample_order, "zero_stage": plan.recipe.zero.stage}
    return names | {"world_size": plan.world_size} | changes


def test_a_run_that_is_done_is_not_started_again(run_dir):
    plan = read_plan(run_dir.plan)
    check_can_go_on(plan, run_dir)
    steps = plan.recipe.train.steps
    whole = save(run_dir.checkpoints, steps - 1, **of_plan(plan))
    last = save(run_dir.checkpoints, steps, **of_plan(plan))
    with pytest.raises(UserError, match="all 20 steps are done"):
        check_can_go_on(plan, run_dir)
    with pytest.raises(UserError, match="all 5 steps are done"):
        check_can_go_on(resumed_plan(run_dir, ["train.steps=5"]), run_dir)
    check_can_go_on(resumed_plan(run_dir, ["train.steps=21"]), run_dir)
    (last.path / "deepspeed" / "part.pt").unlink()
    check_can_go_on(plan, run_dir)  # the last one is damaged: the step is done again
    assert whole.path.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"zero_stage": 0}, "was saved at zero.stage 0"),
        ({"zero_stage": 2}, "was saved at zero.stage 2"),
        ({"packing_key": "128-other"}, "was trained on packed data 128-other"),
        ({"sample_order": "shuffled, 1 held out"}, "1 held out"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_before_anything_changes(run_dir, changes, told):
    plan = read_plan(run_dir.plan)
    save(run_dir.checkpoints, 3, **of_plan(plan, **changes))
    with pytest.raises(UserError, match=told):
        check_can_go_on(plan, run_dir)


def test_sgd_is_resumed_on_as_many_ranks_only(tmp_path, monkeypatch):
    monkeypatch.setenv("ALST_RUNS", str(tmp_path))
    plan = plan_job(load("tiny", overrides=["optimizer.name=sgd"]))
    saved = save(tmp_path, 3, **of_plan(plan))
    check_resumable(saved, plan)
    with pytest.raises(UserError, match="moments of adamw only"):
        check_resumable(saved, plan_job(load("tiny", overrides=["optimizer.name=sgd", "hardware.gpus_per_node=1"])))


def _try_to_hold(path: Path, answers) -> None:
    try:
        RunDir(path).hold()
        answers.put("held")
    except UserError as error:
        answers.put(str(error))


def test_a_run_folder_is_held_by_one_process_until_it_ends(run_dir):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()

    def ask() -> str:
        process = context.Process(target=_try_to_hold, args=(run_dir.path, answers))
        process.start()
        answer = answers.get(timeout=60)
        process.join(60)
        return answer

    assert ask() == "held"
    assert ask() == "held", "the process before has ended"
    run_dir.check_free()
    run_dir.hold()
    assert f"process {os.getpid()} on " in ask()


def test_every_start_of_a_job_has_a_log_folder_of_its_own(run_dir):
    assert [run_dir.new_logs(job="train").name for _ in range(3)] == ["0", "1", "2"]
    assert run_dir.new_logs(job="pack").name == "0"
