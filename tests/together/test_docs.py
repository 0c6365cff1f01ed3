"""The documentation says what is: its code runs, and its lists, commands and links match the tree."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from pages import DOCS, README, ROOT, Reader, blocks
from torch import nn

import ao_core as ao
from ao_core import hookspecs
from ao_core.cli import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

READMES = [README, *sorted(ROOT.glob("packages/*/README.md"))]
TUTORIALS = [DOCS / name for name in ("plugins.md", "hooks.md", "migrating-from-torchao.md")]
PAGES = [*READMES, *sorted(DOCS.glob("*.md")), ROOT / "CHANGELOG.md"]
TERNARY = ROOT / "examples" / "ao-ternary"

each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader in an empty folder, and everything as it was afterwards."""
    safe = torch.serialization.get_safe_globals()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AO_STRICT_PLUGINS", "1")
    reader = Reader(tmp_path, monkeypatch)
    yield reader
    reader.leave()
    torch.serialization.add_safe_globals(safe)


def tiny_model() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the extra ao-core[hf]")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=96, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_readme_run(path, reader):
    found = blocks(path, "python")
    assert found
    for block in found:
        reader.namespace["model"] = tiny_model()
        reader.follow(block, path)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.name)
def test_the_blocks_of_a_tutorial_run(path, reader):
    tiny_model().save_pretrained(reader.folder / "MODEL")
    for block in blocks(path):
        reader.follow(block, path)


def test_the_library_block_quantizes_and_loads(reader):
    reader.namespace["model"] = tiny_model()
    reader.follow(blocks(README, "python")[0], README)
    assert len(blocks(README, "python")[0].code.strip().replace("\n\n", "\n").splitlines()) == 5
    weights = [type(weight) for weight in reader.namespace["model"].parameters()]
    assert any(issubclass(kind, ao.QuantizedTensor) for kind in weights)


def test_the_readme_shows_the_ternary_plugin():
    module = (TERNARY / "src" / "ao_ternary.py").read_text("utf-8")
    assert module in [block.code for block in blocks(README, "python")]
    (entry,) = blocks(README, "toml")
    assert entry.code in (TERNARY / "pyproject.toml").read_text("utf-8")
    assert len([line for line in module.splitlines() if line.strip()]) <= 34


def test_the_tutorial_builds_the_example(reader):
    page = DOCS / "plugins.md"
    end = page.read_text("utf-8").split("\n## 8.")[0].count("\n")
    for block in blocks(page):
        if block.line < end and any("=" in word for word in block.words):
            reader.follow(block, page)
    written = [path for path in (reader.folder / "ao-ternary").rglob("*.*") if path.is_file()]
    assert len(written) == 3
    for path in written:
        example = TERNARY / path.relative_to(reader.folder / "ao-ternary")
        assert path.read_text("utf-8") == example.read_text("utf-8"), path.name


def test_the_hooks_page_has_every_hook_with_its_arguments():
    hooks = [name for name in vars(hookspecs) if name.startswith("ao_")]
    expected = [
        f"{name}({', '.join(inspect.signature(getattr(hookspecs, name)).parameters)})" for name in hooks
    ]
    text = (DOCS / "hooks.md").read_text("utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == expected
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert "**Called**" in section
        assert "**Returns**" in section
        assert f"def {section.splitlines()[0]}:" in section, "no example"


def prose(path: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(path):
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        found = path.parent / target if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@each_page
def test_the_commands_exist(path):
    shown = re.findall(r"`(ao [^`]+)`", prose(path))
    if path not in TUTORIALS:  # what those show is run
        shown += [line for b in blocks(path, "sh") for line in b.code.splitlines() if line.startswith("ao ")]
    commands = typer.main.get_command(build()).commands
    for line in shown:
        name, *words = shlex.split(line, comments=True)[1:]
        if name in ("--help", "--version"):
            continue
        assert name in commands, line
        command = commands[name]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        options = {option for param in command.params for option in param.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_the_readme_shows_every_command():
    text = README.read_text("utf-8")
    assert [name for name in typer.main.get_command(build()).commands if f"ao {name}" not in text] == []


def test_the_two_commands():
    commands = [line for block in blocks(README, "sh") for line in block.code.splitlines()]
    setup = 'python3 -m venv .venv && .venv/bin/pip install --quiet "hatch>=1.18" && .venv/bin/hatch '
    assert setup + "run demo:run" in commands
    assert setup + "test" in commands
    demo = tomllib.loads((ROOT / "hatch.toml").read_text("utf-8"))["envs"]["demo"]
    assert "run" in demo["scripts"]


def test_the_package_table_lists_the_packages():
    rows = re.findall(r"^\| \[([\w-]+)\]\(packages/([\w-]+)/README.md\) \| `(\w+)` \|", prose(README), re.M)
    names = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
    assert rows == [(name, name, name.replace("-", "_")) for name in names]


def test_the_tree_is_the_tree():
    (block,) = blocks(DOCS / "architecture.md", "tree")
    listed: list[Path] = []
    above: dict[int, Path] = {-1: ROOT}
    for line in block.code.splitlines():
        indent = len(line) - len(line.lstrip())
        name, _, purpose = line.strip().partition(" ")
        above[indent] = above[max(depth for depth in above if depth < indent)] / name
        above = {depth: path for depth, path in above.items() if depth <= indent}
        assert above[indent].exists(), line
        assert above[indent].is_dir() == name.endswith("/"), line
        assert purpose.strip() or name.endswith("/"), line
        listed.append(above[indent])
    every = [*ROOT.glob("packages/*/src/**/*.py"), *DOCS.glob("*.md")]
    assert sorted(set(every) - set(listed)) == [], "files that the page does not list"


def test_the_arrows_are_those_of_the_import_test():
    tree = ast.parse((ROOT / "tests/together/test_import_rule.py").read_text("utf-8"))
    values = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    core = ROOT / "packages/ao-core/src/ao_core"
    exist = {path.stem for path in core.iterdir()}
    expected = [layer & exist for layer in ast.literal_eval(values["LAYERS"])]
    (block,) = blocks(DOCS / "architecture.md", "arrows")
    assert [set(line.split()) for line in block.code.splitlines()] == [row for row in expected if row]


def keys(data: object, path: str = "") -> Iterator[str]:
    """Every key of nested dicts, with its path; names of shards are left open."""
    if isinstance(data, dict):
        for key, value in data.items():
            below = f"{path}.*" if path == "files" else f"{path}.{key}".lstrip(".")
            yield below
            yield from keys(value, below)


def test_the_checkpoint_format_is_what_save_writes(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    ao.quantize_(model, "int8-weight-only", group_size=32)
    ao.save(model, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "ao.json").read_text("utf-8"))
    page = DOCS / "architecture.md"
    (block,) = blocks(page, "json")
    shown = json.loads(block.code)
    assert set(keys(shown)) == set(keys(written))
    record = written["tensors"]["0.weight"]
    assert {**shown["tensors"]["0.weight"], "file": ""} == {**record, "file": ""}
    explained = [*written, "files.*.bytes", "files.*.sha256", *(f"tensors.*.{key}" for key in record)]
    assert [key for key in explained if f"`{key}`" not in prose(page)] == []
