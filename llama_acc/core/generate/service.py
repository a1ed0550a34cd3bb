"""An engine in a thread of its own, for a server: requests come from any thread, and hear of each token as it comes."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

from llama_acc.core.device import rest_threads
from llama_acc.core.errors import LlamaAccError, RunError, UserError
from llama_acc.core.generate.engine import Engine, Prompt, Reply
from llama_acc.core.generate.sampling import Sampler, TokenLogprobs
from llama_acc.core.text import count_text


class QueueFull(LlamaAccError):
    """As many requests wait as may."""


class Event(NamedTuple):
    """What a pass brought for a reply."""

    text: str  # what came to its text; it may come later than its tokens, as a stop string is never shown in part
    tokens: Sequence[int] = ()  # the next ones of its tokens: one, or none where it has ended without one more
    logprobs: Sequence[TokenLogprobs] = ()  # of these tokens, where they are asked for
    finish_reason: str | None = None
    """None while the reply is under way; otherwise see `Reply`; "error": the service has failed."""


Listener = Callable[[Event], None]
"""Is called in the service's thread, for each event of a reply; it must return at once and raise nothing."""


class Asked(NamedTuple):
    """What a reply is asked for with."""

    prompt: Prompt
    sampler: Sampler
    listen: Listener


class Service:
    """Runs an engine, which nothing else may use: its own thread changes it at any time."""

    def __init__(self, engine: Engine, queue: int = 64) -> None:
        self.engine, self.queue = engine, queue  # so many requests may wait for a slot
        self.failure: BaseException | None = None  # what ended its thread; None as long as it runs
        self.on_failure: Callable[[], None] = lambda: None  # is called in its thread then
        self._calls: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._listeners: dict[Reply, Listener] = {}
        self._told: dict[Reply, int] = {}
        self._is_closing = self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @contextmanager
    def running(self) -> Iterator["Service"]:
        """It answers within; see `close`."""
        rest_threads()
        self._thread.start()
        try:
            yield self
        finally:
            self.close()
            self._thread.join()

    def close(self) -> None:
        """Takes no more requests, and cancels the replies under way before the next pass. Does not wait for that."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def submit(self, requests: Sequence[Asked]) -> "Future[list[Reply]]":
        """Asks for replies, all of them or none. Between two passes they are taken into the queue.

        Errors of the result:
            QueueFull: too many are waiting.
            UserError: a prompt that the engine refuses (`Engine.add`); more replies than may ever wait.
            RunError: the service has failed or is closing.
        """
        result: Future[list[Reply]] = Future()

        def add() -> None:
            try:
                result.set_result(self._add(requests))
            except Exception as error:
                result.set_exception(error)

        self._call(add)
        return result

    def cancel(self, reply: Reply) -> None:
        """Ends a reply before the next pass, if it has not; its listener hears nothing more."""
        self._call(lambda: self._cancel(reply))

    def generate(self, prompts: Iterable[Prompt], sampler: Sampler) -> Iterator[tuple[Reply, str]]:
        """As `Engine.generate`, one reply after the other, for a thread that waits. The engine does not wait for it: a
        reply may have more tokens than what has come of its text.
        """
        for index, prompt in enumerate(prompts):
            came: queue.SimpleQueue[Event] = queue.SimpleQueue()
            [reply] = self.submit([Asked(prompt, sampler.spawn(), came.put)]).result()
            reply.index, event = index, None
            try:
                while event is None or event.finish_reason is None:
                    event = came.get()
                    if event.finish_reason == "error":
                        raise RunError(f"the engine has failed: {self.failure}")
                    yield reply, event.text
            finally:
                self.cancel(reply)

    def _call(self, call: Callable[[], None]) -> None:
        """Has it called between two passes."""
        with self._changed:
            if not self._has_ended:
                self._calls.append(call)
                self._changed.notify()
                return
        call()  # nothing else uses the engine any more

    def _add(self, requests: Sequence[Asked]) -> list[Reply]:
        if self.failure is not None or self._is_closing:
            raise RunError("no more requests are answered: the server is closing")
        engine = self.engine
        if len(requests) > (most := engine.slots + self.queue):
            raise UserError(f"{len(requests)} answers are asked for at once, and the server takes {most}", "lower n")
        if len(engine.running) + len(engine.waiting) + len(requests) > most:
            raise QueueFull(f"{count_text(len(engine.waiting), 'request')} in front: try again later")
        replies: list[Reply] = []
        try:
            for prompt, sampler, listen in requests:
                replies.append(engine.add(prompt, sampler))
                self._listeners[replies[-1]] = listen
        except LlamaAccError:
            for reply in replies:
                self._cancel(reply)
            raise
        return replies

    def _cancel(self, reply: Reply) -> None:
        self._listeners.pop(reply, None)
        self._told.pop(reply, None)
        self.engine.cancel(reply)

    def _run(self) -> None:
        try:
            while self._next_calls():
                for reply, text in self.engine.step():
                    self._tell(reply, text)
        except BaseException as error:
            self.failure = error
        with self._changed:
            self._has_ended, calls = True, self._calls
        for call in calls:
            call()
        for reply, listen in list(self._listeners.items()):
            self._cancel(reply)
            listen(Event("", finish_reason="cancelled" if self.failure is None else "error"))
        if self.failure is not None:
            self.on_failure()

    def _next_calls(self) -> bool:
        """Makes the calls that have come; waits for one while there is nothing to generate. Whether to go on."""
        with self._changed:
            engine = self.engine
            self._changed.wait_for(lambda: self._is_closing or self._calls or engine.running or engine.waiting)
            calls, self._calls = self._calls, []
            goes_on = not self._is_closing
        for call in calls:
            call()
        return goes_on

    def _tell(self, reply: Reply, text: str) -> None:
        """Lets a reply's listener hear of a pass."""
        listen, told = self._listeners[reply], self._told.get(reply, 0)
        tokens, logprobs = reply.tokens[told:], reply.logprobs[told : len(reply.tokens)]
        self._told[reply] = len(reply.tokens)
        if reply.ended:
            del self._listeners[reply], self._told[reply]
        listen(Event(text, tokens, logprobs, reply.finish_reason))
