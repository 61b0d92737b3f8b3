"""What is written on the command line of `alst bench`, and what is said of what cannot be meant."""

import pytest
from typer.testing import CliRunner

from pipeline.bench.options import check_asked, engines_of, layers_of, lengths_of, rung_names, tokens_of
from pipeline.cli import app
from pipeline.errors import UserError


def test_tokens_are_numbers_or_multiples_of_1024_and_its_square():
    assert [tokens_of(text, option="--most") for text in ("300", "128K", "2m")] == [300, 131072, 2097152]


def test_lengths_ascend_and_none_stands_twice():
    assert lengths_of("128K, 32K,131072") == (32768, 131072)
    assert lengths_of("") == ()


def test_all_is_the_ladder_and_the_recipe_stands_beside_it():
    assert "recipe" not in rung_names("all")
    assert rung_names("recipe,all") == (*rung_names("all"), "recipe")
    assert rung_names("offload,baseline") == ("baseline", "offload"), "in the ladder's order"


def test_the_product_comes_first_whatever_is_written_first():
    assert engines_of("plain,reference,alst") == ("alst", "reference", "plain")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokens_of("12G", option="--most"), "--most 12G: must be tokens, as 131072, 128K"),
        (lambda: tokens_of("0", option="--most"), "--most 0: must be tokens"),
        (lambda: layers_of("two", speed=False), "--layers two: must be numbers of layers"),
        (lambda: layers_of("1,4", speed=True), "a speed needs at least 2 layers; use --layers 2"),
        (lambda: rung_names(","), "names no feature set; use some of baseline"),
        (lambda: engines_of("theirs"), "--engines theirs: unknown; use some of alst, reference, plain"),
        (lambda: check_asked((), find_max=False), "nothing to measure; give --lengths 32K,128K for speed"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_remedy(call, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        call()


def test_the_command_refuses_before_anything_is_packed_or_run(tmp_path):
    done = CliRunner().invoke(app, ["bench", "tiny", f"--output={tmp_path}"])
    assert isinstance(done.exception, UserError)
    assert "nothing to measure" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_help_shows_how_to_begin():
    printed = CliRunner().invoke(app, ["bench", "--help"]).output
    assert "alst bench tiny --lengths 1K,4K" in printed
    assert "--find-max" in printed
