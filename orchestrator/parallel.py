"""Work on several cores whose result does not depend on how many there are.

Every torch operation runs on one thread, so that its sums are made in one order on every machine; cores are filled by
running independent pieces of work beside each other. (An operation that is itself spread over threads may sum in
another order for each number of threads: Cholesky does; and it waits for the slowest thread when the machine is busy.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any


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
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="walk", initializer=_start_worker)

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


def _guarded(task: Callable[[], Any], on_error: Callable[[], None]) -> Any:
    try:
        return task()
    except BaseException:
        on_error()
        raise


def _start_worker() -> None:
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
