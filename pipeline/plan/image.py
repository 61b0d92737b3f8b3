"""The container image of a run, told apart from any other: by its digest, and quickly by its size and SIF id."""

import hashlib
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

_MAGIC = slice(32, 41)
_ID = slice(48, 64)
"""Places in a SIF's header, behind 32 bytes that make it a script (sylabs/sif, pkg/sif/sif.go: `header`)."""


@dataclass(frozen=True)
class Image:
    """A SIF file. Every build has another id, every content another digest."""

    path: str
    digest: str
    """SHA-256 of the file, in hex."""
    size_bytes: int
    sif_id: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def identify(path: Path) -> Image:
    """The image at a path, read whole: seconds per 10 GB. Raises UserError if it is none, or not the one built."""
    size_bytes, sif_id = _quick(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    built = path.with_name(f"{path.name}.sha256")
    if built.is_file() and (was := built.read_text().split()[0]) != digest:
        raise UserError(
            f"{path}: its SHA-256 is {digest[:12]}…, but {built.name} says {was[:12]}…; build or copy it again, with "
            "that file"
        )
    return Image(str(path), digest, size_bytes, sif_id)


def check_same(image: Image, path: Path, *, verify: bool = False) -> None:
    """Raises UserError if the file at `path` is not that image; with `verify` every byte is read."""
    size_bytes, sif_id = _quick(path)
    same = (size_bytes, sif_id) == (image.size_bytes, image.sif_id)
    if same and verify:
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == image.digest
    if not same:
        raise UserError(
            f"{path}: is not the image this run was submitted with (id {sif_id}, {size_bytes} bytes; then "
            f"{image.sif_id}, {image.size_bytes} bytes); put that one back, or `alst resume` with the new one"
        )


def _quick(path: Path) -> tuple[int, str]:
    """Size and id, without reading the file."""
    try:
        with path.open("rb") as file:
            header = file.read(_ID.stop)
        size_bytes = path.stat().st_size
    except OSError as error:
        raise UserError(
            f"container.image = {path}: {error.strerror}; build one with `make image`, copy it, or correct the path"
        ) from None
    if header[_MAGIC] != b"SIF_MAGIC":
        raise UserError(f"container.image = {path}: is no Apptainer image (SIF); build one with `make image`")
    return size_bytes, str(uuid.UUID(bytes=header[_ID]))
