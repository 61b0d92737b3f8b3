"""Which tokens of a sample an SP rank owns, and in which order. Pure arithmetic, no torch: the loader, the plan and the
model share it."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Shard:
    """Tokens `[start, stop)` of a sample."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """How a sample lies over SP ranks, chunk by chunk: local chunk i of rank r is slice r of global chunk i.

    Without chunks there is one, and a rank's shard is contiguous. Raises ValueError if `sp` does not divide the sample
    and its chunks; the plan refuses such a recipe before any rank starts.
    """

    seq_len: int
    sp: int = 1
    chunk_tokens: int | None = None
    """Of the whole sequence, over all ranks; the last chunk may be shorter. None is one chunk."""

    def __post_init__(self) -> None:
        if self.seq_len % self.sp:
            raise ValueError(f"seq_len {self.seq_len} is not a multiple of sp {self.sp}")
        if self._step % self.sp:
            raise ValueError(f"chunk_tokens {self._step} is not a multiple of sp {self.sp}")

    @property
    def _step(self) -> int:
        return self.seq_len if self.chunk_tokens is None else min(self.chunk_tokens, self.seq_len)

    @property
    def local_seq_len(self) -> int:
        return self.seq_len // self.sp

    @cached_property
    def chunks(self) -> tuple[Shard, ...]:
        """Of the sample, in order."""
        step = self._step
        return tuple(Shard(start, min(start + step, self.seq_len)) for start in range(0, self.seq_len, step))

    @cached_property
    def local(self) -> tuple[slice, ...]:
        """Where each chunk's part lies among a rank's own tokens; the same on every rank."""
        return tuple(slice(chunk.start // self.sp, chunk.stop // self.sp) for chunk in self.chunks)

    def shards(self, sp_rank: int) -> tuple[Shard, ...]:
        """What `sp_rank` owns of each chunk, in the order in which it holds them."""
        parts = []
        for chunk in self.chunks:
            tokens = chunk.tokens // self.sp
            parts.append(Shard(chunk.start + sp_rank * tokens, chunk.start + (sp_rank + 1) * tokens))
        return tuple(parts)
