"""A real ``twistd -n pf-files``, one for all tests that need no more than some server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from tests.processes import free_port, server


class Served(NamedTuple):
    """Where it is, by the kind of carrier, and what it serves: a test has a directory of its own there."""

    where: dict[str, str]
    root: Path


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    root = directory / "root"
    root.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    made = authority.issue_cert("localhost")
    made.private_key_pem.write_to_path(directory / "key.pem")
    made.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    port, tls = free_port(), free_port()
    listen = [f"tcp:{port}:interface=127.0.0.1", f"udp:{port}:interface=127.0.0.1"]
    listen.append(f"tls:{tls}:privateKey=key.pem:certKey=cert.pem:interface=127.0.0.1")
    places = [word for place in listen for word in ("--listen", place)]
    with server(directory, "pf-files", "--root", str(root), *places):
        yield Served(
            {
                "tcp": f"tcp:127.0.0.1:{port}",
                "udp": f"udp:127.0.0.1:{port}",
                "tls": f"tls:localhost:{tls}:trustRoots={directory / 'ca.pem'}",
            },
            root,
        )
