"""What stands below does not know what stands above."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

from twisted.trial.unittest import SynchronousTestCase

import protoframe.core

CORE = pathlib.Path(protoframe.core.__file__).parent
ALLOWED = {
    "__future__", "ast", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "hashlib",
    "heapq", "hmac", "inspect", "itertools", "math", "msgspec", "operator", "re", "struct", "textwrap", "types",
    "typing", "zlib",
}  # fmt: skip


class Layers(SynchronousTestCase):
    def test_the_core_imports_neither_twisted_nor_anything_that_has_a_clock_or_a_socket(self):
        for path in CORE.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module]
                for name in names:
                    if not name.startswith(("protoframe.core", "protoframe.errors")):
                        self.assertIn(name.partition(".")[0], ALLOWED, path.name)

    def test_a_process_that_imports_the_core_has_not_loaded_twisted(self):
        paths = [path.relative_to(CORE).with_suffix("") for path in CORE.rglob("*.py") if path.stem != "__init__"]
        self.assertIn("datagram/association", [path.as_posix() for path in paths])
        modules = ", ".join("protoframe.core." + ".".join(path.parts) for path in paths)
        code = f"import sys, {modules}; print([name for name in ('twisted', 'zope') if name in sys.modules])"
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        self.assertEqual(printed, "[]\n")
