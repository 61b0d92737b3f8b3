"""Loss spikes: a step whose loss stands out above those before it. They are flagged and never stop a run."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 64  # steps: long enough for a calm median, short enough to follow the loss as it falls
FEWEST = 16  # steps before anything is flagged; of fewer the spread says little
DEVIATIONS = 6.0  # of a normal distribution one step in a billion lies so far above
LEAST_RISE = 0.02  # of the median: a loss that hardly moves has hardly a spread, and 2 % above it is no spike
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


class SpikeDetector:
    """Compares each loss with the median of those before it, in units of their median absolute deviation.

    Both are blind to a few outliers, so that a spike does not hide the next; a loss that stays high becomes the median.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """`losses` of the steps before, of a run that goes on."""
        self._losses = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def saw(self, loss: float) -> bool:
        """Take in the loss of a step. Returns whether it is a spike."""
        spike = len(self._losses) >= FEWEST and loss > spike_threshold(list(self._losses))
        if math.isfinite(loss):
            self._losses.append(loss)
        return spike


def spike_threshold(losses: list[float]) -> float:
    """The highest loss that is no spike after `losses`."""
    median = statistics.median(losses)
    deviation = NORMAL * statistics.median(abs(loss - median) for loss in losses)
    return median + max(DEVIATIONS * deviation, LEAST_RISE * abs(median))
