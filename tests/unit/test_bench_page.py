"""docs/benchmarks.md says what the planner predicts now, and lists every bench that is committed."""

from benchmarks import page
from pipeline.bench.ladder import names


def test_the_page_is_current():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text) == text, "run python benchmarks/page.py"


def test_every_feature_set_is_named_on_the_page():
    text = page.PAGE.read_text(encoding="utf-8")
    assert [name for name in names() if f"`{name}`" not in text] == []


def test_kernels_bound_what_can_be_reached():
    for kernel in page.KERNELS:
        expected = page.expected(page.KEEP, 2**19, kernel)
        assert 0 < expected.mfu < page.kernel_bound(2**19, kernel) < 1
