"""Serves any Protocol or Factory of the user's: ``twistd pf-serve --protocol package.module:Name``.

Knows how a name becomes a factory, and no more.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from twisted.python import usage

from protoframe import Factory, Protocol
from protoframe.service import ServerOptions, ServerService

__all__ = ["Options", "load_factory", "makeService"]


class Options(ServerOptions):
    """The command line of ``twistd pf-serve``."""

    longdesc = (
        "Serves Protocols. NAME in --protocol package.module:NAME is a Protocol class, a Factory, or a function "
        "without parameters that returns a Factory. The current directory is on the import path."
    )

    def __init__(self) -> None:
        super().__init__()
        self["protocol"] = []

    def opt_protocol(self, name: str) -> None:
        """What to serve, as package.module:Name.  May be given several times for Protocol classes."""
        self["protocol"].append(name)

    opt_p = opt_protocol

    def postOptions(self) -> None:
        """Loads what is to be served."""
        super().postOptions()
        if not self["protocol"]:
            raise usage.UsageError("say what to serve: --protocol package.module:Name")
        try:
            self["factory"] = load_factory(self["protocol"], reflection=not self["no-reflection"])
        except ValueError as error:
            raise usage.UsageError(str(error)) from None


def load_factory(names: list[str], *, reflection: bool = True) -> Factory:
    """The factory that serves what is named.

    :param names: each ``package.module:Name``.
    :param reflection: whether peers may ask what is served; a Factory of the user's has decided that itself.
    :raises ValueError: there is no such thing, or it cannot be served; the text says which and why, on one line.
    """
    things = [_load(name) for name in names]
    classes: list[type[Protocol[Any]]] = []
    for name, thing in zip(names, things, strict=True):
        if isinstance(thing, type) and issubclass(thing, Protocol):
            try:
                inspect.signature(thing).bind()
            except TypeError:
                raise ValueError(
                    f"{name}: its instances want arguments; serve a Factory whose create() gives them"
                ) from None
            classes.append(thing)
            continue
        if len(names) > 1:
            raise ValueError(f"{name}: only Protocol classes can be served together; put them into one Factory")
        return _as_factory(name, thing)
    try:
        return Factory(*classes, reflection=reflection)
    except (TypeError, ValueError) as error:
        raise ValueError(_one_line(error)) from None


def _as_factory(name: str, thing: Any) -> Factory:
    if callable(thing):
        try:
            thing = thing()
        except Exception as error:
            raise ValueError(f"{name}: calling it failed: {_one_line(error)}") from None
    if isinstance(thing, Factory):
        return thing
    raise ValueError(f"{name} is neither a Protocol class, nor a Factory, nor a function that returns one")


def _load(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{name!r}: expected package.module:Name")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        thing = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ValueError(f"{name}: there is no module {missing} on the import path") from None
        raise ValueError(f"{name}: importing {module_name} failed: {_one_line(error)}") from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}: importing {module_name} failed: {_one_line(error)}") from None
    for part in attribute.split("."):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            raise ValueError(f"{name}: {module_name} has no {attribute}") from None
    return thing


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def makeService(options: Options) -> ServerService:
    """The service that twistd runs."""
    return ServerService(options["factory"], options)
