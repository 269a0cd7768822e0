"""Plans made before they are asked for: one thread in the background, a bounded number of them ahead.

Paper: Hydraulis (arXiv 2412.07894) overlaps planning with training. The thread computes and nothing else: it
sends no messages, so no worker's collectives change their order. What is handed out is what counts: a plan
that was made and never asked for leaves no trace.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from hardy.clock import Clock, WallClock
from hardy.config import UserError

PlanT = TypeVar("PlanT")


class PlanAhead(Generic[PlanT]):
    """An iterator over `make(step)` for each step, some of them made ahead in the background.

    What `make` raises comes out of `next` at the step that it belongs to. Close it when it is not run to its
    end (`contextlib.closing`): that waits for the plan being made, and forgets those not begun.

    Args:
        make: a function of the step alone; called in order, by one thread at a time.
        steps: which steps.
        depth: how many to make ahead; 0 makes each when it is asked for, without a thread.
        clock: measures the waiting.

    Raises:
        UserError: a negative depth.

    Example:
        >>> list(PlanAhead(lambda step: step * step, range(3), depth=2))
        [0, 1, 4]
    """

    def __init__(
        self,
        make: Callable[[int], PlanT],
        steps: Iterable[int],
        *,
        depth: int,
        clock: Clock | None = None,
    ) -> None:
        if depth < 0:
            raise UserError(f"plans made ahead must be at least 0, got ahead={depth}; 0 plans when asked")
        self._make, self._steps, self._depth = make, iter(steps), depth
        self._clock: Clock = clock or WallClock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plan-ahead") if depth else None
        self._begun: deque[Future[PlanT]] = deque()
        self.waited_s = 0.0
        """Seconds that `next` took so far: what planning cost the caller."""

    def __iter__(self) -> Iterator[PlanT]:
        """Return itself."""
        return self

    def __next__(self) -> PlanT:
        """Return the next plan, waiting for it where it is not ready."""
        begin_s = self._clock.now()
        try:
            if self._thread is None:
                return self._make(next(self._steps))
            self._fill(self._thread, self._depth)
            if not self._begun:
                raise StopIteration
            plan = self._begun.popleft().result()
            self._fill(self._thread, self._depth)
            return plan
        finally:
            self.waited_s += self._clock.now() - begin_s

    def close(self) -> None:
        """Stop planning: nothing comes any more."""
        self._steps = iter(())
        self._begun.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _fill(self, thread: ThreadPoolExecutor, depth: int) -> None:
        while len(self._begun) < depth:
            step = next(self._steps, None)
            if step is None:
                return
            self._begun.append(thread.submit(self._make, step))
