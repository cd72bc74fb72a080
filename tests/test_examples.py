"""The documentation's examples do what it says: every code block of README.md and docs/ runs, see `tests.examples`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click
import pytest
from twisted.trial.unittest import SynchronousTestCase

import protoframe
from protoframe import files, queue, reflection, service
from protoframe.cli.main import pf
from protoframe.cli.problems import STATUSES
from protoframe.errors import Status
from protoframe.servers import files as files_server
from protoframe.servers import serve, upper
from tests.examples import Broken, run_page
from tests.processes import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_does_what_the_page_says(page: Path, tmp_path: Path) -> None:
    run_page(page.read_text(), tmp_path)


WRONG = {
    "an unknown language": "```ruby\nputs 1\n```",
    "no language": "```\n$ true\n```",
    "code by a directive": "```{code-block} python\n1 / 0\n```",
    "code in reStructuredText": "```{eval-rst}\n.. code-block:: python\n\n   1 / 0\n```",
    "a literal block in reStructuredText": "```{eval-rst}\nAs follows::\n\n   1 / 0\n```",
    "an indented block": "As follows:\n\n    1 / 0\n",
    "tildes": "~~~python\n1 / 0\n~~~",
    "a block that does not end": "```python\npass\n",
    "a script that fails": "```python\nassert 1 > 2\n```",
    "a file that fails": "```python\n# wrong.py\n1 / 0\n```\n\n```console\n$ python wrong.py\n...\n```",
    "a file that goes on before it began": "```python\n# wrong.py, continued\npass\n```",
    "other output": "```console\n$ echo no\nyes\n```",
    "output that is not shown": "```console\n$ echo no\n```",
    "no output": "```console\n$ true\nyes\n```",
    "a command that fails": "```console\n$ false\n$ true\n```",
    "a last command that fails": "```console\n$ false\n```",
    "another status": "```console\n$ (exit 3)\n$ echo $?\n4\n```",
    "a server that ends": "```console\n$ echo --listen tcp:12000 &\n```",
    "a server that listens nowhere": "```console\n$ cat &\n```",
    "a target that is not there": "```shell\nmake coffee\n```",
    "an extra that is not there": '```shell\npip install ".[coffee]"\n```',
    "a command that could be run": "```shell\npf --help\n```",
}


@pytest.mark.parametrize("page", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_example_is_found(page: str, tmp_path: Path) -> None:
    with pytest.raises(Broken, match=r"^line \d"):
        run_page(page, tmp_path)


def test_a_right_example_passes(tmp_path: Path) -> None:
    page = (
        "1. In a list:\n\n   ```console\n   $ echo one \\\n     two  three; echo 1.5\n   one two ...\n   ...5\n"
        "   $ (exit 3)\n   $ echo $?\n   3\n   ```\n\n"
        "```python\n# a.py\nprint(12000)\n```\n\n```python\n# a.py, continued\nprint(12001)\n```\n\n"
        "```console\n$ python a.py\n12000\n12001\n```\n\n```python\nimport a\n```\n"
    )
    run_page(page, tmp_path)


class Pages(SynchronousTestCase):
    def test_links_lead_somewhere(self) -> None:
        for page in PAGES:
            for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
                self.assertTrue((page.parent / link).exists(), f"{page.name}: {link}")

    def test_there_are_no_pages_whose_examples_nobody_runs(self) -> None:
        self.assertEqual([path for path in DOCS.rglob("*.rst") if "_build" not in path.parts], [])

    def test_the_reference_has_every_public_name(self) -> None:
        page = (DOCS / "api.md").read_text()
        documented = set(re.findall(r"^ *\.\. (?:auto|py:)\w+:: ([\w.]+)", page, re.MULTILINE))
        expected = {f"protoframe.{name}" for name in protoframe.__all__}
        for module in (service, reflection, queue, files):
            expected |= {f"{module.__name__}.{name}" for name in module.__all__}
        self.assertEqual(expected - documented, set())

    def test_the_page_of_the_command_line_has_every_command_option_and_status(self) -> None:
        page = (DOCS / "cli.md").read_text()
        context = click.Context(pf)
        names = set()
        commands = [(f"pf {name}", pf.get_command(context, name)) for name in pf.list_commands(context)]
        for name, command in commands:
            if isinstance(command, click.Group):
                commands += [
                    (f"{name} {sub}", command.get_command(context, sub)) for sub in command.list_commands(context)
                ]
                continue
            names.add(name)
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    names |= {*parameter.opts, *parameter.secondary_opts}
                    names |= {parameter.envvar} if parameter.envvar else set()
        for options in (upper.Options(), serve.Options()):
            names |= {f"--{option.rstrip('=')}" for option in options.longOpt}
        self.assertEqual({name for name in names if name not in page}, set())
        statuses = {int(number) for number in re.findall(r"^  (\d+) ", STATUSES, re.MULTILINE)}
        statuses |= {64 + status for status in Status if status is not Status.DEADLINE_EXCEEDED}
        rows = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
        self.assertEqual(rows, statuses)

    def test_the_page_of_files_has_every_option_of_its_server(self) -> None:
        page = (DOCS / "files.md").read_text()
        own = {f"--{name.rstrip('=')}" for name in set(files_server.Options().longOpt) - set(upper.Options().longOpt)}
        self.assertEqual({name for name in own if name not in page}, set())

    def test_the_page_of_security_has_every_limit(self) -> None:
        page = (DOCS / "security.md").read_text()
        for field in dataclasses.fields(protoframe.Limits):
            self.assertIn(f"| `{field.name}` |", page)

    def test_the_page_of_the_errors_has_every_one(self) -> None:
        page = (DOCS / "errors.md").read_text()
        for name in protoframe.errors.__all__:
            self.assertIn(f"`{name}`", page)
