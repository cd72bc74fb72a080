"""Ports of UDP that are read one datagram at a time, where the reactor lets anybody have its own.

Knows Twisted's UDP ports and reactors; not what is in a datagram, nor whose it is.  A reactor that opens sockets in a
way of its own, as a simulated one does, opens these too.
"""

from __future__ import annotations

import os
from time import monotonic
from typing import Any

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.posixbase import PosixReactorBase
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.udp import Port
from twisted.python import log

from protoframe.core.datagram.packets import LARGEST_SIZE

__all__ = ["DatagramPort", "adopt_port", "open_port"]

#: Datagrams that are read in one turn of the reactor at most, so that others have theirs.
MOST_IN_A_TURN = 64
#: Turns for which a port reads on after one in which it found several datagrams; and after as many others it looks
#: again.
_TURNS = 16
#: Seconds after a datagram in which the reactor does not go to sleep, where the next one mostly comes within them.
AWAKE = 0.0001
#: How often more than not nothing may come within them, and after how many datagrams it is tried again then.
PATIENCE, RETRY_AFTER = 3, 64

# Of one datagram, which is copied out of it before anybody else can read.
_buffer = bytearray(LARGEST_SIZE)
_view = memoryview(_buffer).toreadonly()


class DatagramPort(Port):
    """A port that reads one datagram when the reactor says that there is one, and others only where that is worth it.

    Twisted's own reads until there is nothing left, which it finds out by an exception: one for each datagram, where
    they come one at a time, beside a large buffer that is made for each.  A reactor says again that there is something
    to read where more is left.

    Nor does the reactor go to sleep at once where peers answer at once: that, and to be woken, takes several times as
    long as such an answer.  It goes on with its turns, in which everything else is heeded as ever, for a tenth of a
    millisecond; where that is in vain more often than not, it is let sleep, and it is tried again now and then.

    What takes the datagrams says, by what `datagramReceived` returns, which of them are worth it: a stranger's are not.
    """

    reactor: Any
    # Turns for which it reads on; below 0 those since it did so last.
    _turns_left = 0
    # What keeps the reactor awake, until when, and how often more than not that was in vain.  Once that is too often,
    # the datagrams since then are counted in it too.
    _keeping_awake: IDelayedCall | None = None
    _awake_until = 0.0
    _in_vain = 0

    def startListening(self) -> None:
        """Opens the socket, or takes the one that it was given."""
        # Where there is one processor, whoever is to answer needs it.
        self._may_stay_awake = processors() > 1
        super().startListening()

    def doRead(self) -> None:
        """There is something to read.

        :raises OSError: the socket is of no use any more; the reactor closes it.
        """
        is_in_time = monotonic() < self._awake_until
        left = self._turns_left - 1
        most = MOST_IN_A_TURN if left >= 0 or left == -_TURNS else 1
        read = 0
        is_known = False
        while read < most and self.connected:
            address: Any = self._connectedAddr
            try:
                if address is None:
                    size, address = self.socket.recvfrom_into(_buffer)
                else:
                    size = self.socket.recv_into(_buffer)
            except (BlockingIOError, InterruptedError):
                break
            except (ConnectionRefusedError, ConnectionResetError):
                # Windows has the second for the first.
                if self._connectedAddr is not None:
                    self.protocol.connectionRefused()
                break
            read += 1
            try:
                if self.protocol.datagramReceived(bytes(_view[:size]), address if len(address) == 2 else address[:2]):
                    is_known = True
            except BaseException:
                # The reactor would close the port.
                log.err()
        if most > 1:
            left = _TURNS if read > 1 else max(left, 0)
        self._turns_left = left
        if is_known and self._may_stay_awake:
            self._stay_awake(is_in_time=is_in_time)

    def _stay_awake(self, *, is_in_time: bool) -> None:
        """A datagram came: the next one may come at once.

        :param is_in_time: whether this one did.
        """
        if is_in_time:
            self._in_vain = max(min(self._in_vain, PATIENCE) - 1, 0)
        elif self._in_vain >= PATIENCE:
            self._in_vain += 1
            if self._in_vain < PATIENCE + RETRY_AFTER:
                return
            self._in_vain = PATIENCE
        self._awake_until = monotonic() + AWAKE
        if self._keeping_awake is None and self.connected:
            self._keeping_awake = self.reactor.callLater(0, self._keep_awake)

    def _keep_awake(self) -> None:
        if monotonic() < self._awake_until:
            self._keeping_awake = self.reactor.callLater(0, self._keep_awake)
        else:
            self._keeping_awake = None
            self._in_vain += 1

    def connectionLost(self, reason: Any = None) -> None:
        """The socket is to be closed."""
        if self._keeping_awake is not None:
            self._keeping_awake.cancel()
            self._keeping_awake = None
        super().connectionLost(reason)


def processors() -> int:
    """How many this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def open_port(reactor: Any, port: int, protocol: DatagramProtocol, interface: str) -> Any:
    """What `IReactorUDP.listenUDP` does.

    :raises CannotListenError: the port is taken.
    """
    if not isinstance(reactor, PosixReactorBase):
        return reactor.listenUDP(port, protocol, interface=interface, maxPacketSize=LARGEST_SIZE)
    opened = DatagramPort(port, protocol, interface, LARGEST_SIZE, reactor)
    opened.startListening()
    return opened


def adopt_port(reactor: Any, descriptor: int, family: int, protocol: DatagramProtocol) -> Any:
    """What `IReactorSocket.adoptDatagramPort` does."""
    if not isinstance(reactor, PosixReactorBase):
        return reactor.adoptDatagramPort(descriptor, family, protocol, maxPacketSize=LARGEST_SIZE)
    make = getattr(DatagramPort, "_fromListeningDescriptor")  # noqa: B009 - it has no public name
    opened = make(reactor, descriptor, family, protocol, LARGEST_SIZE)
    opened.startListening()
    return opened
