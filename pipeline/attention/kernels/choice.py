"""Which kernel runs: the fastest that is present, does what the model needs, and passes a trial on this GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from pipeline.attention.kernels.cpu import CpuKernel
from pipeline.attention.kernels.interface import AttentionKernel, Needs, check_supported, lacks
from pipeline.attention.kernels.presence import AbsentError, Presence
from pipeline.attention.kernels.trial import try_kernel
from pipeline.attention.kernels.varlen import VarlenBackend, VarlenKernel
from pipeline.errors import AlstError, UserError

BACKENDS = {
    "torch": "pipeline.attention.kernels.torch_cuda",
    "flash_attention_2": "pipeline.attention.kernels.flash_attention_2",
    "flash_attention_3": "pipeline.attention.kernels.flash_attention_3",
    "flash_attention_4": "pipeline.attention.kernels.flash_attention_4",
}
"""Name in the recipe -> module. Each has `load(compute_capability) -> (backend, version)`; libraries load in there."""

BROKEN = (ImportError, OSError, AttributeError, RuntimeError)
"""What importing a present but broken CUDA package raises."""

USUAL = Needs(head_dim=128, value_head_dim=128, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    kernel: AttentionKernel
    detail: str
    """The version of what runs."""
    passed_over: tuple[str, ...]
    """Faster ones, each with the reason why it does not run."""


def choose(asked: str, *, device: torch.device, needs: Needs | None = None) -> Choice:
    """The kernel for `model.attention`, and why not a faster one.

    Raises UserError if what is asked for is absent or cannot do what is needed.
    """
    if device.type != "cuda":
        return _choose_on_cpu(asked, needs)
    compute_capability = torch.cuda.get_device_capability(device)
    found = {name: _find(name, compute_capability) for name in BACKENDS}
    presences = [presence for presence, _ in found.values()]
    candidates, passed_over = candidates_for(asked, compute_capability, presences, needs)
    for name in candidates:
        presence, backend = found[name]
        assert backend is not None, "candidates are present"
        kernel = VarlenKernel(backend, deterministic=needs is not None and needs.deterministic)
        try:
            try_kernel(kernel, needs or USUAL, device)
        except Exception as error:  # also what a compiler at run time raises; told below, or in `passed_over`
            passed_over = (*passed_over, f"{name}: its trial failed: {_brief(error)}")
            continue
        return Choice(kernel, presence.detail, passed_over)
    raise UserError(_no_kernel(asked, passed_over))


def candidates_for(
    asked: str, compute_capability: tuple[int, int], presences: Sequence[Presence], needs: Needs | None
) -> tuple[list[str], tuple[str, ...]]:
    """(names to try in order, reasons against faster ones). Raises UserError if there is nothing to try."""
    by_name = {presence.name: presence for presence in presences}
    order = fastest_first(compute_capability) if asked == "auto" else (asked,)
    candidates, reasons = [], []
    for name in order:
        presence = by_name.get(name)
        reason = (
            f"unknown on a GPU; there are {', '.join(by_name)}" if presence is None else _objection(presence, needs)
        )
        if reason is None:
            candidates.append(name)
        elif not candidates:
            reasons.append(f"{name}: {reason}")
    if not candidates:
        present = [presence.name for presence in presences if _objection(presence, needs) is None]
        raise UserError(_no_kernel(asked, reasons, instead=present))
    return candidates, tuple(reasons)


def fastest_first(compute_capability: tuple[int, int]) -> tuple[str, ...]:
    """Names by GPU generation, as their authors' figures have it; to be measured here."""
    match compute_capability[0]:
        case 10 | 11:
            return ("flash_attention_4", "flash_attention_2", "torch")
        case 9:
            return ("flash_attention_3", "flash_attention_4", "flash_attention_2", "torch")
        case _:
            return ("flash_attention_2", "torch")


def _choose_on_cpu(asked: str, needs: Needs | None) -> Choice:
    if asked not in ("auto", CpuKernel.name):
        raise UserError(
            f"model.attention = {asked!r} needs a CUDA GPU, and this process computes on the CPU; "
            "set model.attention: auto, or train on a GPU (hardware.gpu)"
        )
    kernel = CpuKernel()
    if needs is not None:
        check_supported(kernel, needs)
    return Choice(kernel, f"torch {torch.__version__}", ())


def _find(name: str, compute_capability: tuple[int, int]) -> tuple[Presence, VarlenBackend | None]:
    try:
        backend, version = import_module(BACKENDS[name]).load(compute_capability)
    except AbsentError as error:
        return Presence(name, None, str(error)), None
    except BROKEN as error:
        return Presence(name, None, f"installed, but it does not load: {_brief(error)}"), None
    return Presence(name, backend.capabilities, version), backend


def _objection(presence: Presence, needs: Needs | None) -> str | None:
    """Why this kernel cannot run the model; None if it can."""
    if presence.capabilities is None:
        return presence.detail
    missing = None if needs is None else lacks(presence.capabilities, needs)
    return None if missing is None else f"lacks {missing}"


def _no_kernel(asked: str, reasons: Sequence[str], instead: Sequence[str] = ()) -> str:
    remedy = f"set model.attention to auto or to one of: {', '.join(instead)}" if instead else "install one that fits"
    return f"model.attention = {asked!r} cannot run on this GPU; {remedy}\n  " + "\n  ".join(reasons)


def _brief(error: Exception) -> str:
    """Type and first line; our own errors speak for themselves."""
    first_line = (str(error).splitlines() or [""])[0]
    return first_line if isinstance(error, AlstError) else f"{type(error).__name__}: {first_line}"
