"""Runs a conversation: the reactor, deadlines, threads, interrupts, and how errors become a line and an exit status.

With `loops` and `connections`, all of the command line that imports Twisted, and only when a command runs.  Knows no
command.
"""

from __future__ import annotations

import os
import shlex
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from protoframe.cli.options import Settings
from protoframe.cli.output import is_terminal, width
from protoframe.cli.problems import CONNECT, REMOTE, TIMEOUT, USAGE, Problem, clean, clip
from protoframe.errors import (
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Internal,
    InvalidArgument,
    MessageTooLarge,
    ResourceExhausted,
    Status,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UnknownMethod,
    VersionMismatch,
)

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from protoframe import Connecting, Token
    from protoframe.reflection import Reflection

__all__ = [
    "Progress",
    "Reader",
    "Target",
    "converse",
    "in_thread",
    "not_opened",
    "opened_in_time",
    "read_token",
    "refused",
    "run",
    "unopened",
]

T = TypeVar("T")

#: What this end takes of a server, in bytes.
_LARGEST_ANSWER = 64 * 1024 * 1024
#: Seconds that closing may take, and that a session may take to end once it is interrupted.
_CLOSING = 0.25
#: Seconds after which a person wonders.
_PATIENCE = 0.5
_LONGEST_MESSAGE = 4096
#: Where a token is, if no file is named.
_TOKEN = "PROTOFRAME_TOKEN"  # noqa: S105 - a name
_USUAL_WIDTH = 80


class Target:
    """What a command is about, for its errors.

    :param where: the endpoint string.
    :param what: ``Protocol.method``, a Protocol, or what else the server is asked for; may be empty.
    """

    def __init__(self, where: str, what: str = "") -> None:
        self.where = where
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} at {self.where}" if self.what else self.where

    def command(self, name: str, *more: str) -> str:
        """A command about the same server, for a hint."""
        return shlex.join(["pf", name, self.where, *more])

    def problem(self, text: str, status: int, hint: str = "") -> Problem:
        """What went wrong here."""
        return Problem(f"{self}: {text}", status, hint)


def read_token(path: str | None) -> Token | None:
    """The token of a file, or else of the environment; ``None`` where neither is given.

    :raises Problem: it cannot be read, or is none.  The text does not have it.
    """
    from protoframe import Token

    try:
        if path:
            return Token.from_file(path)
        return Token.from_environment() if os.environ.get(_TOKEN) else None
    except ValueError as error:
        raise Problem(f"the token: {error}", USAGE, f"--token-file FILE, or {_TOKEN} in the environment") from None


def in_thread(function: Callable[..., T], *arguments: Any) -> Deferred[T]:
    """What a function returns that may wait for a file, a pipe or a person, while the conversation goes on."""
    from twisted.internet.threads import deferToThread

    return deferToThread(function, *arguments)


class Reader:
    """Who reads standard output, where it is a pipe: who goes away is noticed, though nothing is there to be written.

    :ivar is_gone: whether it went away.
    """

    def __init__(self, reactor: Any) -> None:
        self.is_gone = False
        self._coming: Deferred[Any] | None = None
        with suppress(OSError, ValueError):
            if sys.stdout is not None and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
                # Nothing ever comes from this end of a pipe but its hanging up.
                reactor.addReader(self)

    def waits_for(self, coming: Deferred[Any]) -> None:
        """What is cancelled when it goes away."""
        self._coming = coming
        if self.is_gone:
            coming.cancel()

    def fileno(self) -> int:
        """For the reactor, as are those below."""
        return sys.stdout.fileno()

    def logPrefix(self) -> str:
        """Its name in logs."""
        return "standard output"

    def doRead(self) -> None:
        """There is nothing to read."""

    def connectionLost(self, reason: Any) -> None:
        """It went away."""
        self.is_gone = True
        if self._coming is not None:
            self._coming.cancel()


def unopened(reactor: Any, target: Target, settings: Settings) -> Connecting[Reflection]:
    """A conversation that is to be opened; a call over it that has no other deadline may take `Settings.timeout`.

    :raises Problem: WHERE is wrong.
    """
    from protoframe import Limits, connect
    from protoframe.reflection import Reflection

    limits = Limits(
        max_message=_LARGEST_ANSWER,
        max_unfinished=_LARGEST_ANSWER,
        handshake_timeout=settings.timeout,
        close_timeout=_CLOSING,
        default_timeout=settings.timeout,
    )
    try:
        return connect(reactor, target.where, Reflection, limits=limits, token=settings.token)
    except ValueError as error:
        raise Problem(str(error), USAGE, "tcp:host:port, tls:host:port, udp:host:port or unix:path") from None


@asynccontextmanager
async def converse(
    reactor: Any, target: Target, settings: Settings, *, block: bool = True
) -> AsyncIterator[Connecting[Reflection]]:
    """An open conversation.

    :param block: whether what is left of the time holds for the block.
    :raises Problem: WHERE is wrong, or no conversation could be opened.
    """
    from protoframe import timeout

    connecting = unopened(reactor, target, settings)
    with ExitStack() as stack:
        stack.enter_context(timeout(settings.timeout))
        try:
            await connecting
        except Error as error:
            raise not_opened(error, target, settings) from None
        if not block:
            stack.close()
        try:
            yield connecting
        finally:
            await connecting.close()


async def opened_in_time(reactor: Any, opening: Deferred[T], target: Target, settings: Settings) -> T:
    """What a client's opening comes to, within `Settings.timeout`.

    :raises Problem: it could not be opened, or not in time.
    """
    is_late = False

    def give_up() -> None:
        nonlocal is_late
        is_late = True
        opening.cancel()

    timer = reactor.callLater(settings.timeout, give_up)
    try:
        return await opening
    except Error as error:
        raise not_opened(error, target, settings) from None
    except BaseException:
        if is_late:
            raise not_opened(DeadlineExceeded(), target, settings) from None
        raise
    finally:
        if timer.active():
            timer.cancel()


def run(
    session: Callable[[Any], Coroutine[Any, Any, T]],
    target: Target,
    settings: Settings,
    progress: Progress | None = None,
) -> T:
    """Runs a session, which is given the reactor, to its end; once in a process.

    :param progress: of a session that writes something itself, and stops it before that.
    :raises Problem: an error of this package, as a line and a status.
    :raises KeyboardInterrupt: the user asked for an end; the session was cancelled.
    """
    from twisted.internet import reactor as installed
    from twisted.logger import globalLogBeginner

    # What goes wrong is said once, by this module: nothing is logged.
    globalLogBeginner.beginLoggingTo([], discardBuffer=True, redirectStandardIO=False)
    reactor: Any = installed
    running = _Running(reactor, session, progress or Progress(target, settings))
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, running.handle_interrupt)
    reactor.callWhenRunning(running.start)
    try:
        reactor.run()
    finally:
        signal.signal(signal.SIGINT, previous)
    if running.interrupted:
        raise KeyboardInterrupt
    try:
        result: T = running.result()
    except Error as error:
        raise refused(error, target, settings) from None
    return result


class _Running:
    """A session while it runs."""

    interrupted = False

    def __init__(self, reactor: Any, session: Callable[[Any], Coroutine[Any, Any, Any]], progress: Progress) -> None:
        self._reactor = reactor
        self._session = session
        self._progress = progress
        self._deferred: Deferred[Any] | None = None
        self._result: Any = None
        self._error: BaseException | None = None

    def start(self) -> None:
        from twisted.internet.defer import Deferred

        # Twisted's own handler would end the reactor in order and exit with 0.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._progress.start(self._reactor)
        self._deferred = Deferred.fromCoroutine(self._session(self._reactor))
        self._deferred.addCallbacks(self._succeeded, self._failed)
        self._deferred.addBoth(self._end)

    def handle_interrupt(self, *_: Any) -> None:
        """Handles SIGINT: the server is told, in a short time; whoever insists is not kept waiting."""
        if self.interrupted:
            os._exit(130)
        self.interrupted = True
        self._reactor.callFromThread(self._cancel)

    def _cancel(self) -> None:
        self._reactor.callLater(_CLOSING, self._end, None)
        if self._deferred is not None:
            self._deferred.cancel()

    def _succeeded(self, result: Any) -> None:
        self._result = result

    def _failed(self, failure: Any) -> None:
        self._error = failure.value

    def _end(self, _: Any) -> None:
        self._progress.stop()
        # Not stop(): it waits for the threads, and one may be looking up a name for much longer than anyone wants to.
        if self._reactor.running:
            self._reactor.crash()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


class Progress:
    """A line on a terminal that says what is waited for; it is gone when the wait is over."""

    #: Seconds from a line to the next.
    interval = 1.0

    def __init__(self, target: Target, settings: Settings) -> None:
        self._reactor: Any = None
        self._text = clean(f"waiting for {target}")
        self._shown = not settings.quiet and is_terminal(sys.stderr)
        self._began = time.monotonic()
        self._visible = False
        self._timer: Any = None

    def start(self, reactor: Any) -> None:
        """Shows it when somebody would wonder."""
        self._reactor = reactor
        if self._shown:
            self._timer = reactor.callLater(_PATIENCE, self._tick)

    def stop(self) -> None:
        """Takes it away."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._visible:
            self._visible = False
            self._write("")

    def _tick(self) -> None:
        self._visible = True
        self._write(self.line(_terminal_width()))
        self._timer = self._reactor.callLater(self.interval, self._tick)

    def line(self, columns: int) -> str:
        """What it says now, in less than so many columns: a line that wraps could not be taken back."""
        text = f"{self._text}: {time.monotonic() - self._began:.0f} s"
        return text if width(text) < columns else "waiting"

    def _write(self, text: str) -> None:
        # Who took the terminal away cannot be told, and can do without.
        with suppress(OSError):
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


def _terminal_width() -> int:
    try:
        # A terminal that does not say has 0.
        return os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH


def not_opened(error: Error, target: Target, settings: Settings) -> Problem:
    """Why there is no conversation."""
    text = _message(error).removeprefix(f"{target.where}: ")
    if isinstance(error, DeadlineExceeded):
        hint = "a longer --timeout, or check that a protoframe server listens there"
        return target.problem(f"could not connect within {settings.timeout:g} s", TIMEOUT, hint)
    if isinstance(error, VersionMismatch):
        return target.problem(f"could not connect: {text}", CONNECT, "a pf of the server's version")
    if isinstance(error, Unauthenticated):
        return target.problem(f"{error.type_name}: {text}", REMOTE + error.status, _hint(error, target))
    hint = "check the address, and that a protoframe server listens there"
    return target.problem(f"could not connect: {text}", CONNECT, hint)


def refused(error: Error, target: Target, settings: Settings) -> Problem:
    """An error of the call, or from the other end."""
    text = _message(error)
    if isinstance(error, DeadlineExceeded):
        ran = "may have run" if error.may_have_run else "did not run"
        text = f"timed out after {settings.timeout:g} s: {text}" if text else f"timed out after {settings.timeout:g} s"
        return target.problem(f"{text} (it {ran})", TIMEOUT, "a longer --timeout")
    if isinstance(error, ConnectionLost):
        text = f"{text} (the call {'may have run' if error.may_have_run else 'did not run'})"
    if error.type_name != UnknownMethod.__name__:
        text = f"{error.type_name}: {text}" if text else error.type_name
    return target.problem(text, REMOTE + error.status, _hint(error, target))


def _message(error: Error) -> str:
    """An error's message and fields."""
    from msgspec.json import encode

    text = clip(error.message.strip(), _LONGEST_MESSAGE)
    if isinstance(error, Internal) and error.message:
        # The message names the incident, which is the one field.
        return text
    fields = ", ".join(f"{name}={encode(value).decode()}" for name, value in error.detail.items())
    if fields:
        fields = clip(fields, _LONGEST_MESSAGE)
        return f"{text} ({fields})" if text else fields
    return text


def _hint(error: Error, target: Target) -> str:
    if isinstance(error, Unimplemented):
        return target.command("list")
    if isinstance(error, InvalidArgument) or error.status == Status.FAILED:
        return target.command("describe", target.what) if target.what else target.command("list")
    if isinstance(error, Unauthenticated):
        return f"--token-file FILE, or {_TOKEN} in the environment"
    if isinstance(error, Internal):
        return "the server's log"
    if isinstance(error, MessageTooLarge):
        return "a smaller value"
    if isinstance(error, ResourceExhausted | Unavailable | Cancelled):
        return f"again later, or {target.command('ping')}"
    return target.command("describe", target.what) if target.what else ""
