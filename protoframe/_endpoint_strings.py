"""Endpoint strings of this package's own, written as Twisted writes its own: ``kind:part:name=value``.

Knows parts and their names; not what any of them is for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["bind_parts", "number_of", "port_of", "split_endpoint"]


def split_endpoint(where: str) -> tuple[str, list[str], dict[str, str]]:
    r"""Takes an endpoint string apart, with Twisted's escapes: a backslash has the next character stand for itself.

    >>> split_endpoint("tls:12000:privateKey=C\\:/key.pem")
    ('tls', ['12000'], {'privateKey': 'C:/key.pem'})

    :return: the kind, the parts without a name, and those with one.
    :raises ValueError: a name is given twice, or nothing follows a backslash.
    """
    parts: list[list[str]] = [[""]]
    characters = iter(where)
    for character in characters:
        if character == ":":
            parts.append([""])
        elif character == "=" and len(parts[-1]) == 1:
            parts[-1].append("")
        elif character == "\\":
            escaped = next(characters, None)
            if escaped is None:
                raise ValueError("nothing follows the backslash at its end")
            parts[-1][-1] += escaped
        else:
            parts[-1][-1] += character
    named: dict[str, str] = {}
    for name, value in (part for part in parts if len(part) == 2):
        if name in named:
            raise ValueError(f"{name}= is given twice")
        named[name] = value
    kind, *positional = [part[0] for part in parts if len(part) == 1] or [""]
    return kind, positional, named


def bind_parts(
    positional: Sequence[str],
    named: dict[str, str],
    positions: Sequence[str],
    names: Collection[str],
    required: Sequence[str],
) -> dict[str, str]:
    """The parts of an endpoint string by their names.

    :param positional: the parts without a name, as `split_endpoint` gives them.
    :param named: those with one.
    :param positions: the names that the former have, in order.
    :param names: all names that there are.
    :param required: those that must be there.
    :raises ValueError: a part is missing, unknown, empty, given twice or too much.
    """
    if len(positional) > len(positions):
        raise ValueError(f"{positional[len(positions)]!r} is a part too many")
    bound = dict(zip(positions, positional, strict=False))
    for name, value in named.items():
        if name not in names:
            raise ValueError(f"there is no part {name}=; there are {', '.join(f'{known}=' for known in names)}")
        if name in bound:
            raise ValueError(f"{name}= is given twice")
        bound[name] = value
    for name in required:
        if name not in bound:
            raise ValueError(f"{name}= is missing" if name not in positions else f"the {name} is missing")
    for name, value in bound.items():
        if not value and name != "interface":
            raise ValueError(f"{name}= is empty" if name in named else f"the {name} is empty")
    return bound


def port_of(text: str) -> int:
    """
    :raises ValueError: it is no port.
    """
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is no port number")
    if int(text) > 65535:
        raise ValueError(f"port {text} is above 65535")
    return int(text)


def number_of(name: str, text: str) -> int:
    """
    :raises ValueError: it is no number above 0.
    """
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise ValueError(f"{name}={text} is no number above 0")
    return int(text)
