"""What annotations say: signatures, codecs, declarations, names on the wire."""

from __future__ import annotations

import copy
import datetime
import enum
import pickle
import uuid
from collections.abc import AsyncIterator, Awaitable, Coroutine
from typing import Annotated, Any, Literal

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from protoframe import Protocol, errors, request
from protoframe.core.declaration import is_declaration
from protoframe.core.schema import (
    Method,
    RequestOptions,
    encode_json,
    encode_msgpack,
    error_type,
    methods_of,
    protocol_name,
    wire_names,
)
from protoframe.core.untrusted import Bounds
from protoframe.errors import BY_NAME, BY_STATUS, Error, Internal, InvalidArgument, InvalidResponse, NotFound, Status
from tests.core.test_untrusted import colliding

NESTING = 64


class Inner(msgspec.Struct):
    b: int
    when: datetime.datetime | None = None


class Outer(msgspec.Struct):
    a: list[Inner]


class Colour(enum.Enum):
    RED = "red"


class Tree(msgspec.Struct):
    children: list[Tree] = []


class Sample(Protocol[Any]):
    """What the tests call."""

    @request
    def plain(self, text: str, ttl: int = 60) -> str:
        return text * ttl

    @request
    def nested(self, a: list[Inner], outer: Outer | None = None) -> list[Inner]:
        return a

    @request
    def keywords(self, a: int, b: int = 2, *, c: int, d: int = 4) -> list[int]:
        return [a, b, c, d]

    @request
    def positional(self, a: int, /, b: int) -> int:
        return a - b

    @request
    def mutable(self, names: list[str] = ["x"], table: dict[str, int] = {}) -> int:  # noqa: B006
        names.append("y")
        table["y"] = 1
        return len(names) + len(table)

    @request
    def anything(self, value: Any, table: dict[str, Any] = {}) -> Any:  # noqa: B006
        return value

    @request
    def tree(self, root: Tree) -> Tree:
        return root

    @request
    def typed(self, value: dict[str, list[int]]) -> None:
        return None

    @request
    def kinds(
        self,
        colour: Colour,
        when: datetime.datetime,
        who: uuid.UUID,
        size: Annotated[int, msgspec.Meta(ge=0, le=9)],
        mode: Literal["r", "w"],
    ) -> None:
        return None

    @request
    def nothing(self) -> None:
        return None


METHODS = methods_of(Sample)


def pack(value):
    return msgspec.msgpack.encode(value)


def encode_arguments(method, args, kwargs):
    """The arguments of a call as a proxy encodes them."""
    return encode_msgpack(method.parameters(*args, **kwargs))


class Arguments(SynchronousTestCase):
    def decode(self, name, value, *, json=False):
        octets = value if isinstance(value, bytes) else (msgspec.json.encode(value) if json else pack(value))
        return METHODS[name].decode_arguments(octets, NESTING, json=json)

    def refused(self, name, value, text, **options):
        error = self.assertRaises(InvalidArgument, self.decode, name, value, **options)
        self.assertEqual(error.message, text)

    def test_they_travel_by_name(self):
        octets = encode_arguments(METHODS["plain"], ("a",), {"ttl": 3})
        self.assertEqual(msgspec.msgpack.decode(octets), {"text": "a", "ttl": 3})
        self.assertEqual(self.decode("plain", octets), ("a", 3))

    def test_what_is_wrong_is_told_path_first(self):
        for json in (False, True):
            for name, value, text in (
                ("plain", {}, "$.text: missing"),
                ("plain", {"text": 5}, "$.text: expected str, got int"),
                ("plain", {"text": "a", "ttl": "b"}, "$.ttl: expected int, got str"),
                ("plain", [], "$: expected object, got array"),
                ("nested", {"a": [{}]}, "$.a[0].b: missing"),
                ("nested", {"a": [{"b": 1}, {"b": True}]}, "$.a[1].b: expected int, got bool"),
                ("nested", {"a": [], "outer": {"a": [{"b": "x"}]}}, "$.outer.a[0].b: expected int, got str"),
                ("typed", {"value": {"k": ["a"]}}, "$.value[...][0]: expected int, got str"),
                ("keywords", {"a": 1}, "$.c: missing"),
            ):
                self.refused(name, value, text, json=json)
        self.refused("typed", {"value": {5: []}}, "$.value: key: expected str, got int")
        self.refused("kinds", {"colour": "blue"}, "$.colour: invalid enum value 'blue'")

    def test_constraints_hold(self):
        good = {"colour": "red", "when": "2026-01-01T00:00:00Z", "who": str(uuid.UUID(int=5)), "size": 9, "mode": "w"}
        self.assertEqual(self.decode("kinds", good)[3:], (9, "w"))
        self.refused("kinds", good | {"size": 10}, "$.size: expected int <= 9")
        self.refused("kinds", good | {"mode": "x"}, "$.mode: invalid enum value 'x'")
        self.refused("kinds", good | {"when": "x"}, "$.when: invalid RFC3339 encoded datetime")
        self.refused("kinds", good | {"who": "x"}, "$.who: invalid UUID")

    def test_names_that_are_not_known_are_ignored(self):
        for json in (False, True):
            self.assertEqual(self.decode("plain", {"text": "a", "later": [{"x": None}]}, json=json), ("a", 60))
            self.assertEqual(self.decode("nothing", {"later": 1}, json=json), ())

    def test_defaults_fill_in_what_is_not_given(self):
        self.assertEqual(self.decode("plain", {"text": "a"}), ("a", 60))
        self.assertEqual(METHODS["keywords"].decode_arguments(pack({"a": 1, "c": 3}), NESTING), (1, 2, 3, 4))

    def test_the_last_of_a_name_that_is_there_twice_counts(self):
        self.assertEqual(self.decode("plain", b"\x82\xa4text\xa1a\xa4text\xa1b"), ("b", 60))

    def test_a_mutable_default_is_a_new_one_at_each_call(self):
        for _ in range(3):
            arguments = self.decode("mutable", {})
            self.assertEqual(METHODS["mutable"].invoke(Sample(), *arguments), 3)

    def test_keyword_only_parameters_reach_their_names(self):
        method = METHODS["keywords"]
        arguments = method.decode_arguments(encode_arguments(method, (1,), {"d": 40, "c": 3}), NESTING)
        self.assertEqual(method.invoke(Sample(), *arguments), [1, 2, 3, 40])

    def test_positional_only_parameters_travel_by_name_too(self):
        method = METHODS["positional"]
        arguments = method.decode_arguments(pack({"b": 1, "a": 5}), NESTING)
        self.assertEqual(method.invoke(Sample(), *arguments), 4)

    def test_a_call_that_does_not_fit_the_signature_is_a_type_error_before_anything_is_sent(self):
        method = METHODS["plain"]
        for args, kwargs in (((), {}), (("a", 1, 2), {}), (("a",), {"text": "b"}), ((), {"text": "a", "later": 1})):
            self.assertRaises(TypeError, encode_arguments, method, args, kwargs)
        self.assertRaises(TypeError, encode_arguments, method, (object(),), {})

    @given(st.text(), st.integers(-(1 << 63), (1 << 64) - 1))
    def test_any_values_arrive(self, text, ttl):
        octets = encode_arguments(METHODS["plain"], (text, ttl), {})
        self.assertEqual(self.decode("plain", octets), (text, ttl))
        self.assertEqual(self.decode("plain", {"text": text, "ttl": ttl}, json=True), (text, ttl))


class Results(SynchronousTestCase):
    def test_they_are_held_to_their_type(self):
        method = METHODS["nested"]
        octets = encode_msgpack([Inner(5)])
        self.assertEqual(method.decode_result(octets, NESTING), [Inner(5)])
        error = self.assertRaises(InvalidResponse, method.decode_result, pack([{"b": "x"}]), NESTING)
        self.assertEqual(
            error.message, "the answer of Sample.nested is not what was declared: $[0].b: expected int, got str"
        )

    def test_what_cannot_travel_is_a_type_error(self):
        self.assertRaises(TypeError, encode_msgpack, object())
        self.assertRaises(TypeError, encode_json, [object()])

    def test_json_is_answered_in_json(self):
        self.assertEqual(encode_json([Inner(5)]), b'[{"b":5,"when":null}]')

    def test_what_a_coroutine_a_deferred_or_an_awaitable_gives_is_the_result(self):
        class Later(Protocol[Any]):
            @request
            async def coroutine(self) -> int: ...

            @request
            def deferred(self) -> Deferred[int]: ...

            @request
            def awaitable(self) -> Awaitable[int]: ...

            @request
            def written_out(self) -> Coroutine[Any, Any, int]: ...

        for method in methods_of(Later).values():
            self.assertIs(method.result, int, method)

    def test_a_hostile_result_is_one_clear_error(self):
        for octets in (b"\x91" * 100_000, b"\x81\x91\x01\x01", b"", b"\xc1", b"\xa1\xff", b"\xdd\xff\xff\xff\xff"):
            for name in ("anything", "tree", "nested"):
                self.assertRaises(InvalidResponse, METHODS[name].decode_result, octets, NESTING)


class HostileArguments(SynchronousTestCase):
    names = ("plain", "nested", "anything", "tree", "typed", "kinds", "nothing", "mutable")

    def test_octets_that_are_no_arguments_are_one_clear_error(self):
        for name in self.names:
            for octets in (
                b"",
                b"\xc1",
                b"\x91" * 100_000,
                b"\x81\xa1y" + b"\x91" * 100_000,
                b"\x81\xa1y" * 100_000,
                b"\x81\xa5value" + b"\x91" * 100_000,
                b"\x81\xa5value" + b"\x81\xa1a" * 100_000,
                b"\x81\xa4root" + b"\x81\xa8children\x91" * 100_000,
                b"\x82\xa4text\xa1\xff",
                b"\xdf\xff\xff\xff\xff",
                b"\x81\xdb\xff\xff\xff\xff",
                b"\x81\xa5value\xdd\xff\xff\xff\xff",
                b"\x81\xa5value\xc6\xff\xff\xff\xff",
                b"\x81\x90\x01",
                b"\x80\x80",
            ):
                error = self.assertRaises(InvalidArgument, METHODS[name].decode_arguments, octets, NESTING)
                self.assertTrue(error.message.startswith("$"), error.message)
            for text in (b"", b"{", b"[" * 100_000, b'{"value":' * 100_000, b'{"root":{"children":[' * 100_000,
                         b'"' + b'\\"' * 100_000, b'{"text":"\xff', b"{}x", b"\xff"):  # fmt: skip
                self.assertRaises(InvalidArgument, METHODS[name].decode_arguments, text, NESTING, json=True)

    def test_a_number_without_end_is_refused_where_it_is_read(self):
        text = b'{"value":' + b"9" * 100_000 + b"}"
        error = self.assertRaises(InvalidArgument, METHODS["anything"].decode_arguments, text, NESTING, json=True)
        self.assertEqual(error.message, "$.value: integer value out of range")

    def test_good_arguments_that_are_cut_anywhere_are_refused(self):
        good = {
            "plain": {"text": "hello", "ttl": 3},
            "nested": {"a": [{"b": 1, "when": "2026-01-01T00:00:00Z"}]},
            "anything": {"value": {"a": [1, 2.5, None, "x" * 40, b"b"]}},
            "tree": {"root": {"children": [{"children": []}]}},
        }
        for name, value in good.items():
            octets = pack(value)
            METHODS[name].decode_arguments(octets, NESTING)
            for length in range(len(octets)):
                self.assertRaises(InvalidArgument, METHODS[name].decode_arguments, octets[:length], NESTING)
            text = msgspec.json.encode(value)
            METHODS[name].decode_arguments(text, NESTING, json=True)
            for length in range(len(text)):
                self.assertRaises(InvalidArgument, METHODS[name].decode_arguments, text[:length], NESTING, json=True)

    @given(st.sampled_from(names), st.binary(max_size=60), st.booleans())
    def test_any_octets_are_arguments_or_an_invalid_argument(self, name, octets, json):
        for prefix in (b"", b"\x81\xa5value", b"\x81\xa4text", b'{"value":', b'{"text":"'):
            try:
                METHODS[name].decode_arguments(prefix + octets, NESTING, json=json)
            except InvalidArgument as error:
                self.assertTrue(error.message.startswith("$"), error.message)

    def test_nesting_is_bounded_where_the_type_does_not(self):
        for name, opening, closing in (
            ("anything", b"\x91", b"\x90"),
            ("tree", b"\x81\xa8children\x91", b"\x80"),
        ):
            prefix = b"\x81\xa5value" if name == "anything" else b"\x81\xa4root"
            per_level = 1 if name == "anything" else 2
            deepest = (NESTING - 2) // per_level
            METHODS[name].decode_arguments(prefix + opening * deepest + closing, NESTING)
            too_deep = prefix + opening * (deepest + 1) + closing
            error = self.assertRaises(InvalidArgument, METHODS[name].decode_arguments, too_deep, NESTING)
            self.assertEqual(error.message, "$: nested deeper than 64")

    def test_keys_that_collide_are_refused_where_maps_have_no_type(self):
        octets = b"\x81\xa5value\xde\x01\x00" + b"".join(pack(pair) + b"\x01" for pair in colliding(256))
        error = self.assertRaises(InvalidArgument, METHODS["anything"].decode_arguments, octets, NESTING)
        self.assertEqual(error.message, "$: a key of a map is an array or a map")

    def test_only_what_has_no_bounds_is_looked_through(self):
        bounds = {
            name: METHODS[name].argument_bounds for name in ("plain", "nested", "typed", "kinds", "anything", "tree")
        }
        self.assertEqual(set(bounds.values()), {Bounds.TYPED, Bounds.UNTYPED, Bounds.RECURSIVE})
        self.assertEqual([name for name, kind in bounds.items() if kind is not Bounds.TYPED], ["anything", "tree"])


class Declarations(SynchronousTestCase):
    def test_a_body_that_says_nothing_declares_and_any_other_serves(self):
        class Mixed(Protocol[Any]):
            @request
            def dots(self) -> int: ...

            @request
            async def documented(self) -> int:
                """What it does."""

            @request
            def docstring_alone(self) -> int:
                """What it does."""

            @request
            def raises(self) -> int:
                raise NotImplementedError

            @request
            def raises_with_text(self) -> int:
                """Docs."""
                raise NotImplementedError("serve it")

            @request
            def nothing(self) -> None:
                pass

            @request
            def returns(self) -> None:
                return

            @request
            def other(self) -> int:
                raise ValueError

            @request
            async def answers(self) -> int:
                return 5

        served = [name for name, method in methods_of(Mixed).items() if method.function is not None]
        self.assertEqual(served, ["nothing", "returns", "other", "answers"])
        self.assertEqual(methods_of(Mixed)["documented"].doc, "What it does.")

    def test_without_source_the_byte_code_decides(self):
        namespace: dict[str, Any] = {}
        exec(
            "def dots(self): ...\n"
            "async def coroutine(self): ...\n"
            "def documented(self):\n  'doc'\n  ...\n"
            "def raising(self): raise NotImplementedError\n"
            "async def raising_text(self):\n  'doc'\n  raise NotImplementedError('text')\n"
            "def echo(self, x): return x\n"
            "async def later(self, x): return x\n"
            "def text(self): return 'x'\n"
            "def own_doc(self):\n  'doc'\n  return 'doc'\n"
            "def number(self): return 5\n"
            "def other(self): raise ValueError\n",
            namespace,
        )
        declared = [
            name for name, made in namespace.items() if callable(made) and is_declaration(made, {"return": int})
        ]
        self.assertEqual(declared, ["dots", "coroutine", "documented", "raising", "raising_text"])
        self.assertFalse(is_declaration(namespace["dots"], {"return": type(None)}))

    def test_a_subclass_serves_a_contract(self):
        class Contract(Protocol[Any]):
            @request(idempotent=True, timeout=3.0)
            async def one(self, a: int) -> int: ...

            @request
            async def two(self) -> int: ...

        class Server(Contract):
            async def one(self, a: int) -> int:
                return a

        methods = methods_of(Server)
        self.assertEqual(
            [(name, method.function is not None) for name, method in methods.items()], [("one", True), ("two", False)]
        )
        self.assertEqual(methods["one"].wire_name, b"Contract.one")
        self.assertEqual(methods["one"].options, RequestOptions(idempotent=True, timeout=3.0))

    def test_options_of_the_nearest_decorated_definition_count(self):
        class Base(Protocol[Any]):
            @request(timeout=1.0, idempotent=True)
            def one(self) -> int: ...

        class Below(Base):
            @request(timeout=2.0)
            def one(self) -> int:
                return 1

        self.assertEqual(methods_of(Below)["one"].options, RequestOptions(timeout=2.0))

    def test_a_request_that_a_subclass_turns_into_something_else_is_refused(self):
        class Base(Protocol[Any]):
            @request
            def one(self) -> int: ...

        class Below(Base):
            one = 5  # type: ignore[assignment]

        self.assertRaises(TypeError, methods_of, Below)


class Names(SynchronousTestCase):
    def test_a_method_is_served_under_the_class_that_declares_it_and_those_below(self):
        class Top(Protocol[Any]):
            @request
            def one(self) -> int: ...

        class Middle(Top, name="org.example.Middle"):
            @request
            def two(self) -> int:
                return 2

        class Bottom(Middle):
            def one(self) -> int:
                return 1

        methods = methods_of(Bottom)
        self.assertEqual([method.wire_name for method in methods.values()], [b"Top.one", b"org.example.Middle.two"])
        self.assertEqual(wire_names(Bottom, methods["one"]), ["Bottom.one", "org.example.Middle.one", "Top.one"])
        self.assertEqual(wire_names(Bottom, methods["two"]), ["Bottom.two", "org.example.Middle.two"])

    def test_a_name_is_not_inherited(self):
        class Named(Protocol[Any], name="a.B"):
            pass

        class Below(Named):
            pass

        self.assertEqual((protocol_name(Named), protocol_name(Below)), ("a.B", "Below"))

    def test_a_name_that_does_not_fit_the_wire_is_refused(self):
        long = type("L" * 250, (Protocol,), {"method": METHODS["nothing"].function})
        self.assertRaises(TypeError, methods_of, long)
        fits = type("L" * (255 - len(".nothing")), (Protocol,), {"nothing": METHODS["nothing"].function})
        methods_of(fits)


def method_with(annotations, source="def f(self, x): ..."):
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    function = namespace["f"]
    function.__annotations__ = annotations
    return Method("P", "f", function, RequestOptions())


class Refused(SynchronousTestCase):
    def refused(self, annotations, text, source="def f(self, x): ..."):
        error = self.assertRaises(TypeError, method_with, annotations, source)
        self.assertIn(text, str(error))
        self.assertIn("P.f", str(error))

    def test_what_has_no_annotation(self):
        self.refused({"return": int}, "parameter x has no annotation")
        self.refused({"x": int}, "no result type")

    def test_what_cannot_go_by_name(self):
        self.refused({"args": int, "return": int}, "*args cannot travel", "def f(self, *args): ...")
        self.refused({"kwargs": int, "return": int}, "*kwargs cannot travel", "def f(self, **kwargs): ...")
        self.refused({"return": int}, "its first parameter is self", "def f(): ...")
        self.refused({"return": int}, "its first parameter is self", "def f(*, a): ...")

    def test_streams_of_what_no_item_can_be(self):
        self.refused({"x": int, "return": AsyncIterator}, "result: a stream of what?")
        self.refused({"x": AsyncIterator, "return": int}, "parameter x: a stream of what?")
        self.refused({"x": AsyncIterator[AsyncIterator[int]], "return": int}, "cannot be streams")
        self.refused({"x": int, "return": AsyncIterator[complex]}, "no type that can travel")
        self.refused({"x": AsyncIterator[complex], "return": int}, "no type that can travel")

    def test_streams_that_a_call_cannot_have(self):
        two = {"x": AsyncIterator[int], "y": AsyncIterator[int], "return": int}
        self.refused(two, "x and y are streams, and a call sends one at most", "def f(self, x, y): ...")
        with_default = {"x": AsyncIterator[int], "return": int}
        self.refused(with_default, "parameter x: a stream has no default", "def f(self, x=None): ...")

    def test_types_that_are_not_known(self):
        class Custom:
            pass

        for annotation in (Custom, object, list[Custom], complex, type):
            self.refused({"x": annotation, "return": int}, "no type that can travel")
            self.refused({"x": int, "return": annotation}, "no type that can travel")
        self.refused({"x": "Missing", "return": int}, "cannot be resolved")
        self.refused({"x": list[int] | tuple[int, ...], "return": int}, "more than one")

    def test_a_deferred_of_nothing_in_particular(self):
        self.refused({"x": int, "return": Deferred}, "a Deferred of what?")


class Options(SynchronousTestCase):
    def test_they_are_checked(self):
        for options in (
            {"timeout": 0},
            {"timeout": -1.0},
            {"timeout": float("inf")},
            {"timeout": float("nan")},
            {"max_size": 0},
        ):
            self.assertRaises(ValueError, RequestOptions, **options)

    def test_errors_are_classes_of_errors_and_no_two_have_a_name(self):
        twin = type("NotFound", (Error,), {})
        self.assertRaises(TypeError, RequestOptions, raises=(NotFound, twin))
        self.assertRaises(TypeError, RequestOptions, raises=(ValueError,))
        self.assertRaises(TypeError, RequestOptions, raises=(NotFound("instance"),))
        RequestOptions(raises=(NotFound, NotFound))


class Limit(Error):
    limit: int
    unit: str = "characters"


class Narrow(Limit):
    pass


class Loose(NotFound):
    where: Any = None


class Errors(SynchronousTestCase):
    def test_fields_travel_and_come_back(self):
        kind = error_type(Limit)
        error = kind.decode("text", kind.encode(Limit("text", limit=5), json=False), 64)
        self.assertEqual((type(error), error.message, error.limit, error.unit), (Limit, "text", 5, "characters"))
        self.assertEqual(kind.encode(Limit(limit=5), json=True), b'{"limit":5,"unit":"characters"}')

    def test_a_detail_that_is_not_what_the_fields_say_is_an_invalid_response(self):
        for detail in (b"", b"\x80", pack({"limit": "x"}), b"\x91" * 100_000, b"\xc1"):
            self.assertRaises(InvalidResponse, error_type(Limit).decode, "", detail, NESTING)
        error = self.assertRaises(InvalidResponse, error_type(Limit).decode, "", b"\x80", NESTING)
        self.assertEqual(error.message, "Limit: $.limit: missing")

    def test_an_untyped_field_is_looked_through_like_any_untyped_value(self):
        kind = error_type(Loose)
        self.assertEqual(kind.decode("", pack({"where": [[1]]}), NESTING).where, [[1]])
        for detail in (b"\x81\xa5where\x81\x91\x01\x01", b"\x81\xa5where" + b"\x91" * 70 + b"\x90"):
            self.assertRaises(InvalidResponse, kind.decode, "", detail, NESTING)

    def test_the_nearest_declared_class_is_the_one_that_travels(self):
        method = Method("P", "nothing", METHODS["nothing"].function, RequestOptions(raises=(Limit, NotFound)))
        self.assertIs(method.error_for(Narrow(limit=1)).cls, Limit)
        self.assertIs(method.error_for(Loose()).cls, NotFound)
        self.assertIsNone(method.error_for(type("Limit", (Error,), {})()))
        self.assertIsNone(method.error_for(ValueError()))
        self.assertIsNone(METHODS["nothing"].error_for(NotFound()))

    def test_every_status_has_a_class_with_that_status(self):
        self.assertEqual(set(BY_STATUS), set(Status))
        for status, cls in BY_STATUS.items():
            self.assertEqual(cls.status, status)
        for name, cls in BY_NAME.items():
            self.assertEqual(name, cls.__name__)

    def test_every_error_can_be_made_copied_pickled_and_shown(self):
        for name in errors.__all__:
            cls = getattr(errors, name)
            if not (isinstance(cls, type) and issubclass(cls, Error)):
                continue
            for error in (cls(), cls("text"), cls(message="text")):
                error.may_have_run = False
                for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
                    self.assertEqual(
                        (type(twin), twin.message, twin.may_have_run, str(twin)),
                        (cls, error.message, False, str(error)),
                    )
        self.assertEqual(str(Limit("too long", limit=5)), "too long (limit=5, unit='characters')")
        self.assertEqual(pickle.loads(pickle.dumps(Limit("a", limit=5))).limit, 5)

    def test_an_error_of_a_class_that_is_not_known_has_its_name_and_detail(self):
        error = errors.unknown_error(5, "NoSuchWord", "text", {"word": "x"})
        self.assertIsInstance(error, NotFound)
        self.assertEqual(
            (error.type_name, dict(error.detail), str(error)), ("NoSuchWord", {"word": "x"}, "text (word='x')")
        )
        self.assertIs(type(errors.unknown_error(999, "X", "", {})), Error)

    def test_a_bare_internal_error_has_an_incident(self):
        self.assertEqual(error_type(Internal).decode("", pack({"incident": "abc"}), 64).incident, "abc")
