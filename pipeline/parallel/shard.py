"""Which tokens of a sample an SP rank owns. Pure arithmetic, no torch: the loader, the plan and the model share it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """An SP rank's part `[start, stop)` of a sample."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def shard_of(sp_rank: int, *, sp: int, seq_len: int) -> Shard:
    """The contiguous shard of `sp_rank`: `seq_len / sp` tokens, in rank order.

    Raises ValueError if `sp` does not divide `seq_len`; the plan refuses such a recipe before any rank starts.
    """
    if seq_len % sp:
        raise ValueError(f"seq_len {seq_len} is not a multiple of sp {sp}")
    local_seq_len = seq_len // sp
    return Shard(sp_rank * local_seq_len, (sp_rank + 1) * local_seq_len)
