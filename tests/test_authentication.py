"""Who the other end is: tokens and certificates become identities, and no secret is told on the way."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import assume, given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger, textFileLogObserver
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from protoframe.authentication import (
    CertificateAuthenticator,
    FirstOf,
    IAuthenticator,
    Identity,
    Shown,
    Token,
    TokenAuthenticator,
    certificate_identity,
    identify,
)
from protoframe.errors import Unauthenticated

ALICE = "Xq3vT0m8Zr5uWk1yLb7dNc"
BACKUP = "p9Hs2fJ6gKe4aRtYxVo0Mi"
WRONG = "thisIsNobodysTokenAtAll"
VARIABLE = "PROTOFRAME_TOKENS_OF_A_TEST"

tokens = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=16, max_size=64).filter(
    lambda token: not token.startswith("#") and ";" not in token
)
words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@contextmanager
def environment(value: str | None, variable: str = VARIABLE) -> Iterator[str]:
    before = os.environ.pop(variable, None)
    if value is not None:
        os.environ[variable] = value
    try:
        yield variable
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def listed(text: str) -> TokenAuthenticator:
    with environment(text) as variable:
        return TokenAuthenticator.from_environment(variable)


def path_for(test: SynchronousTestCase) -> str:
    """A path where nothing is; pytest would have trial's own in the working directory."""
    directory = tempfile.mkdtemp()
    test.addCleanup(shutil.rmtree, directory)
    return os.path.join(directory, "a file")


def raised(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def everything_told(error: BaseException) -> str:
    """All that a person, or a log, may come to see of an error."""
    text = StringIO()
    observer = textFileLogObserver(text)
    log = Logger(namespace="test", observer=observer)
    failure = Failure(error, type(error), error.__traceback__)
    log.failure("failed: {why}", failure=failure, why=error)
    chain: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        # Also what `from None` hides.
        chain += [str(seen), repr(seen), repr(seen.args), repr(vars(seen))]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(
        [text.getvalue(), failure.getTraceback(), repr(failure), *traceback.format_exception(error), *chain]
    )


def signed(common_names: list[str], alternatives: list[x509.GeneralName]) -> x509.Certificate:
    """A certificate with these names; who signed it matters to nobody here."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority = trustme.CA()
    signer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name) for name in common_names])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(signer.not_valid_before_utc)
        .not_valid_after(signer.not_valid_after_utc)
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(key, hashes.SHA256())


def issued(*identities: str, common_name: str | None = None) -> x509.Certificate:
    """A certificate as an authority makes it."""
    made = trustme.CA().issue_cert(*identities, common_name=common_name)
    return x509.load_pem_x509_certificate(made.cert_chain_pems[0].bytes())


class Tokens(SynchronousTestCase):
    def authenticator(self, text: str | bytes) -> TokenAuthenticator:
        return TokenAuthenticator.from_file(self.file(text))

    def file(self, text: str | bytes) -> str:
        path = path_for(self)
        with open(path, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
        return path

    def refused(self, text: str | bytes) -> str:
        path = self.file(text)
        error = raised(lambda: TokenAuthenticator.from_file(path))
        self.assertIs(type(error), ValueError)
        message = str(error)
        self.assertTrue(message.startswith(f"{path}: "), message)
        self.assertNotIn("\n", message)
        return message.removeprefix(f"{path}: ")

    def test_provides_the_interface(self):
        verifyObject(IAuthenticator, self.authenticator(f"alice {ALICE}"))

    def test_a_token_shows_who_it_is_and_what_it_may_do(self):
        authenticator = self.authenticator(f"alice {ALICE} read write\nbackup\t{BACKUP}\n")
        self.assertEqual(
            authenticator.authenticate(Shown(token=ALICE)),
            Identity("alice", frozenset({"read", "write"}), source="token"),
        )
        self.assertEqual(authenticator.authenticate(Shown(token=BACKUP)), Identity("backup", source="token"))

    def test_no_token_is_nothing_to_look_at(self):
        self.assertIsNone(self.authenticator(f"alice {ALICE}").authenticate(Shown(address="somewhere")))

    def test_a_wrong_token_is_refused_whatever_it_is_like(self):
        authenticator = self.authenticator(f"alice {ALICE}\nbackup {BACKUP}")
        for token in (
            WRONG,
            "",
            ALICE[:-1],
            ALICE + "x",
            ALICE.lower(),
            " " + ALICE,
            ALICE + "\n",
            ALICE + "\0",
            "x" * 1025,
            "x" * 1_000_000,
            "\udc80" * 20,
            "é" * 20,
        ):
            error = raised(lambda token=token: authenticator.authenticate(Shown(token=token)))
            self.assertIs(type(error), Unauthenticated)
            self.assertEqual(str(error), "the token is not known here")

    def test_the_longest_token_is_taken(self):
        longest = "x" * 1024
        self.assertEqual(self.authenticator(f"a {longest}").authenticate(Shown(token=longest)).name, "a")
        self.assertIn("line 1: a token is 16 to 1,024", self.refused(f"a {longest}x"))

    def test_every_entry_is_compared_wherever_the_token_stands(self):
        import hmac

        compared: list[bytes] = []

        def counting(one: bytes, other: bytes) -> bool:
            compared.append(one)
            return compare(one, other)

        compare = hmac.compare_digest
        authenticator = self.authenticator(f"alice {ALICE}\nbackup {BACKUP}\ncarol {'c' * 16}\n")
        self.patch(hmac, "compare_digest", counting)
        for token in (ALICE, BACKUP, "c" * 16):
            compared.clear()
            authenticator.authenticate(Shown(token=token))
            self.assertEqual(len(set(compared)), 3)

    def test_no_token_is_kept(self):
        authenticator = self.authenticator(f"alice {ALICE}")
        self.assertNotIn(ALICE, repr(vars(authenticator)))
        self.assertEqual(repr(authenticator), "<TokenAuthenticator: 1 known>")

    def test_comments_and_blank_lines_are_ignored(self):
        text = f"\ufeff# who may come\n\n   \n  # none\nalice {ALICE} read # and not write\r\n"
        self.assertEqual(
            self.authenticator(text).authenticate(Shown(token=ALICE)),
            Identity("alice", frozenset({"read"}), source="token"),
        )

    def test_lines_of_a_variable_may_end_in_semicolons(self):
        authenticator = listed(f"alice {ALICE} read;backup {BACKUP}\n# nobody;carol {'c' * 16};")
        for name, token in (("alice", ALICE), ("backup", BACKUP), ("carol", "c" * 16)):
            self.assertEqual(authenticator.authenticate(Shown(token=token)).name, name)

    def test_a_line_that_is_wrong_is_told_by_its_number(self):
        self.assertEqual(self.refused(f"alice {ALICE}\n\n{BACKUP}"), "line 3: expected a name and a token")
        self.assertEqual(self.refused(f"alice {ALICE}\nalice {BACKUP}"), "line 2: the name is that of line 1")
        self.assertEqual(self.refused(f"# x\nalice {ALICE}\nbob {ALICE}"), "line 3: the token is that of line 2")
        rule = "a token is 16 to 1,024 characters of printable ASCII without spaces"
        self.assertEqual(self.refused("alice " + "x" * 15), f"line 1: {rule}")
        self.assertEqual(self.refused("alice " + "é" * 16), f"line 1: {rule}")
        self.assertEqual(self.refused(f"al\x07ice {ALICE}"), "line 1: a name or a permission cannot be printed")
        self.assertEqual(
            self.refused(b"al\xffice " + ALICE.encode()), "line 1: a name or a permission cannot be printed"
        )
        self.assertEqual(
            self.refused(f"alice {ALICE} re\x1bad"),
            "line 1: a name or a permission cannot be printed",
        )

    def test_a_list_of_nobody_is_refused(self):
        for text in ("", "\n\n", "# alice is gone\n"):
            self.assertEqual(self.refused(text), "there are no tokens in it")

    def test_a_file_that_cannot_be_read_is_told(self):
        path = path_for(self)
        for read in (TokenAuthenticator.from_file, Token.from_file):
            self.assertEqual(str(self.assertRaises(ValueError, read, path)), f"{path}: No such file or directory")

    def test_a_variable_that_is_not_set_is_told(self):
        with environment(None) as variable:
            for read in (TokenAuthenticator.from_environment, Token.from_environment):
                error = self.assertRaises(ValueError, read, variable)
                self.assertEqual(str(error), f"the environment variable {variable} is not set")

    def test_the_variables_have_names_of_their_own(self):
        with environment(f"alice {ALICE}", "PROTOFRAME_TOKENS"), environment(ALICE, "PROTOFRAME_TOKEN"):
            shown = Shown(token=Token.from_environment().reveal())
            self.assertEqual(TokenAuthenticator.from_environment().authenticate(shown).name, "alice")

    def test_an_error_of_a_variable_names_it(self):
        error = raised(lambda: listed(f"alice {ALICE}; bob"))
        self.assertEqual(str(error), f"${VARIABLE}: line 2: expected a name and a token")

    @given(st.dictionaries(words, st.tuples(tokens, st.frozensets(words)), min_size=1, max_size=5), tokens)
    def test_each_is_known_by_its_own_token_alone(self, people, stranger):
        assume(len({token for token, _ in people.values()}) == len(people))
        authenticator = listed(
            ";".join(f"{name} {token} {' '.join(sorted(granted))}" for name, (token, granted) in people.items())
        )
        for name, (token, granted) in people.items():
            self.assertEqual(authenticator.authenticate(Shown(token=token)), Identity(name, granted, source="token"))
        if stranger not in {token for token, _ in people.values()}:
            self.assertRaises(Unauthenticated, authenticator.authenticate, Shown(token=stranger))

    @given(tokens, st.lists(st.sampled_from(["{}", "alice", "bob", "\n", " ", ";", "#", "\x07", "é"]), max_size=12))
    def test_whatever_is_wrong_with_a_list_no_error_tells_a_token(self, token, pieces):
        # Not one that a traceback would have in it anyhow.
        token = f"Sesame!{token}"
        text = "".join(piece.format(token) for piece in pieces)
        try:
            authenticator = listed(text)
        except ValueError as error:
            self.assertIs(type(error), ValueError)
            self.assertNotIn("\n", str(error))
            self.assertNotIn(token, everything_told(error))
        else:
            self.assertNotIn(token, repr(authenticator))


class Secrets(SynchronousTestCase):
    def test_no_failure_tells_the_token(self):
        authenticator = listed(f"alice {ALICE}")
        path = path_for(self)
        with open(path, "wb") as file:
            file.write(f"{ALICE} x\nalice {ALICE} \xff {ALICE}\n".encode("latin-1"))
        failures = [
            raised(lambda: authenticator.authenticate(Shown(token=WRONG))),
            raised(lambda: authenticator.authenticate(Shown(token=f"{ALICE} {WRONG}"))),
            raised(lambda: listed(ALICE)),
            raised(lambda: listed(f"{ALICE} alice")),
            raised(lambda: listed(f"alice {ALICE}\nalice {WRONG}")),
            raised(lambda: listed(f"alice {ALICE}\nbob {ALICE}")),
            raised(lambda: listed(f"alice {ALICE}\x07")),
            raised(lambda: TokenAuthenticator.from_file(path)),
            raised(lambda: Token.from_file(path)),
            raised(lambda: Token(f"{ALICE} {WRONG}", "here")),
            raised(lambda: pickle.dumps(Token(ALICE, "here"))),
        ]
        for error in failures:
            told = everything_told(error)
            self.assertNotIn(ALICE, told)
            self.assertNotIn(WRONG, told)

    def test_what_is_shown_does_not_show_the_token(self):
        shown = Shown("somewhere", ALICE)
        for text in (repr(shown), str(shown), f"{shown}", f"{[shown]!r}"):
            self.assertNotIn(ALICE, text)
            self.assertIn("somewhere", text)


class ClientTokens(SynchronousTestCase):
    def test_a_file_gives_its_first_line(self):
        path = path_for(self)
        for text in (ALICE, f"{ALICE}\n", f"  {ALICE} \r\nmore\n", f"\ufeff{ALICE}\n"):
            with open(path, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            token = Token.from_file(path)
            self.assertEqual(token.reveal(), ALICE)
            self.assertEqual(repr(token), f"<Token of {path}>")

    def test_a_variable_gives_what_it_holds(self):
        with environment(f"{ALICE}\n") as variable:
            token = Token.from_environment(variable)
        self.assertEqual(token.reveal(), ALICE)
        self.assertEqual(str(token), f"<Token of ${VARIABLE}>")

    def test_what_can_be_no_token_is_refused(self):
        for text in ("", "short", "x" * 15, "x" * 1025, "é" * 20, f"{ALICE} {ALICE}", f"{ALICE}\x07", "\udcff" * 20):
            with environment(text) as variable:
                error = self.assertRaises(ValueError, Token.from_environment, variable)
            self.assertEqual(
                str(error), f"${VARIABLE}: a token is 16 to 1,024 characters of printable ASCII without spaces"
            )

    def test_it_stays_where_it_is(self):
        token = Token(ALICE, "here")
        for take in (pickle.dumps, copy.copy, copy.deepcopy):
            self.assertRaises(TypeError, take, token)
        self.assertFalse(hasattr(token, "__dict__"))

    def test_it_is_equal_to_itself_alone(self):
        token = Token(ALICE, "here")
        self.assertEqual(token, token)
        self.assertNotEqual(token, Token(ALICE, "here"))

    @given(tokens)
    def test_its_text_never_has_the_secret_in_it(self, secret):
        token = Token(secret, "here")
        self.assertEqual(token.reveal(), secret)
        self.assertEqual([repr(token), str(token), f"{token}"], ["<Token of here>"] * 3)


class Certificates(SynchronousTestCase):
    def test_provides_the_interface(self):
        verifyObject(IAuthenticator, CertificateAuthenticator())

    def test_no_certificate_is_nothing_to_look_at(self):
        self.assertIsNone(CertificateAuthenticator().authenticate(Shown(token=ALICE)))

    def test_the_common_name_comes_first_and_the_others_in_order(self):
        certificate = signed(
            ["alice", "al"],
            [
                x509.RFC822Name("alice@example.org"),
                x509.UniformResourceIdentifier("spiffe://example.org/alice"),
                x509.DNSName("alice.example.org"),
                x509.DNSName("alice"),
            ],
        )
        self.assertEqual(
            certificate_identity(certificate),
            Identity(
                "alice",
                names=("alice", "al", "alice.example.org", "spiffe://example.org/alice", "alice@example.org"),
                source="certificate",
            ),
        )

    def test_without_a_common_name_the_next_is_taken(self):
        email = x509.RFC822Name("alice@example.org")
        uri = x509.UniformResourceIdentifier("spiffe://example.org/alice")
        self.assertEqual(certificate_identity(signed([], [email, uri])).name, "spiffe://example.org/alice")
        self.assertEqual(certificate_identity(signed([], [email])).name, "alice@example.org")

    def test_a_certificate_of_an_authority_is_read(self):
        self.assertEqual(certificate_identity(issued("alice.example.org", common_name="alice")).name, "alice")
        self.assertEqual(certificate_identity(issued("alice.example.org")).name, "alice.example.org")

    def test_names_that_cannot_be_printed_are_left_out(self):
        certificate = signed(["alice\nadmin", "alice"], [])
        self.assertEqual(certificate_identity(certificate).names, ("alice",))

    def test_a_certificate_without_a_name_is_refused(self):
        error = self.assertRaises(Unauthenticated, certificate_identity, signed([], []))
        self.assertEqual(str(error), "the certificate has no name in it")

    def test_a_certificate_that_cannot_be_read_is_refused(self):
        error = self.assertRaises(Unauthenticated, certificate_identity, object())
        self.assertEqual(str(error), "the certificate cannot be read")

    def test_whoever_has_a_certificate_is_known_and_may_do_nothing(self):
        identity = CertificateAuthenticator().authenticate(Shown(certificate=issued("alice.example.org")))
        self.assertEqual((identity.name, identity.permissions), ("alice.example.org", frozenset()))

    def test_names_that_are_listed_are_known_with_their_permissions(self):
        authenticator = CertificateAuthenticator({"alice": ["read", "write"], "bob": ()})
        identity = authenticator.authenticate(Shown(certificate=issued("a.example.org", common_name="alice")))
        self.assertEqual(identity.permissions, frozenset({"read", "write"}))
        self.assertEqual(identity.names, ("alice", "a.example.org"))
        self.assertEqual(identity.source, "certificate")

    def test_other_names_are_refused_though_a_further_one_is_listed(self):
        authenticator = CertificateAuthenticator({"alice": []})
        shown = Shown(certificate=issued("alice", common_name="mallory"))
        error = self.assertRaises(Unauthenticated, authenticator.authenticate, shown)
        self.assertEqual(str(error), "the certificate of 'mallory' is not known here")

    def test_nobody_is_known_where_nobody_is_listed(self):
        shown = Shown(certificate=issued("alice.example.org"))
        self.assertRaises(Unauthenticated, CertificateAuthenticator({}).authenticate, shown)

    def test_permissions_are_several(self):
        self.assertRaises(TypeError, CertificateAuthenticator, {"alice": "read"})

    def test_the_repr_says_how_many_are_known(self):
        self.assertEqual(repr(CertificateAuthenticator()), "<CertificateAuthenticator: all known>")
        self.assertEqual(repr(CertificateAuthenticator({"alice": []})), "<CertificateAuthenticator: 1 known>")


@implementer(IAuthenticator)
class Answering:
    """Answers as it is told, and notes that it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked = 0

    def authenticate(self, shown: Shown) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def later(value: Any) -> Any:
    return value


class Several(SynchronousTestCase):
    def ask(self, *authenticators: Any) -> Any:
        return self.successResultOf(Deferred.fromCoroutine(FirstOf(*authenticators).authenticate(Shown())))

    def test_provides_the_interface(self):
        verifyObject(IAuthenticator, FirstOf())
        verifyObject(IAuthenticator, Answering(None))

    def test_the_first_that_knows_decides(self):
        last = Answering(Identity("carol"))
        self.assertEqual(self.ask(Answering(None), Answering(Identity("bob")), last).name, "bob")
        self.assertEqual(last.asked, 0)

    def test_nobody_is_known_where_none_knows(self):
        self.assertIsNone(self.ask())
        self.assertIsNone(self.ask(Answering(None), Answering(succeed(None)), Answering(later(None))))

    def test_answers_may_come_later(self):
        waited: Deferred[Identity | None] = Deferred()
        asked = Deferred.fromCoroutine(
            FirstOf(Answering(succeed(None)), Answering(waited), Answering(later(Identity("carol")))).authenticate(
                Shown()
            )
        )
        self.assertNoResult(asked)
        waited.callback(None)
        self.assertEqual(self.successResultOf(asked).name, "carol")

    def test_a_refusal_is_the_end_of_it(self):
        last = Answering(Identity("carol"))
        asked = FirstOf(Answering(Unauthenticated("no")), last).authenticate(Shown())
        self.failureResultOf(Deferred.fromCoroutine(asked), Unauthenticated)
        self.assertEqual(last.asked, 0)

    def test_they_may_be_nested(self):
        self.assertEqual(self.ask(FirstOf(Answering(None)), FirstOf(Answering(Identity("bob")))).name, "bob")

    def test_what_is_no_authenticator_is_refused(self):
        self.assertRaises(TypeError, FirstOf, Answering(None), object())

    def test_the_repr_lists_them(self):
        self.assertEqual(
            repr(FirstOf(listed(f"alice {ALICE}"), CertificateAuthenticator())),
            "FirstOf(<TokenAuthenticator: 1 known>, <CertificateAuthenticator: all known>)",
        )

    def test_who_asks_gets_the_answer_however_it_comes(self):
        for answer in (Identity("bob"), succeed(Identity("bob")), later(Identity("bob"))):
            asked = Deferred.fromCoroutine(identify(Answering(answer), Shown()))
            self.assertEqual(self.successResultOf(asked), Identity("bob"))

    def test_an_answer_that_is_no_identity_is_an_error(self):
        for answer in (True, "bob", succeed("bob")):
            asked = Deferred.fromCoroutine(identify(Answering(answer), Shown(token=ALICE)))
            error = self.failureResultOf(asked, TypeError).value
            self.assertNotIn("bob", str(error))
