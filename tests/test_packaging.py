"""What a user gets: the wheel, an editable install, and imports that bring in no more than they need."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import protoframe

ROOT = Path(__file__).resolve().parent.parent

NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "_build", "_trial_temp*", "dropin.cache", "twistd.*"
)

#: What the modules of the public face name in `__all__` for other modules of the package alone.
INTERNAL = {
    "Calls",
    "RetryBudget",
    "AGENT",
    "Authenticator",
    "Carrier",
    "Chain",
    "Interceptor",
    "certificate_identity",
    "checked",
    "identify",
    "is_authenticator",
    "run",
    "status_of",
}


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Standard output of a program that must end with ``status``; nothing of this process's paths reaches it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PROTOFRAME_"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, *, executable: Path | str = sys.executable, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints that runs ``code``."""
    return run(executable, "-c", code, cwd=cwd)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without what tools and builds leave in it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("sources") / "protoframe", ignore=NOT_SOURCES))


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by this environment's setuptools: an isolated build would fetch another for each run."""
    output = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, cwd=sources)
    (built,) = output.iterdir()
    return built


class Environment:
    """A fresh virtual environment that holds what this one holds, but for protoframe.

    Each entry of this environment's site-packages is linked into it, which takes no time and no network, and is as good
    as installed: pip checks the requirements of what it installs against it.  Twisted is copied, so that the plugins
    land in, and its plugin cache is written to, the environment's own ``twisted/plugins``.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        run(sys.executable, "-m", "venv", "--without-pip", where, cwd=where.parent)
        self.python = where / "bin" / "python"
        self.site_packages = Path(
            python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=self.python, cwd=where).strip()
        )
        for entry in sorted({Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}):
            for path in entry.iterdir():
                if "protoframe" in path.name or path.name in {"__pycache__", "twisted"}:
                    continue
                (self.site_packages / path.name).symlink_to(path)
        twisted = Path(importlib.import_module("twisted").__path__[0])
        shutil.copytree(
            twisted,
            self.site_packages / "twisted",
            ignore=shutil.ignore_patterns("test", "dropin.cache", "protoframe*"),
        )

    def install(self, *what: str | Path) -> None:
        run(
            *(sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check", *what),
            cwd=self.where,
        )

    def twistd_plugins(self) -> set[str]:
        """What ``twistd --help`` lists."""
        text = python(
            "import sys; from twisted.scripts.twistd import run; sys.argv = ['twistd', '--help']; run()",
            executable=self.python,
            cwd=self.where,
        )
        return {line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line.strip()}

    def home(self) -> Path:
        """The directory that ``import protoframe`` finds."""
        code = "import protoframe, protoframe._endpoints; print(protoframe.__file__)"
        return Path(python(code, executable=self.python, cwd=self.where).strip()).resolve().parent

    def pf_version(self) -> str:
        return run(self.where / "bin" / "pf", "--version", cwd=self.where)


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_plugins_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {
        "protoframe",
        "twisted",
        f"protoframe-{protoframe.__version__}.dist-info",
    }
    assert {name for name in names if name.startswith("twisted/")} == {"twisted/plugins/protoframe_plugins.py"}
    here = {
        str(path.relative_to(ROOT)) for path in (ROOT / "protoframe").rglob("*.py*") if path.suffix in {".py", ".pyi"}
    }
    inside = {name for name in names if name.startswith("protoframe/")}
    assert inside - {"protoframe/files/_native.abi3.so"} == here | {"protoframe/py.typed"}
    # Which is for all releases from 3.11 on, where it could be built at all.
    assert ("cp311-abi3" in wheel.name) or "protoframe/files/_native.abi3.so" not in names


@pytest.mark.slow
def test_installed_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install(wheel)
    assert environment.home() == (environment.site_packages / "protoframe").resolve()
    assert {"pf-upper", "pf-serve"} <= environment.twistd_plugins()
    assert protoframe.__version__ in environment.pf_version()


@pytest.mark.slow
def test_editable_install_works_outside_the_tree(sources: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install("--editable", sources)
    assert environment.home() == (sources / "protoframe").resolve()
    assert {"pf-upper", "pf-serve"} <= environment.twistd_plugins()
    assert protoframe.__version__ in environment.pf_version()


def test_twisted_stays_a_namespace() -> None:
    # An __init__.py here would hide Twisted itself, or its plugins.
    assert list((ROOT / "twisted").rglob("__init__.py")) == []


LOADED = "print(json.dumps(sorted(name for name in sys.modules if name.partition('.')[0] in ('twisted', 'zope'))))"


def test_core_loads_no_twisted() -> None:
    printed = python(
        "import importlib, json, pkgutil, sys, protoframe.core as core\n"
        "names = [module.name for module in pkgutil.walk_packages(core.__path__, 'protoframe.core.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(json.dumps(names))\n" + LOADED
    )
    imported, loaded = map(json.loads, printed.splitlines())
    assert "protoframe.core.conversation" in imported
    assert loaded == []


def test_package_alone_loads_no_twisted() -> None:
    assert json.loads(python("import json, sys, protoframe\n" + LOADED)) == []


def test_pf_help_loads_no_twisted() -> None:
    printed = python(
        "import json, sys\n"
        "from protoframe.cli.main import main\n"
        "sys.argv = ['pf', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n" + LOADED
    )
    *text, loaded = printed.splitlines()
    assert any(line.startswith("Usage: pf") for line in text), printed
    assert json.loads(loaded) == []


@pytest.mark.parametrize("name", protoframe.__all__)
def test_public_name_is_its_home_s(name: str) -> None:
    value = getattr(protoframe, name)
    home = protoframe._HOMES.get(name, "_version" if name == "__version__" else "errors")
    module = importlib.import_module(f"protoframe.{home}")
    assert getattr(module, name) is value
    if name != "__version__":
        assert name in module.__all__


def test_public_names_are_those_of_the_modules_behind_them() -> None:
    modules = [importlib.import_module(f"protoframe.{name}") for name in {"errors", *protoframe._HOMES.values()}]
    offered = [name for module in modules for name in module.__all__ if name not in INTERNAL]
    assert sorted([*offered, "__version__"]) == sorted(protoframe.__all__)


def test_type_checkers_see_the_names_that_run_time_gives() -> None:
    (block,) = (
        node
        for node in ast.parse(Path(protoframe.__file__).read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    given = {name: f"protoframe.{protoframe._HOMES.get(name, 'errors')}" for name in protoframe.__all__}
    del given["__version__"]
    assert seen == given


def test_star_import_and_dir_offer_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from protoframe import *", names)
    assert set(protoframe.__all__) <= set(names)
    assert set(protoframe.__all__) <= set(dir(protoframe))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Prtocol'"):
        _ = protoframe.Prtocol
