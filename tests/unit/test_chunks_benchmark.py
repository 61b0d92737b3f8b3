"""A layer in sequence chunks takes so many bytes of the GPU for a token as was promised, and as is published."""

import json

import pytest

from benchmarks import chunks

BOUNDS_KIB = 0.01
"""Of what is measured: 8 bytes of document borders for each chunk, which does not grow with the layer's width."""


@pytest.mark.parametrize("mode", chunks.MODES, ids=lambda mode: f"{mode.hidden_states}-{mode.keys_values}")
def test_the_slope_of_a_layers_peak_is_no_more_than_its_target(mode):
    assert chunks.slope_of(mode).kib <= mode.target_kib + BOUNDS_KIB


def test_the_committed_slopes_and_lengths_are_current(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    published = chunks.slopes_of(json.loads(chunks.RESULTS.read_text()))
    assert [slope.mode for slope in published] == [mode.name for mode in chunks.MODES]
    assert {slope.lengths for slope in published} == {chunks.LENGTHS}
    page = chunks.DOCS.read_text()
    assert chunks.with_table(page, published) == page, "run python benchmarks/chunks.py"
