"""How Sphinx builds the documentation."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import protoframe
from protoframe import errors
from protoframe.core.state import TRANSITIONS, Input, State

project = "protoframe"
author = "The protoframe developers"
copyright = author
version = release = protoframe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"protoframe {release}"
myst_heading_anchors = 3

# Docstrings are reStructuredText, with `names` in single backticks.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
maximum_signature_line_length = 88

# What other projects document: their inventories are on the network, which a build does without.
nitpick_ignore_regex = [
    (r"py:.*", r"(twisted|zope|msgspec|collections\.abc|contextlib|os|typing|types)\..*"),
    # The same by the names that annotations and docstrings have for them.
    (r"py:.*", r"(I[A-Z]\w+|Deferred|Failure|Options|Service|Struct|StringTransport|CannotListenError)"),
    (r"py:.*", r"CollectorRegistry"),
    (r"py:.*", r"(Any|Callable|Iterable|Iterator|Mapping|Sequence|AbstractSet|Literal|NoReturn|ClassVar)"),
    (r"py:.*", r"(bool|bytes|dict|float|frozenset|int|list|None|object|str|tuple|type)"),
    (r"py:.*", r"(Connection|Exception|Timeout|Type|Value)Error|Exception|(enum\.)?IntEnum"),
    # What public signatures name, and users have no use for.
    (r"py:.*", r"protoframe\.(_stream\.StreamCarrier|_inlets\.Stream|core\.schema\.Method)"),
    # Type variables.
    (r"py:.*", r"(protoframe\.[\w.]+\.)?(P|F|PeerT)"),
]


def resolve_public_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Finds what is documented as ``protoframe.X`` where it is called ``X``, or by the module that it is defined in."""
    if node.get("refdomain") != "py":
        return None
    name = re.sub(r"^(protoframe\.(_\w+|errors|core\.limits|authentication|interceptors)\.)", "", node["reftarget"])
    domain = env.domains["py"]
    for prefix in ("protoframe.", "protoframe.interceptors."):
        if f"{prefix}{name}" in domain.objects:
            docname = domain.objects[f"{prefix}{name}"].docname
            return domain.resolve_xref(env, docname, app.builder, "obj", f"{prefix}{name}", node, contnode)
    return None


def name_interfaces(*event: Any) -> Any:
    """Writes zope's interfaces by their names, in a signature and in what it returns."""
    return tuple(text and re.sub(r"<InterfaceClass (?:[\w.]+\.)?(\w+)>", r"\1", text) for text in event[-2:])


class ConversationStates(SphinxDirective):
    """A table of `protoframe.core.state.TRANSITIONS`: a row for each state, a column for each input."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        lines = [
            "| state | " + " | ".join(happened.value for happened in Input) + " |",
            "| --- |" + " --- |" * len(Input),
        ]
        for state in State:
            cells = [TRANSITIONS.get((state, happened)) for happened in Input]
            lines.append(f"| *{state.value}* | " + " | ".join(cell.value if cell else "" for cell in cells) + " |")
        return self.parse_text_to_nodes("\n".join(lines))


class ErrorTree(SphinxDirective):
    """The tree in the docstring of `protoframe.errors`."""

    def run(self) -> list[nodes.Node]:
        """The tree, as a literal block."""
        tree = inspect.cleandoc(errors.__doc__ or "").partition("::\n\n")[2]
        text = inspect.cleandoc(tree)
        return [nodes.literal_block(text, text, language="text")]


class AutoInterface(SphinxDirective):
    """An interface of zope's, with its methods, which autodoc does not see."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Its docstrings, as those of a class."""
        module, _, name = self.arguments[0].rpartition(".")
        interface = getattr(importlib.import_module(module), name)
        lines = [f".. py:class:: {self.arguments[0]}", "", textwrap.indent(inspect.cleandoc(interface.getDoc()), "   ")]
        for method in interface.names():
            signature = interface[method].getSignatureString()
            doc = textwrap.indent(inspect.cleandoc(interface[method].getDoc()), "      ")
            lines += ["", f"   .. py:method:: {method}{signature}", "", doc]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> None:
    """Registers what is above."""
    app.connect("missing-reference", resolve_public_name)
    app.connect("autodoc-process-signature", name_interfaces)
    app.add_directive("conversation-states", ConversationStates)
    app.add_directive("error-tree", ErrorTree)
    app.add_directive("autointerface", AutoInterface)
