"""Run tasks in a pool of worker processes, and return answers in the order of the tasks.

concurrent.futures lacks three properties that are needed here: workers end whenever the parent ends, because
their pipe closes; they can be stopped in the middle of a task; and Ctrl-C reaches only the parent.
"""

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, Self

from foundation.errors import UserError


class WorkerError(UserError):
    """A worker process ended in the middle of a task."""


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Processes started in the block ignore it for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    """Run a worker. Its first message is the handler, all others are tasks.

    It ends when the parent closes the pipe, or with an exception of the handler and a traceback on stderr.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    messages = _messages(connection)
    handler: Any = next(messages, None)  # None: the pipe is closed, so there are no tasks either
    for task in messages:
        answer = handler(task)
        with suppress(ConnectionError):
            connection.send(answer)


def _messages(connection: Connection) -> Iterator[Any]:
    with suppress(EOFError, ConnectionError):
        while True:
            yield connection.recv()


class WorkerPool:
    """A pool of worker processes, as a context manager."""

    def __init__(self, num_workers: int, handler: Callable[[Any], Any]) -> None:
        """Configure the pool; `with` starts it.

        Args:
            handler: task -> answer; every worker has a copy. Handler, tasks and answers must be picklable.
        """
        assert num_workers >= 1, num_workers
        self._num_workers = num_workers
        self._handler = handler
        self._workers: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> Self:
        # One thread waits for each worker. spawn, because a fork of a process with threads may deadlock.
        context = multiprocessing.get_context("spawn")
        unbound: SimpleQueue[tuple[SpawnProcess, Connection]] = SimpleQueue()
        self._mine = threading.local()
        self._threads = ThreadPoolExecutor(self._num_workers, initializer=self._bind, initargs=(unbound,))
        resource_tracker.ensure_running()  # else the first start() does it, and unblocks SIGINT
        with interrupts_held():
            for _ in range(self._num_workers):
                connection, its_end = context.Pipe()
                process = context.Process(target=_serve, args=(its_end,), daemon=True)
                process.start()
                its_end.close()  # the worker has the only copy now, so the pipe closes when it dies
                self._workers.append((process, connection))
                unbound.put((process, connection))
        return self

    def __exit__(self, *_: object) -> None:
        with interrupts_held():
            for process, _connection in self._workers:
                process.terminate()  # safe: workers have no state
            self._threads.shutdown(cancel_futures=True)
            for process, connection in self._workers:
                process.join()
                connection.close()

    def answers(self, tasks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (task, answer) in the order of the tasks. At most two tasks per worker are taken in advance.

        Raises WorkerError if a worker dies.
        """
        asked: deque[tuple[Any, Future[Any]]] = deque()
        for task in tasks:
            asked.append((task, self._threads.submit(self._ask, task)))
            if len(asked) == 2 * self._num_workers:
                yield self._oldest(asked)
        while asked:
            yield self._oldest(asked)

    @staticmethod
    def _oldest(asked: deque[tuple[Any, Future[Any]]]) -> tuple[Any, Any]:
        task, future = asked.popleft()
        return task, future.result()

    def _bind(self, unbound: SimpleQueue[tuple[SpawnProcess, Connection]]) -> None:
        self._mine.worker = _, connection = unbound.get()
        # Not an argument of the process: start() would block until the worker has read it.
        with suppress(ConnectionError):  # the worker is dead already; the first task reports it
            connection.send(self._handler)

    def _ask(self, task: Any) -> Any:
        process, connection = self._mine.worker
        try:
            connection.send(task)
            return connection.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            raise WorkerError(
                f"a worker process ended with status {process.exitcode}; its message is above "
                "(none, and status -9: the system ran out of memory, so try fewer workers)"
            ) from error
