"""Exchanges that run beside training, one after the other, or at once where nothing can run beside it.

All exchanges of one group go through one lane, so every worker makes them in the same order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Lane:
    """Runs calls in order.

    Args:
        beside: whether in a thread of its own; otherwise `submit` runs the call before it returns.
        device: of the tensors; CUDA work of the thread gets a stream of its own, which begins after what was
            enqueued when a call was submitted, and which `result` makes the caller's stream wait for.
    """

    def __init__(self, *, beside: bool, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="exchange") if beside else None
        self._device = device
        self._stream = torch.cuda.Stream(device) if beside and device.type == "cuda" else None

    def submit(self, call: Callable[[], R], *, uses: Sequence[Tensor] = ()) -> "Future[R]":
        """Run `call` in its turn.

        What it raises is raised by `result`, or here where it runs at once.

        Args:
            call: what to do.
            uses: tensors of the caller's stream that it reads, so that their memory is not given away before.
        """
        if self._pool is None:
            done: Future[R] = Future()
            done.set_result(call())
            return done
        started = None
        if self._stream is not None:
            started = torch.cuda.Event()
            started.record(torch.cuda.current_stream(self._device))
            for tensor in uses:
                tensor.record_stream(self._stream)
        return self._pool.submit(self._run, call, started)

    def result(self, future: "Future[R]") -> R:
        """Wait for a call and return what it gave, or raise what it raised."""
        value = future.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor) and part.is_cuda:
                    part.record_stream(current)
        return value

    def close(self) -> None:
        """End the thread; calls that wait are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, call: Callable[[], R], started: "torch.cuda.Event | None") -> R:
        with torch.no_grad():
            if self._stream is None or started is None:
                return call()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(started)
                return call()
