"""Imports run downwards and in no circle, and folders stay small enough to be read."""

import ast
import pathlib
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
WINGS = ("pallas_kernels", "specmq_jax", "checkpoints_tools", "experiments")
HOOK = ("specmq_jax.loading.model", "checkpoints_tools.conversion")
"""What `specmq_jax.load` imports when it is given a model that is not converted yet."""
LAYERS = (("",), ("commands", "formats"), ("network",), ("loading",), ("decoding",))
"""Folders of specmq_jax, lowest first; "" is its top."""
MOST_MODULES = 14

Graph = Mapping[str, set[str]]


def modules_of(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of all modules by name; a package stands for its __init__."""
    files = [file for wing in WINGS for file in sorted((root / wing).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports_of(root: pathlib.Path) -> dict[str, set[str]]:
    """Modules that each module imports, wherever the import stands but for type checkers; packages are left out, as they
    import what stands in them for who asks for it."""
    modules = modules_of(root)
    plain = {name for name, file in modules.items() if file.name != "__init__.py"}
    return {name: set(_imported(ast.parse(modules[name].read_text()), name)) & plain - {name} for name in plain}


def _imported(tree: ast.AST, module: str) -> Iterator[str]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[:-node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def circles_of(graph: Graph) -> list[list[str]]:
    """Sets of nodes that reach one another."""
    reached = {node: _reachable(graph, node) for node in graph}
    sets = {frozenset(other for other in reached[node] if node in reached.get(other, ())) for node in graph}
    return sorted(sorted(found) for found in sets if found)


def _reachable(graph: Graph, start: str) -> set[str]:
    found, waiting = set(), list(graph[start])
    while waiting:
        if (node := waiting.pop()) not in found:
            found.add(node)
            waiting += graph.get(node, ())
    return found


def sibling_circles(graph: Graph) -> list[list[str]]:
    """Circles of folders that lie in one package, with all that lies below them."""
    siblings: dict[str, set[str]] = {}
    for name, found in graph.items():
        for other in found:
            mine, theirs = name.split("."), other.split(".")
            shared = next(i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1])
            if 0 < shared < min(len(mine), len(theirs)) - 1:
                siblings.setdefault(".".join(mine[:shared + 1]), set()).add(".".join(theirs[:shared + 1]))
    return circles_of(siblings)


def upward_imports(graph: Graph) -> list[str]:
    """Imports of a wing or a layer from one below it."""
    return sorted(f"{name} -> {other}" for name, found in graph.items() for other in found
                  if _height(other) > _height(name) and (name, other) != HOOK)


def _height(module: str) -> tuple[int, int]:
    wing, *folders = module.split(".")[:-1] or [module]
    folder = folders[0] if folders else ""
    layer = next((i for i, names in enumerate(LAYERS) if folder in names), 0) if wing == "specmq_jax" else 0
    return WINGS.index(wing), layer


def no_commands(root: pathlib.Path) -> list[str]:
    """Modules at the top of experiments that are not run by themselves."""
    return sorted(file.name for file in (root / "experiments").glob("*.py")
                  if file.name != "__init__.py" and 'if __name__ == "__main__":' not in file.read_text())


def crowded_folders(root: pathlib.Path) -> list[str]:
    counts: dict[str, int] = {}
    for file in modules_of(root).values():
        folder = str(file.parent.relative_to(root))
        counts[folder] = counts.get(folder, 0) + (file.name != "__init__.py")
    return sorted(f"{folder}: {number}" for folder, number in counts.items() if number > MOST_MODULES)


@pytest.fixture(scope="module")
def graph():
    return imports_of(ROOT)


def test_no_modules_import_one_another_in_a_circle(graph):
    assert circles_of(graph) == []


def test_no_folders_of_a_package_import_one_another_in_a_circle(graph):
    assert sibling_circles(graph) == []


def test_imports_run_downwards(graph):
    assert upward_imports(graph) == []


def test_the_one_exception_is_still_needed(graph):
    module, tool = HOOK
    assert tool in graph[module]


def test_at_the_top_of_experiments_are_commands_alone():
    assert no_commands(ROOT) == []


def test_no_folder_is_crowded():
    assert crowded_folders(ROOT) == []


BROKEN = {
    "pallas_kernels/op.py": "def late():\n    from specmq_jax.files import put\n",
    "specmq_jax/files.py": "if TYPE_CHECKING:\n    from specmq_jax.network.layers import Layer\n",
    "specmq_jax/entries.py": "from specmq_jax.formats.base import Format\n",
    "specmq_jax/formats/base.py": "from . import dense\nfrom ..network import layers\n",
    "specmq_jax/formats/dense.py": "import specmq_jax.formats.base\n",
    "specmq_jax/network/layers.py": "",
    "specmq_jax/loading/model.py": "from checkpoints_tools import conversion\n",
    "specmq_jax/loading/other.py": "from checkpoints_tools import conversion\n",
    "checkpoints_tools/conversion.py": "",
    "experiments/command.py": 'if __name__ == "__main__":\n    pass\n',
    "experiments/helper.py": "",
    "experiments/cost/study.py": "from experiments.running.runner import run\n",
    "experiments/cost/table.py": "",
    "experiments/running/runner.py": "from experiments.cost import table\nfrom experiments.running.parts import part\n",
    "experiments/running/parts/part.py": "from experiments.running import settings\n",
    "experiments/running/settings.py": "",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A tree that breaks every rule."""
    root = tmp_path_factory.mktemp("broken")
    crowd = {f"specmq_jax/network/part{i}.py": "" for i in range(MOST_MODULES)}
    for name, text in (BROKEN | crowd).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        for folder in list((root / name).relative_to(root).parents)[:-1]:
            (root / folder / "__init__.py").touch()
    return root


def test_what_breaks_a_rule_is_found(broken):
    graph = imports_of(broken)
    assert circles_of(graph) == [["specmq_jax.formats.base", "specmq_jax.formats.dense"]]
    assert sibling_circles(graph) == [["experiments.cost", "experiments.running"]]
    assert upward_imports(graph) == [
        "pallas_kernels.op -> specmq_jax.files", "specmq_jax.entries -> specmq_jax.formats.base",
        "specmq_jax.formats.base -> specmq_jax.network.layers", "specmq_jax.loading.other -> checkpoints_tools.conversion"]
    assert no_commands(broken) == ["helper.py"]
    assert crowded_folders(broken) == ["specmq_jax/network: 15"]
