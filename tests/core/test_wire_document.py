"""The specification's tables and its example are what the code does."""

from __future__ import annotations

import pathlib
import re

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.frames import (
    ARRAY_HEAD,
    FIRST_VERSION,
    ITEM_OVERHEAD,
    LAST_VERSION,
    LONGEST_HELLO,
    LONGEST_REMAINING,
    LONGEST_TEXT,
    NO_DEADLINE,
    Flag,
    Hello,
    Kind,
    serialize_preface,
)
from protoframe.core.limits import LARGEST_FRAME, SMALLEST_FRAME, Limits
from protoframe.core.messages import SLACK
from protoframe.core.outgoing import _EXPIRED_BURST, _EXPIRED_RATE, _TOLD_BURST, _TOLD_RATE
from protoframe.core.state import TRANSITIONS
from protoframe.errors import (
    Flood,
    RemoteProtocolError,
    Status,
    TooManyConnections,
    TooMuchUnsent,
    Unauthenticated,
    VersionMismatch,
)
from tests.core.test_frames import vectors

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "wire-format.md").read_text("utf-8")


def rows(heading):
    """The cells of the table under a header line."""
    _, _, rest = TEXT.partition(f"{heading}\n")
    table = rest.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def types_of(cls):
    # As msgpack calls them.
    return {field.name: {bytes: "bin"}.get(field.type, field.type.__name__) for field in msgspec.structs.fields(cls)}


def defaults_of(cls):
    return {
        field.name: None if field.default is msgspec.NODEFAULT else field.default
        for field in msgspec.structs.fields(cls)
    }


class WireDocument(SynchronousTestCase):
    def test_it_is_of_the_version_that_is_spoken(self):
        self.assertIn(f"# The wire format, version {LAST_VERSION}\n", TEXT)
        self.assertEqual(FIRST_VERSION, LAST_VERSION)

    def test_kinds_flags_and_statuses_are_the_codes(self):
        kinds = {row[1]: int(row[0].strip("`"), 16) for row in rows("| kind | name | payload | call id |")}
        self.assertEqual(kinds, {kind.name: int(kind) for kind in Kind})
        flags = {row[1]: int(row[0].strip("`"), 16) for row in rows("| flag | name | in | meaning |")}
        self.assertEqual(flags, {flag.name: int(flag) for flag in Flag})
        statuses = {row[1]: int(row[0]) for row in rows("| status | name | meaning |")}
        self.assertEqual(statuses, {status.name: int(status) for status in Status})

    def test_the_settings_are_the_codes(self):
        written = rows("| key | type | bounds | meaning |")
        self.assertEqual({row[0].strip("`"): row[1] for row in written}, types_of(Hello))
        optional = {row[0].strip("`") for row in written if row[2].startswith("optional")}
        self.assertEqual(optional, {name for name, default in defaults_of(Hello).items() if default is not None})

    def test_what_an_end_says_when_it_ends_is_a_status(self):
        for number, _ in rows("| the status of a GOAWAY | why |"):
            self.assertTrue(number == "0" or Status(int(number)))
        for cls in (RemoteProtocolError, Flood, TooManyConnections, TooMuchUnsent, VersionMismatch, Unauthenticated):
            self.assertIn(str(int(cls.status)), [row[0] for row in rows("| the status of a GOAWAY | why |")])

    def test_the_allowances_are_the_defaults(self):
        limits = Limits()
        (cancels, pings) = rows("| what | at once | a second |")
        self.assertEqual(cancels[1], f"{limits.cancel_burst:,}, or `max_calls` where that is more")
        self.assertEqual((cancels[2], pings[1:]), (f"{limits.cancel_rate:g}", ["100", "10"]))
        self.assertEqual((limits.ping_burst, limits.ping_rate), (100, 10))
        self.assertIn(f"no more than {_TOLD_BURST} CANCELs at once and {_TOLD_RATE:g} a second", TEXT)
        self.assertIn(f"no more than {_EXPIRED_BURST} at once and {_EXPIRED_RATE:g} a second", TEXT)
        self.assertLess(_TOLD_BURST, limits.cancel_burst)
        self.assertLess(_TOLD_RATE, limits.cancel_rate)
        self.assertIn(f"was not taken ({limits.max_unread >> 20} MiB by\n  default)", TEXT)
        self.assertIn(f"hears nothing for {limits.keepalive_idle:g} s sends a PING of 8 octets of 0", TEXT)
        self.assertIn(f"nothing {limits.keepalive_timeout:g} s later", TEXT)
        self.assertIn(f"it for {limits.write_timeout:g} s; as long", TEXT)

    def test_what_an_item_costs_and_what_is_no_deadline_are_the_codes(self):
        self.assertIn(f", and {ITEM_OVERHEAD} for\n  each item", TEXT)
        self.assertIn("1 to 65,535", TEXT)
        self.assertIn(f"An array is at most {ARRAY_HEAD} octets longer", TEXT)
        self.assertIn(f"`{NO_DEADLINE:#x}` means that there is none", TEXT)
        self.assertIn(f"`{round(LONGEST_REMAINING * 1000):#x}`, some 49 days", TEXT)

    def test_the_states_are_the_tables(self):
        written = rows("| state | what happens | then |")
        self.assertEqual(
            written, [[state.value, what.value, then.value] for (state, what), then in TRANSITIONS.items()]
        )

    def test_the_magic_and_the_bounds_are_the_codes(self):
        self.assertIn(f"| magic | `{serialize_preface()[:4].hex(' ')}` |", TEXT)
        for number in (SMALLEST_FRAME, LARGEST_FRAME, LONGEST_HELLO, LONGEST_TEXT, SLACK):
            self.assertIn(f"{number:,}", TEXT)

    def test_the_example_is_the_vectors(self):
        example = re.search(r"<!-- conversation.json -->\n\n```text\n(.*?)```", TEXT, re.DOTALL)[1]
        steps = []
        for line in example.splitlines():
            sender, rest = line[:11].strip(), line[11:]
            if sender:
                steps.append({"sender": sender, "hex": "", "what": ""})
            if re.fullmatch(r"([0-9a-f]{2} ?)+", rest):
                steps[-1]["hex"] += rest.replace(" ", "")
            else:
                steps[-1]["what"] = rest
        self.assertEqual(
            steps, [{key: step[key] for key in ("sender", "hex", "what")} for step in vectors("conversation.json")]
        )

    def test_every_file_of_vectors_is_named(self):
        datagrams = (pathlib.Path(__file__).parents[2] / "docs" / "wire-datagrams.md").read_text("utf-8")
        named = set(re.findall(r"^\| `(\w+\.json)`", TEXT + datagrams, re.MULTILINE))
        self.assertEqual(named, {path.name for path in (pathlib.Path(__file__).parents[1] / "vectors").iterdir()})
