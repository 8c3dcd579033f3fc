"""A thread beside the trainer's for calls that must not overlap each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


class Worker(Generic[Result]):
    """Runs calls one after another, in the order in which they came.

    The thread is a daemon: a call that never returns does not keep the process alive. It has the
    CUDA device of the thread that made it, which would else be the first.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Result], Callable[[], Result]] | None] = SimpleQueue()
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        device = torch.cuda.current_device() if used else None
        threading.Thread(target=self._run, args=(device,), name="rewards", daemon=True).start()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Return the call's future result, or what it raised."""
        future: Future[Result] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """End the thread after the calls that wait."""
        self._calls.put(None)

    def _run(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        while (job := self._calls.get()) is not None:
            future, call = job
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - handed on to whoever asks
                future.set_exception(error)
