"""Whether a function is declared alone, or served too: what its body says.

Knows functions, their source and their byte code; not what their annotations mean.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["is_declaration"]


def is_declaration(function: Callable[..., Any], hints: Mapping[str, Any]) -> bool:
    """Whether a function's body says nothing: ``...`` or ``raise NotImplementedError``, after a docstring or not.

    So does a docstring alone, unless the function is annotated to return ``None``.  The source decides.  Where there is
    none, a body that can only return ``None`` is taken for a declaration, again unless ``None`` is the annotation.
    """
    code = getattr(function, "__code__", None)
    if code is None or len(code.co_code) > _LONGEST_DECLARATION or hasattr(function, "__wrapped__"):
        # What wraps a function does something, whatever that one says.
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        if code.co_code in _RAISING:
            return bool(code.co_names == ("NotImplementedError",))
        return code.co_code in _SILENT and code.co_consts[-1] is None and hints.get("return") is not type(None)
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    body = tree.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    if not body:
        return hints.get("return") is not type(None)
    return all(_says_nothing(statement) for statement in body)


#: Octets of byte code of the longest body that `is_declaration` looks at closer, several times over.
_LONGEST_DECLARATION = 256


def _bodies(*bodies: str) -> frozenset[bytes]:
    """The byte codes of functions and coroutines with these bodies."""
    codes = set()
    for body in bodies:
        for head in ("def f():", "async def f():"):
            for doc in ("", "'doc'; "):
                (made,) = (
                    const for const in compile(f"{head} {doc}{body}", "", "exec").co_consts if inspect.iscode(const)
                )
                codes.add(made.co_code)
    return frozenset(codes)


# Where there is no source: bodies that return None or a docstring, and bodies that raise one name.
_SILENT = _bodies("...")
_RAISING = _bodies("raise NotImplementedError", "raise NotImplementedError()", "raise NotImplementedError('text')")


def _says_nothing(statement: ast.stmt) -> bool:
    match statement:
        case ast.Expr(value=ast.Constant(value=constant)):
            return constant is ...
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False
