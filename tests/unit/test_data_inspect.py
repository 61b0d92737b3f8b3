"""Inspection: the numbers are those of the data set, and damage shows."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data.inspect import beginnings, describe, print_beginnings, print_description
from pipeline.data.pack import pack
from pipeline.data.plots import plot_packed
from pipeline.errors import DataError
from pipeline.recipe.schema import JsonlSource
from tests.unit.data_support import packed, recipe_of

LENGTHS = [5, 30, 1, 12, 7, 16, 33, 2, 9, 4]


def test_the_description_counts_what_was_packed_and_is_json(tmp_path: Path) -> None:
    dataset = packed(tmp_path, LENGTHS, seq_len=16)
    found = json.loads(json.dumps(describe(dataset.folder)))
    total = sum(LENGTHS)
    assert found["documents"] == found["texts"] == 10
    assert found["tokens"] == found["tokens_in"] == total
    assert found["tokens_dropped"] == 0
    assert found["documents_cut"] == 2
    assert found["unfilled_fraction"] == pytest.approx(1 - total / (found["samples"] * 16))
    assert found["loss_fraction"] == pytest.approx((total - 13) / total)  # 30 is 2 pieces, 33 is 3
    assert [found[f"document_tokens_{what}"] for what in ("min", "mean", "median", "max")] == [1, 11.9, 8.0, 33]
    assert found["checksums_ok"] is True
    assert describe(dataset.folder, verify=False)["checksums_ok"] is None


def test_damage_shows_in_the_description_and_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = packed(tmp_path, LENGTHS, seq_len=16)
    part = dataset.folder / dataset.manifest.parts[0].name
    data = bytearray(part.read_bytes())
    data[int(dataset.index.payload_offset[2])] ^= 1
    part.write_bytes(data)
    found = describe(dataset.folder)
    assert (found["checksums_ok"], found["damaged_samples"]) == (False, [2])
    print_description(found, console=Console(width=120))
    assert "WRONG in samples [2] and files []" in capsys.readouterr().out


def test_the_table_shows_samples_fill_and_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = packed(tmp_path, LENGTHS, seq_len=16)
    print_description(describe(dataset.folder), console=Console(width=120))
    out = capsys.readouterr().out
    assert f"{dataset.samples} of 16 tokens" in out
    assert "119 of 119 in; 0 dropped" in out
    assert "all right" in out


def test_describing_a_folder_that_is_no_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a packed data set"):
        describe(tmp_path)


def test_the_beginnings_of_a_samples_documents_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = packed(tmp_path, LENGTHS, seq_len=16)
    for sample in range(dataset.samples):
        found = beginnings(dataset.folder, sample=sample)
        ends = dataset.sample(sample).cu_seqlens.tolist()
        tokens = dataset.read_tokens(sample, 0, 16).tolist()
        assert [row["start"] for row in found["documents"]] == ends[:-1]
        for row in found["documents"]:
            first, count = row["start"], row["tokens"]
            assert row["begins"] == " ".join(map(str, tokens[first : first + count]))
            assert row["name"] == f"corpus.jsonl:{row['document'] + 1}"
            assert sum(LENGTHS[: row["document"]]) < tokens[first] <= sum(LENGTHS[: row["document"] + 1])
    print_beginnings(found, console=Console(width=120))
    assert f"corpus.jsonl:{found['documents'][0]['document'] + 1}" in capsys.readouterr().out
    with pytest.raises(DataError, match=rf"sample {dataset.samples} is not in .*; it has samples 0 to"):
        beginnings(dataset.folder, sample=dataset.samples)


def test_tokens_without_a_tokenizer_are_shown_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"ids": [5, 6, 7]}')
    source = {"type": "jsonl", "path": str(tmp_path / "a.jsonl"), "columns": {"input_ids": "ids"}}
    pack(recipe_of([JsonlSource.model_validate(source)], tokenizer=None, seq_len=8), tmp_path / "out")
    assert beginnings(tmp_path / "out", sample=0)["documents"][0]["begins"] == "5 6 7"
    print_description(describe(tmp_path / "out"), console=Console(width=120))
    assert "none, the sources were tokenized already; largest id used 7" in capsys.readouterr().out


def test_damage_beside_the_tokens_shows_too(tmp_path: Path) -> None:
    dataset = packed(tmp_path, LENGTHS, seq_len=16)
    part = dataset.folder / dataset.manifest.parts[0].name
    data = bytearray(part.read_bytes())
    data[20] ^= 1
    part.write_bytes(data)
    found = describe(dataset.folder)
    assert (found["checksums_ok"], found["damaged_samples"]) == (False, [])
    assert found["damaged_parts"] == [part.name]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    dataset = packed(tmp_path, LENGTHS, seq_len=16)
    plot_packed(dataset.folder, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"plot .*plot.what cannot be written: .*name a .png"):
        plot_packed(dataset.folder, tmp_path / "plot.what")
