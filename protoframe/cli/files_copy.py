"""``pf put``, ``pf get`` and ``pf sync``: copies of files and of trees, and what is said of them.

Knows what is typed and what is printed; how a copy is made is `protoframe.files`'s.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from protoframe.cli.completing import complete_where
from protoframe.cli.files_session import (
    DIGESTS,
    check_rate,
    duration,
    into,
    is_into,
    local_trouble,
    run_with_files,
    server_path,
    size,
)
from protoframe.cli.options import Settings, check_where, shared
from protoframe.cli.output import report, width, write_json, write_text
from protoframe.cli.problems import FAILURE, INTERRUPTED, REMOTE, STATUSES, TIMEOUT, USAGE, Problem, clean

if TYPE_CHECKING:
    from protoframe.cli import running
    from protoframe.files import Change, FileClient, Progress, Summary
    from protoframe.files import Problem as FileProblem

__all__ = ["get", "put", "sync"]

F = TypeVar("F", bound=Callable[..., Any])

#: Seconds without news after which no rate is shown any more.
_QUIET = 3.0
_AGAIN = "the same command again, which goes on from there"


def _copying(function: F) -> F:
    """Adds the options that all copies have, and those that all commands have."""
    function = shared(function)
    for option in reversed(
        (
            click.option(
                "--jobs",
                "-j",
                type=click.IntRange(1, 64),
                metavar="N",
                default=4,
                show_default=True,
                help="Large files of a tree that are copied at the same time.",
            ),
            click.option(
                "--bwlimit",
                callback=check_rate,
                metavar="RATE",
                help="Octets a second, at most, of all together; K, M and G are of 1024.",
            ),
            click.option(
                "--checksum", "-c", is_flag=True, help="Compare files by their digests, not by their sizes and times."
            ),
            click.option(
                "--digest",
                type=click.Choice(DIGESTS),
                default=DIGESTS[0],
                show_default=True,
                help="What contents are verified with.",
            ),
        )
    ):
        function = option(function)
    return function


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("local", type=click.Path())
@click.argument("remote")
@_copying
def put(
    where: str,
    local: str,
    remote: str,
    jobs: int,
    bwlimit: float | None,
    checksum: bool,
    digest: str,
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Copy a file, or a directory with what is below, to a `twistd pf-files` server.

    REMOTE is the path that it is to have there; where that ends with a slash or is `.`, or where a file is copied to a
    directory, it is copied into it under its own name.  Of a directory, what is there already with the same size and
    time is left alone.  Directories that are missing are made.

    What is copied is verified at both ends, from the disk of the server, and is durable when the command ends.  After
    an interruption of any kind the same command goes on from what is there.

    \b
    Examples:
      pf put tcp:127.0.0.1:12200 report.pdf reports/2026.pdf
      pf put tcp:127.0.0.1:12200 photos backup/ --jobs 8 --bwlimit 10M
    """
    from protoframe.cli.running import read_token

    try:
        is_tree = stat.S_ISDIR(os.stat(local).st_mode)
    except (OSError, ValueError) as error:
        raise local_trouble(error, local) from None
    copy = _Copy(Settings(timeout, json, quiet, read_token(token_file)), digest, jobs, bwlimit)
    path = server_path(remote)
    name = os.path.basename(os.path.abspath(local))

    async def session(files: FileClient) -> Summary:
        target = await into(files, remote, path, name, copy.settings, look=not is_tree)
        if not target and not is_tree:
            raise Problem(f"{remote!r} is the root of the server", USAGE, f"{name} as REMOTE")
        if is_tree:
            return await files.sync(local, target, by_digest=checksum)
        return await files.put(local, target, by_digest=checksum)

    copy.run(session, where, path or local, local, is_tree=is_tree)


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("remote")
@click.argument("local", type=click.Path())
@_copying
def get(
    where: str,
    remote: str,
    local: str,
    jobs: int,
    bwlimit: float | None,
    checksum: bool,
    digest: str,
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Copy a file, or a directory with what is below, from a `twistd pf-files` server.

    LOCAL is the path that it is to have here; where that ends with a slash or is `.` or `..`, or where a file is copied
    to a directory, it is copied into it under its own name.  Of a directory, what is here already with the same size
    and time is left alone.

    What is copied is verified at both ends, from the disk of this one, and is durable when the command ends.  After an
    interruption of any kind the same command goes on from what is here; until then that is in a directory `.pf-files`
    beside LOCAL, or within it if it is a directory.

    \b
    Examples:
      pf get tcp:127.0.0.1:12200 reports/2026.pdf .
      pf get tcp:127.0.0.1:12200 backup/photos photos --checksum
    """
    from protoframe.cli.running import read_token

    copy = _Copy(Settings(timeout, json, quiet, read_token(token_file)), digest, jobs, bwlimit)
    path = server_path(remote)

    async def session(files: FileClient) -> Summary:
        from protoframe import timeout as deadline
        from protoframe.files import Kind

        with deadline(timeout):
            entry = await files.stat(path)
        copy.is_tree = entry.kind is Kind.DIRECTORY
        target = _into_here(local, path.rpartition("/")[2], look=not copy.is_tree)
        if copy.is_tree:
            return await files.sync(target, path, direction=_pull(), by_digest=checksum)
        return await files.get(path, target, by_digest=checksum)

    copy.run(session, where, path, local)


@click.command(epilog=STATUSES)
@click.argument("where", callback=check_where, shell_complete=complete_where)
@click.argument("local", type=click.Path())
@click.argument("remote")
@click.option("--pull", is_flag=True, help="Make LOCAL like REMOTE, rather than REMOTE like LOCAL.")
@click.option("--delete", is_flag=True, help="Remove what the other has not.")
@click.option("--dry-run", "-n", is_flag=True, help="Change nothing, and print what would be changed.")
@_copying
def sync(
    where: str,
    local: str,
    remote: str,
    pull: bool,
    delete: bool,
    dry_run: bool,
    jobs: int,
    bwlimit: float | None,
    checksum: bool,
    digest: str,
    timeout: float,
    token_file: str,
    json: bool,
    quiet: bool,
) -> None:
    """Make a directory at a `twistd pf-files` server like one here, or with --pull one here like one there.

    Only what differs is copied: files that the other has not, or has with another size or time, or with --checksum with
    other contents.  Links and devices are left out.  Nothing is removed without --delete, and nothing at all if a
    directory of the tree that is copied cannot be read.  With --pull, what is closed to you there is not there.

    With --dry-run, a line for each change: copy, mkdir or remove, and the path; with --json as well an object for each,
    before the summary.

    \b
    Examples:
      pf sync tcp:127.0.0.1:12200 site www --delete --dry-run
      pf sync tcp:127.0.0.1:12200 site www --pull
    """
    from protoframe.cli.running import read_token

    try:
        if not pull or os.path.lexists(local):
            os.listdir(local)
    except (OSError, ValueError) as error:
        raise local_trouble(error, local) from None
    # Lines and progress would write into each other.
    copy = _Copy(Settings(timeout, json, quiet or dry_run, read_token(token_file)), digest, jobs, bwlimit)
    path = server_path(remote)

    def change(one: Change) -> None:
        if json:
            import msgspec

            write_json(msgspec.json.encode(one).decode())
        else:
            write_text(clean(f"{one.action.value} {one.path}"))

    async def session(files: FileClient) -> Summary:
        return await files.sync(
            local,
            path,
            direction=_pull() if pull else _push(),
            by_digest=checksum,
            delete=delete,
            dry_run=change if dry_run else None,
        )

    copy.run(session, where, path, local, is_dry=dry_run, is_silent=quiet)


def _into_here(local: str, name: str, *, look: bool) -> str:
    """Where something is to be at this end: in the directory that was named, or there itself."""
    is_directory = is_into(local) or os.path.basename(local) == ".." or (look and os.path.isdir(local))
    return os.path.join(local, name) if is_directory else local


def _pull() -> Any:
    from protoframe.files import Direction

    return Direction.GET


def _push() -> Any:
    from protoframe.files import Direction

    return Direction.PUT


class _Copy:
    """A copy while it runs, and what is said of it.

    :ivar is_tree: whether it is of more than one file.
    """

    def __init__(self, settings: Settings, digest: str, jobs: int, rate: float | None) -> None:
        self.settings = settings
        self.is_tree = True
        self._digest = digest
        self._jobs = jobs
        self._rate = rate
        self._last: Progress | None = None
        self._told_at = 0.0

    def run(
        self,
        session: Callable[[FileClient], Awaitable[Summary]],
        where: str,
        what: str,
        local: str,
        *,
        is_tree: bool = True,
        is_dry: bool = False,
        is_silent: bool = False,
    ) -> None:
        """Runs it, and prints what it came to.

        :raises Problem: something could not be copied.
        """
        self.is_tree = is_tree

        async def whole(_: Any, files: FileClient) -> Summary:
            return await session(files)

        try:
            summary = run_with_files(
                whole,
                where,
                what,
                self.settings,
                lambda target: _progress(target, self.settings, self),
                local=local,
                digest=self._digest,
                at_once=self._jobs,
                bandwidth=self._rate,
                observer=self._told,
            )
        except KeyboardInterrupt:
            raise Problem(f"interrupted{self._so_far()}", INTERRUPTED, "" if is_dry else _AGAIN) from None
        if self.settings.json:
            write_json(_encoded(summary, self._digest))
        elif not (is_silent or (self.settings.quiet and not is_dry)):
            write_text(clean(_said(summary, what, self._digest, is_dry=is_dry)))
        _check(summary)

    def _told(self, progress: Progress) -> None:
        self._last = progress
        self._told_at = time.monotonic()

    def _so_far(self) -> str:
        last = self._last
        if last is None or not last.octets:
            return ""
        return f"; {_of(last, is_tree=self.is_tree)} are copied"

    def line(self) -> str | None:
        """How far it is."""
        last = self._last
        if last is None:
            return None
        text = f"{_of(last, is_tree=self.is_tree)}"
        silent = time.monotonic() - self._told_at
        if silent > _QUIET:
            return f"{text}, nothing for {silent:.0f} s"
        text = f"{text}, {size(last.rate)}/s"
        return text if last.seconds_left is None else f"{text}, {duration(last.seconds_left)} left"


def _of(last: Progress, *, is_tree: bool) -> str:
    """How much is done, and of how much."""
    octets = size(last.octets)
    if last.octets_total is not None:
        octets = f"{octets} of {size(last.octets_total)}"
    if not is_tree:
        return octets
    files = f"{last.files:,}" if last.files_total is None else f"{last.files:,} of {last.files_total:,}"
    return f"{files} files, {octets}"


def _progress(target: running.Target, settings: Settings, copy: _Copy) -> running.Progress:
    from protoframe.cli.running import Progress

    class Copying(Progress):
        """How far the copy is, how fast it goes, and how long it may take."""

        interval = 0.25

        def line(self, columns: int) -> str:
            text = copy.line()
            return text if text is not None and width(text) < columns else super().line(columns)

    return Copying(target, settings)


def _said(summary: Summary, what: str, digest: str, *, is_dry: bool) -> str:
    """What a copy came to, for people."""
    if is_dry:
        text = f"{_count(summary.files, 'file')}, {size(summary.octets)}, would be copied"
        return f"{text}, {summary.removed:,} removed" if summary.removed else text
    seconds = f"{summary.seconds:.1f} s" if summary.seconds < 60 else duration(summary.seconds)
    took = f"in {seconds}"
    if summary.moved and summary.seconds > 0:
        took += f" ({size(summary.moved / summary.seconds)}/s)"
    moved = f"{size(summary.octets)} {took}"
    if summary.moved < summary.octets:
        moved = f"{size(summary.octets)}, {size(summary.moved)} of them moved, {took}"
    parts = [moved]
    if summary.interruptions:
        parts.append(f"{_count(summary.interruptions, 'interruption')}")
    if summary.digest:
        if not summary.files:
            parts = ["is the same already"]
        return f"{what}: {', '.join([*parts, f'{digest}:{summary.digest.hex()}'])}"
    if summary.skipped:
        parts.append(f"{summary.skipped:,} were the same already")
    if summary.removed:
        parts.append(f"{summary.removed:,} removed")
    if summary.failed:
        parts.append(f"{summary.failed:,} failed")
    return f"{_count(summary.files, 'file')}, {', '.join(parts)}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _encoded(summary: Summary, digest: str) -> str:
    """The same as JSON."""
    import msgspec

    fields = msgspec.to_builtins(summary)
    fields["digest"] = f"{digest}:{summary.digest.hex()}" if summary.digest else None
    for problem in fields["problems"]:
        del problem["status"]
    return msgspec.json.encode(fields).decode()


def _check(summary: Summary) -> None:
    """
    :raises Problem: something was not copied; what, is reported.
    """
    if not summary.failed:
        return
    for problem in summary.problems:
        report(Problem(f"{problem.path}: {problem.error}: {problem.reason}", FAILURE))
    many = f", of which the first {len(summary.problems)} are told" if len(summary.problems) < summary.failed else ""
    what = "1 problem" if summary.failed == 1 else f"{summary.failed:,} problems"
    text = f"{what}{many}; everything else is copied"
    raise Problem(text, _status(summary.problems[0]), "the same command again, which copies what is missing")


def _status(problem: FileProblem) -> int:
    """What ``pf`` exits with."""
    from protoframe import Status

    if problem.status is None:
        return FAILURE
    return TIMEOUT if problem.status is Status.DEADLINE_EXCEEDED else REMOTE + problem.status
