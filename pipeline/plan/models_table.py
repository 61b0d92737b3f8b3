"""The table of model types as a person reads it."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.plan.model_support import Support


def print_models(models: Mapping[str, Support]) -> None:
    """What trains exactly first, then the others with what stands in the way."""
    versions = ", ".join(sorted({support.transformers for support in models.values()}))
    table = Table(title=f"with transformers {versions}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("model type", style="cyan", no_wrap=True)
    table.add_column("trains exactly")
    table.add_column("in chunks")
    table.add_column("why not", overflow="fold")
    for name, support in sorted(models.items(), key=lambda item: (not item[1].supported, item[0])):
        in_chunks = "" if not support.supported else "no" if support.no_chunks else "yes"
        told = support.reason or support.no_chunks
        table.add_row(name, "yes" if support.supported else "no", in_chunks, told)
    console = Console()
    console.print(table, markup=False, highlight=False)
    exact = sum(support.supported for support in models.values())
    console.print(f"{exact} of {len(models)} train exactly", markup=False, highlight=False)
