"""Who may do what in which directory, and how many bytes all may take together.

Knows paths and permissions; no files and no connections.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from protoframe.files import NoSuchPath, OverQuota, ReadOnly

__all__ = ["Access", "Quota", "Rule", "parse_rule"]


class Rule:
    """A directory, and the permission that opens it.

    :param permission: what the peer's `Identity` must have.
    :param parts: the directory, below the root.
    :param read_only: whether it opens it for reading alone.
    """

    __slots__ = ("parts", "permission", "read_only")

    def __init__(self, permission: str, parts: Sequence[str], *, read_only: bool = False) -> None:
        self.permission = permission
        self.parts = tuple(parts)
        self.read_only = read_only


def parse_rule(text: str) -> Rule:
    """A rule, as ``PERMISSION=DIR`` or ``PERMISSION=DIR:ro``; the root is ``.``.

    :raises ValueError: it is none.
    """
    from protoframe.files import split_path

    permission, equals, directory = text.partition("=")
    read_only = directory.endswith(":ro")
    directory = directory.removesuffix(":ro").rstrip("/")
    parts = split_path("" if directory in {"", "."} else directory)
    if not permission or not equals or parts is None:
        raise ValueError(f"expected PERMISSION=DIR or PERMISSION=DIR:ro, got {text!r}")
    return Rule(permission, parts, read_only=read_only)


class Access:
    """What rules say.  Those of the innermost directory decide; without any rule everybody may do everything.

    :param rules: where there are any, what none is about is closed.
    :param read_only: nothing may be written, whatever the rules say.
    """

    def __init__(self, rules: Collection[Rule] = (), *, read_only: bool = False) -> None:
        self.read_only = read_only
        self._rules: dict[tuple[str, ...], list[Rule]] = {}
        for rule in rules:
            self._rules.setdefault(rule.parts, []).append(rule)

    def check(self, parts: Sequence[str], permissions: Collection[str], *, write: bool) -> None:
        """Whether it may be used.

        :raises NoSuchPath: there is nothing for who has these permissions.
        :raises ReadOnly: there is, for reading.
        """
        read, written = self._may(tuple(parts), permissions)
        if not read:
            raise NoSuchPath("no such path")
        if write and not written:
            raise ReadOnly("nothing can be written here")

    def may_read(self, parts: Sequence[str], permissions: Collection[str]) -> bool:
        """Whether there is something to be read, for who has these permissions."""
        return self._may(tuple(parts), permissions)[0]

    def is_guarded(self, parts: Sequence[str]) -> bool:
        """Whether a rule is about this directory, or one below: it must stay where it is."""
        place = tuple(parts)
        return any(directory[: len(place)] == place for directory in self._rules)

    def _may(self, parts: tuple[str, ...], permissions: Collection[str]) -> tuple[bool, bool]:
        if not self._rules:
            return True, not self.read_only
        for length in range(len(parts), -1, -1):
            rules = self._rules.get(parts[:length])
            if rules is not None:
                opened = [rule for rule in rules if rule.permission in permissions]
                return bool(opened), not self.read_only and any(not rule.read_only for rule in opened)
        return False, False


class Quota:
    """Bytes that all files may have together; any thread may ask.

    :param limit: ``None`` where it does not matter.
    :param used: how many they have.
    """

    def __init__(self, limit: int | None, used: int = 0) -> None:
        self.limit = limit
        self.used = used
        self._lock = threading.Lock()

    def take(self, octets: int) -> None:
        """Takes so many bytes.

        :raises OverQuota: so many are not left.
        """
        if self.limit is None:
            return
        with self._lock:
            left = max(0, self.limit - self.used)
            if octets > left:
                raise OverQuota("the files here would take too many bytes", left=left)
            self.used += octets

    def give_back(self, octets: int) -> None:
        """So many are free again."""
        if self.limit is not None:
            with self._lock:
                self.used = max(0, self.used - octets)
