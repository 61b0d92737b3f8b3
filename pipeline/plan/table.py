"""The plan as a person reads it."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipeline.plan.job import JobPlan


def print_plan(plan: JobPlan) -> None:
    """The derived numbers, grouped: who computes, how long, in which tiles."""
    shape, hardware = plan.model, plan.recipe.hardware
    rows = [
        (
            "model",
            f"{shape.model_type}: {shape.num_layers} layers, hidden {shape.hidden_size:,}, "
            f"{shape.num_query_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}, "
            f"vocabulary {shape.vocab_size:,}",
        ),
        ("hardware", f"{plan.nodes} x {hardware.gpus_per_node} {hardware.gpu.value}"),
        ("mesh", f"{plan.world_size} ranks = dp {plan.dp} x sp {plan.sp}{_why_dp(plan)}"),
        ("sequence", f"{plan.seq_len:,} tokens, {plan.local_seq_len:,} per rank"),
        ("step", f"{plan.samples_per_step:,} samples, {plan.tokens_per_step:,} tokens"),
        ("loss tiles", f"{plan.num_loss_tiles:,} of {plan.loss_tile_tokens:,} tokens"),
        ("MLP tiles", f"{plan.num_mlp_tiles:,} of {plan.mlp_tile_tokens:,} tokens"),
        (
            "ZeRO",
            f"stage {plan.recipe.zero.stage}, optimizer on {plan.recipe.zero.offload_optimizer or 'device'}, "
            f"parameters on {plan.recipe.zero.offload_parameters or 'device'}",
        ),
        ("model FLOPs", f"{plan.model_flops_per_step:.3e} per step with one document per sample"),
    ]
    table = Table(title=plan.recipe.name, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table, markup=False, highlight=False)


def _why_dp(plan: JobPlan) -> str:
    """Why not all ranks share one sequence, where the heads are the reason."""
    if plan.dp == 1 or plan.world_size <= plan.model.num_query_heads:
        return ""
    return f" (sp divides the {plan.model.num_query_heads} query heads; the rest of the ranks is dp)"
