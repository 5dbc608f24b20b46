"""One model, many askers: requests wait in a bounded queue, and a thread answers one at a time."""

import asyncio
import collections
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

Start = Callable[[], Iterator[list[int]]]
"""Begins an answer: an iterator over the token ids that each round commits."""

_MEMORY = 0.2
"""Weight of the newest answer in the running mean of their seconds."""


class QueueFullError(Exception):
    """No place is left; `retry_after` is in how many seconds one may be, from the time that answers took so far."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class QueueStoppedError(Exception):
    """The queue answers no more."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


class Ticket:
    """A place in the queue, and then the answer, in the event loop that asked.

    Iterated over, it yields token ids a round, and raises what ended the answer early.
    """

    def __init__(self, start: Start) -> None:
        self._start, self._loop = start, asyncio.get_running_loop()
        self._rounds: asyncio.Queue[list[int] | BaseException | None] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ends the answer behind the round that is on its way, or gives the place in the queue up."""
        self._cancelled.set()

    def stop(self) -> None:
        """Cancels, and raises a `QueueStoppedError` where the answer is awaited."""
        self.cancel()
        self._send(QueueStoppedError())

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        while (tokens := await self._rounds.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            yield tokens

    def answer(self) -> None:
        """Makes the answer, in the queue's thread."""
        try:
            for tokens in self._start():
                if self.cancelled:
                    return
                self._send(tokens)
            self._send(None)
        except Exception as error:  # the asker is told, and the next one served
            self._send(error)

    def _send(self, item: list[int] | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._rounds.put_nowait, item)
        except RuntimeError:  # the event loop is closed, nobody listens
            self.cancel()


class ModelQueue:
    """First come, first served, one at a time."""

    def __init__(self, waiting: int) -> None:
        """Starts the thread; `waiting` is how many may wait beside the one that is answered."""
        self._waiting = waiting
        self._tickets: collections.deque[Ticket] = collections.deque()
        self._current: Ticket | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._seconds: float | None = None
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, start: Start) -> Ticket:
        """Queues an answer; to be called in the event loop that awaits it.

        Raises:
          QueueFullError: as many wait as may.
          QueueStoppedError: the queue has been stopped.
        """
        with self._changed:
            if self._closed:
                raise QueueStoppedError
            self._tickets = collections.deque(ticket for ticket in self._tickets if not ticket.cancelled)
            ahead = len(self._tickets) + (self._current is not None)
            if ahead > self._waiting:
                raise QueueFullError(max(1, math.ceil(self._seconds or 1.0)))
            ticket = Ticket(start)
            self._tickets.append(ticket)
            self._changed.notify()
        return ticket

    def depth(self) -> tuple[int, int]:
        """How many are being answered, 0 or 1, and how many wait."""
        with self._changed:
            return int(self._current is not None), sum(not ticket.cancelled for ticket in self._tickets)

    @property
    def stopped(self) -> bool:
        return self._closed

    def stop(self) -> None:
        """Ends what is on its way behind its round and drops those who wait; each asker gets a `QueueStoppedError`."""
        with self._changed:
            stopped = [] if self._closed else [*self._tickets, *filter(None, [self._current])]
            self._closed = True
            self._changed.notify()
        for ticket in stopped:
            ticket.stop()

    def close(self, timeout: float | None = None) -> None:
        """Stops, and waits for the thread, `timeout` seconds at most."""
        self.stop()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._tickets or self._closed)
                if self._closed:
                    return
                self._current = self._tickets.popleft()
            if not self._current.cancelled:
                start = time.perf_counter()
                self._current.answer()
                self._note(time.perf_counter() - start)

    def _note(self, seconds: float) -> None:
        self._seconds = seconds if self._seconds is None else (1 - _MEMORY) * self._seconds + _MEMORY * seconds
