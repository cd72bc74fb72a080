"""`Client`: calls that get their answer, or an error that says truthfully whether they may have run.

Knows which servers there are and which of them takes the next call; how one is reached is `protoframe._link`'s, and how
often a call is made `protoframe._attempts`'s.
"""

from __future__ import annotations

import enum
import random
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.logger import Logger

from protoframe._attempts import Attempts
from protoframe._calling import Callee, Interceptable, failed, seconds_of
from protoframe._clock import Timer, call_later, clock_of
from protoframe._context import Scope, scope
from protoframe._datagram_sockets import random_of
from protoframe._endpoints import Opening
from protoframe._link import Link
from protoframe._protocol import Protocol
from protoframe._proxy import InterceptedStream, proxy_class
from protoframe._srv import Place, ServiceLookup, service_name
from protoframe.authentication import Token
from protoframe.core.balance import Balance
from protoframe.core.limits import Limits
from protoframe.core.retry import Backoff, RetryBudget, RetryPolicy
from protoframe.core.schema import methods_of, protocol_name
from protoframe.errors import (
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    Error,
    Unauthenticated,
    VersionMismatch,
    not_run,
    own_copy,
)
from protoframe.interceptors import Interceptor, checked

__all__ = ["Calls", "Client", "ClientState"]

_log = Logger(namespace="protoframe.client")

P = TypeVar("P", bound=Protocol[Any])

#: Seconds between two questions of how a server is, where there are several.
HEALTH_INTERVAL = 5.0
#: What is no use to try again.
_FOR_GOOD = (Unauthenticated, VersionMismatch)


class ClientState(enum.Enum):
    """How a `Client` stands to its servers."""

    IDLE = "idle"
    """It was not started, or is stopped."""
    CONNECTING = "connecting"
    """No server was reached yet, and none has failed."""
    READY = "ready"
    """A server takes calls."""
    UNAVAILABLE = "unavailable"
    """No server takes calls; each is tried again, and calls wait."""


class Client(Service, Generic[P]):
    """Calls servers, through the loss of connections and servers.

    Used as ``async with Client(reactor, "tcp:127.0.0.1:12000", Speech) as speech:``, it gives a proxy, typed as the
    Protocol, as soon as a server is reached, and stops when the block ends.  It is an `IService` too: started as one,
    it connects for as long as it runs, and calls wait until a server is there.

    A call that was on its way when the connection was lost has its outcome told over the next one: the server knows
    this client again.  A call with a stream fails with `ConnectionLost`.

    :param where: a server, as `connect` takes it, or several of them, or ``srv:_service._tcp.domain`` for those that
        the SRV records of the name tell (RFC 2782).
    :param protocol: what the servers answer.
    :param serving: what this end answers, where a server may call it: a Protocol, or its class, of which each
        connection has an instance of its own.
    :param limits: what this end takes of a server.
    :param token: shows the servers who calls.
    :param interceptors: what runs around each call; the first is the outermost.
    :param retry: which calls are made again, and when.
    :param retries: the same for some methods, by their names.
    :param budget: how many calls may be made again, for each that is made, and a second beside.
    :param reconnect: how long to wait before a server is tried again.
    :param resolver: looks SRV records up, as twisted.names does, which is the default.
    :raises ValueError: ``where`` is wrong, or there is no server.
    :raises TypeError: the Protocol has a signature that cannot travel, or something is not of its type.
    :ivar where: the servers, as a text.
    :ivar proxy: calls the servers; typed as the Protocol.
    """

    proxy: P

    def __init__(
        self,
        reactor: Any,
        where: str | IStreamClientEndpoint | Sequence[str | IStreamClientEndpoint],
        protocol: type[P],
        *,
        serving: Protocol[Any] | type[Protocol[Any]] | None = None,
        limits: Limits | None = None,
        token: Token | None = None,
        interceptors: Iterable[Interceptor] = (),
        retry: RetryPolicy | None = None,
        retries: Mapping[str, RetryPolicy] | None = None,
        budget: tuple[float, float] = (0.2, 10.0),
        reconnect: Backoff | None = None,
        resolver: Any = None,
    ) -> None:
        self.reactor = reactor
        self.clock = clock_of(reactor)
        octets = random_of(reactor)
        self._random = random.Random(int.from_bytes(octets(8)))  # noqa: S311 - it is to spread load, not to keep secrets
        self.chance: Callable[[], float] = self._random.random
        self.budget = RetryBudget(*budget, now=self.clock())
        self.default_timeout = (limits if limits is not None else Limits()).default_timeout
        self._retry = retry if retry is not None else RetryPolicy()
        self._retries = _by_method(protocol, retries or {})
        self._waiting: dict[object, tuple[Callable[[Error | None], None], bool]] = {}
        # Calls that have no outcome yet.
        self._attempts: dict[Attempts, None] = {}
        # Who waits until it is stopped, while it is about to.
        self._stopping: list[Deferred[None]] | None = None
        self._closings = 0
        self._watchers: list[Callable[[ClientState], None]] = []
        self._state = ClientState.IDLE
        self._balance = Balance()
        self._name = protocol_name(protocol) if isinstance(protocol, type) else ""
        self._health_timer: Timer | None = None
        limits = limits if limits is not None else Limits()
        backoff = reconnect if reconnect is not None else Backoff()

        def link(place: Place) -> Link[P]:
            opening = Opening(reactor, place.where, protocol, serving, limits, token)
            return Link(
                reactor, opening, place, octets, self.chance, backoff, lambda: bool(self._waiting), self._changed
            )

        self._make_link = link
        self._links: list[Link[P]] = []
        # Servers that are none any more, and have calls of this client.
        self._leaving: list[Link[P]] = []
        self._lookup: ServiceLookup | None = None
        self._lookup_error: Error | None = None
        service = service_name(where)
        if service is not None:
            # What else may be wrong is told now, not when there are servers.
            link(Place("tcp:localhost:1"))
            self._lookup = ServiceLookup(reactor, service, resolver, self._set_places, self._lookup_failed)
            self.where = str(where)
        else:
            places = [where] if isinstance(where, str) or not isinstance(where, Sequence) else list(where)
            if not places:
                raise ValueError("where: there is no server")
            self._links = [link(Place(one)) for one in places]
            self.where = ", ".join(one.where for one in self._links)
        self._calls = Calls(self, checked(interceptors))
        self.proxy = typing.cast("P", proxy_class(protocol)(self._calls, self.where))

    def __repr__(self) -> str:
        return f"<Client of {self.where}: {self.state.value}>"

    # IService, and what else starts and stops it.

    def startService(self) -> None:
        """Connects, and goes on doing so."""
        if self.running:
            return
        super().startService()  # type: ignore[no-untyped-call]
        self._lookup_error = None
        for link in self._links:
            link.start()
        if self._lookup is not None:
            self._lookup.start()
        if self._lookup is not None or len(self._links) > 1:
            self._check_health()
        self._update()

    def stopService(self) -> Deferred[None]:
        """Closes all connections in order; fires when they are gone.  Calls that have no outcome yet fail."""
        done: Deferred[None] = Deferred()
        if self._stopping is not None:
            self._stopping.append(done)
        elif not self.running:
            done.callback(None)
        if not self.running:
            return done
        super().stopService()  # type: ignore[no-untyped-call]
        stopping = self._stopping
        if stopping is None:
            stopping = self._stopping = [done]
        if self._health_timer is not None:
            self._health_timer.cancel()
            self._health_timer = None
        if self._lookup is not None:
            self._lookup.stop()
        for attempts in list(self._attempts):
            attempts.stop(ConnectionLost("the client was stopped"))
        self._tell_waiting(not_run(ConnectionLost("the client was stopped")))
        closing = DeferredList([link.stop() for link in (*self._links, *self._leaving)], consumeErrors=True)
        self._leaving.clear()
        self._update()

        self._closings += 1

        def stopped(_: Any) -> None:
            self._closings -= 1
            if self._closings:
                # It was started and stopped again meanwhile.
                return
            self._stopping = None
            for one in stopping:
                one.callback(None)

        closing.addCallback(stopped)
        return done

    async def __aenter__(self) -> P:
        self.startService()
        try:
            return await self.whenConnected()
        except BaseException:
            await self.stopService()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stopService()

    def whenConnected(self) -> Deferred[P]:
        """Fires with the proxy when a server takes calls.

        It fails with why not, as `connect` would, when each of the servers was tried once in vain.
        """
        if not self.running:
            return failed(not_run(ConnectFailed("the client is not started")))
        if self.pick(set()) is not None:
            done: Deferred[P] = Deferred()
            done.callback(self.proxy)
            return done
        untried = any(link.error is None for link in self._links)
        error = next((link.error for link in self._links if link.error is not None), self._lookup_error)
        if not untried and error is not None:
            return failed(own_copy(error))
        opening: Deferred[P] = Deferred(lambda _: stop())

        def ready(error: Error | None) -> None:
            if error is not None:
                opening.errback(error)
            else:
                opening.callback(self.proxy)

        stop = self.wait(ready, is_first=True)
        return opening

    # How it stands.

    @property
    def state(self) -> ClientState:
        """How it stands to its servers."""
        return self._state

    def watch(self, changed: Callable[[ClientState], None]) -> Callable[[], None]:
        """Has a function called whenever the state changes; what undoes that."""
        self._watchers.append(changed)

        def stop() -> None:
            with suppress(ValueError):
                self._watchers.remove(changed)

        return stop

    def _update(self) -> None:
        if not self.running:
            state = ClientState.IDLE
        elif any(link.is_up for link in self._links):
            state = ClientState.READY
        elif any(link.error is None and not link.was_up for link in self._links) or (
            not self._links and self._lookup_error is None
        ):
            state = ClientState.CONNECTING
        else:
            state = ClientState.UNAVAILABLE
        if state is self._state:
            return
        self._state = state
        for changed in list(self._watchers):
            try:
                changed(state)
            except Exception:
                _log.failure("what watches {client} failed", client=self)

    def _set_places(self, places: list[Place]) -> None:
        """These are the servers from now on; one that is none any more ends what it has begun."""
        self._lookup_error = None
        wanted = {place.where: place for place in places}
        self._leaving = [link for link in self._leaving if link.is_running]
        for link in list(self._links):
            if link.place.where in wanted:
                link.place = wanted.pop(link.place.where)
                continue
            self._links.remove(link)
            self._balance.forget(link)
            self._leaving.append(link)
            link.retire()
        for place in wanted.values():
            try:
                made = self._make_link(place)
            except ValueError as error:
                _log.warn("{client}: {error}", client=self, error=error)
                continue
            self._links.append(made)
            made.start()
        self._update()

    def _lookup_failed(self, error: Error) -> None:
        """The servers are not known; those that were known stay."""
        self._lookup_error = error
        _log.info("{client}: {error}", client=self, error=error)
        if not self._links:
            self._tell_waiting(error, firsts_only=True)
        self._update()

    def _check_health(self) -> None:
        """Asks the servers that can be reached how they are, again and again."""
        for link in list(self._links):
            link.check_health(self._name)
        self._health_timer = call_later(self.reactor, HEALTH_INTERVAL, self._check_health)

    def _changed(self, link: Link[P]) -> None:
        """A server can be reached, or not any more."""
        self._update()
        if not self.running:
            return
        if link.is_up:
            self._tell_waiting(None)
        elif isinstance(link.error, _FOR_GOOD) and all(isinstance(one.error, _FOR_GOOD) for one in self._links):
            self._tell_waiting(link.error)
        elif all(one.error is not None for one in self._links) and link.error is not None:
            self._tell_waiting(link.error, firsts_only=True)

    # Servers, for a call's attempts.

    def pick(self, avoided: set[Any]) -> Link[P] | None:
        """The server for the next call: of two that are chosen by chance the one with fewer calls on their way.

        One that has lost a race counts as having twice as many, or more.  One that answers with errors again and again
        is left alone for a while, unless there is no other.
        """
        up = [link for link in self._links if link.is_up]
        if len(up) > 1:
            now = self.clock()
            up = self._balance.without(up, now)
            up = [link for link in up if link not in avoided] or up
            first = min(link.place.priority for link in up)
            up = [link for link in up if link.place.priority == first]
        if len(up) > 2:
            up = [self._draw(up), self._draw(up)]
        if len(up) == 2:
            one, other = map(self._load, up)
            return up[0] if one < other or (one == other and self.chance() < 0.5) else up[1]
        return up[0] if up else None

    def _draw(self, links: list[Link[P]]) -> Link[P]:
        """One of several, by their weights, and not the same again."""
        (drawn,) = self._random.choices(links, [max(1, link.place.weight) for link in links])
        links.remove(drawn)
        return drawn

    def _load(self, link: Link[P]) -> float:
        return (len(link.calls) + 1) * self._balance.slowness(link, self.clock()) / max(1, link.place.weight)

    def wait(self, ready: Callable[[Error | None], None], *, is_first: bool = False) -> Callable[[], None]:
        """Has a function called when a server takes calls, or with why none ever will; what undoes that.

        :param is_first: whether it is told so too when none can be reached for now.
        """
        token = object()
        self._waiting[token] = (ready, is_first)
        for link in self._links:
            link.hurry()

        def stop() -> None:
            self._waiting.pop(token, None)

        return stop

    def _tell_waiting(self, error: Error | None, *, firsts_only: bool = False) -> None:
        for token, (_, is_first) in list(self._waiting.items()):
            # Whoever is told may give up another, or stop the client.
            if (firsts_only and not is_first) or token not in self._waiting:
                continue
            ready, _ = self._waiting.pop(token)
            try:
                ready(own_copy(error) if error is not None else None)
            except Exception:
                _log.failure("what waited for {client} failed", client=self)

    def reason(self) -> str:
        """Why no server takes calls."""
        why = [str(link.error or f"{link.where}: not connected") for link in self._links]
        return "; ".join(why) or str(self._lookup_error or f"{self.where}: not looked up yet")

    def ended(self, link: Link[P], error: Error | None) -> None:
        """A call of a server has ended: it counts for or against the server."""
        self._balance.ended(link, self.clock(), error)

    def lost(self, link: Link[P]) -> None:
        """Another server has answered the same call sooner, though it was asked later."""
        self._balance.lost(link, self.clock())

    # Calls.

    def make(self, method: Callee, arguments: bytes, around: Scope) -> Deferred[Any]:
        """Makes a call with one answer."""
        if not self.running:
            return failed(not_run(ConnectFailed("the client is not started")))
        try:
            seconds = seconds_of(method, around, self.default_timeout)
        except Error as error:
            return failed(error)
        policy = self._retries.get(method.full_name, self._retry)
        attempts = Attempts(self, method, arguments, around, self.clock() + seconds, policy)
        self._attempts[attempts] = None
        return attempts.start()

    def over(self, attempts: Attempts) -> None:
        """A call has its outcome."""
        self._attempts.pop(attempts, None)

    def when_up(self, around: Scope) -> Deferred[Link[P]]:
        """Fires with a server, when one takes calls, for a call that is made there or not at all."""
        if not self.running:
            return failed(not_run(ConnectFailed("the client is not started")))
        link = self.pick(set())
        found: Deferred[Link[P]] = Deferred(lambda _: stop())
        if link is not None:
            found.callback(link)
            return found
        remaining = around.remaining()
        seconds = self.default_timeout if remaining is None else max(0.0, remaining)

        def ready(error: Error | None) -> None:
            timer.cancel()
            up = self.pick(set()) if self.running else None
            if error is None and up is not None:
                found.callback(up)
            else:
                found.errback(error or not_run(ConnectFailed(self.reason())))

        def expired() -> None:
            stop_waiting()
            found.errback(not_run(DeadlineExceeded(f"no server could be reached in time: {self.reason()}")))

        def stop() -> None:
            stop_waiting()
            timer.cancel()

        stop_waiting = self.wait(ready)
        timer = call_later(self.reactor, seconds, expired)
        return found


class Calls(Interceptable):
    """What proxies call: see `protoframe._calling.Caller`.

    :param client: makes the calls.
    """

    def __init__(self, client: Client[Any], interceptors: Sequence[Interceptor]) -> None:
        super().__init__()
        self._client = client
        if interceptors:
            self.intercept(interceptors, None, client.where, lambda: None)

    def call(self, method: Callee, arguments: bytes, sent: Any = None) -> Deferred[Any]:
        """Calls a method."""
        if sent is not None:
            around = scope.get()
            return Deferred.fromCoroutine(self._call_there(method, arguments, sent, around))
        return self._client.make(method, arguments, scope.get())

    async def _call_there(self, method: Callee, arguments: bytes, sent: Any, around: Scope) -> Any:
        link = await self._client.when_up(around)
        return await link.connection.calls.call(method, arguments, sent)  # type: ignore[union-attr]

    def call_stream(self, method: Callee, arguments: bytes, sent: Any = None) -> Any:
        """Calls a method whose answer is a stream."""
        link = self._client.pick(set()) if self._client.running else None
        if link is not None and link.connection is not None:
            return link.connection.calls.call_stream(method, arguments, sent)
        return InterceptedStream(Deferred.fromCoroutine(self._stream_there(method, arguments, sent, scope.get())))

    async def _stream_there(self, method: Callee, arguments: bytes, sent: Any, around: Scope) -> Any:
        link = await self._client.when_up(around)
        return link.connection.calls.call_stream(method, arguments, sent)  # type: ignore[union-attr]

    def call_oneway(self, method: Callee, arguments: bytes) -> Deferred[None]:
        """Calls a method that gives no answer; fires when the call is on its way."""
        return Deferred.fromCoroutine(self._oneway_there(method, arguments, scope.get()))

    async def _oneway_there(self, method: Callee, arguments: bytes, around: Scope) -> None:
        link = await self._client.when_up(around)
        await link.connection.calls.call_oneway(method, arguments)  # type: ignore[union-attr]


def _by_method(protocol: type[Any], retries: Mapping[str, RetryPolicy]) -> dict[str, RetryPolicy]:
    """Policies by the full names of methods.

    :raises ValueError: the Protocol has no such method.
    """
    methods = methods_of(protocol)
    unknown = retries.keys() - methods.keys()
    if unknown:
        raise ValueError(f"retries: {protocol.__name__} has no request called {', '.join(sorted(unknown))}")
    return {methods[name].full_name: policy for name, policy in retries.items()}
