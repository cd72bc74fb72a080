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

from protoframe._alarms import Alarms
from protoframe._calling import Answer, Caller, JSONMethod, JSONStream, PendingCall, PendingStream, failed
from protoframe._carrier import Carrier
from protoframe._clock import Timer, call_later, clock_of
from protoframe._context import NOWHERE, get_scope, run_nowhere
from protoframe._inlets import Inlets, Stream
from protoframe._outlets import Outlets
from protoframe._pings import Pings
from protoframe._protocol import Protocol, begin_conversation, end_conversation
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
from protoframe.core.replies import Session
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

__all__ = ["Connection"]

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
    :param alarms: keep the time of many connections.
    :param helpers: further instances that serve methods, and any number of conversations: they are told of none.
    :param gone: called in the end.
    :ivar address: the peer's.
    :ivar identity: who the peer has shown to be; ``None`` for one that has shown nothing.
    :ivar timer_due: when the timer goes off that this and the carrier share; infinity for never.
    """

    # More attributes than the dictionaries of instances share the names of.  Most connections are idle, so much is made
    # when it is first needed: what begins with ``_made`` is None until then, and the property of that name makes it.
    __slots__ = (
        "__weakref__",
        "_again",
        "_alarms",
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
        "_gone",
        "_helpers",
        "_interceptors",
        "_is_drained",
        "_keeper",
        "_limits",
        "_made",
        "_made_calls",
        "_made_inlets",
        "_made_opened",
        "_made_outlets",
        "_made_pings",
        "_made_server",
        "_over",
        "_paused",
        "_reactor",
        "_session",
        "_table",
        "_traffic",
        "_waiting_for_end",
        "_wake",
        "address",
        "identity",
        "protocols",
        "timer_due",
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
        alarms: Alarms | None = None,
        helpers: Sequence[Protocol[Any]] = (),
        gone: Callable[[Connection], object] | None = None,
    ) -> None:
        self.address = address
        self.protocols = protocols
        self.identity: Identity | None = None
        self._alarms = alarms if alarms is not None else Alarms(reactor)
        self._helpers = helpers
        self._gone = gone
        self._table = table
        self._interceptors = interceptors
        self._session: Session | None = None
        self._made_opened: Deferred[None] | None = None
        self._made_calls: Caller | None = None
        self._made_server: Server | None = None
        self._made_outlets: Outlets | None = None
        self._made_inlets: Inlets | None = None
        self._made_pings: Pings | None = None
        self._waiting_for_end: tuple[Deferred[None], ...] = ()
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
            self._max_arguments,
            _max_result,
            authenticator is not None,
            session,
            next_key,
        )
        self._conversation.outbox.is_confirmed = carrier.is_confirming
        self._traffic = self._conversation.traffic
        self._allowance = carrier.allowance
        self._keeper = keeper
        self._paused = False
        self._busy = False
        self._again = False
        self._closing = False
        self._is_drained = False
        self._over = False
        self._made = False
        self._end_error: Error | None = None
        self._wake: IDelayedCall | None = None
        self.timer_due = math.inf
        self._close_timer: Timer | None = None
        self._drain_timer: Timer | None = None
        self._drained_by = math.inf
        self._authenticating: Deferred[Any] | None = None
        for protocol in protocols:
            begin_conversation(protocol, self)

    # What is made when it is first needed.

    @property
    def opened(self) -> Deferred[None]:
        """Fires when the conversation is open, or fails with why it will not be."""
        opened = self._made_opened
        if opened is None:
            opened = self._made_opened = Deferred(self._give_up_opening)
            if self._made:
                opened.callback(None)
            elif self._over:
                opened.errback(self._end_error or ConnectionLost("the connection was lost"))
        return opened

    @property
    def calls(self) -> Caller:
        """What makes the calls of this end; proxies call it."""
        calls = self._made_calls
        if calls is None:
            calls = self._made_calls = Caller(
                self._conversation,
                self._limits,
                self._clock,
                self.outlets,
                self.inlets,
                self._schedule,
                self._settle_now,
            )
            if self._interceptors:
                calls.intercept(self._interceptors, self.address, self.where, lambda: self.identity)
        return calls

    @property
    def _server(self) -> Server:
        server = self._made_server
        if server is None:
            server = self._made_server = Server(
                self._conversation,
                self._table,
                (*self.protocols, *self._helpers),
                self._limits,
                self._clock,
                self.address,
                self.where,
                self,
                self._interceptors,
                self._schedule,
                self._keeper,
            )
            server.identity = self.identity
            server.session = self._session
        return server

    @property
    def outlets(self) -> Outlets:
        """The streams that this end sends."""
        outlets = self._made_outlets
        if outlets is None:
            outlets = self._made_outlets = Outlets(self._conversation, self._clock, self._schedule)
            outlets.is_paused = self._paused
        return outlets

    @property
    def inlets(self) -> Inlets:
        """The streams that come."""
        inlets = self._made_inlets
        if inlets is None:
            inlets = self._made_inlets = Inlets(self._conversation, self._reactor, self._schedule)
        return inlets

    @property
    def _pings(self) -> Pings:
        pings = self._made_pings
        if pings is None:
            pings = self._made_pings = Pings(self._reactor, self._clock, self._limits.default_timeout)
        return pings

    def _max_arguments(self, name: bytes) -> int | None:
        entry = self._table.get(name)
        return entry[0].options.max_size if entry is not None else None

    # How it stands.

    @property
    def where(self) -> str:
        """The peer's address, as a text."""
        return _where(self.address)

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
            self._waiting_for_end += (done,)
        return done

    # For whoever calls.

    def proxy(self, protocol: type[P]) -> P:
        """A proxy of the other end, typed as the Protocol that it answers."""
        return typing.cast("P", proxy_class(protocol)(self.calls, self.where))

    def call_json(self, name: str, arguments: bytes) -> Deferred[bytes]:
        """Calls ``Protocol.method``, whose declaration is not at hand, with a JSON object; the answer is JSON too."""
        return self.calls.call(JSONMethod(name), bytes(arguments))

    def stream_json(self, name: str, arguments: bytes, sent: Any = None) -> Stream:
        """The same, where the answer may be a stream: its items, or the one result, as JSON texts.

        :param sent: an async iterator of JSON texts as `msgspec.Raw`, where the method takes a stream.
        """
        return self.calls.call_stream(JSONStream(name, sends=sent is not None), bytes(arguments), sent)

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
        self._paused = True
        if self._made_outlets is not None:
            self._made_outlets.is_paused = True
        self._conversation.handle_blocked(self._clock())
        if not self._busy:
            self.wake_at(self._conversation.next_timer())

    def resume(self) -> None:
        """The carrier can send more."""
        self._paused = False
        if self._made_outlets is not None:
            self._made_outlets.is_paused = False
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
            self._wake = None
        self._alarms.unset(self)
        for timer in (self._close_timer, self._drain_timer):
            if timer is not None:
                timer.cancel()
        if self._made_pings is not None:
            self._made_pings.lost()
        if self._made_calls is not None:
            self._made_calls.lost()
        if self._authenticating is not None:
            self._authenticating.cancel()
        if self._made_opened is not None and not self._made_opened.called:
            self._made_opened.errback(self._end_error or ConnectionLost(_reason(reason)))
        for protocol in self.protocols:
            end_conversation(protocol)
        if self._made:
            for protocol in self.protocols:
                try:
                    protocol.connectionLost(reason)
                except Exception:
                    _log.failure("connectionLost of {protocol} failed", protocol=protocol)
        if self._gone is not None:
            self._gone(self)
        waiting, self._waiting_for_end = self._waiting_for_end, ()
        for done in waiting:
            if not done.called:
                done.callback(None)

    def superseded(self) -> None:
        """The peer is here again, over another connection: it does not use this one any more."""
        self._carrier.abort()

    def _leave_session(self, *, for_good: bool) -> None:
        session, self._session = self._session, None
        if self._made_server is not None:
            self._made_server.session = None
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
                    caller = self._made_calls
                    for number, event in enumerate(events, 1):
                        try:
                            if type(event) is ResponseReceived:
                                (caller or self.calls).answered(event)
                            elif type(event) is not RequestReceived:
                                _REACTIONS[type(event)](self, event)
                            elif traffic.is_closed:
                                # What came after it ended the conversation.
                                pass
                            else:
                                server = self._made_server or self._server
                                if server.held or outbox.octets > BACKLOG:
                                    server.hold(event)
                                else:
                                    server.serve(event)
                        except Exception:
                            self._failed_to_react(event)
                        if not number % _TURN and not self._paused:
                            self._send_frames(large=False)
                inlets = self._made_inlets
                if inlets is not None and inlets.left:
                    inlets.settle()
                if self._over:
                    return
                self._again = False
                if not self._paused:
                    frames = outbox.poll(self._allowance)
                    if frames:
                        self._carrier.send(frames)
                    calls = self._made_calls
                    if outbox.is_left or outbox.departed or (calls is not None and calls.oneway):
                        self._send_rest()
                elif outbox.octets > self._limits.max_unsent and not traffic.is_closed:
                    text = f"{outbox.octets} bytes wait for a peer that does not read"
                    self._conversation.end(TooMuchUnsent(text))
                if traffic.events:
                    # The carrier was lost while it sent, say: what that means is among the events now.
                    continue
                if self._paused:
                    break
                serving = self._made_server
                if serving is not None and serving.held and serving.go_on():
                    continue
                outlets = self._made_outlets
                if outlets is not None and outlets.ready and rounds:
                    rounds -= 1
                    outlets.go_on()
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
                due = self._conversation.next_timer()
                if due < self.timer_due:
                    self.wake_at(due)
        finally:
            self._busy = False
        outlets = self._made_outlets
        if self._again or (outlets is not None and outlets.ready and not self._paused):
            self._schedule()

    def _send_rest(self) -> None:
        """Sends the rest of what is ready, until the carrier has enough, and tells who waits for that."""
        outbox = self._conversation.outbox
        while outbox.is_left and not self._paused:
            self._send_frames()
        if outbox.departed:
            self._departed()
        calls = self._made_calls
        if calls is not None and calls.oneway:
            calls.oneway_sent()

    def _departed(self) -> None:
        """Large messages are sent: what comes after them in their streams may go."""
        departed, self._conversation.outbox.departed = self._conversation.outbox.departed, ()
        for call_id in departed:
            self.outlets.go_on_with(call_id)

    def _failed_to_react(self, event: Any) -> None:
        """An event met a fault of this package: nobody is left waiting for what it would have brought."""
        _log.failure("{where}: a fault of protoframe itself, at {event}", where=self.where, event=type(event).__name__)
        token: Any = getattr(event, "token", None)
        unread = InvalidResponse("the answer could not be read; the log has the details")
        if isinstance(token, Answer | PendingCall | PendingStream):
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
            self._alarms.set(self, due)

    def woken(self) -> None:
        """Its time has come, or that of its carrier."""
        now = self._clock()
        try:
            self._carrier.handle_timer(now)
        except ProtocolError as error:
            self._conversation.end(error)
        try:
            self._conversation.handle_timer(now)
        except Exception:
            # Without this it would have no timer any more, and nobody would know.
            _log.failure("{where}: a fault of protoframe itself, at a timer", where=self.where)
            self._conversation.end(LocalProtocolError("this end met a fault of its own"))
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
        self._know(identity)
        self._conversation.greet()
        self._schedule()

    def _know(self, identity: Identity | None) -> None:
        self.identity = identity
        if self._made_server is not None:
            self._made_server.identity = identity

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
                    self._know(certificate_identity(certificate))
        hello = event.hello
        if hello.session and self._keeper is not None:
            # A secret is of use to nobody but whom it was seen with.
            name = (getattr(self.identity, "name", None), hello.session)
            self._session = self._keeper.open(name, hello.next_key, self)
            if self._made_server is not None:
                self._made_server.session = self._session
        for protocol in self.protocols:
            try:
                protocol.connectionMade()
            except Exception:
                _log.failure("connectionMade of {protocol} failed", protocol=protocol)
        if self._made_opened is not None:
            self._made_opened.callback(None)

    def _drained(self, _: Drained) -> None:
        # The last answers may not be sent yet.
        self._is_drained = True

    def _ended(self, event: Ended) -> None:
        self._end_error = event.error
        error = event.error
        if self._made_inlets is not None:
            over = error if isinstance(error, ConnectionLost) else ConnectionLost("the conversation is over")
            self._made_inlets.end_all(over)
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
            _REACTIONS[type(event)](self, event)

    # Calls and streams, of either end.

    def _answered(self, event: ResponseReceived) -> None:
        calls = self._made_calls or self.calls
        calls.answered(event)

    def _refused(self, event: ErrorReceived) -> None:
        self.calls.refused(event)

    def _failed(self, event: CallFailed) -> None:
        self.calls.failed(event)

    def _cancelled(self, event: RequestCancelled) -> None:
        self._server.cancel(event)

    def _items_came(self, event: ItemsReceived) -> None:
        self.inlets.receive(event)

    def _credit_came(self, event: CreditReceived) -> None:
        self.outlets.credit_came(event)

    def _stopped(self, event: StopReceived) -> None:
        self.calls.stopped(event)

    def _pong_came(self, event: PongReceived) -> None:
        self._pings.answered(event)

    def _stream_ended(self, event: EndReceived) -> None:
        if event.token is not None:
            self.calls.ended(event)
        self.inlets.end(event.call_id)


# What is done about each event but requests; `Connection._transmit` looks at those, and at answers, itself.
_REACTIONS: Mapping[type, Callable[[Connection, Any], None]] = {
    ResponseReceived: Connection._answered,
    ErrorReceived: Connection._refused,
    CallFailed: Connection._failed,
    RequestCancelled: Connection._cancelled,
    ItemsReceived: Connection._items_came,
    EndReceived: Connection._stream_ended,
    CreditReceived: Connection._credit_came,
    StopReceived: Connection._stopped,
    PongReceived: Connection._pong_came,
    Greeted: Connection._greeted,
    Opened: Connection._open,
    Drained: Connection._drained,
    Ended: Connection._ended,
}


def _max_result(call: Answer | PendingCall | PendingStream) -> int | None:
    return call.method.options.max_size


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
