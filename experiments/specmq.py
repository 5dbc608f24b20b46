"""One program for all commands: specmq COMMAND [arguments], the same as python -m of the command's module."""

import ast
import difflib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping

GROUPS: Mapping[str, Mapping[str, str]] = {
    "Decode": {
        "bench": "experiments.mt_bench", "spec_bench": "experiments.spec_bench", "gsm8k": "experiments.gsm8k",
        "human_eval": "experiments.human_eval", "chat": "experiments.chat", "serve": "experiments.serve",
        "speedup": "experiments.speedup", "sweep": "experiments.sweep", "cost_model": "experiments.cost_model",
    },
    "Checkpoints and heads": {
        "inspect": "checkpoints_tools.inspect", "convert": "checkpoints_tools.convert",
        "quantize": "checkpoints_tools.quantize", "rotate": "checkpoints_tools.rotate", "export": "checkpoints_tools.export",
        "perplexity": "checkpoints_tools.perplexity", "train_eagle": "checkpoints_tools.train_eagle",
        "convert_eagle_rotation": "checkpoints_tools.convert_eagle_rotation",
        "rank_vocabulary": "checkpoints_tools.rank_vocabulary", "demo_model": "checkpoints_tools.demo_model",
        "demo_prompts": "checkpoints_tools.demo_prompts",
    },
    "Speed of this device": {
        "decode_bench": "experiments.decode_bench", "batch_bench": "experiments.batch_bench",
        "kernel_bench": "experiments.kernel_bench", "tune": "experiments.tune",
    },
}
"""The commands' modules by name, in groups. A command is also known by its module's own name (mt_bench)."""
_INTERRUPTED, _MISTAKE = 130, 2


def main() -> None:
    """Runs the command that the arguments name in this process's place, or prints what commands there are.

    Nothing but the standard library is imported here. The command runs as `python -P -m MODULE` would run it, so that flags,
    signals and processes that it starts are the same; -P leaves the working directory out of the places of modules.
    """
    try:
        name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
        if name in ("--help", "-h", "-?", "help"):
            print(page())
        elif name == "--version":
            from specmq_jax.commands.version import NAME, version  # imports JAX

            print(f"{NAME} {version()}")
        else:
            os.execv(sys.executable, [sys.executable, "-P", "-m", _module(name), *arguments])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def page() -> str:
    """What --help prints: every command with what its module's docstring says first."""
    width = max(len(name) for group in GROUPS.values() for name in group)
    lines = ["specmq COMMAND [arguments]: low-bit Llama-family models, decoded speculatively"]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}}  {_summary(module)}" for name, module in group.items())]
    return "\n".join([*lines, "", "specmq COMMAND --help lists a command's flags; specmq --version shows the version."])


def _module(name: str) -> str:
    """The module of a command; an unknown one ends the program."""
    known = {name: module for group in GROUPS.values() for name, module in group.items()}
    known |= {module.rpartition(".")[2]: module for module in known.values()}
    wanted = name.replace("-", "_")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "specmq --help lists the commands"
    print(f"error: specmq has no command {name!r}; {hint}", file=sys.stderr)
    sys.exit(_MISTAKE)


def _summary(module: str) -> str:
    """The first line of a module's docstring, without how to call it; the module is read, not imported."""
    package, _, name = module.partition(".")
    found = importlib.util.find_spec(package)
    source = pathlib.Path(found.submodule_search_locations[0], f"{name}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return first.partition(": python -m")[0].rstrip(":.")


if __name__ == "__main__":
    main()
