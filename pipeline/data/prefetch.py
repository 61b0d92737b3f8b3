"""Batches are read in a thread while the ones before them are trained on.

Inside the last stop of the data path: sample -> Batch of this rank.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.data.batch import Batch


class BatchReader:
    """Reads batches in the order in which they are needed, `ahead` of them before they are asked for.

    A batch that was announced and is not asked for next is forgotten, so that a jump elsewhere holds no memory.
    """

    def __init__(self, read: Callable[[int], Batch], *, ahead: int) -> None:
        """`read` reads the batch of a sample; `ahead` 0 reads in the caller's thread."""
        self._read, self._ahead = read, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if ahead else None
        self._waiting: list[tuple[int, Future[Batch]]] = []

    def batch(self, sample: int, *, upcoming: Sequence[int] = ()) -> Batch:
        """The batch of a sample; `upcoming` samples are those that will be asked for after it."""
        if self._thread is None:
            return self._read(sample)
        wanted = [sample, *upcoming[: self._ahead]]
        known = 0
        while known < min(len(wanted), len(self._waiting)) and self._waiting[known][0] == wanted[known]:
            known += 1
        for _, future in self._waiting[known:]:
            future.cancel()
        self._waiting[known:] = [(number, self._thread.submit(self._read, number)) for number in wanted[known:]]
        _, future = self._waiting.pop(0)
        return future.result()
