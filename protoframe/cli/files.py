"""``pf ls``, ``rm``, ``mv``, ``mkdir`` and ``verify``: what is at a server of files, and changes of it.

Knows how that is laid out; what copies is `protoframe.cli.files_copy`'s.
"""

from __future__ import annotations

import json as json_lines
import stat
import sys
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.files_session import DIGESTS, into, local_trouble, run_with_files, server_path
from protoframe.cli.options import Settings, check_where, shared
from protoframe.cli.output import report, write_json, write_octets, write_text, write_through
from protoframe.cli.problems import FAILURE, REMOTE, STATUSES, Problem, clean

if TYPE_CHECKING:
    from protoframe.cli import running
    from protoframe.files import Entry, FileClient, Verified

__all__ = ["ls", "mkdir", "mv", "rm", "verify"]

#: The status of what is not there.
_NOT_FOUND = 5
#: Lines that are written at a time.
_LINES = 500


def _settings(timeout: float, token_file: str, json: bool, quiet: bool) -> Settings:
    from protoframe.cli.running import read_token

    return Settings(timeout, json, quiet, read_token(token_file))


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("path", default="")
@click.option("--recursive", "-r", is_flag=True, help="What is below the directories as well.")
@shared
def ls(where: str, path: str, recursive: bool, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """List a directory of a `twistd pf-files` server, or show a file; by default its root.

    A line each: mode, octets, when it was changed, and the path, behind that of a directory a slash.  With --json, an
    object each.  With --recursive, a directory that the server cannot read is a problem, and the rest is listed.

    \b
    Examples:
      pf ls tcp:127.0.0.1:12200 reports
      pf ls tcp:127.0.0.1:12200 --recursive --json | jq -r .path
    """
    at = server_path(path)
    settings = _settings(timeout, token_file, json, quiet)
    shown: list[running.Progress] = []
    unread: list[str] = []

    def progress(target: running.Target) -> running.Progress:
        from protoframe.cli.running import Progress

        shown.append(Progress(target, settings))
        return shown[0]

    async def session(_: Any, files: FileClient) -> None:
        from protoframe.cli.running import in_thread

        lines: list[str] = []
        async for entry in _entries(files, at, timeout, recursive=recursive):
            lines.append(_encoded(entry) if json else _row(entry))
            if not entry.is_readable:
                unread.append(entry.path)
            if len(lines) == _LINES:
                shown[0].stop()
                await in_thread(_write, lines, json)
                lines = []
        shown[0].stop()
        if lines:
            await in_thread(_write, lines, json)

    run_with_files(session, where, at, settings, progress)
    for one in unread[:-1]:
        report(_unreadable(one))
    if unread:
        raise _unreadable(unread[-1])


def _unreadable(path: str) -> Problem:
    return Problem(f"{path}: the server cannot read this directory", FAILURE)


async def _entries(files: FileClient, path: str, seconds: float, *, recursive: bool) -> AsyncIterator[Entry]:
    from protoframe import timeout
    from protoframe.files import Kind

    with timeout(seconds):
        entry = await files.stat(path)
    if entry.kind is Kind.FILE:
        yield entry
        return
    async for entry in files.list(path, recursive=recursive):
        yield entry


def _encoded(entry: Entry) -> str:
    import msgspec

    return msgspec.json.encode(entry).decode()


def _row(entry: Entry) -> str:
    is_file = entry.kind.value == "file"
    mode = stat.filemode(entry.mode | (stat.S_IFREG if is_file else stat.S_IFDIR))
    try:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.mtime_ns // 10**9))
    except (OverflowError, ValueError, OSError):
        changed = "-"
    return clean(f"{mode} {entry.size:>12} {changed:<16} {entry.path}{'' if is_file else '/'}")


def _write(lines: list[str], json: bool) -> None:
    text = "\n".join(lines)
    if json:
        write_through(text)
    else:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        write_octets(f"{text}\n".encode(encoding, "backslashreplace"))


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--recursive", "-r", is_flag=True, help="Directories with what is in them, too.")
@shared
def rm(
    where: str,
    paths: tuple[str, ...],
    recursive: bool,
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Remove files, and directories that are empty, from a `twistd pf-files` server.

    \b
    Examples:
      pf rm tcp:127.0.0.1:12200 reports/2025.pdf
      pf rm tcp:127.0.0.1:12200 reports --recursive
    """
    targets = [server_path(path, root=False) for path in paths]

    async def session(_: Any, files: FileClient) -> int:
        from protoframe import timeout as deadline

        removed = 0
        for target in targets:
            found = [target]
            if recursive:
                found += [
                    one.path async for one in _entries(files, target, timeout, recursive=True) if one.path != target
                ]
            for path in reversed(found):
                with deadline(timeout):
                    await files.remove(path)
                removed += 1
        return removed

    removed = run_with_files(session, where, ", ".join(targets), _settings(timeout, token_file, json, quiet))
    if json:
        write_json(json_lines.dumps({"removed": removed}))
    elif not quiet:
        write_text(f"{removed} removed")


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("path")
@click.argument("to")
@shared
def mv(where: str, path: str, to: str, timeout: float, token_file: str, json: bool, quiet: bool) -> None:
    """Rename a file or a directory of a `twistd pf-files` server, or move it into another directory.

    A file that has the new name is replaced.

    \b
    Examples:
      pf mv tcp:127.0.0.1:12200 reports/draft.pdf reports/2026.pdf
      pf mv tcp:127.0.0.1:12200 reports/2026.pdf archive/
    """
    at, there = server_path(path, root=False), server_path(to)
    settings = _settings(timeout, token_file, json, quiet)

    async def session(_: Any, files: FileClient) -> str:
        from protoframe import timeout as deadline

        target = await into(files, to, there, at.rpartition("/")[2], settings)
        with deadline(timeout):
            await files.rename(at, target)
        return target

    target = run_with_files(session, where, at, settings)
    if json:
        write_json(json_lines.dumps({"path": at, "to": target}))


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--parents", "-p", is_flag=True, help="Make those above it too; one that is there is left as it is.")
@shared
def mkdir(
    where: str, paths: tuple[str, ...], parents: bool, timeout: float, token_file: str, json: bool, quiet: bool
) -> None:
    """Make directories at a `twistd pf-files` server.

    \b
    Examples:
      pf mkdir tcp:127.0.0.1:12200 reports
      pf mkdir tcp:127.0.0.1:12200 reports/2026/may --parents
    """
    targets = [server_path(path, root=False) for path in paths]

    async def session(_: Any, files: FileClient) -> None:
        from protoframe import timeout as deadline

        for target in targets:
            with deadline(timeout):
                await files.mkdir(target, parents=parents)

    settings = _settings(timeout, token_file, json, quiet)
    try:
        run_with_files(session, where, ", ".join(targets), settings)
    except Problem as problem:
        if problem.status == REMOTE + _NOT_FOUND and not parents:
            problem.hint = "--parents"
        raise
    if json:
        write_json(json_lines.dumps({"paths": targets}))


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("path")
@click.argument("local", type=click.Path(), required=False)
@click.option(
    "--digest", type=click.Choice(DIGESTS), default=DIGESTS[0], show_default=True, help="Which digest is computed."
)
@shared
def verify(
    where: str,
    path: str,
    local: str | None,
    digest: str,
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Print the digest of a file as the server reads it from its disk now; with LOCAL, compare it with a file here.

    It is the digest of the digests of the file's blocks, which docs/files.md says how to compute.  Exits with 1 where
    the two files differ.

    \b
    Examples:
      pf verify tcp:127.0.0.1:12200 reports/2026.pdf
      pf verify tcp:127.0.0.1:12200 reports/2026.pdf report.pdf
    """
    at = server_path(path, root=False)

    async def session(_: Any, files: FileClient) -> tuple[Verified, Verified | None]:
        theirs = await files.verify(at)
        if local is None:
            return theirs, None
        try:
            return theirs, await files.verify_local(local, theirs.block_size)
        except ValueError:
            # So much larger that it can have no such blocks.
            return theirs, await files.verify_local(local)

    settings = _settings(timeout, token_file, json, quiet)
    if local is not None:
        try:
            open(local, "rb").close()
        except (OSError, ValueError) as error:
            raise local_trouble(error, local) from None
    theirs, ours = run_with_files(session, where, at, settings, local=local or "", digest=digest)
    is_same = ours is None or (ours.digest, ours.block_size) == (theirs.digest, theirs.block_size)
    if json:
        fields: dict[str, Any] = {"path": at, "digest": f"{digest}:{theirs.digest.hex()}"}
        fields |= {"block_size": theirs.block_size, "size": theirs.size, "mtime_ns": theirs.mtime_ns}
        write_json(json_lines.dumps(fields | ({} if ours is None else {"same": is_same})))
    else:
        write_text(clean(f"{digest}:{theirs.digest.hex()}  {at}"))
    if not is_same:
        raise Problem(f"{local} differs from {at} at {where}", FAILURE)
