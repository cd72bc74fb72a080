"""Who the other end is: what a peer shows becomes an `Identity`, by tokens or by the certificate of its TLS.

Knows secrets, where they come from, and how they are compared; not connections, nor frames.  No secret stands in an
error, a log or a repr: whoever reads those is told the file and the line instead.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import msgspec
from zope.interface import Interface, implementer

from protoframe.errors import Unauthenticated

if TYPE_CHECKING:
    # Slow to import, and needed by none but those who are shown a certificate.
    from cryptography import x509

__all__ = [
    "Authenticator",
    "CertificateAuthenticator",
    "FirstOf",
    "IAuthenticator",
    "Identity",
    "Shown",
    "Token",
    "TokenAuthenticator",
    "certificate_identity",
    "identify",
    "is_authenticator",
]

#: A token: printable ASCII without spaces, too long to be guessed and short enough to be hashed at once.
_is_token = re.compile(r"[!-~]{16,1024}").fullmatch
_TOKEN_RULE = "a token is 16 to 1,024 characters of printable ASCII without spaces"  # noqa: S105 - it is not


class Identity(msgspec.Struct, frozen=True):
    """Who a peer has shown to be.

    :ivar name: what it is called, in logs too.
    :ivar permissions: what it may do; what each means is for those to say who ask for it.
    :ivar names: all names that its certificate carries; none of a token.
    :ivar source: what showed it, ``"token"`` or ``"certificate"``; an authenticator of your own says what it likes.
    """

    name: str
    permissions: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, eq=False)
class Shown:
    """What a peer has shown of itself.

    :ivar address: the peer's, as Twisted's transport gives it.
    :ivar token: what it sent, not looked at by anybody yet; ``None`` where it sent none.
    :ivar certificate: what TLS has verified already; ``None`` where there is none.
    """

    address: Any = None
    token: str | None = field(default=None, repr=False)
    certificate: x509.Certificate | None = None


class IAuthenticator(Interface):
    """What tells who a peer is by what it has shown."""

    def authenticate(shown: Shown) -> Identity | Awaitable[Identity | None] | None:  # noqa: N805 - zope's have no self
        """Who has shown this; ``None`` where there is nothing that this authenticator looks at.

        A coroutine or a Deferred may bring the answer.

        :raises Unauthenticated: what was shown is wrong.  The message goes to the peer and to the log: it must not have
            the secret in it.
        """


class Authenticator(Protocol):
    """What provides `IAuthenticator`, as type checkers see it without a plugin for zope.interface."""

    def authenticate(self, shown: Shown) -> Identity | Awaitable[Identity | None] | None:
        """See `IAuthenticator`."""
        ...


async def identify(authenticator: Authenticator, shown: Shown) -> Identity | None:
    """Who has shown this, whichever way the authenticator gives its answer.

    :raises Unauthenticated: what was shown is wrong.
    :raises TypeError: the authenticator answered with something else.
    """
    answer: Any = authenticator.authenticate(shown)
    if isinstance(answer, Awaitable):
        answer = await answer
    if answer is None or isinstance(answer, Identity):
        return answer
    raise TypeError(f"{authenticator!r} answered with {type(answer).__name__}, and not with an Identity or None")


@implementer(IAuthenticator)
class TokenAuthenticator:
    """Knows peers by the tokens that they send.  Made by `from_file` and `from_environment`.

    Each line lists a name, its token, and its permissions, with spaces between them.  ``#`` at the beginning of a word
    begins a comment.  A name has one token, and is known by it alone::

        # name    token                             permissions
        alice     Xq3vT0m8Zr5uWk1yLb7dNc            read write
        backup    p9Hs2fJ6gKe4aRtYxVo0Mi            read    # once a night

    Tokens are kept as their digests.

    :param entries: of each token the SHA-256 digest, and whose it is.
    """

    def __init__(self, entries: Iterable[tuple[bytes, Identity]]) -> None:
        self._entries = tuple(entries)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TokenAuthenticator:
        """Reads the tokens from a file, once.

        :raises ValueError: the file cannot be read, or a line of it is wrong.
        """
        return cls(_parse_tokens(_read(path).split("\n"), os.fspath(path)))

    @classmethod
    def from_environment(cls, variable: str = "PROTOFRAME_TOKENS") -> TokenAuthenticator:
        """Reads the tokens from an environment variable, where ``;`` too ends a line: no token may have one in it.

        :raises ValueError: the variable is not set, or a line of it is wrong.
        """
        return cls(_parse_tokens(re.split("[\n;]", _environment(variable)), f"${variable}"))

    def authenticate(self, shown: Shown) -> Identity | None:
        """Whose token this is; ``None`` where none was sent.

        :raises Unauthenticated: nobody's.
        """
        if shown.token is None:
            return None
        found = None
        if _is_token(shown.token):
            digest = _digest(shown.token)
            # All are compared, whichever it is, so that the time that it takes tells nothing.
            for known, identity in self._entries:
                if hmac.compare_digest(known, digest):
                    found = identity
        if found is None:
            raise Unauthenticated("the token is not known here")
        return found

    def __repr__(self) -> str:
        return f"<TokenAuthenticator: {len(self._entries)} known>"


@implementer(IAuthenticator)
class CertificateAuthenticator:
    """Knows peers by the certificates that TLS has verified.

    :param permissions: of each name that is known, what it may do; where it is not given, whoever has a certificate is
        known, and has no permissions.
    :raises TypeError: the permissions of a name are a text, and not several.
    """

    def __init__(self, permissions: Mapping[str, Iterable[str]] | None = None) -> None:
        self._permissions: dict[str, frozenset[str]] | None = None
        if permissions is not None:
            for name, granted in permissions.items():
                if isinstance(granted, str):
                    raise TypeError(f"permissions of {name!r}: expected several texts, got one")
            self._permissions = {name: frozenset(granted) for name, granted in permissions.items()}

    def authenticate(self, shown: Shown) -> Identity | None:
        """Whose certificate this is, by the name that `certificate_identity` gives; ``None`` where there is none.

        :raises Unauthenticated: nobody's who is known.
        """
        if shown.certificate is None:
            return None
        identity = certificate_identity(shown.certificate)
        if self._permissions is None:
            return identity
        granted = self._permissions.get(identity.name)
        if granted is None:
            raise Unauthenticated(f"the certificate of {identity.name!r} is not known here")
        return msgspec.structs.replace(identity, permissions=granted)

    def __repr__(self) -> str:
        known = "all" if self._permissions is None else len(self._permissions)
        return f"<CertificateAuthenticator: {known} known>"


def certificate_identity(certificate: x509.Certificate) -> Identity:
    """Whose certificate this is.

    The names are, in this order, the common names of its subject, and of its alternative names those of DNS, the URIs
    and the e-mail addresses; the first is whose it is.  Names that cannot be printed are left out.  So whoever signs
    certificates must look at all of them: it must sign no common name for somebody whose name that is not.

    :raises Unauthenticated: it has no name, or cannot be read.
    """
    from cryptography import x509

    try:
        found: list[Any] = [
            attribute.value for attribute in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        ]
        try:
            alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            pass
        else:
            found += alternatives.get_values_for_type(x509.DNSName)
            found += alternatives.get_values_for_type(x509.UniformResourceIdentifier)
            found += alternatives.get_values_for_type(x509.RFC822Name)
    except Exception:
        # TLS looks at the chain, not at everything that is in a certificate.
        raise Unauthenticated("the certificate cannot be read") from None
    names = tuple(dict.fromkeys(name for name in found if isinstance(name, str) and name and name.isprintable()))
    if not names:
        raise Unauthenticated("the certificate has no name in it")
    return Identity(names[0], names=names, source="certificate")


@implementer(IAuthenticator)
class FirstOf:
    """Asks authenticators one after another: the first that knows who it is decides.

    What one of them refuses stays refused: who sends a wrong token is not asked for a certificate.

    :raises TypeError: one of them is no authenticator.
    """

    def __init__(self, *authenticators: Authenticator) -> None:
        for authenticator in authenticators:
            if not IAuthenticator.providedBy(authenticator):
                raise TypeError(f"{authenticator!r} does not provide IAuthenticator")
        self._authenticators = authenticators

    async def authenticate(self, shown: Shown) -> Identity | None:
        """What the first gives that gives anything.

        :raises Unauthenticated: one of them does not take what was shown.
        """
        for authenticator in self._authenticators:
            identity = await identify(authenticator, shown)
            if identity is not None:
                return identity
        return None

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(repr, self._authenticators))})"


class Token:
    """The secret that a client sends.  Made by `from_file` and `from_environment`, so that none stands in code.

    It is not shown by printing it, cannot be pickled, and is equal to itself alone.

    :param secret: the token.
    :param source: where it is from, for the repr and for errors.
    :raises ValueError: this cannot be a token.
    """

    __slots__ = ("_secret", "_source")

    def __init__(self, secret: str, source: str) -> None:
        if not _is_token(secret):
            raise ValueError(f"{source}: {_TOKEN_RULE}")
        self._secret = secret
        self._source = source

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Token:
        """Reads the first line of a file, without the spaces around it.

        :raises ValueError: the file cannot be read, or holds no token.
        """
        return cls(_read(path).split("\n", 1)[0].strip(), os.fspath(path))

    @classmethod
    def from_environment(cls, variable: str = "PROTOFRAME_TOKEN") -> Token:
        """Reads an environment variable, without the spaces around what it holds.

        :raises ValueError: the variable is not set, or holds no token.
        """
        return cls(_environment(variable).strip(), f"${variable}")

    def reveal(self) -> str:
        """The secret itself, to be sent and never shown."""
        return self._secret

    def __repr__(self) -> str:
        return f"<Token of {self._source}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Token cannot be pickled, nor copied: it would be a secret in yet another place")


def _digest(token: str) -> bytes:
    # No salt, and no slow hash: tokens are made by machines, and too long to be guessed.
    return hashlib.sha256(token.encode()).digest()


def _parse_tokens(lines: Iterable[str], where: str) -> list[tuple[bytes, Identity]]:
    """What lines list.  No word of them gets into an error, since a token may stand where a name should."""
    entries: list[tuple[bytes, Identity]] = []
    names: dict[str, int] = {}
    digests: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
        del words[comment:]
        if not words:
            continue
        if len(words) == 1:
            raise ValueError(f"{where}: line {number}: expected a name and a token")
        name, token, *permissions = words
        if not _is_token(token):
            raise ValueError(f"{where}: line {number}: {_TOKEN_RULE}")
        # What is not UTF-8 is not printable either, as it was read.
        if not all(word.isprintable() for word in words):
            raise ValueError(f"{where}: line {number}: a name or a permission cannot be printed")
        digest = _digest(token)
        if name in names:
            raise ValueError(f"{where}: line {number}: the name is that of line {names[name]}")
        if digest in digests:
            raise ValueError(f"{where}: line {number}: the token is that of line {digests[digest]}")
        names[name] = digests[digest] = number
        entries.append((digest, Identity(name, frozenset(permissions), source="token")))
    if not entries:
        raise ValueError(f"{where}: there are no tokens in it")
    return entries


def _read(path: str | os.PathLike[str]) -> str:
    """
    :raises ValueError: the file cannot be read.
    """
    try:
        # What is no UTF-8 becomes surrogates, as it does in `os.environ`: an error of the codec would hold the file.
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: {error.strerror}") from None


def _environment(variable: str) -> str:
    """
    :raises ValueError: the variable is not set.
    """
    text = os.environ.get(variable)
    if text is None:
        raise ValueError(f"the environment variable {variable} is not set")
    return text


def is_authenticator(thing: object) -> bool:
    """Whether something provides `IAuthenticator`."""
    provides: bool = IAuthenticator.providedBy(thing)
    return provides
