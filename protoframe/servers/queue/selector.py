"""Which messages a consumer wants: by the words of their subject, and by their headers.

Knows texts alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from protoframe import InvalidArgument

__all__ = ["Selector"]

#: Words of a pattern; a subject has 128 at most, so that a match takes some thousand steps.
_MOST_WORDS = 32
_ONE, _ANY = "*", "#"


class Selector:
    """What a consumer wants.

    :param pattern: a subject; of its words, ``*`` stands for any one, and ``#`` for any number, none among them, as in
        the topics of AMQP 0-9-1, section 3.1.3.3.  Empty for any subject.
    :param headers: texts that a message's headers have to have.
    :raises InvalidArgument: the pattern has too many words.
    """

    def __init__(self, pattern: str, headers: Mapping[str, str]) -> None:
        self._words = pattern.split(".") if pattern else None
        if self._words is not None and len(self._words) > _MOST_WORDS:
            raise InvalidArgument(f"subject: a pattern has {_MOST_WORDS} words at most, got {len(self._words)}")
        self._exact = pattern if pattern and not {_ONE, _ANY} & set(pattern.split(".")) else None
        self._headers = dict(headers)

    @classmethod
    def of(cls, pattern: str, headers: Mapping[str, str]) -> Selector | None:
        """The same; ``None`` where everything is wanted."""
        return cls(pattern, headers) if (pattern and pattern != _ANY) or headers else None

    def takes(self, subject: str, headers: Mapping[str, str]) -> bool:
        """Whether a message is wanted."""
        for name, value in self._headers.items():
            if headers.get(name) != value:
                return False
        if self._words is None:
            return True
        if self._exact is not None:
            return subject == self._exact
        return _matches(self._words, subject.split(".") if subject else [])


def _matches(pattern: list[str], words: list[str]) -> bool:
    """Whether words are what a pattern says; goes back to the last ``#`` alone, which is enough."""
    at = place = 0
    mark = -1
    resume = 0
    while place < len(words):
        if at < len(pattern) and pattern[at] == _ANY:
            mark, resume = at, place
            at += 1
        elif at < len(pattern) and (pattern[at] == _ONE or pattern[at] == words[place]):
            at += 1
            place += 1
        elif mark >= 0:
            resume += 1
            at, place = mark + 1, resume
        else:
            return False
    return all(word == _ANY for word in pattern[at:])
