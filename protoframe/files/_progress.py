"""How far copies are: what is counted, what is told, and how fast it may go.

Knows numbers and the time that it is given; no files and no connections.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from protoframe import Error, Status

__all__ = ["Action", "Change", "Meter", "Pace", "Problem", "Progress", "Summary"]

#: Seconds between two reports, and those over which a rate is measured.
_REPORT = 0.1
_RATE = 3.0
#: Problems that are kept; others are counted.
_MOST_PROBLEMS = 1000


class Progress(Struct, frozen=True):
    """How far a copy is.

    :ivar path: what is copied now; one of them, where there are several.
    :ivar files: files that are done.
    :ivar files_total: of so many; ``None`` while that is not known.
    :ivar octets: bytes that are done: in place, or written down at the receiving end, which verifies them at last.
    :ivar octets_total: of so many.
    :ivar rate: bytes a second, over the last few seconds.
    :ivar seconds_left: at that rate; ``None`` while nobody can say.
    """

    path: str
    files: int
    files_total: int | None
    octets: int
    octets_total: int | None
    rate: float
    seconds_left: float | None


class Problem(Struct, frozen=True):
    """Something that was not copied.

    :ivar path: relative to the tree, or as it was given.
    :ivar error: the class of the error.
    :ivar reason: for people.
    :ivar status: that of the error; ``None`` where this end's disk or file system failed.
    """

    path: str
    error: str
    reason: str
    status: Status | None = None


class Action(enum.Enum):
    """What is done about a difference of two trees."""

    COPY = "copy"
    MAKE = "mkdir"
    REMOVE = "remove"


class Change(Struct, frozen=True):
    """A difference of two trees.

    :ivar path: relative to the trees.
    :ivar size: bytes; 0 for a directory.
    """

    action: Action
    path: str
    size: int


class Summary(Struct, frozen=True):
    """What a copy came to.

    :ivar files: files that are in place and verified.
    :ivar octets: bytes of these.
    :ivar skipped: files that did not differ.
    :ivar removed: files and directories that were removed.
    :ivar moved: bytes of contents that went over the network.
    :ivar moved_again: how many of these went more than once.
    :ivar interruptions: how often a copy was gone on with.
    :ivar seconds: how long it took.
    :ivar failed: how many could not be copied.
    :ivar problems: these, or the first thousand of them.
    :ivar digest: of one file, its whole digest, as verified at the receiving end; empty for a tree.
    """

    files: int
    octets: int
    skipped: int
    removed: int
    moved: int
    moved_again: int
    interruptions: int
    seconds: float
    failed: int
    problems: list[Problem]
    digest: bytes = b""


class Meter:
    """Counts, and tells an observer now and then.

    :param clock: gives the time, in seconds.
    :param observer: called with a `Progress`.
    """

    def __init__(self, clock: Callable[[], float], observer: Callable[[Progress], None] | None = None) -> None:
        self._clock = clock
        self._observer = observer
        self._began = clock()
        self._told = self._began - _REPORT
        self._marks: deque[tuple[float, int]] = deque([(self._began, 0)])
        self.path = ""
        self.files = 0
        self.files_total: int | None = None
        self.octets_total: int | None = None
        #: Bytes that are done; what an attempt finds done already is among them, once.
        self.octets = 0
        self.fresh = 0
        self.stored_octets = 0
        self.skipped = 0
        self.removed = 0
        self.moved = 0
        self.interruptions = 0
        self.failed = 0
        self.problems: list[Problem] = []
        self.digest = b""

    def move(self, octets: int) -> None:
        """So many bytes go over the network."""
        self.moved += octets

    def advance(self, octets: int) -> None:
        """So many bytes more are done; fewer, where some are found to be wrong."""
        self.octets += octets
        self.tell()

    def done(self, path: str, octets: int) -> None:
        """A file is in place."""
        self.path = path
        self.files += 1
        self.stored_octets += octets
        self.tell()

    def problem(self, path: str, error: BaseException) -> None:
        """A file is not copied."""
        self.failed += 1
        if len(self.problems) < _MOST_PROBLEMS:
            status = error.status if isinstance(error, Error) else None
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
            self.problems.append(Problem(path, type(error).__name__, reason, status))

    def tell(self, *, now: bool = False) -> None:
        """Tells the observer, if it is time."""
        if self._observer is None:
            return
        time = self._clock()
        if time - self._told < _REPORT and not now:
            return
        self._told = time
        self._marks.append((time, self.octets))
        while len(self._marks) > 2 and time - self._marks[1][0] > _RATE:
            self._marks.popleft()
        since, before = self._marks[0]
        rate = max(0, self.octets - before) / (time - since) if time > since else 0.0
        left = self.octets_total - self.octets if self.octets_total is not None else None
        self._observer(
            Progress(
                self.path,
                self.files,
                self.files_total,
                self.octets,
                self.octets_total,
                rate,
                max(0, left) / rate if left is not None and rate > 0 else None,
            )
        )

    def summary(self, *, one: bool = True) -> Summary:
        """What it came to.

        :param one: whether it was one file.
        """
        self.tell(now=True)
        return Summary(
            files=self.files,
            octets=self.stored_octets,
            skipped=self.skipped,
            removed=self.removed,
            moved=self.moved,
            moved_again=max(0, self.moved - self.fresh),
            interruptions=self.interruptions,
            seconds=self._clock() - self._began,
            failed=self.failed,
            problems=self.problems,
            digest=self.digest if one else b"",
        )


class Pace:
    """Holds bytes back so that no more than so many go in a second.

    :param reactor: for the time.
    :param rate: bytes a second; ``None`` holds nothing back.
    """

    def __init__(self, reactor: Any, rate: float | None) -> None:
        self._reactor = reactor
        self._rate = rate
        self._free_at = reactor.seconds() if rate else 0.0

    @property
    def is_limited(self) -> bool:
        """Whether anything is ever held back."""
        return bool(self._rate)

    async def take(self, octets: int) -> None:
        """Waits until so many bytes may go."""
        if not self._rate:
            return
        now = self._reactor.seconds()
        # What was not used for a while may not be caught up with at once.
        begin = max(self._free_at, now - 0.05)
        self._free_at = begin + octets / self._rate
        if begin > now:
            waiting: Deferred[None] = deferLater(self._reactor, begin - now)
            await waiting
