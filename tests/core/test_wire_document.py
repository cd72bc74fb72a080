"""The specification's tables and its example are what the code does."""

from __future__ import annotations

import pathlib
import re

from twisted.trial.unittest import SynchronousTestCase

from protoframe.core.frames import (
    FIRST_VERSION,
    LAST_VERSION,
    LONGEST_HELLO,
    LONGEST_TEXT,
    Flag,
    Kind,
    serialize_preface,
)
from protoframe.core.limits import LARGEST_FRAME, SMALLEST_FRAME
from protoframe.core.messages import SLACK
from protoframe.core.state import TRANSITIONS
from protoframe.errors import Status
from tests.core.test_frames import vectors

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "wire-format.md").read_text("utf-8")


def rows(heading):
    """The cells of the table under a header line."""
    _, _, rest = TEXT.partition(f"{heading}\n")
    table = rest.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


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
        named = set(re.findall(r"^\| `(\w+\.json)`", TEXT, re.MULTILINE))
        self.assertEqual(named, {path.name for path in (pathlib.Path(__file__).parents[1] / "vectors").iterdir()})
