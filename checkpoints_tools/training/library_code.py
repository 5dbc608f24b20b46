"""Code and documentation of the Python standard library, cut into pieces that a request can be about."""

import ast
import pathlib
import sys
import sysconfig
import textwrap
from collections.abc import Sequence

LONGEST_TURN = 1500  # characters; the heads train on dialogues of 1024 tokens, answers included
LONGEST_CODE = 60  # lines
LEFT_OUT = {"__phello__", "antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "this", "turtledemo"}


def files() -> list[pathlib.Path]:
    """The modules of the running Python's standard library, its tests apart, in order of their names."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    modules = sorted(sys.stdlib_module_names - LEFT_OUT)
    files = [path for name in modules for path in (root / f"{name}.py", *sorted((root / name).rglob("*.py")))]
    return [path for path in files if path.is_file() and not {"test", "tests"} & set(path.relative_to(root).parts)]


def pieces(path: pathlib.Path) -> list[dict[str, str]]:
    """What can be asked about in a module: texts by the slot they fill, one dict a function, class or documentation."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError):
        return []
    lines = source.splitlines()
    if path.parent.name == "pydoc_data":
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        found = [{"text": _shortened(text)} for text in texts if len(text) > 300]
    else:
        documentation = ast.get_docstring(tree) or ""
        found = [{"text": _shortened(documentation)}] if len(documentation) > 200 else []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(_definition(node, lines))
    return [piece for piece in found if piece]


def _definition(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: Sequence[str]) -> dict[str, str]:
    """The slots `code`, `stub` (signature and docstring) and `bare` (without docstring), so far as the lengths allow."""
    first, last = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1, node.end_lineno
    if not 4 <= last - first <= LONGEST_CODE:
        return {}
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    if kind == "function" and node.args.args and node.args.args[0].arg in ("self", "cls"):
        kind = "method"
    texts = {"code": lines[first:last]}
    if ast.get_docstring(node) and len(node.body) > 1:
        docstring = node.body[0]
        texts["stub"] = lines[first:docstring.end_lineno]
        texts["bare"] = lines[first:docstring.lineno - 1] + lines[docstring.end_lineno:last]
    dedented = {name: textwrap.dedent("\n".join(text)).strip("\n") for name, text in texts.items()}
    fitting = {name: text for name, text in dedented.items() if len(text) < LONGEST_TURN - 200}
    return {"kind": kind, "name": node.name, **fitting} if fitting else {}


def _shortened(text: str) -> str:
    """The paragraphs of `text` that fit into a turn."""
    kept = ""
    for paragraph in text.strip().split("\n\n"):
        if kept and len(kept) + len(paragraph) > LONGEST_TURN - 300:
            break
        kept += f"\n\n{paragraph}" if kept else paragraph
    return kept
