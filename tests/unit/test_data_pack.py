"""Packing as a whole: killed anywhere and run again it ends in the same bytes, and it overwrites nothing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import pack as module
from pipeline.data import write
from pipeline.data.pack import pack
from pipeline.data.packed_dataset import PackedDataset
from pipeline.data.progress import PackProgress
from pipeline.errors import DataError
from pipeline.recipe.schema import Recipe, TextSource, TrainTokenizer
from tests.unit.data_support import corpus_recipe, files_of, numbered_documents, recipe_of

LENGTHS = [3, 25, 8, 1, 14, 9, 40, 6, 2, 11] * 2
STAGES = ("tokenize", "plan", "write", "finish")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return corpus_recipe(tmp_path / "in", numbered_documents(LENGTHS), seq_len=16)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=25), seq_len=st.integers(2, 24), seed=st.integers(0, 99)
)
@settings(max_examples=15, deadline=None)
def test_every_token_is_packed_exactly_once_and_in_order_within_its_document(
    lengths: list[int], seq_len: int, seed: int
) -> None:
    corpus = numbered_documents(lengths)
    with tempfile.TemporaryDirectory() as folder:
        recipe = corpus_recipe(Path(folder), corpus, seq_len=seq_len, seed=seed)
        manifest = pack(recipe, Path(folder) / "out")
        dataset = PackedDataset.open(Path(folder) / "out")
        pieces = []
        for index in range(dataset.samples):
            ends = dataset.sample(index).cu_seqlens.tolist()
            tokens = dataset.read_tokens(index, 0, seq_len).tolist()
            assert not any(tokens[ends[-1] :])
            pieces += [tokens[start:stop] for start, stop in pairwise(ends)]
    # Tokens number the corpus from 1 on: sorted by their first token, the pieces must be the corpus again.
    assert list(chain(*sorted(pieces))) == list(chain(*corpus))
    starts = {document[0] for document in corpus}
    assert all(not starts & set(piece[1:]) for piece in pieces)
    assert manifest.tokens == manifest.tokens_in == sum(lengths)
    assert manifest.valid_tokens == sum(lengths) - len(pieces)


def test_a_trained_tokenizer_packs_text_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from data_support import recipe_of\n"
        "from pipeline.recipe.schema import *; from pipeline.data.pack import pack\n"
        "from pipeline.data.inspect import describe\n"
        "source = TextSource(type='text', path='python:stdlib', glob='json/*.py', max_document_tokens=500)\n"
        "recipe = recipe_of([source], tokenizer=TrainTokenizer(vocab_size=400, sample_mib=1.0), seq_len=1024)\n"
        "pack(recipe, Path(sys.argv[1])); describe(Path(sys.argv[1]))\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folders},
    )  # fmt: skip
    assert out.stdout.strip() == "[]", out.stderr
    source = TextSource(type="text", path="python:stdlib", glob="json/*.py", max_document_tokens=500)
    recipe = recipe_of([source], tokenizer=TrainTokenizer(vocab_size=400, sample_mib=1.0), seq_len=1024)
    pack(recipe, tmp_path / "again")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_the_same_inputs_give_the_same_bytes_and_another_seed_others(recipe: Recipe, tmp_path: Path) -> None:
    pack(recipe, tmp_path / "a")
    pack(recipe, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    pack(recipe.model_copy(update={"data": recipe.data.model_copy(update={"seed": 1})}), tmp_path / "c")
    assert files_of(tmp_path / "a")["index.npz"] != files_of(tmp_path / "c")["index.npz"]


def test_stages_run_one_by_one_make_what_all_makes(recipe: Recipe, tmp_path: Path) -> None:
    pack(recipe, tmp_path / "a")
    assert [pack(recipe, tmp_path / "b", stage=stage) is None for stage in STAGES] == [True, True, False, False]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not (tmp_path / "b" / ".alst-pack").exists()


def staged(recipe: Recipe, output: Path) -> None:
    """Packs all but the last stage: as if the task that would finish were killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "finish", lambda _: None)
        for stage in STAGES[:3]:
            pack(recipe, output, stage=stage)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, *, number: int) -> None:
    """The process dies just before its `number`-th file is renamed into place."""
    replace, count = Path.replace, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    # A killed process removes nothing behind it, and the next one has another id.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **kw: None if self.suffix == ".tmp" else unlink(self, **kw))


def test_killed_before_any_file_and_run_again_it_makes_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    pack(recipe, tmp_path / "whole")
    whole, kills = files_of(tmp_path / "whole"), 0
    for number in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            kill_at_rename(patch, number=number)
            try:
                pack(recipe, tmp_path / "killed")
            except Killed:
                kills += 1
                with pytest.raises(DataError, match=r"has not finished"):
                    PackedDataset.open(tmp_path / "killed")
            else:
                break
        pack(recipe, tmp_path / "killed")
        assert files_of(tmp_path / "killed") == whole
        shutil.rmtree(tmp_path / "killed")
    assert kills >= 10


def test_killed_while_another_recipe_takes_its_place_the_first_is_not_mixed_with_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    source = recipe.data.sources[0].model_copy(update={"max_document_tokens": 9})
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": (source,), "seed": 1})})
    pack(recipe, tmp_path / "whole")
    staged(recipe, tmp_path / "staged")
    for number in range(1, 14):
        shutil.copytree(tmp_path / "staged", tmp_path / "out")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at_rename(patch, number=number)
            pack(other, tmp_path / "out")
        pack(recipe, tmp_path / "out")
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_finished_stage_is_not_done_again(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(recipe, tmp_path / "out")
    for place, name in ((module, "tokenize"), (module, "plan_packing"), (write, "write_part")):
        monkeypatch.setattr(place, name, None)  # calling it is an error
    pack(recipe, tmp_path / "out")
    monkeypatch.setattr(module, "finish", None)
    assert pack(recipe, tmp_path / "out") == PackedDataset.open(tmp_path / "out").manifest


def test_an_unfinished_packing_of_another_recipe_is_made_anew_and_leaves_nothing_behind(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": 2})})
    monkeypatch.setattr(write, "PART_BYTES", 64 * 8)
    staged(shorter, tmp_path / "a")
    assert len(list((tmp_path / "a").glob("data-*.arrow"))) == 2
    pack(recipe, tmp_path / "a")
    pack(recipe, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize(("stage", "before"), [("plan", "tokenize"), ("write", "plan"), ("finish", "plan")])
def test_a_stage_without_its_predecessor_is_an_error_that_names_it(
    recipe: Recipe, tmp_path: Path, stage: str, before: str
) -> None:
    with pytest.raises(DataError, match=f"run the stage {before} first"):
        pack(recipe, tmp_path / "out", stage=stage)


def test_finish_before_write_and_an_unknown_stage_are_errors(recipe: Recipe, tmp_path: Path) -> None:
    for stage in STAGES[:2]:
        pack(recipe, tmp_path / "out", stage=stage)
    with pytest.raises(DataError, match=r"run the stage write first"):
        pack(recipe, tmp_path / "out", stage="finish")
    with pytest.raises(DataError, match=r"stage 'wirte' is not known; use one of tokenize, plan, write, finish, all"):
        pack(recipe, tmp_path / "out", stage="wirte")


@pytest.mark.parametrize("change", [{"seq_len": 32}, {"seed": 1}])
def test_a_complete_data_set_of_other_inputs_is_never_overwritten(
    recipe: Recipe, tmp_path: Path, change: dict[str, int]
) -> None:
    pack(recipe, tmp_path / "out")
    before = files_of(tmp_path / "out")
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update=change)})
    (key, value) = next(iter(change.items()))
    with pytest.raises(DataError, match=rf"other inputs \({key} \d+, asked for {value}\); .*--output, or delete"):
        pack(other, tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_changed_sources_are_other_inputs(recipe: Recipe, tmp_path: Path) -> None:
    pack(recipe, tmp_path / "out")
    source = Path(recipe.data.sources[0].path)
    source.write_text(source.read_text() + '{"text": "1"}\n')
    with pytest.raises(DataError, match=r"other inputs .sources"):
        pack(recipe, tmp_path / "out")


def test_a_folder_with_other_files_is_not_touched(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"is not empty and holds no packed data set; choose another --output"):
        pack(recipe, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_output_that_cannot_be_made_is_an_error_without_traceback(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the packed data set .*Not a directory.*choose another --output"):
        pack(recipe, tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_write_permission_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"Permission denied.*choose another --output"):
        pack(recipe, tmp_path / "locked" / "out")


def test_a_disk_that_fills_up_is_an_error_and_leaves_no_data_set(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "data-00000")

    monkeypatch.setattr(write, "save_index", full)
    with pytest.raises(DataError, match=r"No space left on device .data-00000.; .*make room"):
        pack(recipe, tmp_path / "out")
    with pytest.raises(DataError, match=r"has not finished"):
        PackedDataset.open(tmp_path / "out")


def test_tokens_outside_the_models_vocabulary_are_an_error_also_for_a_data_set_that_is_there(tmp_path: Path) -> None:
    corpus = numbered_documents([5, 5])
    small = corpus_recipe(tmp_path / "in", corpus, seq_len=8, vocab_size=10)
    enough = corpus_recipe(tmp_path / "in", corpus, seq_len=8, vocab_size=11)
    with pytest.raises(DataError, match=r"token id 10 in corpus.jsonl:2 is outside the vocabulary of 10"):
        pack(small, tmp_path / "out")
    pack(enough, tmp_path / "out")
    with pytest.raises(DataError, match=r"token id 10 .*outside the model's vocabulary of 10"):
        pack(small, tmp_path / "out")


def test_no_data_set_when_tokens_in_are_not_tokens_out(recipe: Recipe, tmp_path: Path) -> None:
    staged(recipe, tmp_path / "out")
    record = tmp_path / "out" / ".alst-pack" / "tokens-00000-of-00001.json"
    value = json.loads(record.read_text())
    record.write_text(json.dumps(value | {"tokens": value["tokens"] + 1}))
    with pytest.raises(DataError, match=r"239 tokens were read and the plan is for 238"):
        pack(recipe, tmp_path / "out", stage="finish")
    with pytest.raises(DataError, match=r"has not finished"):
        PackedDataset.open(tmp_path / "out")


def test_progress_ends_at_all_tokens_in_both_long_stages(recipe: Recipe, tmp_path: Path) -> None:
    reports: list[PackProgress] = []
    pack(recipe, tmp_path / "out", progress=reports.append)
    last = {report.stage: report for report in reports}
    assert last["tokenize"].tokens == last["write"].tokens == sum(LENGTHS)
    assert last["write"].bytes_done == last["write"].bytes_total
