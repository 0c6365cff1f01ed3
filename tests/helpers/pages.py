"""Pages of the documentation, and a reader who does what they say."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ao_core import plugins
from ao_core.cli import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"


@dataclass(frozen=True)
class Block:
    """A fenced block: language, the words after it (such as ``file=a.py``), text, first line."""

    language: str
    words: tuple[str, ...]
    code: str
    line: int


def blocks(path: Path, language: str = "") -> list[Block]:
    text = path.read_text("utf-8")
    found = re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    every = [
        Block(one[1], tuple(one[2].split()), one[3], text[: one.start(3)].count("\n") + 1) for one in found
    ]
    return [block for block in every if language in ("", block.language)]


class Reader:
    """Does what a page says, in an empty folder; pip and pytest are stood in for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.namespace: dict = {"__name__": "page"}
        self.modules: dict = {}

    def follow(self, block: Block, path: Path) -> None:
        how, _, target = next((word for word in block.words if "=" in word), "").partition("=")
        if target:
            self.write(self.folder / target, block.code, edit=how == "edit")
        elif block.language == "python" and "no-run" not in block.words:
            padding = "\n" * (block.line - 1)  # so that a traceback shows the page's own line
            exec(compile(padding + block.code, str(path), "exec"), self.namespace)
        elif block.language == "sh":
            for line in block.code.splitlines():
                self.shell(shlex.split(line, comments=True))

    def write(self, file: Path, code: str, *, edit: bool) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(merged(file.read_text("utf-8"), code) if edit else code, "utf-8")
        if file.parent.name == "src":
            self.reload(file.parent)

    def reload(self, source: Path) -> None:
        if str(source) not in sys.path:
            self.monkeypatch.syspath_prepend(str(source))
        importlib.invalidate_caches()
        for name in (file.stem for file in source.glob("*.py")):
            self.modules.setdefault(name, sys.modules.get(name))
            forget(name)
        plugins.reset()

    def shell(self, words: list[str]) -> None:
        match words:
            case ["mkdir", "-p", *folders]:
                for folder in folders:
                    (self.folder / folder).mkdir(parents=True)
            case ["pip", "install", "-e", project]:
                self.install(self.folder / project)
            case ["pytest", tests]:
                found = self.folder / tests
                for file in [found] if found.is_file() else sorted(found.glob("test_*.py")):
                    run_checks(file)
            case ["ao", *arguments]:
                result = CliRunner().invoke(build(), arguments)
                assert result.exit_code == 0, f"{words}: {result.exception!r} {result.output}"
            case _:
                raise AssertionError(f"this test can't stand in for {words}")

    def install(self, project: Path) -> None:
        """What pip leaves behind, as far as importlib.metadata reads it."""
        table = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]
        name, version = table["name"], table["version"]
        info = project / "src" / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        requires = [f"Requires-Dist: {line}" for line in table["dependencies"]]
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *requires]
        (info / "METADATA").write_text("\n".join(head) + "\n")
        points = [f"{key} = {value}" for key, value in table["entry-points"]["ao"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[ao]", *points]) + "\n")
        self.reload(project / "src")

    def leave(self) -> None:
        for name, module in {**self.modules, "page": None}.items():
            forget(name)
            if module is not None:
                sys.modules[name] = module
        plugins.reset()


def forget(module: str) -> None:
    """Import it anew next time; of two classes of one name, torch.load would take either."""
    sys.modules.pop(module, None)
    safe = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([it for it in safe if getattr(it, "__module__", "") != module])


def merged(old: str, new: str) -> str:
    """``old`` with the top-level definitions of ``new``: each in the place of its namesake, or at the end."""

    def named(source: str) -> Iterator[tuple[str, int, int]]:
        for node in ast.parse(source).body:
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            targets = [ast.unparse(target) for target in getattr(node, "targets", [])]
            yield getattr(node, "name", "".join(targets)), first - 1, node.end_lineno

    for name, first, last in named(new):
        code = "\n".join(new.splitlines()[first:last])
        lines = old.rstrip().splitlines()
        places = [(start, end) for other, start, end in named(old) if other == name]
        start, end = places[0] if places else (len(lines), len(lines))
        lines[start:end] = [code] if places else ["", "", code]
        old = "\n".join(lines) + "\n"
    return old


def run_checks(file: Path) -> None:
    """Run a test file's parametrized checks, each in turn; an expected failure must fail."""
    spec = importlib.util.spec_from_file_location(f"page_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, test in vars(module).items():
        if not name.startswith("test_"):
            continue
        (mark,) = test.pytestmark
        assert mark.args[1], f"{file.name}: no checks"
        for case in mark.args[1]:
            if any(each.name == "xfail" for each in case.marks):
                with pytest.raises(AssertionError):
                    test(*case.values)
            else:
                test(*case.values)
