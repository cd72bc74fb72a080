"""What the commands about files share: a client of the server, what goes wrong there, paths, sizes and rates.

Knows servers of files; not what is copied, nor when.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from protoframe.cli.options import Settings
from protoframe.cli.problems import FAILURE, USAGE, Problem, clip

if TYPE_CHECKING:
    from protoframe import Error
    from protoframe.cli.running import Progress, Target
    from protoframe.files import FileClient

__all__ = [
    "DIGESTS",
    "check_rate",
    "duration",
    "into",
    "is_into",
    "local_trouble",
    "run_with_files",
    "server_path",
    "size",
    "trouble",
]

T = TypeVar("T")

DIGESTS = ("sha256", "blake3")

#: Seconds that closing may take.
_CLOSING = 0.25
_RATE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)", re.ASCII | re.IGNORECASE)
_UNITS = "BKMGT"


def check_rate(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Octets a second.

    :raises click.BadParameter: it is no rate.
    """
    if value is None:
        return None
    match = _RATE.fullmatch(value)
    rate = float(match[1]) * 1024 ** _UNITS.index(match[2].upper() or "B") if match is not None else 0.0
    if not (rate >= 1 and math.isfinite(rate)):
        text = f"expected octets a second, such as 500K or 10M, of 1 and more, got {clip(value, 40)!r}"
        raise click.BadParameter(text, context, parameter)
    return rate


def server_path(text: str, *, root: bool = True) -> str:
    """A path of the server as it takes it: ``/``, ``.`` and what is empty are its root.

    :param root: whether that may be meant.
    :raises Problem: no server has such a path.
    """
    from protoframe.files import split_path

    parts = [part for part in text.split("/") if part not in {"", "."}]
    if split_path("/".join(parts)) is None:
        hint = "a path below the server's root, without '..' and unseen characters"
        raise Problem(f"{clip(text, 200)!r} is no path of a server", USAGE, hint)
    if not parts and not root:
        raise Problem(f"{text!r} is the root of the server", USAGE, "a path below it")
    return "/".join(parts)


def is_into(text: str) -> bool:
    """Whether a path names the directory that something is to be copied into, rather than what it is to be."""
    return text.rpartition("/")[2] in {"", "."} and text != ""


async def into(files: FileClient, text: str, path: str, name: str, settings: Settings, *, look: bool = True) -> str:
    """Where something is to be at the server: in the directory that was named, or there itself.

    :param text: what was typed.
    :param path: the same, as the server takes it.
    :param look: whether a directory that is there is meant so, however it is typed.
    """
    from protoframe import timeout
    from protoframe.files import Kind, NoSuchPath

    is_directory = is_into(text) or (look and not path)
    if look and not is_directory:
        try:
            with timeout(settings.timeout):
                is_directory = (await files.stat(path)).kind is Kind.DIRECTORY
        except NoSuchPath:
            is_directory = False
    return f"{path}/{name}".lstrip("/") if is_directory else path


def size(octets: float) -> str:
    """A number of octets, for people."""
    if octets < 1024:
        return f"{octets:.0f} B"
    for unit in "KMGT":
        octets /= 1024
        # 1023.95 would be written as 1024.0.
        if octets < 1023.95 or unit == "T":
            return f"{octets:.1f} {unit}iB"
    raise AssertionError(octets)


def duration(seconds: float) -> str:
    """A time, for people, as ``m:ss`` or ``h:mm:ss``."""
    whole = math.ceil(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def run_with_files(
    session: Callable[[Any, FileClient], Awaitable[T]],
    where: str,
    what: str,
    settings: Settings,
    progress: Callable[[Target], Progress] | None = None,
    *,
    local: str = "",
    digest: str = "sha256",
    **options: Any,
) -> T:
    """Runs a session, which is given the reactor and a client that is connected, to its end; once in a process.

    :param what: the path, for errors.
    :param progress: makes that of a session which tells it.
    :param local: the path of this end, for errors.
    :param options: what else `FileClient` takes.
    :raises Problem: an error, as a line and a status.
    :raises KeyboardInterrupt: the user asked for an end; the session was cancelled.
    """
    from protoframe import Error
    from protoframe.cli.running import Target, run

    target = Target(where, what)

    async def whole(reactor: Any) -> T:
        async with _connected(reactor, target, settings, digest, options) as files:
            try:
                return await session(reactor, files)
            except Error as error:
                raise trouble(error, target, settings) from None
            except BrokenPipeError:
                raise
            except OSError as error:
                raise local_trouble(error, local) from None

    return run(whole, target, settings, progress(target) if progress is not None else None)


@asynccontextmanager
async def _connected(
    reactor: Any, target: Target, settings: Settings, digest: str, options: dict[str, Any]
) -> AsyncIterator[FileClient]:
    from twisted.internet.defer import Deferred

    from protoframe.cli.running import opened_in_time
    from protoframe.files import FILES_LIMITS, Digest, DigestUnavailable, FileClient
    from protoframe.files._system import raise_open_files

    raise_open_files(reactor)
    limits = dataclasses.replace(
        FILES_LIMITS, handshake_timeout=settings.timeout, close_timeout=_CLOSING, default_timeout=settings.timeout
    )
    try:
        files = FileClient(reactor, target.where, token=settings.token, limits=limits, digest=Digest(digest), **options)
    except DigestUnavailable as error:
        raise Problem(error.message, FAILURE, "pip install 'protoframe[blake3]', or --digest sha256") from None
    except ValueError as error:
        raise Problem(str(error), USAGE, "tcp:host:port, tls:host:port, udp:host:port or unix:path") from None
    await opened_in_time(reactor, Deferred.fromCoroutine(files.__aenter__()), target, settings)
    try:
        yield files
    finally:
        await files.__aexit__(None, None, None)


def local_trouble(error: OSError | ValueError, path: str = "") -> Problem:
    """Why this end's disk or file system does not do it.

    :param path: what it was about.
    """
    text = getattr(error, "strerror", None) or str(error)
    name = getattr(error, "filename", None)
    path = path or (name if isinstance(name, str) else "")
    return Problem(f"{path}: {text[:1].lower()}{text[1:]}" if path else f"{text[:1].lower()}{text[1:]}", FAILURE)


def trouble(error: Error, target: Target, settings: Settings) -> Problem:
    """An error of a call, or of a copy."""
    from protoframe import Unavailable
    from protoframe.cli.running import refused
    from protoframe.files import (
        CorruptCopy,
        DigestUnavailable,
        FileTooLarge,
        NoSuchPath,
        NotEmpty,
        OutOfSpace,
        OverQuota,
        ReadOnly,
        SourceChanged,
        Superseded,
    )

    problem = refused(error, target, settings)
    # What is asked for here is a path, which `pf describe` does not know.
    if "describe" in problem.hint:
        problem.hint = target.command("list")
    for kind, hint in (
        (NoSuchPath, f"{target.command('ls')}, which shows what is there"),
        (NotEmpty, "--recursive"),
        (ReadOnly, "another directory, or a server without --read-only"),
        (FileTooLarge, "a smaller file"),
        (OverQuota, "to remove other files, or a server with a larger --quota"),
        (OutOfSpace, "again when there is room"),
        (DigestUnavailable, "--digest sha256"),
        (SourceChanged, "the same command again, when nobody writes to the file"),
        (CorruptCopy, "another disk at the end that gets the file, for it does not keep what is written"),
        (Superseded, "to wait for the other copy"),
        (Unavailable, "the same command again, which goes on from what is there"),
    ):
        if isinstance(error, kind):
            problem.hint = hint
            break
    return problem
