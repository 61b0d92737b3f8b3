"""The learning rate as a function of the step: nothing to save, nothing to resume."""

import math

from pipeline.recipe.schema import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """At `step`, counted from 1: linear warm-up, then the schedule down to `min_lr_fraction` at the last step."""
    schedule, peak = recipe.schedule, recipe.optimizer.lr
    if step <= schedule.warmup_steps:
        return peak * step / (schedule.warmup_steps + 1)
    decay_steps = max(recipe.train.steps - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / decay_steps, 1.0)
    match schedule.name:
        case "constant":
            fraction = 1.0
        case "linear":
            fraction = 1.0 - progress
        case "cosine":
            fraction = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.min_lr_fraction + (1.0 - schedule.min_lr_fraction) * fraction)
