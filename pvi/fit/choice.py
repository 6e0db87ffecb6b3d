"""When does it pay to capture a step, and to compile it? What `compile="auto"` decides.

A step takes $e$ seconds by the programs, $g$ by a graph, and $n$ are to come. A capture costs about
$500 e$. It is tried where that is at most an eighth of $n e$, so that a fit whose capture fails is
hardly slower. The graph is compiled where $n (e - g)$ is more than that costs: then the fit is no
slower than by the programs, even if the compiler fails. Where $n$ is not known, the time that has
passed stands for the time to come: the fit takes at most twice as long as by the best decision.
"""

import time
from statistics import median

CAPTURE = 500  # steps whose time a capture takes
SHARE = 8
COLD, PER_CAPTURE = 8.0, 6.0  # seconds, and captures, that a compilation takes
FIRST = 64  # decisions are made at this step and its doubles


class Choice:
    """Times the steps of a fit, and tells what pays.

    Args:
        limit: steps in all; `None` where that is open.
    """

    def __init__(self, limit: int | None):
        self._limit = limit
        self._begun = time.perf_counter()
        self._last: float | None = None
        self._steps: list[float] = []
        self._graph = self._capture = 0.0

    def tick(self) -> None:
        """A step by the programs begins."""
        now = time.perf_counter()
        if self._last is not None:
            self._steps = [*self._steps[-FIRST:], now - self._last]
        self._last = now

    def captured(self, seconds: float, graph: float) -> None:
        """There is a graph now.

        Args:
            seconds: that this has taken.
            graph: seconds of a step by it.
        """
        self._capture, self._graph = seconds, graph

    def captures(self, step: int) -> bool:
        """Whether a graph pays after so many steps."""
        if not _is_time(step) or not self._steps:
            return False
        if self._limit is not None:
            return self._limit - step >= SHARE * CAPTURE
        return self._passed >= CAPTURE * median(self._steps)

    def compiles(self, step: int) -> bool:
        """Whether machine code pays after so many steps, where there is a graph."""
        if not _is_time(step):
            return False
        cost = max(COLD, PER_CAPTURE * self._capture)
        if self._limit is not None:
            return (self._limit - step) * (median(self._steps) - self._graph) > cost
        return self._passed >= cost

    @property
    def _passed(self) -> float:
        return time.perf_counter() - self._begun


def _is_time(step: int) -> bool:
    return step >= FIRST and step & (step - 1) == 0
