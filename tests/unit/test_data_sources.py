"""Sources: which documents there are, in which order, and what is said when there are none."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.source_documents import documents as documents_of
from pipeline.data.sources import fingerprint, resolve_source_path, units
from pipeline.errors import DataError
from pipeline.recipe.schema import JsonlSource, Source, TextSource


def text_source(path: Path | str, **settings: object) -> TextSource:
    return TextSource.model_validate({"type": "text", "path": str(path), **settings})


def jsonl_source(path: Path | str, **settings: object) -> JsonlSource:
    return JsonlSource.model_validate({"type": "jsonl", "path": str(path), **settings})


def documents(source: Source, **settings: Any) -> Iterator[Any]:
    """The documents of all units of a source."""
    return (document for unit in units([source]) for document in documents_of(unit, source=source, **settings))


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_folder_yields_its_matching_files_sorted_by_name(tmp_path: Path) -> None:
    write_tree(tmp_path, {"b.txt": "B", "a/z.txt": "Z", "a/b.txt": "AB", "c.md": "no"})
    found = [(document.name, document.text) for document in documents(text_source(tmp_path))]
    assert found == [("a/b.txt", "AB"), ("a/z.txt", "Z"), ("b.txt", "B")]


def test_excluded_names_are_passed_over_anywhere_in_the_path(tmp_path: Path) -> None:
    write_tree(tmp_path, {"keep.txt": "k", "x/skip/a.txt": "1", "skip/b.txt": "2", "y/skip": "3", "skipper.txt": "s"})
    found = [document.name for document in documents(text_source(tmp_path, glob="**/*", exclude=["skip"]))]
    assert found == ["keep.txt", "skipper.txt"]


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    write_tree(tmp_path, {"in/a.txt": "A", "out/secret.txt": "S"})
    (tmp_path / "in" / "file.txt").symlink_to(tmp_path / "out" / "secret.txt")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "out")
    for glob in ("**/*.txt", "*.txt"):
        assert [document.text for document in documents(text_source(tmp_path / "in", glob=glob))] == ["A"]
    with pytest.raises(DataError, match=r"no file with text"):
        list(documents(text_source(tmp_path / "in", glob="*/*.txt")))


def test_a_file_is_one_document_with_its_bytes_kept(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes("\r\n é\n".encode())
    assert [(d.name, d.text) for d in documents(text_source(path))] == [("one.txt", "\r\n é\n")]


def test_json_lines_yield_one_document_per_line_and_pass_over_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n\n{"body": ""}\n{"body": "y", "text": 1}')
    found = [(document.name, document.text) for document in documents(jsonl_source(path, columns={"text": "body"}))]
    assert found == [("a.jsonl:1", "x"), ("a.jsonl:3", ""), ("a.jsonl:4", "y")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{'text': 1}", "is not JSON"),
        (b'{"text": "cut', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"txt": "a"}', "has no column 'text' but .'txt'.; set data.sources"),
        (b'["text"]', "has no column 'text' but list"),
        (b'{"text": 7}', "has a int in column 'text'; it must be a string"),
        (b'{"text": null}', "has a NoneType"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "has half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"a.jsonl line 2 {says}"):
        list(documents(jsonl_source(path)))


@pytest.mark.parametrize("make", [text_source, jsonl_source])
def test_a_missing_or_empty_file_is_an_error_that_names_it(tmp_path: Path, make: type) -> None:
    with pytest.raises(DataError, match=r"nowhere.txt does not exist; set data.sources"):
        list(documents(make(tmp_path / "nowhere.txt")))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty.txt is empty; .*name another file"):
        list(documents(make(tmp_path / "empty.txt")))


def test_a_folder_without_text_is_an_error_that_names_the_glob(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.txt": "", "b.md": "B"})
    with pytest.raises(DataError, match=r"no file with text that matches '\*\*/\*.txt'.*1 names match.*set data"):
        list(documents(text_source(tmp_path)))


@pytest.mark.parametrize("glob", ["", "/abs/*.txt"])
def test_an_impossible_glob_is_an_error_that_quotes_it(tmp_path: Path, glob: str) -> None:
    with pytest.raises(DataError, match=f"glob '{glob}'".replace("*", r"\*")):
        list(documents(text_source(tmp_path, glob=glob)))


def test_the_json_lines_of_a_folder_are_read_file_by_file(tmp_path: Path) -> None:
    write_tree(tmp_path, {"b.jsonl": '{"text": "B"}\n', "a/a.jsonl": '{"text": "A"}\n', "c.txt": "no"})
    assert [(d.name, d.text) for d in documents(jsonl_source(tmp_path))] == [("a/a.jsonl:1", "A"), ("b.jsonl:1", "B")]
    with pytest.raises(DataError, match=r"no file with text that matches '\*.json'"):
        list(documents(jsonl_source(tmp_path, glob="*.json")))


def test_a_file_that_is_not_utf8_is_an_error_or_is_skipped_and_counted(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.txt": "A"})
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"bad.txt is not UTF-8 \(byte 3\); .*on_undecodable: skip"):
        list(documents(text_source(tmp_path)))
    skipped: list[str] = []
    found = list(documents(text_source(tmp_path, on_undecodable="skip"), on_skip=skipped.append))
    assert [document.name for document in found] == ["a.txt"]
    assert skipped == ["bad.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission_is_an_error_that_says_so(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.txt": "A"})
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied"):
        list(documents(text_source(tmp_path)))


def test_the_fingerprint_follows_files_and_settings_but_not_the_place(tmp_path: Path) -> None:
    write_tree(tmp_path / "a", {"x.txt": "X", "y.txt": "YY"})
    first = fingerprint(text_source(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(text_source(tmp_path / "b")) == first
    assert fingerprint(text_source(tmp_path / "a", max_document_tokens=5)) != first
    (tmp_path / "b" / "x.txt").write_text("longer")
    assert fingerprint(text_source(tmp_path / "b")) != first
    (tmp_path / "a" / "x.txt").rename(tmp_path / "a" / "z.txt")
    assert fingerprint(text_source(tmp_path / "a")) != first


def test_the_standard_library_is_a_source_and_other_python_names_are_errors() -> None:
    assert (resolve_source_path("python:stdlib") / "os.py").is_file()
    with pytest.raises(DataError, match=r"'python:site' is not known; .*python:stdlib"):
        resolve_source_path("python:site")
