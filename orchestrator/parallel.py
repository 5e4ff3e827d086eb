"""Work on several cores whose result does not depend on how many there are.

Every torch operation runs on one thread, so that its sums are made in one order on every machine; cores are filled by
running independent pieces of work beside each other. (An operation that is itself spread over threads may sum in
another order for each number of threads: Cholesky does; and it waits for the slowest thread when the machine is busy.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_here = threading.local()  # the pool that a worker belongs to


@contextmanager
def one_thread() -> Iterator[int]:
    """Let torch compute on one thread an operation; gives the number of threads that was set before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """Keep accelerators from rounding the factors of float32 products to TF32."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Workers:
    """A pool of threads for torch operations without gradients."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="walk", initializer=self._start_worker)

    def _start_worker(self) -> None:
        import torch

        torch.set_grad_enabled(False)
        torch.set_num_threads(1)
        _here.pool = self._pool

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Iterable[Callable[[], Any]], on_error: Callable[[], None] = lambda: None) -> list[Any]:
        """Run all tasks, begun in their order, and return their results in that order.

        If one raises, `on_error` is called at once, tasks not yet begun are dropped, and the error of the first task
        in order that failed by itself is raised when the others have ended.
        """
        futures: list[Future[Any]] = [self._pool.submit(_guarded, task, on_error) for task in tasks]
        try:
            for future in futures:
                if future.exception() is not None:
                    break
        except BaseException:  # interrupted while waiting: what tasks use must not be taken from under them
            on_error()
            for future in futures:
                future.cancel()
            wait(futures)
            raise
        for future in futures:
            future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if errors:
            raise next((error for error in errors if not isinstance(error, StoppedError)), errors[0])
        return [future.result() for future in futures]


class StoppedError(Exception):
    """Ends a task that waits for one that has failed."""


def in_parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run the parts of a task beside each other where workers are idle, and return their results in order.

    Called by a task of `Workers`, else the parts run one after the other. Who calls does what nobody has begun, so
    that nobody waits for a worker that will not come. The parts must not depend on each other.
    """
    pool: ThreadPoolExecutor | None = getattr(_here, "pool", None)
    if pool is None or len(tasks) < 2:
        return [task() for task in tasks]
    others = [pool.submit(task) for task in tasks[1:]]
    try:
        first = tasks[0]()
        return [
            first,
            *(task() if other.cancel() else other.result() for task, other in zip(tasks[1:], others, strict=True)),
        ]
    except BaseException:
        # One that was cancelled counts as done only when a worker comes by, which may be the one that would wait here.
        wait([other for other in others if not other.cancel()])
        raise


def _guarded(task: Callable[[], Any], on_error: Callable[[], None]) -> Any:
    try:
        return task()
    except BaseException:
        on_error()
        raise
