"""``pf dev-certs``: an authority and certificates to develop with.

Knows which files are made, and leaves what is in them to trustme; nothing here talks to a server.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

from protoframe.cli.output import write_json, write_text
from protoframe.cli.problems import FAILURE, USAGE, Problem, clean

__all__ = ["dev_certs"]

_NAMES = ("localhost", "127.0.0.1", "::1")
_CLIENTS = ("client",)
#: Names of files that no client may have.
_TAKEN = frozenset({"ca", "server"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@click.command("dev-certs")
@click.argument("directory", metavar="[DIR]", default="certs", type=click.Path())
@click.option("--name", "names", multiple=True, metavar="NAME", help="A host name or address of the server.")
@click.option("--client", "clients", multiple=True, metavar="NAME", help="Whom a client's certificate is for.")
@click.option("--force", is_flag=True, help="Replace certificates and keys that are there; the authority stays.")
@click.option(
    "--json/--no-json",
    default=False,
    envvar="PROTOFRAME_JSON",
    show_envvar=True,
    help="JSON instead of text for people.",
)
def dev_certs(directory: str, names: tuple[str, ...], clients: tuple[str, ...], force: bool, json: bool) -> None:
    """Make certificates to develop with: an authority, a server's, and clients'.

    They are for development only: whoever reads the key of the authority can be anyone to those who trust it.  Needs
    trustme: pip install 'protoframe[certs]'.

    --name and --client may be given several times; by default the names are localhost, 127.0.0.1 and ::1, and there is
    one client, named client.  An authority that is in DIR (certs by default) already signs what is missing there; what
    is there is kept.  Prints the paths of what was made; with --json, an object: made, ca, ca_key, server and clients.

    \b
    Examples:
      pf dev-certs
      pf dev-certs --name dev.example --client ann --client bob certs

    \b
    Exit status: 0; 1 if a file cannot be written; 2 for what cannot be asked for, such as a name that is none.
    """
    maker = _trustme()
    try:
        made = _Directory(directory, force).make(maker, names, clients or _CLIENTS)
    except OSError as error:
        reason = error.strerror or str(error)
        path = error.filename if isinstance(error.filename, str) else directory
        raise Problem(f"{path}: {reason[:1].lower()}{reason[1:]}", FAILURE) from None
    if json:
        from json import dumps

        write_json(dumps(made))
    elif made["made"]:
        write_text("\n".join(clean(path) for path in made["made"]))
    _hint(made)


def _trustme() -> Any:
    try:
        return importlib.import_module("trustme")
    except ImportError:
        hint = "pip install 'protoframe[certs]'"
        raise Problem("trustme, which makes certificates, is not installed", USAGE, hint) from None


class _Directory:
    """A directory with an authority, whose certificate stands alone in ``ca/``, and certificates that it signed.

    :param force: whether to replace what is there, but for the authority.
    """

    def __init__(self, path: str, force: bool) -> None:
        self._path = path
        self._force = force
        self._made: list[str] = []

    def make(self, maker: Any, names: Sequence[str], clients: Sequence[str]) -> dict[str, Any]:
        """Makes what is missing; what there is then.

        :raises Problem: a name is none, or files that are there do not belong together.
        :raises OSError: a file cannot be read or written.
        """
        for client in clients:
            _check_client(client)
        authority, key = self._file("ca", "ca.pem"), self._file("ca.key")
        # A name that is none is found before anything is written.
        issuer = self._authority(maker, authority, key)
        leaves = {"server": _issue(issuer, names or _NAMES, None)}
        leaves |= {client: _issue(issuer, [client], client) for client in clients}
        kept = {name for name in leaves if self._keeps(name)}
        if "server" in kept and names:
            self._check_names(leaves["server"])
        os.makedirs(self._file("ca"), exist_ok=True)
        if not os.path.exists(key):
            self._write(key, issuer.private_key_pem.bytes(), 0o600)
            self._write(authority, issuer.cert_pem.bytes(), 0o644)
        for name, leaf in leaves.items():
            if name not in kept:
                self._write(self._file(f"{name}.key"), leaf.private_key_pem.bytes(), 0o600)
                chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
                self._write(self._file(f"{name}.pem"), chain, 0o644)
        return {
            "made": self._made,
            "ca": authority,
            "ca_key": key,
            "server": {**self._pair("server"), "names": self._names()},
            "clients": [{"name": name, **self._pair(name)} for name in leaves if name != "server"],
        }

    def _file(self, *names: str) -> str:
        return os.path.join(self._path, *names)

    def _pair(self, name: str) -> dict[str, str]:
        return {"certificate": self._file(f"{name}.pem"), "key": self._file(f"{name}.key")}

    def _authority(self, maker: Any, path: str, key: str) -> Any:
        """The authority that is there, or a new one."""
        there = [one for one in (path, key) if os.path.lexists(one)]
        if not there:
            return maker.CA(organization_name="protoframe development", path_length=0)
        if len(there) == 1:
            missing = key if there[0] == path else path
            raise Problem(f"{there[0]} is there, and {missing} is not", USAGE, "another directory")
        certificate, secret = _read(path), _read(key)
        if not _belong(certificate, secret):
            raise Problem(f"{path} and {key} are not a certificate and its key", USAGE, "another directory")
        return maker.CA.from_pem(certificate, secret)

    def _keeps(self, name: str) -> bool:
        """Whether a certificate is there, and stays."""
        there = [one for one in self._pair(name).values() if os.path.lexists(one)]
        if not there or self._force:
            return False
        if len(there) == 1:
            missing = next(one for one in self._pair(name).values() if one not in there)
            raise Problem(f"{there[0]} is there, and {missing} is not", USAGE, "--force, which replaces it")
        return True

    def _names(self) -> list[str]:
        """Whom the server's certificate is for."""
        path = self._file("server.pem")
        try:
            return _names_of(_read(path))
        except ValueError:
            raise Problem(f"{path} is no certificate", USAGE, "--force, which replaces it") from None

    def _check_names(self, wanted: Any) -> None:
        """
        :raises Problem: the server's certificate that is kept is not for all names of another.
        """
        there = self._names()
        missing = [name for name in _names_of(wanted.cert_chain_pems[0].bytes()) if name not in there]
        if missing:
            path = self._file("server.pem")
            raise Problem(f"{path} is there, and is not for {', '.join(missing)}", USAGE, "--force, which replaces it")

    def _write(self, path: str, content: bytes, mode: int) -> None:
        if self._force:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        # A new file, never one that another has open, or a link to somewhere else.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        self._made.append(path)


def _issue(issuer: Any, identities: Sequence[str], common: str | None) -> Any:
    """
    :raises Problem: an identity cannot stand in a certificate.
    """
    try:
        return issuer.issue_cert(*identities, common_name=common)
    except (ValueError, TypeError) as error:
        option = "--client" if common else "--name"
        text = f"{option} {', '.join(identities)}: {' '.join(str(error).split())}"
        raise Problem(text, USAGE, "a host name, an address or an e-mail address") from None


def _belong(certificate: bytes, key: bytes) -> bool:
    """Whether a key is that of a certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    try:
        certified = x509.load_pem_x509_certificate(certificate).public_key()
        return certified.public_bytes(*form) == load_pem_private_key(key, None).public_key().public_bytes(*form)
    except (ValueError, TypeError):
        return False


def _names_of(certificate: bytes) -> list[str]:
    """Whom a certificate is for.

    :raises ValueError: it cannot be read.
    """
    from cryptography import x509

    extensions = x509.load_pem_x509_certificate(certificate).extensions
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _check_client(name: str) -> None:
    """
    :raises Problem: no files can be named so.
    """
    if name.casefold() in _TAKEN or name.startswith((".", "-", "*")) or os.path.basename(name) != name or not name:
        raise Problem(f"--client {name!r}: its files cannot be named so", USAGE, "another name, such as ann")


def _hint(made: dict[str, Any]) -> None:
    """What to type next, on standard error."""
    if sys.stderr is None:
        return
    names = made["server"]["names"]
    host = next((name for name in names if not set(name) & set("*/@")), "localhost")
    server, client = made["server"], made["clients"][0]
    listen = {"privateKey": server["key"], "certKey": server["certificate"], "trustRoots": made["ca"]}
    if _LOOPBACK.issuperset(names):
        listen["interface"] = "127.0.0.1"
    where = {"trustRoots": made["ca"], "certificate": client["certificate"], "privateKey": client["key"]}
    for line in (
        f"twistd -n pf-upper --listen {_word(['tls', '12000'], listen)}",
        f"pf list {_word(['tls', host, '12000'], where)}",
    ):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{clean(line)}\n")
            sys.stderr.flush()


def _word(positional: Sequence[str], named: dict[str, str]) -> str:
    """An endpoint string, as a word of a shell."""
    return shlex.quote(":".join([*map(_escaped, positional), *(f"{k}={_escaped(v)}" for k, v in named.items())]))


def _escaped(part: str) -> str:
    return part.replace("\\", "\\\\").replace(":", "\\:")
