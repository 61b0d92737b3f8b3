"""Whether a kernel is here, and if not, why not."""

import re
from dataclasses import dataclass
from importlib import metadata

from pipeline.attention.kernels.interface import Capabilities


class AbsentError(Exception):
    """A backend cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class Presence:
    """What was found of one kernel on this machine."""

    name: str
    capabilities: Capabilities | None
    """None: absent."""
    detail: str
    """The version that is present, or the reason of absence."""


def installed_version(distribution: str, *, oldest: str, install: str) -> str:
    """Raises AbsentError if it is not installed, or too old."""
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise AbsentError(f"{distribution} is not installed; {install}") from None
    if _order(found) < _order(oldest):
        raise AbsentError(f"{distribution} {found} is older than {oldest}; {install}")
    return found


def _order(version: str) -> tuple[tuple[int, ...], int]:
    """To compare '2.8.3.post1', '4.0.0b36' and '3.0.0+cu130torch2.11': release, then beta (a release is past any)."""
    public = version.split("+")[0]
    release = tuple(int(part) for part in re.findall(r"\d+", re.split(r"[abr]|\.dev|\.post", public)[0]))
    beta = re.search(r"(?:a|b|rc|\.dev)(\d+)", public)
    return release, int(beta[1]) if beta else 1 << 30
