"""One end of a conversation, bound to Twisted: calls become Deferreds, requests are served, one timer is kept.

Knows the request layer and when to send what; not how a request is served (`protoframe._serving`), how calls are made
(`protoframe._calling`), how the items of a stream are made and taken (`protoframe._outlets`, `protoframe._inlets`), who
may call (`protoframe.authentication`), nor what carries the frames: that is a `Carrier`, such as
`protoframe._stream.StreamCarrier`.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from protoframe._calling import Caller, JSONMethod, JSONStream, PendingCall, PendingStream, failed
from protoframe._clock import Timer, call_later, clock_of, watch_steps
from protoframe._context import NOWHERE, get_scope, run_nowhere
from protoframe._inlets import Inlets, Stream
from protoframe._outlets import Outlets
from protoframe._pings import Pings
from protoframe._protocol import Protocol
from protoframe._proxy import proxy_class
from protoframe._serving import MethodTable, Server
from protoframe._sessions import Keeper
from protoframe._tls import describe_tls_failure
from protoframe.authentication import Authenticator, Identity, Shown, certificate_identity, identify
from protoframe.core.conversation import Conversation
from protoframe.core.events import (
    CallFailed,
    CreditReceived,
    Drained,
    Ended,
    EndReceived,
    ErrorReceived,
    Greeted,
    ItemsReceived,
    Opened,
    PongReceived,
    RequestCancelled,
    RequestReceived,
    ResponseReceived,
    StopReceived,
)
from protoframe.core.frames import Flag, Frame
from protoframe.core.limits import Limits
from protoframe.core.messages import BACKLOG, Outbox
from protoframe.core.state import Role, State
from protoframe.errors import (
    ConnectionLost,
    Error,
    InvalidResponse,
    KeepaliveTimeout,
    LocalProtocolError,
    ProtocolError,
    TooMuchUnsent,
    Unauthenticated,
    WriteTimeout,
    not_run,
)
from protoframe.interceptors import Interceptor

__all__ = ["Carrier", "Connection"]

# Not in the class: there its namespace would become the class's name.
_log = Logger(namespace="protoframe.connection")

P = typing.TypeVar("P", bound=Protocol[Any])

_CLOSED = State.CLOSED
_STREAMS = int(Flag.ITEMS | Flag.STREAM)

#: Seconds that a peer has at least to close its end too.
_GRACE = 0.1

#: Turns that streams have in one go; further ones come between those of the reactor.
_ROUNDS = 2

#: Events after which what is ready is sent, so that the peer works on it while this end works on the rest.
_TURN = 16


class Carrier(typing.Protocol):
    """What brings frames to the peer.

    :cvar allowance: octets that are handed to it at a time: what a peer must read for it to take more.
    :cvar is_confirming: whether it tells by `Outbox.confirm` when a large message has come, because what it sends later
        may come earlier.
    """

    allowance: int
    is_confirming: bool

    def send(self, frames: list[bytes]) -> None:
        """Sends frames, in order."""

    def close(self) -> None:
        """Closes once everything is sent; `Connection.lost` follows."""

    def abort(self) -> None:
        """Closes at once; `Connection.lost` follows."""

    def certificate(self) -> Any:
        """The certificate that the peer has shown, and that was verified; ``None`` where there is none."""

    def next_timer(self) -> float:
        """When the carrier wants `handle_timer`; infinity for never.

        Where that moves, it calls `Connection.wake_at`.
        """

    def handle_timer(self, now: float) -> None:
        """
        :raises ProtocolError: the peer was too slow.
        """


class Connection:
    """One end of a conversation.

    :param role: which end.
    :param reactor: for its timers.
    :param limits: what this end takes.
    :param table: the methods that this end serves.
    :param protocols: the instances that serve them.
    :param address: the peer's.
    :param agent: what this end is called in HELLO.
    :param token: a secret that shows the peer who this end is.
    :param authenticator: finds out who the peer is; without one, everybody is let in.
    :param anonymous: whether a peer is let in that shows nothing which the authenticator looks at.
    :param interceptors: what runs around each call that is made or served here, the outermost first.
    :param keeper: keeps what outlives a connection, for peers that have a session.
    :param session: the secret by which the peer knows this end again, over another connection.
    :param next_key: no call of the session that was sent has this key, or one above it.
    :ivar calls: what makes the calls of this end; proxies call it.
    :ivar address: the peer's.
    :ivar where: the same, as a text.
    :ivar timer_due: when the timer goes off that this and the carrier share; infinity for never.
    :ivar opened: fires when the conversation is open, or fails with why it will not be.
    """

    # More attributes than the dictionaries of instances share the names of.
    __slots__ = (
        "__weakref__",
        "_again",
        "_allowance",
        "_anonymous",
        "_authenticating",
        "_authenticator",
        "_busy",
        "_carrier",
        "_clock",
        "_close_timer",
        "_closing",
        "_conversation",
        "_drain_timer",
        "_drained_by",
        "_end_error",
        "_inlets",
        "_is_drained",
        "_keeper",
        "_limits",
        "_made",
        "_next_timer",
        "_outlets",
        "_over",
        "_paused",
        "_pings",
        "_reactions",
        "_reactor",
        "_server",
        "_timer",
        "_traffic",
        "_waiting_for_end",
        "_wake",
        "address",
        "calls",
        "opened",
        "protocols",
        "timer_due",
        "where",
    )

    def __init__(
        self,
        role: Role,
        reactor: IReactorTime,
        limits: Limits,
        table: MethodTable,
        protocols: Sequence[Protocol[Any]],
        carrier: Carrier,
        address: Any,
        agent: str,
        *,
        token: str = "",
        authenticator: Authenticator | None = None,
        anonymous: bool = False,
        interceptors: Sequence[Interceptor] = (),
        keeper: Keeper | None = None,
        session: bytes = b"",
        next_key: int = 0,
    ) -> None:
        self.address = address
        self.where = _where(address)
        self.protocols = protocols
        self.opened: Deferred[None] = Deferred(self._give_up_opening)
        self._waiting_for_end: list[Deferred[None]] = []
        self._reactor = reactor
        self._clock = clock_of(reactor)
        self._limits = limits
        self._carrier = carrier
        self._authenticator = authenticator
        self._anonymous = anonymous
        self._conversation = Conversation(
            role,
            limits,
            self._clock(),
            agent,
            token,
            lambda name: table[name][0].options.max_size if name in table else None,
            lambda call: call.method.options.max_size,
            authenticator is not None,
            session,
            next_key,
        )
        self._conversation.outbox.is_confirmed = carrier.is_confirming
        self._traffic = self._conversation.traffic
        self._next_timer = self._conversation.next_timer
        self._allowance = carrier.allowance
        self._outlets = Outlets(self._conversation, self._clock, self._schedule)
        self._inlets = Inlets(self._conversation, reactor, self._schedule)
        self.calls = Caller(
            self._conversation,
            limits,
            self._clock,
            self._outlets,
            self._inlets,
            self._schedule,
            self._settle_now,
        )
        self._server = Server(
            self._conversation,
            table,
            protocols,
            limits,
            self._clock,
            address,
            self.where,
            self._outlets,
            self._inlets,
            interceptors,
            self._schedule,
            keeper,
        )
        self._keeper = keeper
        if interceptors:
            self.calls.intercept(interceptors, address, self.where, lambda: self._server.identity)
        self._pings = Pings(reactor, self._clock, limits.default_timeout)
        self._paused = False
        self._busy = False
        self._again = False
        self._closing = False
        self._is_drained = False
        self._over = False
        self._made = False
        self._end_error: Error | None = None
        self._wake: IDelayedCall | None = None
        self._timer: Timer | None = None
        self.timer_due = math.inf
        self._close_timer: Timer | None = None
        self._drain_timer: Timer | None = None
        self._drained_by = math.inf
        self._authenticating: Deferred[Any] | None = None
        # What is done about each event but requests, which `_transmit` looks at itself.
        self._reactions: Mapping[type, Callable[[Any], None]] = {
            ResponseReceived: self.calls.answered,
            ErrorReceived: self.calls.refused,
            CallFailed: self.calls.failed,
            RequestCancelled: self._server.cancel,
            ItemsReceived: self._inlets.receive,
            EndReceived: self._stream_ended,
            CreditReceived: self._outlets.credit_came,
            StopReceived: self.calls.stopped,
            PongReceived: self._pings.answered,
            Greeted: self._greeted,
            Opened: self._open,
            Drained: self._drained,
            Ended: self._ended,
        }
        watch_steps(reactor, self)
        for protocol in protocols:
            # One that has served a conversation before had another peer then.
            protocol.__dict__.pop("_protoframe_peer", None)
            protocol.__dict__.setdefault("_protoframe_live", []).append(self)
            protocol.__dict__["_protoframe_make_peer"] = self.proxy

    @property
    def is_open(self) -> bool:
        """Whether the peer has greeted, and the conversation is not over."""
        return self._made and self._conversation.state is not _CLOSED

    @property
    def takes_calls(self) -> bool:
        """Whether it is open, and neither end has said that it is leaving."""
        return self._made and self._conversation.state is State.OPEN

    @property
    def closed(self) -> Deferred[None]:
        """Fires when the connection is gone; a new one each time, so that whoever cancels it does so for itself."""
        done: Deferred[None] = Deferred()
        if self._over:
            done.callback(None)
        else:
            self._waiting_for_end.append(done)
        return done

    @property
    def identity(self) -> Identity | None:
        """Who the peer has shown to be; ``None`` for one that has shown nothing."""
        identity: Identity | None = self._server.identity
        return identity

    # For whoever calls.

    def proxy(self, protocol: type[P]) -> P:
        """A proxy of the other end, typed as the Protocol that it answers."""
        return typing.cast("P", proxy_class(protocol)(self.calls, self.where))

    def call_json(self, name: str, arguments: bytes) -> Deferred[bytes]:
        """Calls ``Protocol.method``, whose declaration is not at hand, with a JSON object; the answer is JSON too."""
        return self.calls.call(JSONMethod(name), arguments)

    def stream_json(self, name: str, arguments: bytes, sent: Any = None) -> Stream:
        """The same, where the answer may be a stream: its items, or the one result, as JSON texts.

        :param sent: an async iterator of JSON texts as `msgspec.Raw`, where the method takes a stream.
        """
        return self.calls.call_stream(JSONStream(name, sends=sent is not None), arguments, sent)

    def ping(self) -> Deferred[float]:
        """Asks the other end for a sign of life; fires with the seconds that it took.

        Fails with `DeadlineExceeded` after what is left of `timeout`, or else `Limits.default_timeout`.
        """
        if not self.is_open:
            return failed(not_run(ConnectionLost("the connection is closed")))
        sent = self._pings.ping(self._conversation.ping)
        self._schedule()
        return sent

    def drain(self, seconds: float | None = None) -> Deferred[None]:
        """Takes no new calls, and closes when what runs has ended; what still runs after a time is cancelled.

        :param seconds: the time; `Limits.drain_timeout` by default.
        """
        done = self.closed
        if not self._over and not self._closing:
            self._conversation.go_away("the other end is shutting down")
            if self._drain_timer is None:
                seconds = self._limits.drain_timeout if seconds is None else seconds
                self._drained_by = self._clock() + seconds
                self._drain_timer = call_later(self._reactor, seconds, self._stop_draining)
            self._schedule()
        return done

    def _stop_draining(self) -> None:
        self._conversation.end(None)
        self._leave_session(for_good=True)
        self._transmit()

    def close(self) -> Deferred[None]:
        """Ends the conversation in order: calls of this end that have no answer yet fail, what is sent arrives.

        The Deferred fires when the connection is gone; where the peer does not close its end in time
        (`Limits.close_timeout`), it is cut off.
        """
        done = self.closed
        if not self._over and not self._closing:
            self._conversation.go_away()
            self._conversation.end(None)
            self._schedule()
        return done

    # For the carrier.

    def start(self) -> None:
        """The carrier is connected: greets the peer."""
        self._transmit()

    def frames_received(self, frames: list[Frame], now: float) -> None:
        """Takes frames from the carrier, that came at a time of `clock_of` its reactor."""
        self._conversation.handle_frames(frames, now)
        self._transmit()

    @property
    def outbox(self) -> Outbox:
        """What the carrier is to send."""
        return self._conversation.outbox

    @property
    def pending(self) -> int:
        """Calls of this end that are not answered yet."""
        return self._conversation.pending

    def heard(self, now: float) -> None:
        """Something came from the peer, though no whole frame yet."""
        self._conversation.handle_heard(now)

    def violated(self, error: Error) -> None:
        """The carrier cannot read what the peer sends: the conversation is over."""
        self._conversation.end(error)
        self._transmit()

    def pause(self) -> None:
        """The carrier has enough to send."""
        self._paused = self._outlets.is_paused = True
        self._conversation.handle_blocked(self._clock())
        if not self._busy:
            self.wake_at(self._conversation.next_timer())

    def resume(self) -> None:
        """The carrier can send more."""
        self._paused = self._outlets.is_paused = False
        self._conversation.handle_unblocked(self._clock())
        self._transmit()

    def lost(self, reason: Failure) -> None:
        """The carrier is gone."""
        if self._over:
            return
        self._conversation.end(ConnectionLost(_reason(reason)))
        self._over = True
        self._transmit()
        self._leave_session(for_good=self._conversation.was_left)
        if self._wake is not None:
            self._wake.cancel()
        for timer in (self._timer, self._close_timer, self._drain_timer):
            if timer is not None:
                timer.cancel()
        self._pings.lost()
        self.calls.lost()
        if self._authenticating is not None:
            self._authenticating.cancel()
        if not self.opened.called:
            self.opened.errback(self._end_error or ConnectionLost(_reason(reason)))
        for protocol in self.protocols:
            protocol.__dict__["_protoframe_live"].remove(self)
        if self._made:
            for protocol in self.protocols:
                try:
                    protocol.connectionLost(reason)
                except Exception:
                    _log.failure("connectionLost of {protocol} failed", protocol=protocol)
        waiting, self._waiting_for_end = self._waiting_for_end, []
        for done in waiting:
            if not done.called:
                done.callback(None)

    def superseded(self) -> None:
        """The peer is here again, over another connection: it does not use this one any more."""
        self._carrier.abort()

    def _leave_session(self, *, for_good: bool) -> None:
        session, self._server.session = self._server.session, None
        if session is None or self._keeper is None:
            return
        if for_good:
            self._keeper.end(session, self)
        else:
            self._keeper.left(session, self)

    # The heart.

    def _schedule(self) -> None:
        """Has `_transmit` called once in this turn of the reactor, after what else is called in it."""
        if self._busy:
            # Unless it comes by what this is about itself, before it is done.
            self._again = True
        elif self._wake is None and not self._over:
            self._wake = self._reactor.callLater(0, self._woken)

    def rearm(self) -> None:
        """The wall clock was set, which the reactor's timers go by."""
        if self._wake is not None:
            self._wake.reset(0)

    def _woken(self) -> None:
        self._wake = None
        self._transmit()

    def _transmit(self) -> None:
        """Acts on what happened, sends what there is to send, and sets the timer."""
        if self._busy:
            return
        if get_scope() is not NOWHERE:
            # Somebody's deadline surrounds this: that of who made the call, or, where the reactor keeps contexts as
            # asyncio's does, of who was there when a timer was set.  It is not that of the callbacks that run here.
            run_nowhere(self._transmit)
            return
        self._busy = True
        try:
            traffic = self._traffic
            outbox = traffic.outbox
            rounds = _ROUNDS
            while True:
                while traffic.events:
                    events = traffic.events
                    traffic.events = []
                    for number, event in enumerate(events, 1):
                        try:
                            if type(event) is not RequestReceived:
                                self._reactions[type(event)](event)
                            elif traffic.is_closed:
                                # What came after it ended the conversation.
                                pass
                            elif self._server.held or outbox.octets > BACKLOG:
                                self._server.hold(event)
                            else:
                                self._server.serve(event)
                        except Exception:
                            self._failed_to_react(event)
                        if not number % _TURN and not self._paused:
                            self._send_frames(large=False)
                if self._inlets.left:
                    self._inlets.settle()
                if self._over:
                    return
                self._again = False
                if not self._paused:
                    frames = outbox.poll(self._allowance)
                    if frames:
                        self._carrier.send(frames)
                    if outbox.is_left or outbox.departed or self.calls.oneway:
                        self._send_rest()
                elif outbox.octets > self._limits.max_unsent and not traffic.is_closed:
                    text = f"{outbox.octets} bytes wait for a peer that does not read"
                    self._conversation.end(TooMuchUnsent(text))
                if traffic.events:
                    # The carrier was lost while it sent, say: what that means is among the events now.
                    continue
                if self._paused:
                    break
                if self._server.held and self._server.go_on():
                    continue
                if self._outlets.ready and rounds:
                    rounds -= 1
                    self._outlets.go_on()
                    continue
                if not self._is_drained:
                    break
                if outbox:
                    continue
                if traffic.is_closed or self._conversation.running or self._conversation.pending:
                    break
                self._conversation.end(None)
            if traffic.is_closed:
                self._close()
            else:
                next_timer = self._next_timer
                due = next_timer()
                if due < self.timer_due:
                    self.wake_at(due)
        finally:
            self._busy = False
        if self._again or (self._outlets.ready and not self._paused):
            self._schedule()

    def _send_rest(self) -> None:
        """Sends the rest of what is ready, until the carrier has enough, and tells who waits for that."""
        outbox = self._conversation.outbox
        while outbox.is_left and not self._paused:
            self._send_frames()
        if outbox.departed:
            self._departed()
        if self.calls.oneway:
            self.calls.oneway_sent()

    def _departed(self) -> None:
        """Large messages are sent: what comes after them in their streams may go."""
        departed, self._conversation.outbox.departed = self._conversation.outbox.departed, ()
        for call_id in departed:
            self._outlets.go_on_with(call_id)

    def _failed_to_react(self, event: Any) -> None:
        """An event met a fault of this package: nobody is left waiting for what it would have brought."""
        _log.failure("{where}: a fault of protoframe itself, at {event}", where=self.where, event=type(event).__name__)
        token: Any = getattr(event, "token", None)
        unread = InvalidResponse("the answer could not be read; the log has the details")
        if isinstance(token, PendingStream) or (isinstance(token, PendingCall) and not token.deferred.called):
            token.fail(unread)
        self._conversation.end(LocalProtocolError("this end met a fault of its own"))

    def _send_frames(self, *, large: bool = True) -> None:
        """Sends some of what is ready, of large messages too or not."""
        frames = self._conversation.outbox.poll(self._allowance, large=large)
        if frames and not self._over:
            self._carrier.send(frames)

    def wake_at(self, due: float) -> None:
        """Has the timer go off by then, for the conversation or for the carrier.

        A timer that goes off early finds nothing due and is set anew: cheaper than to move it at each call.
        """
        if due < self.timer_due and not self._over:
            if self._timer is not None:
                self._timer.cancel()
            self.timer_due = due
            self._timer = call_later(self._reactor, due - self._clock(), self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self.timer_due = math.inf
        now = self._clock()
        try:
            self._carrier.handle_timer(now)
        except ProtocolError as error:
            self._conversation.end(error)
        self._conversation.handle_timer(now)
        self._transmit()
        if not self._over:
            self.wake_at(self._carrier.next_timer())

    def _close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._made and self._end_error is None:
                # Nothing was said, so there is nothing that the peer must be let read.
                self._carrier.abort()
                return
            # What says why, also where the peer reads slowly.
            self._send_frames(large=False)
            patience = max(_GRACE, min(self._limits.close_timeout, self._drained_by - self._clock()))
            self._close_timer = call_later(self._reactor, patience, self._carrier.abort)
            self._carrier.close()

    def _give_up_opening(self, _: Deferred[None]) -> None:
        self._carrier.abort()

    # Events of the conversation.

    def _greeted(self, event: Greeted) -> None:
        """Looks at who greets, before it is let in."""
        if self._authenticator is None:
            self._conversation.greet()
            return
        shown = Shown(address=self.address, token=event.hello.token or None, certificate=self._carrier.certificate())
        deciding: Deferred[Any] = Deferred.fromCoroutine(identify(self._authenticator, shown))
        self._authenticating = deciding
        deciding.addCallbacks(self._identified, self._unknown)
        deciding.addErrback(lambda failure: _log.failure("{where}: a fault", failure, where=self.where))

    def _identified(self, identity: Identity | None) -> None:
        self._authenticating = None
        if identity is None and not self._anonymous:
            self._turn_away(Unauthenticated("this server asks who calls, and nothing was shown that it knows of"))
            return
        self._server.identity = identity
        self._conversation.greet()
        self._schedule()

    def _unknown(self, failure: Failure) -> None:
        self._authenticating = None
        if failure.check(Unauthenticated):
            self._turn_away(typing.cast("Error", failure.value))
        elif self._conversation.state is not _CLOSED:
            _log.failure("{where}: finding out who calls failed", failure, where=self.where)
            self._turn_away(Unauthenticated("this server could not find out who calls"))

    def _turn_away(self, error: Error) -> None:
        self._conversation.end(error)
        self._schedule()

    def _open(self, event: Opened) -> None:
        self._made = True
        if self._authenticator is None:
            certificate = self._carrier.certificate()
            if certificate is not None:
                # One that has no name is nobody's.
                with suppress(Unauthenticated):
                    self._server.identity = certificate_identity(certificate)
        hello = event.hello
        if hello.session and self._keeper is not None:
            # A secret is of use to nobody but whom it was seen with.
            name = (getattr(self._server.identity, "name", None), hello.session)
            self._server.session = self._keeper.open(name, hello.next_key, self)
        for protocol in self.protocols:
            try:
                protocol.connectionMade()
            except Exception:
                _log.failure("connectionMade of {protocol} failed", protocol=protocol)
        self.opened.callback(None)

    def _drained(self, _: Drained) -> None:
        # The last answers may not be sent yet.
        self._is_drained = True

    def _ended(self, event: Ended) -> None:
        self._end_error = event.error
        error = event.error
        self._inlets.end_all(error if isinstance(error, ConnectionLost) else ConnectionLost("the conversation is over"))
        dropped = isinstance(error, KeepaliveTimeout | WriteTimeout | TooMuchUnsent)
        if error is not None and (dropped or not isinstance(error, ConnectionLost)):
            _log.warn("{where}: {kind}: {error}", where=self.where, kind=error.type_name, error=error.message)
        if dropped:
            self._closing = True
            self._carrier.abort()

    # Calls of this end.

    def _settle_now(self) -> None:
        """Fires what has its outcome at once: whoever cancels a Deferred expects it to have fired."""
        if self._busy:
            run_nowhere(self._react)
        else:
            self._transmit()

    def _react(self) -> None:
        for event in self._conversation.poll_events():
            self._reactions[type(event)](event)

    # Streams.

    def _stream_ended(self, event: EndReceived) -> None:
        if event.token is not None:
            self.calls.ended(event)
        self._inlets.end(event.call_id)


def _where(address: Any) -> str:
    host = getattr(address, "host", None)
    if host is not None:
        return f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"
    if isinstance(address, UNIXAddress):
        name = address.name
        return f"unix:{name.decode(errors='replace')}" if name else "unix"
    return repr(address)


def _reason(reason: Failure) -> str:
    described = describe_tls_failure(reason.value)
    if described is not None:
        return described
    text = reason.getErrorMessage().strip().rstrip(".")
    return f"the connection was lost: {text[:1].lower()}{text[1:]}" if text else "the connection was lost"
