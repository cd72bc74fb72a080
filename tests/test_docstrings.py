"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

from twisted.trial.unittest import SynchronousTestCase

import protoframe


class Docstrings(SynchronousTestCase):
    def test_every_example_gives_what_it_says(self):
        attempted = 0
        for module in pkgutil.walk_packages(protoframe.__path__, "protoframe."):
            if not module.name.endswith("__main__"):
                results = doctest.testmod(importlib.import_module(module.name), optionflags=doctest.ELLIPSIS)
                self.assertEqual(results.failed, 0, module.name)
                attempted += results.attempted
        self.assertGreater(attempted, 4)
