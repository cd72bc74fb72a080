"""Queue servers on disks that are full, or that fail: nothing that was acknowledged is lost, and the log says why."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from protoframe import ConnectionLost, Error, timeout
from protoframe.queue import Delivery, Message, Settings, StoreFailed, StoreFull
from tests.processes import PATIENCE
from tests.queue_load import pause, queue_server

#: Octets of the disk that gets full, and of each body.
DISK, BODY = 16 * 2**20, 2**16


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(where)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def body(number: int, size: int = BODY) -> bytes:
    return str(number).encode().ljust(size, b".")


async def fill(queue: Any) -> list[bytes]:
    """Publishes until the disk is full; the bodies of which there were receipts."""
    stored: list[bytes] = []
    for number in range(0, 10 * DISK // BODY, 4):
        bodies = [body(number + part) for part in range(4)]
        try:
            with timeout(PATIENCE):
                await queue.publish_batch("q", [Message(body=each) for each in bodies])
        except StoreFull:
            return stored
        stored += bodies
    raise AssertionError("a disk of 16 MiB takes 160")


async def drain(queue: Any, count: int) -> list[Delivery]:
    """Takes and acknowledges so many."""
    taken: list[Delivery] = []
    with timeout(PATIENCE):
        async for delivery in queue.consume("q", prefetch=10):
            taken.append(delivery)
            assert (await queue.acknowledge("q", [delivery.tag])).count == 1
            if len(taken) == count:
                break
    return taken


async def publishes_again(queue: Any) -> float:
    """Publishes as soon as that goes again; the seconds that it took."""
    began = time.monotonic()
    while True:
        try:
            await queue.publish("q", b"again")
        except StoreFull:
            assert time.monotonic() - began < PATIENCE
            await pause(0.05)
        else:
            return time.monotonic() - began


@pytest.mark.parametrize("end", [None, signal.SIGKILL] if "PROTOFRAME_KILLS" in os.environ else [None])
@pytest_twisted.ensureDeferred
async def test_a_full_disk_takes_nothing_and_gives_everything(
    tmp_path: Path, disk: Path, end: signal.Signals | None
) -> None:
    async with AsyncExitStack() as stack:
        running, queue = await stack.enter_async_context(
            queue_server(tmp_path, disk / "data", "--ballast", "2M"),
        )
        await queue.declare("q")
        stored = await fill(queue)
        assert len(stored) * BODY > DISK // 4
        await deferToThread(running.wait_for_log, "is full: nothing more is stored until there is room")
        if end is not None:
            # There is no ballast now that a new start could take up.
            running.process.send_signal(end)
            assert await deferToThread(running.process.wait, PATIENCE) == -end
            assert "Traceback" not in running.log
            running, queue = await stack.enter_async_context(queue_server(tmp_path, disk / "data", "--ballast", "2M"))
            stored += await fill(queue)
        assert [delivery.body for delivery in await drain(queue, len(stored))] == stored
        assert await publishes_again(queue) < 5
        assert (await queue.statistics("q")).depth == 1
        await deferToThread(running.wait_for_log, "has room again")
        assert await fill(queue)
        assert "Traceback" not in running.log


def use_up(foreign: Path) -> None:
    """Has a file take all the room that there is."""
    descriptor = os.open(foreign, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while os.write(descriptor, bytes(size)) == size:
                    pass
    finally:
        os.close(descriptor)
    system = os.statvfs(foreign)
    assert system.f_bavail == 0


@pytest_twisted.ensureDeferred
async def test_a_server_starts_on_a_full_disk_and_goes_on_when_there_is_room(tmp_path: Path, disk: Path) -> None:
    async with queue_server(tmp_path, disk / "data", "--ballast", "2M") as (running, queue):
        await queue.declare("q", Settings())
        for number in range(40):
            await queue.publish("q", body(number))
        # These are given back at the next start, which takes room.
        async for delivery in queue.consume("q"):
            if delivery.sequence == 3:
                running.process.kill()
                break
    foreign = disk / "foreign"
    use_up(foreign)
    async with queue_server(tmp_path, disk / "data", "--ballast", "2M") as (running, queue):
        # Room that is the log's may be there, and no more.
        stored = [body(number) for number in range(40)] + await fill(queue)
        assert len(stored) * BODY < DISK // 2
        assert [delivery.body for delivery in await drain(queue, len(stored))] == stored
        foreign.unlink()
        assert await publishes_again(queue) < 5
        await deferToThread(running.wait_for_log, "has room again")
        assert "Traceback" not in running.log


SHIM = """
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(void) { return access(getenv("FAILS"), F_OK) == 0; }

int fsync(int file) {
    if (fails()) { errno = EIO; return -1; }
    return syscall(SYS_fsync, file);
}

int fdatasync(int file) {
    if (fails()) { errno = EIO; return -1; }
    return syscall(SYS_fdatasync, file);
}
"""


@pytest.fixture
def shim(tmp_path: Path) -> dict[str, str]:
    """Variables that have a process's syncs fail from when the file is there that ``FAILS`` names."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "shim.c").write_text(SHIM)
    library = tmp_path / "shim.so"
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "shim.c")],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        pytest.skip(f"the C compiler does not work: {built.stderr}")
    return {"LD_PRELOAD": str(library), "FAILS": str(tmp_path / "fails")}


@pytest_twisted.ensureDeferred
async def test_a_sync_that_fails_is_the_last(tmp_path: Path, shim: dict[str, str]) -> None:
    stored: dict[bytes, int] = {}
    late: list[bytes] = []
    errors: list[Error] = []

    async def publish(queue: Any, publisher: int) -> None:
        for number in range(1_000_000):
            text = f"{publisher}.{number}".encode()
            is_late = failed > 0
            try:
                with timeout(PATIENCE):
                    stored[text] = (await queue.publish("q", text)).sequence
            except Error as error:
                errors.append(error)
                return
            if is_late:
                late.append(text)

    async def consume(queue: Any) -> None:
        try:
            async for _ in queue.consume("idle"):
                pass
        except Error as error:
            errors.append(error)

    failed = 0.0
    async with queue_server(tmp_path, tmp_path / "data", "--ballast", "1M", **shim) as (running, queue):
        await queue.declare("q")
        await queue.declare("idle")
        began = [Deferred.fromCoroutine(publish(queue, publisher)) for publisher in range(8)]
        began.append(Deferred.fromCoroutine(consume(queue)))
        while len(stored) < 200:
            await pause(0.01)
        await deferToThread(Path(shim["FAILS"]).touch)
        failed = time.monotonic()
        await gatherResults(began)
        assert await deferToThread(running.process.wait, PATIENCE) == 1
        # Not the time that calls have to end in.
        assert time.monotonic() - failed < 5
        assert not late
        assert len(errors) == 9
        assert all(isinstance(error, StoreFailed | ConnectionLost) and error.may_have_run for error in errors), errors
        (line,) = (tmp_path / "stderr").read_text().splitlines()
        assert line.endswith("the store failed: disk I/O error")
        assert "Traceback" not in running.log
    async with queue_server(tmp_path, tmp_path / "data") as (running, queue):
        there = {waiting.message.body: waiting.message.sequence async for waiting in queue.peek("q", count=1_000_000)}
        assert stored.items() <= there.items()
        assert len(there) <= len(stored) + 8
        await queue.publish("q", b"again")
