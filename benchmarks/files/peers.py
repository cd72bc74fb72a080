"""The programs that copy: what each is called, what it takes, what it verifies, and its command lines.

Knows programs and their options.  It must not know what is measured, nor how processes are started and ended.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.files.workloads import PUT
from benchmarks.peers import Peer

__all__ = ["COPIERS", "Copier", "version"]

Command = list[str]

#: Debian's sshd is not where programs of users are looked for; it insists on being started by its whole path.
_PLACES = "/usr/sbin:/usr/local/sbin"


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_PLACES)


def version(program: str) -> str | None:
    """Of a program, if it is there."""
    found = _program(program)
    if found is None:
        return None
    option = "--version" if program == "rsync" else "-V"
    done = subprocess.run([found, option], capture_output=True, text=True, timeout=30, check=False)
    number = re.search(r"(?:version |OpenSSH_)(\d[\w.]*)", done.stdout + done.stderr)
    return number[1] if number else "of an unknown version"


@dataclasses.dataclass(frozen=True)
class Copier(Peer):
    """One of those that are compared.

    :param programs: what must be there, with the Debian package that has it.
    :param serve: the command line of a server: of its root, a directory for its settings, and its port.
    :param copy: the command line of a copy: which way, a path of this end, one of the other, the server's root and its
        directory, and its port.
    """

    programs: tuple[tuple[str, str], ...] = ()
    serve: Callable[[Path, Path, int], Command] = dataclasses.field(kw_only=True)
    copy: Callable[[str, Path, str, Path, Path, int], Command] = dataclasses.field(kw_only=True)

    def missing(self) -> str | None:
        """What is not installed of what it takes, if anything."""
        for program, package in self.programs:
            if _program(program) is None:
                return f"the program {program} (Debian's package {package})"
        return super().missing()


def _protoframe_server(kind: str) -> Callable[[Path, Path, int], Command]:
    def serve(root: Path, _directory: Path, port: int) -> Command:
        run = "from twisted.scripts.twistd import run; run()"
        where = f"{kind}:{port}:interface=127.0.0.1"
        return [*(sys.executable, "-c", run, "-n", "--pidfile=", "pf-files", "--root", str(root), "--listen", where)]

    return serve


def _protoframe_copy(kind: str, digest: str = "sha256") -> Callable[[str, Path, str, Path, Path, int], Command]:
    def copy(way: str, local: Path, remote: str, _root: Path, _directory: Path, port: int) -> Command:
        where = f"{kind}:127.0.0.1:{port}"
        return [sys.executable, "-m", "benchmarks.files", "take", way, str(local), remote, where, digest]

    return copy


def _rsync_server(root: Path, directory: Path, port: int) -> Command:
    settings = directory / "rsyncd.conf"
    # One that root starts becomes nobody otherwise.
    user = "uid = root\ngid = root\n" if os.geteuid() == 0 else ""
    settings.write_text(
        f"port = {port}\naddress = 127.0.0.1\nuse chroot = no\nnumeric ids = yes\n{user}"
        f"[files]\npath = {root}\nread only = no\n"
    )
    return [_program("rsync") or "rsync", "--daemon", "--no-detach", f"--config={settings}"]


def _rsync_copy(*options: str) -> Callable[[str, Path, str, Path, Path, int], Command]:
    def copy(way: str, local: Path, remote: str, root: Path, _directory: Path, port: int) -> Command:
        there = f"rsync://127.0.0.1:{port}/files/{remote}"
        # A slash at the end: what is in a directory, and not it.
        ends = [f"{local}/" if local.is_dir() else str(local), there] if way == PUT else [there, str(local)]
        if way != PUT and (root / remote).is_dir():
            ends[0] += "/"
        return [_program("rsync") or "rsync", "--recursive", "--times", "--perms", *options, *ends]

    return copy


def _ssh_server(_root: Path, directory: Path, port: int) -> Command:
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(key, check=True, timeout=30, stdin=subprocess.DEVNULL)
    settings = directory / "sshd_config"
    settings.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory / 'host'}\nPidFile none\n"
        f"AuthorizedKeysFile {directory / 'user.pub'}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "Compression no\nSubsystem sftp internal-sftp\n"
    )
    return [_program("sshd") or "sshd", "-D", "-e", "-f", str(settings)]


def _scp(way: str, local: Path, remote: str, root: Path, directory: Path, port: int) -> Command:
    there = f"{getpass.getuser()}@127.0.0.1:{root / remote}"
    options = ["Compression=no", "StrictHostKeyChecking=no", f"UserKnownHostsFile={directory / 'known'}"]
    ends = [str(local), there] if way == PUT else [there, str(local)]
    return [
        *("scp", "-q", "-r", "-p", "-P", str(port), "-i", str(directory / "user")),
        *(part for option in options for part in ("-o", option)),
        *ends,
    ]


_RSYNC = (
    "`rsync --daemon` with `use chroot = no` and `numeric ids = yes`; `rsync --recursive --times --perms`. It verifies"
    " a digest of each file as it was sent and as it was received, before it is written, not as it is on the disk"
)
COPIERS = {
    peer.name: peer
    for peer in (
        Copier(
            "protoframe",
            "",
            ("protoframe", "twisted", "msgspec"),
            "`twistd pf-files` and `FileClient.put` and `get` over TCP, with their defaults. It verifies SHA-256 of"
            " each block and of the whole, as read from the source and as read back from the receiving file, and tells"
            " of a copy only when it is durable (`fsync`; `syncfs` for small files) and in its place.",
            serve=_protoframe_server("tcp"),
            copy=_protoframe_copy("tcp"),
        ),
        Copier(
            "protoframe, BLAKE3",
            "",
            ("protoframe", "twisted", "msgspec", "blake3"),
            "The same with BLAKE3 in place of SHA-256, for information.",
            serve=_protoframe_server("tcp"),
            copy=_protoframe_copy("tcp", "blake3"),
        ),
        Copier(
            "protoframe, UDP",
            "",
            ("protoframe", "twisted", "msgspec"),
            "With SHA-256 over UDP, for information; with an eighth of the bytes.",
            serve=_protoframe_server("udp"),
            copy=_protoframe_copy("udp"),
        ),
        Copier(
            "rsync daemon",
            "",
            (),
            f"{_RSYNC}; nothing is made durable.",
            (("rsync", "rsync"),),
            serve=_rsync_server,
            copy=_rsync_copy(),
        ),
        Copier(
            "rsync, --fsync",
            "",
            (),
            f"{_RSYNC}; with `--fsync` each file is made durable by itself. For information.",
            (("rsync", "rsync"),),
            serve=_rsync_server,
            copy=_rsync_copy("--fsync"),
        ),
        Copier(
            "scp",
            "",
            (),
            "An `sshd` with throw-away keys, its default cipher and no compression; `scp -r -p`, of trees with a tenth"
            " of the files. What is on the way is authenticated; what is read and written is not verified, and nothing"
            " is made durable.",
            (("scp", "openssh-client"), ("sshd", "openssh-server")),
            serve=_ssh_server,
            copy=_scp,
        ),
    )
}
