"""The plan as a person reads it."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import ceil

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from pipeline.plan.estimate import Advice, Estimate
from pipeline.plan.hardware import GIB
from pipeline.plan.job import JobPlan
from pipeline.plan.model_shape import APPROXIMATE, sizes_are_from_table
from pipeline.plan.terms import Item, Term
from pipeline.recipe.schema import ActivationCheckpoint


def print_plan(plan: JobPlan) -> None:
    """The derived numbers, grouped: who computes, how long, in which tiles."""
    _print(_grid(plan.recipe.name, _facts(plan)))


def print_estimate(estimate: Estimate, advice: Sequence[Advice] = ()) -> None:
    """The plan, then its bytes and seconds item by item with what binds marked, then what to change."""
    print_plan(estimate.plan)
    _print(_memory(estimate))
    if estimate.seconds is not None:
        _print(_seconds(estimate))
    _print(_grid(None, _outcome(estimate)))
    if advice:
        _print(_advised(advice))


def _facts(plan: JobPlan) -> list[tuple[str, str]]:
    shape, hardware = plan.model, plan.recipe.hardware
    experts = f", {shape.experts_per_token} of {shape.num_experts} experts" if shape.num_experts else ""
    windows = f", {shape.num_window_layers} of them see {shape.window:,} tokens" if shape.window else ""
    origin = " (sizes from the planner's own table)" if sizes_are_from_table(plan.recipe.model) else ""
    about = "about " if shape.model_type in APPROXIMATE else ""
    return [
        (
            "model",
            f"{shape.model_type}, {about}{shape.total_parameters / 1e9:.2f}B parameters: "
            f"{shape.num_layers} layers{windows}, hidden {shape.hidden_size:,}{experts}, "
            f"{shape.num_query_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}, "
            f"vocabulary {shape.vocab_size:,}{origin}",
        ),
        ("hardware", f"{plan.nodes} x {hardware.gpus_per_node} {hardware.gpu.value}"),
        ("mesh", f"{plan.world_size} ranks = dp {plan.dp} x sp {plan.sp}{_why_dp(plan)}"),
        ("sequence", f"{plan.seq_len:,} tokens, {plan.local_seq_len:,} per rank"),
        ("step", f"{plan.samples_per_step:,} samples, {plan.tokens_per_step:,} tokens"),
        *_chunks(plan),
        ("loss tiles", f"{plan.num_loss_tiles:,} of {plan.loss_tile_tokens:,} tokens"),
        ("MLP tiles", f"{plan.num_mlp_tiles:,} of {plan.mlp_tile_tokens:,} tokens"),
        ("norm tiles", f"{ceil(plan.local_seq_len / plan.norm_tile_tokens):,} of {plan.norm_tile_tokens:,} tokens"),
        ("for backward", _waits(plan.recipe.memory.activation_checkpoint)),
        (
            "ZeRO",
            f"stage {plan.recipe.zero.stage}, optimizer on {plan.recipe.zero.offload_optimizer or 'device'}, "
            f"parameters on {plan.recipe.zero.offload_parameters or 'device'}",
        ),
        ("model FLOPs", f"{plan.model_flops_per_step:.3e} per step with one document per sample"),
    ]


def _chunks(plan: JobPlan) -> list[tuple[str, str]]:
    """How much of the sequence a layer sees at once, where that is not all."""
    feature = plan.recipe.memory.sequence_chunks
    if feature is None:
        return []
    found = feature.resolved
    kept = ", keys and values kept for backward" if found.keep_keys_values else ""
    where = f"hidden states on {found.hidden_states}, keys and values on {found.keys_values}{kept}"
    return [("chunks", f"{plan.num_chunks:,} of {plan.chunk_tokens:,} tokens; {where}")]


def _why_dp(plan: JobPlan) -> str:
    """Why not all ranks share one sequence, where the heads are the reason."""
    if plan.dp == 1 or plan.world_size <= plan.model.num_query_heads:
        return ""
    return f" (sp divides the {plan.model.num_query_heads} query heads; the rest of the ranks is dp)"


def _memory(estimate: Estimate) -> Table:
    """Items in rows, the memories in columns; what is nothing stays empty."""
    load = estimate.load
    columns = [load.gpu.by_name, load.host.by_name, estimate.disk.by_name]
    limits = [load.hardware.memory_bytes, load.hardware.host_memory_bytes, None]
    titles = ["GPU, a rank" if limits[0] else "tensors, a rank", "host, a node", "disk, a node"]
    if load.scratch.total:
        columns.append(load.scratch.by_name)
        limits.append(load.hardware.scratch_bytes)
        titles = [title.partition(",")[0] for title in (*titles, "scratch")]  # four must fit into 80 columns
    table = Table(box=SIMPLE_HEAD, pad_edge=True)
    table.add_column("GiB", style="cyan", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [_gib(column.get(name, 0)) for column in columns]
        if any(cells):
            table.add_row(_words(name), *cells)
    table.add_section()
    binding = {"gpu": 0, "host": 1, "scratch": 3}[load.binding]
    totals = [sum(column.values()) for column in columns]
    marked = [f"{_gib(total)}{' < binds' if number == binding else ''}" for number, total in enumerate(totals)]
    table.add_row("total", *marked, style="bold")
    table.add_row("there is", *("" if limit is None else _gib(limit) for limit in limits))
    return table


def _seconds(estimate: Estimate) -> Table:
    seconds = estimate.seconds
    assert seconds is not None
    table = Table(box=SIMPLE_HEAD)
    table.add_column("a step", style="cyan", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for item in seconds.items:
        if item.terms:
            told = _hidden(item)
            table.add_row(_words(item.name), f"{item.total:,.2f}", f"{item.total / seconds.total:.1%}", told)
    table.add_section()
    table.add_row("total", f"{seconds.total:,.2f}", "", _clock(seconds.total), style="bold")
    return table


def _waits(checkpoint: ActivationCheckpoint | None) -> str:
    """What is kept until backward, and where."""
    if checkpoint is None:
        return "off: all that layers compute stays on device"
    found, size = checkpoint.resolved, checkpoint.resolved.layers_per_group
    kept = "layer inputs" if size == 1 else f"the input of every {size} layers"
    where = "on device" if checkpoint.offload is None else "in host memory"
    groups = "layers" if size == 1 else "groups"
    others = [f"of {found.disk_groups} {groups} on disk"] if found.disk_groups else []
    others += [f"of the last {found.resident_groups} on device"] if found.resident_groups else []
    told = f" ({', '.join(others)})" if others else ""
    return f"{kept}{' and attention outputs' if found.keep_attention else ''} {where}{told}"


def _hidden(item: Item) -> str:
    """What of an item's traffic hides behind the computation."""
    hidden = -sum(part.value for part in item.terms if part.value < 0)
    if not hidden:
        return ""
    moved = item.total + hidden
    return f"{moved:,.2f} s of traffic, {hidden / moved:.0%} of it hidden behind the computation"


def _outcome(estimate: Estimate) -> list[tuple[str, str]]:
    load, plan = estimate.load, estimate.plan
    rows = [("documents", estimate.documents.told)]
    if estimate.seconds is not None:
        rate = estimate.tokens_per_second or 0.0
        rows.append(("tokens/s", f"{rate:,.0f}, {rate / plan.world_size:,.1f} per GPU"))
        rows.append(("MFU, HFU", f"{estimate.mfu:.1%} of the bf16 peak, {estimate.hfu:.1%} with what is recomputed"))
    if estimate.checkpoint_seconds is not None:
        rows.append(("checkpoint", f"{estimate.checkpoint_seconds:,.0f} s to write"))
    rows.append(("a failure costs", _lost(estimate)))
    if estimate.steps_per_time_limit is not None:
        rows.append(("time limit", f"{estimate.steps_per_time_limit:,} steps in {_clock(estimate.time_limit_seconds)}"))
    if load.hardware.memory_bytes is not None:
        rows.append(("GPU's peak", f"in {load.gpu.moment}"))
    limit = plan.model.max_position_embeddings
    if limit is not None and plan.seq_len > limit:
        rows.append(("positions", f"the model was made for {limit:,}; longer ones need a rope scaling to be of use"))
    rows.append(("verdict", _verdict(estimate)))
    return rows


def _lost(estimate: Estimate) -> str:
    checkpoint, steps = estimate.plan.recipe.checkpoint, estimate.lost_steps
    every = None if checkpoint is None else checkpoint.every_steps
    saves = "nothing is saved" if checkpoint is None else f"saved every {every:,}" if every else "saved at the end"
    seconds = "" if estimate.lost_seconds is None else f"; {_clock(estimate.lost_seconds)} with the next start"
    return f"{steps:,.1f} steps on average ({saves}){seconds}"


def _verdict(estimate: Estimate) -> str:
    load = estimate.load
    if load.fits:
        return f"fits; {load.binding} memory binds"
    missing = [
        f"{-free / GIB:,.1f} GiB of {name} memory"
        for name, free in zip(("GPU", "host", "scratch"), load.free_bytes, strict=True)
        if free < 0
    ]
    return f"does NOT fit: {' and '.join(missing)} too much"


def _advised(advice: Iterable[Advice]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("change, one after the other", overflow="fold", style="cyan")
    for title in ("frees on GPU", "on host", "time a token", "then it"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, change in enumerate(advice, start=1):
        ratio = change.seconds_per_token_ratio
        table.add_row(
            ("or " if change.instead else f"{number} ") + " ".join(change.changes),
            f"{change.frees_gpu_bytes / GIB:,.1f} GiB",
            f"{change.frees_host_bytes_per_node / GIB:,.1f} GiB",
            "" if ratio is None else f"x {ratio:.2f}",
            "fits" if change.fits else "does not fit",
        )
    return table


def print_fit(estimate: Estimate, *, chosen: bool) -> None:
    """What was found: the length, what binds, and with what features."""
    plan, load = estimate.plan, estimate.load
    memory, zero = plan.recipe.memory, plan.recipe.zero
    features = [
        f"tiled loss {_on(memory.tiled_loss)}",
        f"tiled MLP {_on(memory.tiled_mlp)}",
        f"tiled norms {_on(memory.tiled_norm)}",
        f"activation checkpoints {_waits(memory.activation_checkpoint)}",
        f"sequence chunks {''.join(told for _, told in _chunks(plan)) or 'off'}",
        f"optimizer on {zero.offload_optimizer or 'device'}",
        f"parameters on {zero.offload_parameters or 'device'}",
    ]
    gpu = load.hardware.memory_bytes
    rows = [
        ("hardware", f"{plan.nodes} x {plan.recipe.hardware.gpus_per_node} {plan.recipe.hardware.gpu.value}"),
        ("mesh", f"{plan.world_size} ranks = dp {plan.dp} x sp {plan.sp}{_why_dp(plan)}"),
        ("sequence", f"data.seq_len={plan.seq_len}: {plan.seq_len:,} tokens, {plan.local_seq_len:,} per rank"),
        ("features" + (" chosen" if chosen else ""), ", ".join(features)),
        ("GPU", "" if gpu is None else f"{_gib(load.gpu.total)} of {_gib(gpu)} GiB, in {load.gpu.moment}"),
        ("host", f"{_gib(load.host.total)} of {_gib(load.hardware.host_memory_bytes)} GiB a node"),
    ]
    if estimate.seconds is not None:
        rate = estimate.tokens_per_second or 0.0
        told = (
            f"{_clock(estimate.seconds.total)}, {rate / plan.world_size:,.1f} tokens/s per GPU, MFU {estimate.mfu:.1%}"
        )
        rows.append(("a step", f"{told} with {estimate.documents.told}"))
    rows.append(("binds", f"{load.binding} memory"))
    _print(_grid(plan.recipe.name, [row for row in rows if row[1]]))


def _on(feature: object) -> str:
    return "off" if feature is None else "on"


# One item


def print_explanation(estimate: Estimate, name: str) -> None:
    """The formula of an item with its numbers. Raises UserError if there is none of that name."""
    items = estimate.items
    asked = name.replace(" ", "_").replace("-", "_")
    if asked not in items:
        near = get_close_matches(asked, items, n=1)
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise UserError(f"--explain {name}: no such item; {hint} are {', '.join(items)}")
    console = Console()
    for unit, item in items[asked]:
        console.print(f"[bold]{_words(item.name)}[/], {unit}", highlight=False)
        if not item.terms:
            console.print("  nothing, with this recipe", highlight=False)
        for part in item.terms:
            console.print(f"  {part.what}{_when(part)}", highlight=False, markup=False)
            console.print(f"    {_formula(part)} = {_amount(part.value, unit)}", highlight=False, markup=False)
        total = item.at(estimate.load.gpu.moment) if "GPU" in unit else item.total
        at = f" at the peak, {estimate.load.gpu.moment}" if "GPU" in unit else ""
        console.print(f"  [bold]total{at}: {_amount(total, unit)}[/]", highlight=False)


def _when(part: Term) -> str:
    """At which moments a term is there, if not at all of them."""
    return "" if part.when is None else f"  [in {', '.join(sorted(part.when))}]"


def _formula(part: Term) -> str:
    over = f" / ({_product(part.over)})" if part.over else ""
    return _product(part.factors) + over


def _product(factors: Iterable[tuple[str, float]]) -> str:
    return " x ".join(f"{_number(value)} {what}".strip() for what, value in factors)


def _number(value: float) -> str:
    if value >= 1e12:
        return f"{value:.3e}"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def _amount(value: float, unit: str) -> str:
    return f"{value / GIB:,.2f} GiB" if unit.startswith("bytes") else f"{value:,.3f} s"


# Two recipes


def print_comparison(first: Estimate, second: Estimate) -> None:
    """Two plans side by side; rows that are nothing in both are left out."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", style="cyan", no_wrap=True)
    for estimate in (first, second):
        table.add_column(estimate.plan.recipe.name, justify="right", overflow="fold")
    for name, cells in _side_by_side(_summary(first), _summary(second)):
        table.add_row(name, *cells)
    for title, rows in (("GPU GiB", _gpu_rows), ("host GiB", _host_rows), ("seconds", _seconds_rows)):
        table.add_section()
        for name, cells in _side_by_side(rows(first), rows(second)):
            if any(cell not in ("", "0.00") for cell in cells):
                table.add_row(f"{title}: {name}", *cells)
    _print(table)


def _side_by_side(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, tuple[str, str]]]:
    return [(name, (first.get(name, ""), second.get(name, ""))) for name in dict.fromkeys((*first, *second))]


def _summary(estimate: Estimate) -> dict[str, str]:
    plan = estimate.plan
    hardware = plan.recipe.hardware
    rate = estimate.tokens_per_second
    return {
        "hardware": f"{plan.nodes} x {hardware.gpus_per_node} {hardware.gpu.value}",
        "mesh": f"dp {plan.dp} x sp {plan.sp}",
        "sequence": f"{plan.seq_len:,}",
        "tokens a step": f"{plan.tokens_per_step:,}",
        "tokens/s per GPU": "" if rate is None else f"{rate / plan.world_size:,.1f}",
        "MFU": "" if estimate.mfu is None else f"{estimate.mfu:.1%}",
        "HFU": "" if estimate.hfu is None else f"{estimate.hfu:.1%}",
        "verdict": _verdict(estimate),
    }


def _gpu_rows(estimate: Estimate) -> dict[str, str]:
    return _gib_rows({**estimate.load.gpu.by_name, "total": estimate.load.gpu.total})


def _host_rows(estimate: Estimate) -> dict[str, str]:
    return _gib_rows({**estimate.load.host.by_name, "total": estimate.load.host.total})


def _seconds_rows(estimate: Estimate) -> dict[str, str]:
    seconds = estimate.seconds
    if seconds is None:
        return {}
    return {_words(name): f"{value:,.2f}" for name, value in {**seconds.by_name, "total": seconds.total}.items()}


def _gib_rows(by_name: Mapping[str, int]) -> dict[str, str]:
    return {_words(name): _gib(value) for name, value in by_name.items()}


# Small things


def _grid(title: str | None, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _print(table: Table) -> None:
    Console().print(table, markup=False, highlight=False)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}" if value else ""


def _clock(seconds: float | None) -> str:
    whole = round(seconds or 0.0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
