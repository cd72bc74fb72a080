"""The ready-made servers, as real ``twistd`` processes on real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme

from tests.processes import environment, free_port, pf, run_twistd, server

USER_MODULE = '''
from __future__ import annotations

import datetime
import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from msgspec import Struct
from zope.interface import classImplements

from protoframe import Error, Factory, IAuthenticator, Protocol, current_call, request


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Item(Struct):
    name: str
    price: float = 0.0
    tags: list[str] = []


@dataclass
class Basket:
    items: list[Item]
    size: Size = Size.SMALL
    made: datetime.datetime | None = None
    nested: dict[str, Item] = field(default_factory=dict)
    parent: Basket | None = None


class SoldOut(Error):
    """There is none left."""

    item: Item


class Thing(Protocol):
    """A shop."""

    @request(raises=[SoldOut])
    async def total(self, basket: Basket, level: Level = Level.LOW) -> float:
        """What it costs."""
        for item in basket.items:
            if item.name == "unicorn":
                raise SoldOut("no unicorns today", item=item)
        return sum(item.price for item in basket.items) * level

    @request
    async def echo(self, basket: Basket) -> Basket:
        return basket

    @request
    def later(self, when: datetime.datetime, by: datetime.timedelta) -> datetime.datetime:
        return when + by


class Contract(Protocol):
    @request
    async def hello(self) -> str: ...


def make() -> Factory:
    return Factory(Thing, reflection=False)


factory = Factory(Thing)
broken = Factory


class Vault(Protocol, permission="look"):
    @request
    async def look(self) -> str:
        return current_call().identity.name

    @request(permission="take")
    async def take(self) -> str:
        return "all of it"

    @request(permission="look")
    async def watch(self, times: int) -> AsyncIterator[str]:
        for _ in range(times):
            yield current_call().identity.name


class Own:
    def authenticate(self, shown):
        return None


classImplements(Own, IAuthenticator)
guarded = Factory(Vault, authenticator=Own(), anonymous=True)
'''

CLIENT = """
import asyncio, datetime, sys
from thatmodule import Basket, Item, Level, Size, SoldOut, Thing
from protoframe import connect
from twisted.internet.defer import Deferred
from twisted.internet.task import react

async def main(reactor):
    async with connect(reactor, sys.argv[1], Thing) as thing:
        made = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
        basket = Basket([Item("tea", 2.5, ["hot"])], Size.LARGE, made, {"x": Item("y")}, Basket([]))
        assert await thing.echo(basket) == basket
        assert await thing.total(basket, level=Level.HIGH) == 5.0
        assert await thing.later(made, datetime.timedelta(days=1)) == made + datetime.timedelta(days=1)
        try:
            await thing.total(Basket([Item("unicorn")]))
        except SoldOut as error:
            assert error.item == Item("unicorn")
            print("all well")

react(lambda reactor: Deferred.fromCoroutine(main(reactor)))
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory outside the repository with a user's module."""
    (tmp_path / "thatmodule.py").write_text(USER_MODULE)
    (tmp_path / "client.py").write_text(CLIENT)
    return tmp_path


def test_pf_upper_answers_as_the_readme_says(tmp_path: Path) -> None:
    port = free_port()
    where = f"tcp:127.0.0.1:{port}"
    with server(tmp_path, "pf-upper", "--listen", f"tcp:{port}") as running:
        done = pf("call", where, "Speech.upper", "text=hello")
        assert (done.stdout, done.stderr, done.returncode) == ('"HELLO"\n', "", 0)
        missing = pf("call", where, "Speech.upper")
        assert (missing.stdout, missing.returncode) == ("", 67)
        assert "$.text: missing" in missing.stderr
        unknown = pf("call", where, "Speech.nosuch")
        assert (unknown.stdout, unknown.returncode) == ("", 76)
        assert "no method Speech.nosuch" in unknown.stderr
        wrong = pf("call", where, "Speech.upper", "text:=3")
        assert (wrong.stdout, wrong.returncode) == ("", 67)
        assert "$.text: expected str, got int" in wrong.stderr
        for failed in (missing, unknown, wrong):
            assert failed.stderr.count("\n") == 1
        count = pf("call", where, "Speech.count", "text=a bb\nccc")
        assert json.loads(count.stdout) == {"characters": 8, "words": 3, "lines": 2, "longest_word": "ccc"}
        running.terminate()
        assert "Server Shut Down" in running.log
    closed = pf("call", where, "Speech.upper", "text=hello")
    assert (closed.stdout, closed.returncode, closed.stderr.count("\n")) == ("", 7, 1)


def test_a_users_module_is_served_over_a_unix_socket_and_called_both_ways(elsewhere: Path) -> None:
    path = elsewhere / "x.sock"
    with server(elsewhere, "pf-serve", "--protocol", "thatmodule:Thing", "--listen", f"unix:{path}"):
        client = subprocess.run(
            [sys.executable, "client.py", f"unix:{path}"],
            cwd=elsewhere,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (client.stdout, client.returncode) == ("all well\n", 0), client.stderr
        basket = {"items": [{"name": "tea", "price": 1.5}], "size": "large", "made": "2026-01-02T03:04:05Z"}
        total = pf("call", f"unix:{path}", "Thing.total", f"basket:={json.dumps(basket)}", "level:=2")
        assert (total.stdout, total.returncode) == ("3.0\n", 0)
        echo = pf("call", f"unix:{path}", "Thing.echo", f"basket:={json.dumps(basket)}")
        assert json.loads(echo.stdout)["made"] == "2026-01-02T03:04:05Z"
        bad = pf("call", f"unix:{path}", "Thing.echo", 'basket:={"items": [{"name": "x"}, {"name": 3}]}')
        assert "$.basket.items[1].name: expected str, got int" in bad.stderr
        sold_out = pf("call", f"unix:{path}", "Thing.total", 'basket:={"items": [{"name": "unicorn"}]}')
        assert sold_out.returncode == 66
        assert "SoldOut" in sold_out.stderr
        later = pf("call", f"unix:{path}", "Thing.later", "when=2026-01-02T00:00:00Z", "by=P1D")
        assert later.stdout == '"2026-01-03T00:00:00Z"\n'


def test_a_factory_or_a_function_that_makes_one_is_served_too(elsewhere: Path) -> None:
    for name, listed in (("factory", 0), ("make", 76)):
        path = elsewhere / f"{name}.sock"
        with server(elsewhere, "pf-serve", "--protocol", f"thatmodule:{name}", "--listen", f"unix:{path}"):
            assert pf("call", f"unix:{path}", "Thing.later", "when=2026-01-02T00:00:00Z", "by=PT0S").stdout
            assert pf("list", f"unix:{path}").returncode == listed


def test_reflection_can_be_switched_off(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, "pf-upper", "--no-reflection", "--listen", f"tcp:{port}"):
        assert pf("call", f"tcp:127.0.0.1:{port}", "Speech.upper", "text=a").stdout == '"A"\n'
        listing = pf("list", f"tcp:127.0.0.1:{port}")
        assert (listing.stdout, listing.returncode, listing.stderr.count("\n")) == ("", 76, 1)


def test_one_server_listens_at_several_places_ipv6_and_tls_among_them(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    ports = [free_port() for _ in range(3)]
    places = [
        f"tcp:{ports[0]}:interface=127.0.0.1",
        f"tcp6:{ports[1]}:interface=\\:\\:1",
        f"ssl:{ports[2]}:interface=127.0.0.1:privateKey=server.pem:certKey=server.pem",
        f"unix:{tmp_path / 'u.sock'}",
    ]
    arguments = [word for place in places for word in ("--listen", place)]
    anchors = tmp_path / "anchors"
    anchors.mkdir()
    (anchors / "ca.pem").write_bytes((tmp_path / "ca.pem").read_bytes())
    with server(tmp_path, "pf-upper", *arguments):
        for where in (
            f"tcp:127.0.0.1:{ports[0]}",
            f"tcp:[::1]:{ports[1]}",
            f"tls:localhost:{ports[2]}:trustRoots={anchors}",
            f"unix:{tmp_path / 'u.sock'}",
        ):
            done = pf("call", where, "Speech.upper", "text=hello")
            assert (done.stdout, done.returncode) == ('"HELLO"\n', 0), (where, done.stderr)
        # A certificate of an authority that is not trusted.
        refused = pf("call", f"tls:localhost:{ports[2]}", "Speech.upper", "text=hello")
        assert (refused.stdout, refused.returncode, refused.stderr.count("\n")) == ("", 7, 1)
        assert "certificate" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["pf-upper", "--listen", "tcp:99999"], 2, "port 99999 is above 65535"),
        (["pf-upper", "--listen", "tcp"], 2, "missing, unknown or too many"),
        (["pf-upper", "--listen", "tcp:1:nosuch=2"], 2, "missing, unknown or too many"),
        (["pf-upper", "--listen", "pigeon:1"], 2, "Unknown endpoint type"),
        (["pf-upper", "--listen", "ssl:1:privateKey=nosuch.pem"], 2, "no such file or directory"),
        (["pf-upper", "--listen", "unix:nosuch/x.sock"], 1, "no such file or directory"),
        (["pf-upper", "--listen", "tcp:0:interface=192.0.2.1"], 1, "no such address"),
        (["pf-upper", "--lisen", "tcp:1"], 2, "--lisen"),
        (["pf-upper", "too", "much"], 2, "arguments"),
        (["pf-serve"], 2, "--protocol package.module:Name"),
        (["pf-serve", "--protocol", "nosuchmodule:Thing"], 2, "no module nosuchmodule"),
        (["pf-serve", "--protocol", "thatmodule"], 2, "expected package.module:Name"),
        (["pf-serve", "--protocol", "thatmodule:Nothing"], 2, "thatmodule has no Nothing"),
        (["pf-serve", "--protocol", "thatmodule:Item"], 2, "calling it failed"),
        (["pf-serve", "--protocol", "thatmodule:broken"], 2, "calling it failed"),
        (["pf-serve", "--protocol", "thatmodule:Size.SMALL"], 2, "neither a Protocol class, nor a Factory"),
        (["pf-serve", "--protocol", "badmodule:Thing"], 2, "SyntaxError"),
        (["pf-upper", "--tokens", "nosuch"], 2, "--tokens: nosuch: No such file or directory"),
        (["pf-upper", "--tokens", "badtokens"], 2, "--tokens: badtokens: line 2: "),
        (["pf-serve", "--protocol", "thatmodule:guarded", "--tokens", "tokens"], 2, "an authenticator of its own"),
        (["pf-upper", "--drain", "nan"], 2, "--drain: expected 0 to 1000000 seconds, got nan"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error(elsewhere: Path, arguments: list[str], status: int, text: str) -> None:
    (elsewhere / "badmodule.py").write_text("def (")
    (elsewhere / "badtokens").write_text("ann 0123456789abcdef\nbob secret\n")
    (elsewhere / "tokens").write_text("ann 0123456789abcdef\n")
    done = run_twistd("-n", "--pidfile", "p.pid", "--logfile", "t.log", *arguments, cwd=elsewhere)
    assert done.returncode == status
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert "secret" not in done.stderr
    assert not (elsewhere / "p.pid").exists()


def test_a_busy_port_ends_the_process_also_as_a_daemon(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        done = run_twistd("-n", "pf-upper", "--listen", "tcp:0", "--listen", where, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr == f"twistd: cannot listen at {where}: the address is in use\n"
        daemon = run_twistd("pf-upper", "--listen", where, cwd=tmp_path)
        assert daemon.returncode == 1
        assert f"cannot listen at {where}: the address is in use" in daemon.stderr
        assert not (tmp_path / "twistd.pid").exists()


def test_a_daemon_starts_serves_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    done = run_twistd("pf-upper", "--listen", f"unix:{path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    process = int((tmp_path / "twistd.pid").read_text())
    try:
        assert pf("call", f"unix:{path}", "Speech.upper", "text=a").stdout == '"A"\n'
    finally:
        os.kill(process, signal.SIGTERM)
    while (tmp_path / "twistd.pid").exists():
        pass
    assert not path.exists()


def pf_each(commands: list[tuple[list[str], dict[str, str]]]) -> list[subprocess.CompletedProcess[str]]:
    """Several at a time, each with its environment: most of what one costs is the start of an interpreter."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda command: pf(*command[0], **command[1]), commands))


def test_tokens_say_who_calls_and_what_they_may_do(elsewhere: Path) -> None:
    secrets = {"ann": "Ann-0123456789abcdef", "bob": "Bob-0123456789abcdef", "eve": "Eve-0123456789abcdef"}
    lines = [f"ann {secrets['ann']} look take", f"bob {secrets['bob']} look  # no more"]
    (elsewhere / "tokens").write_text("\n".join(lines))
    for name, secret in secrets.items():
        (elsewhere / name).write_text(f"{secret}\n")
    (elsewhere / "empty").write_text("\nnot this line, with a secret\n")
    where = f"unix:{elsewhere / 'v.sock'}"
    arguments = ["--protocol", "thatmodule:Vault", "--listen", where, "--tokens", "tokens", "--log-calls"]
    with server(elsewhere, "pf-serve", *arguments) as running:
        ann, bob, nobody = (["--token-file", str(elsewhere / name)] for name in ("ann", "bob", "empty"))
        eve = {"PROTOFRAME_TOKEN": secrets["eve"]}
        refused = "try: --token-file FILE, or PROTOFRAME_TOKEN"
        cases: list[tuple[list[str], dict[str, str], int, str, str]] = [
            (["call", where, "Vault.look"], {"PROTOFRAME_TOKEN": secrets["bob"]}, 0, '"bob"\n', ""),
            # The flag goes before the environment.
            (["call", where, "Vault.watch", "times:=2", *ann], eve, 0, '"ann"\n"ann"\n', ""),
            (["call", where, "Vault.take", *ann], {}, 0, '"all of it"\n', ""),
            (["call", where, "Vault.take", *bob], {}, 71, "", "PermissionDenied: Vault.take takes the permission take"),
            (["call", where, "Vault.look"], {}, 80, "", refused),
            (["call", where, "Vault.look"], eve, 80, "", "Unauthenticated: "),
            (["call", where, "Vault.look"], {"PROTOFRAME_TOKEN": ""}, 80, "", refused),
            (["call", where, "Vault.look", *nobody], {}, 2, "", "empty: a token is 16 to 1,024 characters"),
            (["list", where, "--token-file", "nosuch"], {}, 2, "", "nosuch: No such file"),
            (["list", where], {}, 80, "", refused),
            (["ping", where], {}, 80, "", refused),
            (["describe", where, "Vault.take", *bob], {}, 0, "    permissions  look, take\n", ""),
        ]
        answers = pf_each([(words, variables) for words, variables, *_ in cases])
        for (words, _, status, out, err), done in zip(cases, answers, strict=True):
            assert (done.returncode, done.stderr.count("\n")) == (status, status != 0), (words, done.stderr)
            assert done.stdout.endswith(out)
            assert bool(done.stdout) == bool(out)
            assert err in done.stderr
            for secret in (*secrets.values(), "not this line"):
                assert secret not in done.stdout + done.stderr
        line = f"pf call {' '.join(bob)} {where} Vault.ta"
        completed = pf(_PF_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD="5")
        assert completed.stdout == "plain,Vault.take\n"
        running.wait_for_log(r"incoming Vault\.watch, .*\(ann\): ok.* items: 2")
        assert running.terminate() == 0
        for secret in secrets.values():
            assert secret not in running.log
        assert "0123456789abcdef" not in running.log


def test_tokens_of_the_environment_hold_where_no_file_is_named(elsewhere: Path) -> None:
    where = f"unix:{elsewhere / 'v.sock'}"
    tokens = {"PROTOFRAME_TOKENS": "ann Ann-0123456789abcdef look; bob Bob-0123456789abcdef"}
    arguments = ["pf-serve", "--protocol", "thatmodule:Vault", "--listen", where]
    with server(elsewhere, *arguments, variables=tokens) as running:
        tokens_sent = [{}, {"PROTOFRAME_TOKEN": "Ann-0123456789abcdef"}, {"PROTOFRAME_TOKEN": "Bob-0123456789abcdef"}]
        answers = pf_each([(["call", where, "Vault.look"], sent) for sent in tokens_sent])
        assert [(done.returncode, done.stdout) for done in answers] == [(80, ""), (0, '"ann"\n'), (71, "")]
        running.terminate()
        assert "0123456789abcdef" not in running.log
    # A Factory that asks who calls in its own way goes on to do so.
    with server(elsewhere, "pf-serve", "--protocol", "thatmodule:guarded", "--listen", where, variables=tokens):
        answers = pf_each([(["list", where], {}), (["call", where, "Vault.look"], {})])
        assert [done.returncode for done in answers] == [0, 80]
    empty = run_twistd("-n", *arguments, cwd=elsewhere, PROTOFRAME_TOKENS="")
    assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)
    assert "$PROTOFRAME_TOKENS: there are no tokens in it" in empty.stderr


def test_the_first_server_has_streams_to_call_and_to_read(tmp_path: Path) -> None:
    where = f"unix:{tmp_path / 'u.sock'}"
    (tmp_path / "lines").write_text('"one"\n"three"\n"seven"\n')
    with server(tmp_path, "pf-upper", "--listen", where):
        cases = {
            ("spell", "word=abc", "pause:=0.01"): '"a"\n"b"\n"c"\n',
            ("shout", f"lines@{tmp_path}/lines"): '"ONE"\n"THREE"\n"SEVEN"\n',
            ("longest", f"words@{tmp_path}/lines"): '"three"\n',
            ("longest", "words:=[]"): "null\n",
        }
        answers = pf_each([(["call", where, f"Speech.{method}", *more], {}) for method, *more in cases])
        assert [done.stdout for done in answers] == list(cases.values())


def test_twistd_lists_the_servers_and_their_version_is_ours(tmp_path: Path) -> None:
    from protoframe import __version__

    listing = run_twistd("--help", cwd=tmp_path)
    assert "pf-upper" in listing.stdout
    assert "pf-serve" in listing.stdout
    version = run_twistd("pf-upper", "--version", cwd=tmp_path)
    assert (version.stdout, version.returncode) == (f"protoframe {__version__}\n", 0)
    options = run_twistd("pf-serve", "--help", cwd=tmp_path)
    assert "--listen" in options.stdout
    assert "--protocol" in options.stdout


def test_the_internal_error_of_a_handler_is_in_the_servers_log_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "from protoframe import Protocol, request\n"
        "class Failing(Protocol):\n"
        "    @request\n"
        "    async def fail(self) -> None:\n"
        "        raise RuntimeError('the password is 12345')\n",
    )
    path = tmp_path / "f.sock"
    with server(tmp_path, "pf-serve", "-p", "failing:Failing", "-l", f"unix:{path}") as running:
        done = pf("call", f"unix:{path}", "Failing.fail")
        assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 77, 1)
        assert "12345" not in done.stderr
        logged = running.wait_for_log(r"Failing\.fail failed \(incident (\w+)\)")
        assert logged[1] in done.stderr
        assert "the password is 12345" in running.log
        assert "Traceback" in running.log


STARTED_BEFORE_THE_REACTOR_RUNS = """
import signal, sys
from twisted.internet import reactor
from twisted.logger import globalLogPublisher
from protoframe import Factory
from protoframe.servers.upper import Options, makeService

options = Options()
options.parseOptions(["--listen", "tcp:0:interface=127.0.0.1"])
said = []

def note(event):
    if "serving" in (event["log_format"] or ""):
        said.append(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
        reactor.stop()

globalLogPublisher.addObserver(note)
service = makeService(options)
service.startService()
assert said == [], said
reactor.run()
assert said == [True], said
"""


def test_that_it_serves_is_said_when_it_can_be_ended_in_order() -> None:
    subprocess.run([sys.executable, "-c", STARTED_BEFORE_THE_REACTOR_RUNS], check=True, timeout=30, env=environment())
