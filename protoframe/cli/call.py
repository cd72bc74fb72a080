"""``pf call``: calls a method, and prints what it answers.

Knows how a call is put together, and how long its answer may take; the types are the server's business, which is why no
declaration is needed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from protoframe.cli.arguments import Argument, open_file, parse_arguments
from protoframe.cli.completing import complete_argument, complete_method, complete_where
from protoframe.cli.items import send, take
from protoframe.cli.methods import UNDESCRIBED, Method, find_method
from protoframe.cli.options import Settings, check_method, check_where, shared
from protoframe.cli.output import write_json
from protoframe.cli.problems import REMOTE, STATUSES

if TYPE_CHECKING:
    from protoframe import Connecting
    from protoframe.cli.running import Progress, Target
    from protoframe.reflection import Reflection

__all__ = ["call"]


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("method", metavar="PROTOCOL.METHOD", callback=check_method, shell_complete=complete_method)
@click.argument("arguments", metavar="[k=v | k:=json | k@file]...", nargs=-1, shell_complete=complete_argument)
@shared
@click.pass_context
def call(
    context: click.Context,
    where: str,
    method: str,
    arguments: tuple[str, ...],
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Call a method, and print its result as a line of JSON, or a line for each item of a stream, as they come.

    Arguments go by name.  k=v gives a string, k:=json any JSON value, k@file the content of a file (k@- reads standard
    input): as base64 where the parameter takes bytes, and as text where it does not.

    Where the parameter is a stream, k@file gives an item for each line of the file, which is a JSON value, and k:=json
    one for each element of an array.

    A stream takes as long as it takes, unless --timeout is given.

    \b
    WHERE is tcp:host:port, tls:host:port, udp:host:port, unix:path
    or any other client endpoint string of Twisted.

    \b
    Examples:
      pf call tcp:127.0.0.1:12000 Speech.upper text=hello
      pf call tcp:127.0.0.1:12000 Speech.spell word=hello pause:=0.5
      pf call unix:/run/bank.sock Bank.pay to=ann cents:=1250
      pf call tcp:files.lan:12000 Files.put name=a.png content@a.png
    """
    # Imported here, as in every command: `pf --help` need not know of errors, the reactor and so on.
    from protoframe.cli.running import Progress, Target, converse, read_token, run

    del json  # A result is JSON in any case.
    given = parse_arguments(arguments)
    for argument in given:
        open_file(argument)
    settings = Settings(timeout, True, quiet, read_token(token_file))
    target = Target(where, method)
    progress = Progress(target, settings)
    is_bounded = context.get_parameter_source("timeout") is not ParameterSource.DEFAULT

    async def session(reactor: Any) -> str:
        began = time.monotonic()
        async with converse(reactor, target, settings, block=False) as connecting:
            left = began + timeout - time.monotonic()
            return await _Call(reactor, connecting, target, given, left).run(progress, is_bounded=is_bounded)

    rest = run(session, target, settings, progress)
    if rest:
        write_json(rest)


class _Call:
    """One call.

    :param seconds: what is left of the time that it may take.
    """

    def __init__(
        self,
        reactor: Any,
        connecting: Connecting[Reflection],
        target: Target,
        given: list[Argument],
        seconds: float,
    ) -> None:
        self._reactor = reactor
        self._connecting = connecting
        self._target = target
        self._given = given
        self._until = time.monotonic() + seconds
        self._is_mute = False
        self._is_late = False

    async def run(self, progress: Progress, *, is_bounded: bool) -> str:
        """Prints what the call is answered with, but for the last lines, which it gives.

        :param is_bounded: whether the time holds for a stream too.
        """
        from protoframe import DeadlineExceeded, FailedPrecondition

        # What may be meant in two ways is for the server to say, who is asked for nothing else.
        is_asked = any(argument.json is None or argument.json.startswith("[") for argument in self._given)
        method = await self._describe() if is_asked else UNDESCRIBED
        sent, plain = self._sorted(method)
        # Reading their files does not count as waiting for the server.
        began_reading = time.monotonic()
        arguments = await method.compose(plain)
        self._until += time.monotonic() - began_reading
        patience: _Patience | None = None
        seconds: float | None = None
        if is_bounded or (method.is_described and not method.streams and sent is None):
            seconds = self._left()
        stream = self._call(arguments, sent, seconds)
        if seconds is None and sent is None and not method.is_described:
            patience = _Patience(self._reactor, self._left(), self._streams, lambda: self._give_up(stream))

        def began() -> None:
            progress.stop()
            if patience is not None:
                patience.end()

        try:
            rest = await take(stream, self._reactor, began)
        except FailedPrecondition as error:
            if self._is_mute and not error.may_have_run:
                text = f"{error.type_name}: {error.message} (pf sends streams to servers that describe themselves)"
                raise self._target.problem(text, REMOTE + error.status) from None
            raise
        finally:
            if patience is not None:
                patience.end()
        if self._is_late:
            raise DeadlineExceeded("the deadline passed before the answer came")
        return rest

    async def _describe(self) -> Method:
        from protoframe import timeout

        with timeout(self._left()):
            method = await find_method(self._connecting, self._target.what)
        self._is_mute = method.is_mute
        return method

    def _sorted(self, method: Method) -> tuple[Argument | None, list[Argument]]:
        """The argument that is sent as a stream, and the others."""
        sent = next((argument for argument in self._given if argument.name in method.sent_streams), None)
        return sent, [argument for argument in self._given if argument is not sent]

    def _call(self, arguments: bytes, sent: Argument | None, seconds: float | None) -> Any:
        from protoframe import timeout

        connection = self._connecting.connection
        items = send(sent) if sent is not None else None
        with timeout(seconds) if seconds is not None else nullcontext():
            return connection.stream_json(self._target.what, arguments, items)

    def _left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    async def _streams(self) -> bool:
        return (await self._describe()).streams

    def _give_up(self, stream: Any) -> None:
        from twisted.internet.defer import Deferred

        self._is_late = True
        Deferred.fromCoroutine(stream.aclose())


class _Patience:
    """Gives an answer the usual time to begin, and more where it turns out to be a stream.

    The server is asked about that when half of the time is over: most calls are answered by then.
    """

    def __init__(
        self,
        reactor: Any,
        seconds: float,
        streams: Callable[[], Coroutine[Any, Any, bool]],
        give_up: Callable[[], None],
    ) -> None:
        self._streams = streams
        self._timers = [reactor.callLater(seconds / 2, self._ask), reactor.callLater(seconds, give_up)]

    def end(self) -> None:
        """Waits for as long as it takes."""
        for timer in self._timers:
            if timer.active():
                timer.cancel()

    def _ask(self) -> None:
        from twisted.internet.defer import Deferred

        asking: Deferred[bool] = Deferred.fromCoroutine(self._streams())
        asking.addCallbacks(lambda streams: self.end() if streams else None, lambda _: None)
