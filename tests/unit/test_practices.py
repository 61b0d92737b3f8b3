"""What stands beside the code agrees with it."""

import re
import tomllib
from pathlib import Path

import yaml

from pipeline import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {str(citation["version"]), PROJECT["version"]} == {__version__}


def test_the_licence_is_whole_and_named_alike():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


def test_the_three_papers_are_cited_with_their_authors():
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    cited = {reference["identifiers"][0]["value"]: reference for reference in references}
    assert cited.keys() == {"arXiv:2506.13996", "arXiv:2408.16978", "arXiv:2309.14509"}
    for name, reference in cited.items():
        assert reference["url"].endswith(name.removeprefix("arXiv:"))
        assert len(reference["authors"]) > 5


def test_commit_hooks_need_no_network():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
    assert {hook["language"] for repository in hooks["repos"] for hook in repository["hooks"]} == {"system"}


def test_changes_are_collected_for_the_next_release():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)


def test_the_rooms_of_the_contributors_guide_are_those_of_the_package():
    table = set(re.findall(r"^\| `(\w+)` \| ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    rooms = {
        path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert table == rooms - {"__init__", "cli"}


def test_every_make_target_a_contributor_is_told_of_exists():
    makefile = (ROOT / "Makefile").read_text()
    told = set(re.findall(r"\bmake ([a-z][a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"setup", "test", "test-quick", "test-full"} <= told
    assert {target for target in told if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()
