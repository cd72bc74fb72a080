"""``pf dev-certs``: what it makes, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from tests.processes import PATIENCE, environment, free_port, pf, server

TWO = ("twistd -n pf-upper --listen ", "pf list ")


def make(cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "protoframe.cli", "dev-certs", *words],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], status: int = 2) -> str:
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", status, 1), done.stderr
    return done.stderr


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in extension.value]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_authority_a_server_and_a_client_are_made(tmp_path: Path) -> None:
    done = make(tmp_path)
    files = ["ca.key", "ca/ca.pem", "server.key", "server.pem", "client.key", "client.pem"]
    assert done.stdout.splitlines() == [f"certs/{name}" for name in files]
    assert done.returncode == 0
    certs = tmp_path / "certs"
    assert sorted(contents(certs)) == sorted(files)
    assert [path.name for path in (certs / "ca").iterdir()] == ["ca.pem"]
    authority = read(certs / "ca" / "ca.pem")
    for name, expected in (("server", ["localhost", "127.0.0.1", "::1"]), ("client", ["client"])):
        certificate = read(certs / f"{name}.pem")
        assert names(certificate) == expected
        certificate.verify_directly_issued_by(authority)
    common = read(certs / "client.pem").subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert [one.value for one in common] == ["client"]
    for path in certs.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.slow
def test_what_is_hinted_at_can_be_pasted(tmp_path: Path) -> None:
    done = make(tmp_path, "my certs:1")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(start) for line, start in zip(lines, TWO, strict=True))
    port = str(free_port())
    listen, call = (shlex.split(line.replace(":12000:", f":{port}:")) for line in lines)
    with server(tmp_path, *listen[2:]):
        listing = subprocess.run(
            [sys.executable, "-m", "protoframe.cli", *call[1:]],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (listing.returncode, listing.stderr) == (0, "")
        assert "Speech" in listing.stdout
        # Without the certificate that the server asks for.
        assert pf("list", f"tls:localhost:{port}:trustRoots={tmp_path}/my certs\\:1/ca").returncode == 7


def test_a_second_run_adds_what_is_missing_from_the_same_authority(tmp_path: Path) -> None:
    make(tmp_path, "here")
    before = contents(tmp_path / "here")
    again = make(tmp_path, "here")
    assert (again.stdout, again.returncode) == ("", 0)
    assert contents(tmp_path / "here") == before
    added = make(tmp_path, "here", "--client", "ann@example.com", "--client", "client", "--name", "localhost")
    assert added.stdout.splitlines() == ["here/ann@example.com.key", "here/ann@example.com.pem"]
    after = contents(tmp_path / "here")
    assert {name: after[name] for name in before} == before
    certificate = read(tmp_path / "here" / "ann@example.com.pem")
    certificate.verify_directly_issued_by(read(tmp_path / "here" / "ca" / "ca.pem"))
    assert names(certificate) == ["ann@example.com"]


def test_force_replaces_all_but_the_authority(tmp_path: Path) -> None:
    make(tmp_path)
    before = contents(tmp_path / "certs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / "certs" / "client.key").unlink()
    (tmp_path / "certs" / "client.key").symlink_to(elsewhere)
    done = make(tmp_path, "--force", "--name", "dev.example")
    assert done.returncode == 0
    after = contents(tmp_path / "certs")
    assert {name for name in after if after[name] == before[name]} == {"ca.key", "ca/ca.pem"}
    assert names(read(tmp_path / "certs" / "server.pem")) == ["dev.example"]
    assert stat.S_IMODE((tmp_path / "certs" / "server.key").stat().st_mode) == 0o600
    assert elsewhere.read_text() == "untouched"
    assert "tls:dev.example:12000:" in done.stderr
    assert "interface=" not in done.stderr


def test_json_is_one_object(tmp_path: Path) -> None:
    for done in (make(tmp_path, "--json"), make(tmp_path, PROTOFRAME_JSON="1")):
        assert done.stdout.count("\n") == 1
        made: dict[str, Any] = json.loads(done.stdout)
        assert list(made) == ["made", "ca", "ca_key", "server", "clients"]
        assert made["ca"] == "certs/ca/ca.pem"
        assert made["server"]["names"] == ["localhost", "127.0.0.1", "::1"]
        assert made["clients"] == [{"name": "client", "certificate": "certs/client.pem", "key": "certs/client.key"}]
    assert made["made"] == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--name", "not a name"], "--name not a name: "),
        (["--name", ""], "--name : "),
        (["--client", "not a name"], "--client not a name: "),
        (["--client", "../escape"], "its files cannot be named so"),
        (["--client", ".hidden"], "its files cannot be named so"),
        (["--client", ""], "its files cannot be named so"),
        (["--client", "Server"], "its files cannot be named so"),
        (["--client", "ca"], "its files cannot be named so"),
        (["one", "two"], "unexpected extra argument"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path: Path, words: list[str], text: str) -> None:
    assert text in refused(make(tmp_path, *words))
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_belong_together_are_left_alone(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, "other")
    certs = tmp_path / "certs"
    kept = contents(certs)
    assert "certs/server.pem is there, and is not for dev.example" in refused(make(tmp_path, "--name", "dev.example"))

    (certs / "client.key").unlink()
    text = refused(make(tmp_path))
    assert "certs/client.pem is there, and certs/client.key is not; try: --force" in text
    (certs / "client.key").write_bytes(kept["client.key"])

    (certs / "server.pem").write_text("no certificate")
    assert "certs/server.pem is no certificate" in refused(make(tmp_path))
    (certs / "server.pem").write_bytes(kept["server.pem"])

    (certs / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    assert "are not a certificate and its key" in refused(make(tmp_path, "--force"))
    (certs / "ca.key").unlink()
    text = refused(make(tmp_path, "--force"))
    assert "certs/ca/ca.pem is there, and certs/ca.key is not; try: another directory" in text
    (certs / "ca.key").write_bytes(kept["ca.key"])
    assert contents(certs) == kept


def test_a_directory_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "certs").write_text("a file")
    assert refused(make(tmp_path), 1).startswith("pf: certs")


def test_without_trustme_it_is_said_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "trustme.py").write_text("raise ImportError\n")
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    text = refused(make(tmp_path, "certs", PYTHONPATH=paths))
    assert text.endswith("; try: pip install 'protoframe[certs]'\n")
    assert not (tmp_path / "certs").exists()


def test_help_imports_neither_twisted_nor_trustme_and_says_what_it_is_for() -> None:
    script = (
        "import sys\n"
        "from protoframe.cli.main import main\n"
        "try: main(['dev-certs', '--help'])\n"
        "except SystemExit: print([name for name in ('twisted', 'trustme', 'cryptography') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "for development only" in done.stdout
    assert "pf dev-certs " in done.stdout.partition("Example")[2]
