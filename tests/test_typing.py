"""The public face as type checkers see it: what is right passes, and each wrong line is complained about."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from protoframe.core.schema import methods_of

ROOT = Path(__file__).resolve().parent.parent
USES = ROOT / "tests" / "typing" / "uses.py"

#: A line of `USES`, and the code of a complaint about it.
Complaint = tuple[int, str]


def expected(checker: str) -> list[Complaint]:
    """What the comments in `USES` say that a type checker complains about."""
    found: list[Complaint] = []
    for number, line in enumerate(USES.read_text().splitlines(), start=1):
        _, marker, comment = line.partition("  # wrong: ")
        for part in comment.split():
            name, _, codes = part.partition("=")
            assert name in {"mypy", "pyright"}, f"{USES}:{number}: {part}"
            if name == checker:
                found += [(number, code) for code in codes.split(",")]
        assert bool(marker) == bool(comment.strip()), f"{USES}:{number}: nothing stands after the marker"
    return found


def compare(checker: str, complaints: list[tuple[int, str, str]]) -> None:
    """Fails with the lines and the texts of what is missing and what is too much."""
    wanted = Counter(expected(checker))
    found = Counter((line, code) for line, code, _ in complaints)
    texts = {(line, code): text for line, code, text in complaints}
    lines = USES.read_text().splitlines()
    wrong = [
        *(f"{line}: missing: {code}: {lines[line - 1].strip()}" for line, code in (wanted - found).elements()),
        *(f"{line}: too much: {code}: {texts[line, code]}" for line, code in (found - wanted).elements()),
    ]
    assert not wrong, "\n".join([f"{checker} and {USES.name} disagree:", *wrong])
    assert wanted, "the comments were not read"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
def test_mypy_complains_where_it_should_and_nowhere_else(pytestconfig: pytest.Config) -> None:
    # As a user would have it: no plugin, and none of this project's settings.
    done = run(
        *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--output=json", "--python-version=3.11"),
        *(f"--cache-dir={pytestconfig.cache.mkdir('mypy')}", USES),
    )
    assert not done.stderr, done.stderr
    complaints = [json.loads(line) for line in done.stdout.splitlines()]
    compare(
        "mypy",
        [
            (complaint["line"], complaint["code"], complaint["message"])
            for complaint in complaints
            if complaint["severity"] == "error" and (ROOT / complaint["file"]) == USES
        ],
    )


@pytest.fixture(scope="session")
def pyright() -> list[str | Path]:
    """How to run pyright; some of its releases fetch the program itself, from npm's registry, when they first run."""
    command: list[str | Path] = [sys.executable, "-m", "pyright"]
    done = run(*command, "--version", PYRIGHT_PYTHON_IGNORE_WARNINGS="1")
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        reason = f"pyright does not run, perhaps for want of a network to fetch it: {last}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return command


@pytest.mark.slow
def test_pyright_complains_where_it_should_and_nowhere_else(pyright: list[str | Path], tmp_path: Path) -> None:
    # A copy, for what pyright includes must stand below its settings, which must not be this project's.
    (tmp_path / USES.name).write_text(USES.read_text())
    settings = {
        "include": [USES.name],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        "reportUnknownMemberType": False,  # the echo of reportAttributeAccessIssue
        "pythonVersion": "3.11",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run(
        *(*pyright, "--outputjson", "--pythonpath", sys.executable, "--project", tmp_path),
        PYRIGHT_PYTHON_IGNORE_WARNINGS="1",
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1, done.stdout
    compare(
        "pyright",
        [
            (complaint["range"]["start"]["line"] + 1, complaint.get("rule", "error"), complaint["message"])
            for complaint in report["generalDiagnostics"]
        ],
    )


@pytest.fixture
def readme_example(tmp_path: Path) -> Path:
    """The example that the README opens with, in a file of its own."""
    (example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(example)
    return path


@pytest.mark.slow
def test_mypy_has_nothing_to_say_of_the_readmes_example(readme_example: Path, pytestconfig: pytest.Config) -> None:
    done = run(
        *(
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            "--python-version=3.11",
            "--follow-imports=silent",
        ),
        *(f"--cache-dir={pytestconfig.cache.mkdir('mypy')}", readme_example),
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_pyright_has_nothing_to_say_of_the_readmes_example(readme_example: Path, pyright: list[str | Path]) -> None:
    settings = {"include": [readme_example.name], "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (readme_example.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run(
        *(*pyright, "--outputjson", "--pythonpath", sys.executable, "--project", readme_example.parent),
        PYRIGHT_PYTHON_IGNORE_WARNINGS="1",
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1, done.stdout
    assert report["generalDiagnostics"] == []


@pytest.mark.parametrize("name", ["Contract", "ShortContract"])
def test_both_ways_to_declare_serve_nothing(name: str) -> None:
    contract = getattr(import_module("tests.typing.uses"), name)
    assert {method.name: method.function for method in methods_of(contract).values()} == {
        "define": None,
        "note": None,
    }


def test_every_marker_is_well_formed() -> None:
    marked = [line for line in USES.read_text().splitlines() if "# wrong" in line and not line.startswith("A line")]
    pattern = re.compile(r"  # wrong: (?=[mp])(mypy=[a-z,-]+)?( ?pyright=[A-Za-z,]+)?$")
    assert [line for line in marked if not pattern.search(line)] == []
