"""Finds the program in a model's answer, by the rules that evalplus (arXiv:2305.01210) sanitises with."""

import ast
from collections.abc import Iterator, Mapping, Sequence

from experiments.benchmarks.stop_strings import cut

_ENDS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(", "\n```\n")
_TAB = "    "


def solution(text: str, entry_point: str, prompt: str) -> str:
    """What to run behind the prompt for an answer to it.

    The answer ends before the first main block, print at the top level or closing fence. Of its lines the longest span counts
    that is Python, and of that the imports and what the entry point refers to, however indirectly; functions that return
    nothing are left out. An answer that does not define the entry point may go on with the prompt's own function: of its
    lines as many as make Python behind the prompt.

    Args:
      text: the answer, indentation included.
      entry_point: name of the function that is asked for.
      prompt: its beginning, up to the docstring.
    """
    text = cut(text, _ENDS).replace("\t", _TAB)
    code = _longest_span(text.split("\n"))
    definitions = _definitions(code)
    return _sanitised(code, definitions, entry_point) if entry_point in definitions else _continuation(text, prompt)


def _parse(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _longest_span(lines: Sequence[str]) -> str:
    """The span of two lines or more that parses and has the most lines with something in them; of equals the first."""
    best, longest = "", 0
    for first in range(len(lines)):
        filled = bool(lines[first].strip())
        for last in range(first + 1, len(lines)):
            filled += bool(lines[last].strip())
            if filled > longest and _parse(code := "\n".join(lines[first:last + 1])):
                best, longest = code, filled
    return best


def _definitions(code: str) -> dict[str, ast.stmt]:
    """Classes, functions that return something, and variables of the top level by name, the first of each name."""
    found: dict[str, ast.stmt] = {}
    tree = _parse(code)
    for statement in tree.body if tree else ():
        name = _defined_name(statement)
        if name and name not in found:
            found[name] = statement
    return found


def _defined_name(statement: ast.stmt) -> str | None:
    match statement:
        case ast.ClassDef(name=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name if any(isinstance(node, ast.Return) for node in ast.walk(statement)) else None
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def _sanitised(code: str, definitions: Mapping[str, ast.stmt], entry_point: str) -> str:
    reached, waiting = {entry_point}, [entry_point]
    while waiting:
        for name in _names(definitions[waiting.pop()]):
            if name in definitions and name not in reached:
                reached.add(name)
                waiting.append(name)
    # a __future__ import is no Python behind the prompt
    imports = [node for node in ast.parse(code).body
               if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    kept = [statement for name, statement in definitions.items() if name in reached]
    return "\n".join(ast.unparse(statement) for statement in [*imports, *kept])


def _names(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _continuation(text: str, prompt: str) -> str:
    lines = text.split("\n")
    return next(("\n".join(lines[:count]) for count in range(len(lines), 0, -1)
                 if _parse(prompt + "\n".join(lines[:count]))), "")
