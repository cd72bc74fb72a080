"""Runs the code blocks of a Markdown page, in order, in one directory, as a reader would who types them.

What becomes of a block is in its language:

``python``
    With ``# name.py`` as its first line it is written to that file; with ``# name.py, continued`` it is added to it.
    Any other is run as a script, and must succeed.
``console``
    Each line that begins with ``$`` is given to bash; a line that ends in a backslash goes on in the next.  The lines
    below it are what the command prints, on standard output and standard error together; ``...`` stands for anything.
    A command that fails must be followed by ``$ echo $?``, so that the page shows the status.  One that ends in ``&``
    is a server: it runs until the page ends, or a ``kill`` on the page ends it, and the page goes on when it listens
    and has printed the lines below, if there are any.
``shell``
    What sets up a machine: environments and installations.  Running it would take minutes and a package index; what it
    names is looked up instead, see `check_setup`.
those in `SHOWN`
    Are only shown.

Anything else is an error, and so is code that a reader sees and this module does not, such as an indented block.  The
numbers 12000 to 12299 are the ports of the documentation: each becomes a free port of this machine, the same one
throughout a page.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.processes import PATIENCE, ROOT, environment, free_port, twistd

#: Languages of blocks that show something which is no program.
SHOWN = frozenset({"ini", "text"})
#: MyST's directives: markup, not code.
DIRECTIVES = frozenset({"{toctree}", "{eval-rst}", "{conversation-states}", "{error-tree}"})

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^`]*)")
_FILE = re.compile(r"# (?P<name>[\w/]+\.py)(?P<more>, continued)?\n")
_PORT = re.compile(r"\b12[0-2]\d\d\b")
_LISTENS = re.compile(r"--listen[ =](?P<kind>tcp|tls|ssl|unix):(?P<where>[^: ]+)")
#: In reStructuredText: what would show code.
_REST_CODE = re.compile(
    r"\.\. (code|sourcecode|parsed-literal|literalinclude|doctest|testcode)|(^|[^.: ]|\S )::$", re.MULTILINE
)


class Broken(AssertionError):
    """An example does not do what the page says."""


class Block(NamedTuple):
    """A fenced block: the line of the page on which it opens, its language and what is in it."""

    line: int
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page.

    :raises Broken: there is code that is in no such block.
    """
    blocks = []
    opening: re.Match[str] | None = None
    began, body = 0, []
    blank = True
    for number, line in enumerate(page.splitlines(), 1):
        match = _FENCE.fullmatch(line)
        if opening is not None:
            if match and match["language"].strip() == "" and match["fence"].startswith(opening["fence"]):
                text = textwrap.dedent("".join(f"{one}\n" for one in body))
                blocks.append(Block(began, opening["language"].strip().partition(" ")[0], text))
                opening = None
            else:
                body.append(line)
        elif match:
            opening, began, body = match, number, []
        elif blank and re.match(r" {4}|\t", line):
            raise Broken(f"line {number}: an indented block; put it between fences, with its language")
        blank = not line.strip()
    if opening is not None:
        raise Broken(f"line {began}: a block that does not end")
    return blocks


def run_page(page: str, directory: Path) -> None:
    """Runs a page's blocks, in an empty directory.

    :raises Broken: one does not do what the page says; the text begins with its line.
    """
    blocks = blocks_of(page)
    shims = directory / "bin"
    shims.mkdir()
    _write_shims(shims)
    home = directory / "page"
    home.mkdir()
    runner = _Runner(home, shims)
    line = 1
    try:
        for block in blocks:
            line = block.line
            runner.run(block)
        runner.check_last()
    except Broken as error:
        raise Broken(f"line {line}: {error}") from None
    finally:
        runner.stop()


def _write_shims(directory: Path) -> None:
    """The programs that the pages use, as those of this interpreter and of this checkout, installed or not."""
    python = shlex.quote(sys.executable)
    for name, command in {
        "python": python,
        "pf": f"{python} -m protoframe.cli",
        "twistd": shlex.quote(twistd()),
        "trial": f"{python} -m twisted.trial",
        "pytest": f"{python} -m pytest",
    }.items():
        file = directory / name
        file.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        file.chmod(0o755)


class _Runner:
    """A page's directory, its servers and its ports."""

    def __init__(self, home: Path, shims: Path) -> None:
        self._home = home
        path = os.pathsep.join([str(shims), os.environ.get("PATH", os.defpath)])
        # No byte code: a file that a page writes twice within a second looks unchanged.
        self._environment = environment(
            PATH=path, PYTHONDONTWRITEBYTECODE="1", PYTEST_ADDOPTS="", COLUMNS="80", LC_ALL="C.UTF-8"
        )
        self._servers: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._ports: dict[str, int] = {}
        self._status = 0
        self._failed = ""

    def run(self, block: Block) -> None:
        text = _PORT.sub(lambda match: str(self._port(match[0])), block.text)
        if block.language == "python":
            self._python(text)
        elif block.language == "console":
            for command, output in exchanges(text):
                self._command(command, output)
        elif block.language == "shell":
            for line in text.splitlines():
                check_setup(line.partition("  #")[0].strip())
        elif block.language == "{eval-rst}":
            if _REST_CODE.search(text):
                raise Broken("code in reStructuredText would not be run; put it into a block of its own")
        elif block.language not in SHOWN | DIRECTIVES:
            raise Broken(
                f"nobody runs {block.language or 'a block without a language'}; it is neither code nor in SHOWN"
            )

    def stop(self) -> None:
        """Ends the servers."""
        for process, _ in self._servers:
            if process.poll() is None:
                process.terminate()
        for process, _ in self._servers:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def check_last(self) -> None:
        """
        :raises Broken: the last command failed, and the page does not say so.
        """
        if self._failed:
            raise Broken(self._failed)

    def _port(self, number: str) -> int:
        while number not in self._ports:
            port = free_port()
            if port not in self._ports.values():
                self._ports[number] = port
        return self._ports[number]

    def _python(self, text: str) -> None:
        match = _FILE.match(text)
        if match is None:
            done = self._bash("exec python -", text)
            if done.returncode:
                raise Broken(f"the script fails:\n{done.stdout}")
            return
        file = self._home / match["name"]
        if match["more"] and not file.exists():
            raise Broken(f"{match['name']} is to go on, and has not begun")
        with file.open("a" if match["more"] else "w") as stream:
            stream.write(text[match.end() :] if match["more"] else text)

    def _command(self, command: str, output: str) -> None:
        if command != "echo $?":
            self.check_last()
        if command.endswith(" &"):
            self._serve(command[:-2], output)
            return
        # Each command has a shell of its own; the status of the one before is all that it is given.
        done = self._bash(f"(exit {self._status})\n{command}")
        self._status = done.returncode
        self._failed = f"$ {command}\nfails with {done.returncode}:\n{done.stdout}" if done.returncode else ""
        if not pattern_of(output).fullmatch(_trimmed(done.stdout)):
            raise Broken(f"$ {command}\nis said to print:\n{output}\nand prints:\n{done.stdout}")
        if command.startswith("kill "):
            self._await(command, lambda: any(process.poll() is not None for process, _ in self._servers))
            self._servers = [server for server in self._servers if server[0].poll() is None]

    def _bash(self, command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                ["bash", "-c", command],
                cwd=self._home,
                env=self._environment,
                input=text,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Broken(f"$ {command}\ndoes not end within {PATIENCE:g} s:\n{error.stdout!r}") from None

    def _serve(self, command: str, output: str) -> None:
        places = [(match["kind"], match["where"]) for match in _LISTENS.finditer(command)]
        if not places:
            raise Broken(f"$ {command} &\ndoes not say where it listens (--listen)")
        log = self._home.parent / f"output-{len(list(self._home.parent.iterdir()))}"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self._home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self._servers.append((process, log))
        pattern = pattern_of(output)

        def ready() -> bool:
            if process.poll() is not None:
                raise Broken(f"$ {command} &\nends with {process.returncode}:\n{log.read_text()}")
            listening = all(self._listens(kind, where) for kind, where in places)
            return listening and bool(pattern.search(_trimmed(log.read_text())))

        self._await(f"{command} &\n{output}", ready)
        self._status = 0

    def _listens(self, kind: str, where: str) -> bool:
        if kind == "unix":
            return (self._home / where).is_socket()
        try:
            socket.create_connection(("127.0.0.1", int(where)), PATIENCE).close()
        except OSError:
            return False
        return True

    def _await(self, what: str, holds: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > limit:
                logs = "\n".join(log.read_text() for _, log in self._servers)
                raise Broken(f"$ {what}\ndoes not happen within {PATIENCE:g} s:\n{logs}")
            time.sleep(0.01)


def exchanges(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it prints.

    :raises Broken: the block does not begin with a command.
    """
    command, output = "", ""
    for line in text.splitlines():
        if command.endswith("\\"):
            command = f"{command}\n{line}"
        elif line.startswith("$ "):
            if command:
                yield command, output
            command, output = line[2:], ""
        elif command:
            output += f"{line}\n"
        else:
            raise Broken(f"a console begins with a command, not with {line!r}")
    yield command, output


def pattern_of(output: str) -> re.Pattern[str]:
    """What matches the printed lines of a page; ``...`` matches anything."""
    return re.compile(".*?".join(map(re.escape, _trimmed(output).split("..."))), re.DOTALL)


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def check_setup(command: str) -> None:
    """Looks up what a command that sets up a machine names: targets of the Makefile, extras of the package.

    :raises Broken: there is no such thing, or the command is none that a page may leave unrun.
    """
    words = shlex.split(command)
    match words:
        case ["make", target]:
            done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Broken(f"$ {command}\n{done.stderr}")
        case ["python3", "-m", "venv", _] | [".", _] | ["apt-get", "install", *_] | ["mkdir", "-p", _]:
            pass
        case ["pip", "install", *options, what] if set(options) <= {"--editable"}:
            project, _, extras = what.rstrip("]").partition("[")
            setup = configparser.ConfigParser()
            setup.read(ROOT / "setup.cfg")
            known = {name for name, _ in setup.items("options.extras_require")}
            if project != "." or not known.issuperset(filter(None, extras.split(","))):
                raise Broken(f"$ {command}\ninstalls something that is not here")
        case _:
            raise Broken(f"$ {command}\nis no command that sets up a machine; a console block would run it")
