"""One engine for many requests: a thread runs it, and each caller gets the pieces of its answer."""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace

from experiments.vlm.generate.answering import Answering
from torchtitan.generation.engine import Answer, Event, Request
from torchtitan.tools.logging import logger


class EngineFailed(Exception):
    """The engine failed while it answered: a fault of the program, whose traceback is in the log."""


class Service:
    """Answers requests in one batch as they come. `close` ends its thread."""

    def __init__(self, answering: Answering):
        self.prompter = answering.prompter
        self.engine = answering.engine
        self._asked: queue.Queue[Request | None] = queue.Queue()
        self._pieces: dict[int, queue.Queue[Event | None]] = {}
        self._lock = threading.Lock()
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> Generator[Event, None, None]:
        """The pieces of an answer as they come. Closing the iterator early cancels the answer.

        The request's own number decides only its draws. Raises EngineFailed.
        """
        pieces: queue.Queue[Event | None] = queue.Queue()
        with self._lock:
            self._count += 1
            key = self._count
            self._pieces[key] = pieces
        self._asked.put(replace(request, key=key))
        answer: Answer | None = None
        try:
            while True:
                event = pieces.get()
                if event is None:
                    raise EngineFailed
                answer = event.answer
                yield event
                if answer.ended:
                    return
        finally:
            if answer is not None:
                answer.cancelled = True
            with self._lock:
                self._pieces.pop(key, None)

    def close(self) -> None:
        """Ends the thread once what is asked has been answered."""
        self._asked.put(None)
        self._thread.join()

    def _requests(self) -> Iterator[Request | None]:
        while True:
            idle = not any(self.engine.rows)
            try:
                request = self._asked.get(block=idle)
            except queue.Empty:
                yield None
                continue
            if request is None:
                return
            yield request

    def _run(self) -> None:
        ended = False
        while not ended:
            try:
                for event in self.engine.answer(self._requests()):
                    self._give(event)
                ended = True
            except Exception:
                logger.exception("the engine failed; requests that wait get an error")
                with self._lock:
                    for pieces in self._pieces.values():
                        pieces.put(None)

    def _give(self, event: Event) -> None:
        with self._lock:
            pieces = self._pieces.get(event.answer.request.key)
        if pieces is None:
            event.answer.cancelled = True  # nobody waits for it any more
        else:
            pieces.put(event)
