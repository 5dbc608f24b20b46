"""What the pages say holds: links lead somewhere, commands exist and know the flags that are given to them."""

import functools
import pathlib
import re

import pytest
from markdown_it import MarkdownIt
from typed import commands

from experiments import specmq

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(path for package in ("checkpoints_tools", "experiments", "pallas_kernels", "specmq_jax")
                               for path in sorted((ROOT / package).rglob("*.md")))]
MODULES = {module: name for group in specmq.GROUPS.values() for name, module in group.items()}
FLAG = re.compile(r"(?<![\w-])--([a-z]\w*)")
COMMAND = re.compile(r"(?:python -m|specmq) +([a-z][\w.]*)((?:(?!&&|\||;|#|python -m|specmq ).)*)")
OTHERS = {"pytest": {"shard", "dist"}, "pip": set()}
"""What the pages name beside the project's commands."""


@functools.cache
def tokens(page):
    """The page's blocks and what stands in them, in order."""
    return [token for block in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
            for token in (block, *(block.children or ()))]


@functools.cache
def anchors(page):
    """The headings of a page as GitHub spells them in addresses."""
    found = tokens(page)
    titles = [found[i + 1].content for i, token in enumerate(found) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code(page):
    """Code of the page, a command line each: blocks with their continued lines, and spans."""
    for token in tokens(page):
        if token.type == "code_inline":
            yield token.content
        elif token.type in ("code_block", "fence") and token.info in ("", "bash"):
            yield from re.sub(r"\\\n\s*", " ", token.content).splitlines()


def of_page(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def flags():
    """The flags of each command by its module, as its --help lists them."""
    known = {}
    for module, found in zip(MODULES, commands(*((module, "--help") for module in MODULES)), strict=True):
        assert found.returncode == 0 and not found.stderr, f"{module}: {found.stderr}"
        assert "\nFlags:\n" in found.stdout
        known[module] = {name for line in found.stdout.splitlines() if line.startswith("  --")
                         for name in ([line[8:], f"no{line[8:]}"] if line.startswith("  --[no]") else [line[4:]])}
    return known


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_links_lead_somewhere(page):
    for token in tokens(page):
        address = token.attrs.get("href") or token.attrs.get("src")
        if not address or "://" in address:
            continue
        place, _, anchor = address.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), address
        if anchor:
            assert anchor in anchors(target), address


def test_commands_exist_and_know_their_flags(flags):
    every, seen = set().union(*flags.values(), *OTHERS.values()), set()
    by_name = {name: module for module, name in MODULES.items()} | {module: module for module in MODULES}
    for page in PAGES:
        for line in code(page):
            for name, arguments in COMMAND.findall(line):
                if name in ("main", "command"):  # of the program as such
                    continue
                known = OTHERS[name] if name in OTHERS else flags[by_name[name]]
                assert set(FLAG.findall(arguments)) <= known, f"{of_page(page)}: {line}"
                seen.add(by_name.get(name))
            assert set(FLAG.findall(line)) <= every, f"{of_page(page)}: {line}"
    assert set(MODULES) <= seen | {None}, "each command is shown on some page"


def test_the_front_page_is_short_and_names_every_command():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) < 150
    assert "pip install -e . && python -m experiments.mt_bench\n" in text
    assert all(f"`{name}`" in text for name in MODULES.values())
