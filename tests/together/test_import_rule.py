"""The import rule: siblings meet only through hooks, and inside ao_core the arrows go one way."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECTS = [*sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))]
PROJECTS += [ROOT / "examples" / "ao-ternary"]  # a stranger keeps the same rule

# What other packages may import of ao_core, beside the names in ao_core.__all__.
PUBLIC_MODULES = re.compile(
    r"ao_core(\.hookspecs|\.arguments|\.child|\.triton_support|\.testing|\.calibrate|\.numerics(\.\w+)?)?"
)

# Inside ao_core a module imports from the rows above its own and, where that makes no cycle, from
# its own row. ao_core/__init__.py joins them all and is exempt; its __version__ is for everyone.
LAYERS = (
    {"errors"},
    {"registry", "hookspecs", "command", "arguments", "child", "progress"},
    {"numerics"},
    {"ops"},
    {"kernels", "triton_support"},
    {"tensor"},
    {"scheme"},
    {"layers"},
    {"plan"},
    {"algorithm"},
    {"plugins"},
    {
        "convert",
        "calibrate",
        "compress",
        "checkpoint",
        "rebuild",
        "shards",
        "causal",
        "metrics",
        "timing",
        "speed",
        "token_speed",
        "models",
    },
    {"proposals"},
    {"cli", "testing"},
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}


@dataclass(frozen=True)
class Import:
    """One imported module, or one name of it."""

    line: int
    module: str
    name: str | None = None
    in_function: bool = False
    typing_only: bool = False


@dataclass
class Reader(ast.NodeVisitor):
    """Collects what ``module`` imports at any depth; ``ao.name`` counts as importing the name."""

    module: str
    is_package: bool = False
    found: list[Import] = field(default_factory=list)
    _aliases: set[str] = field(default_factory=set)
    _in_function: bool = False
    _typing_only: bool = False

    def _add(self, node: ast.AST, module: str, name: str | None = None) -> None:
        self.found.append(Import(node.lineno, module, name, self._in_function, self._typing_only))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)
            if alias.name == "ao_core":
                self._aliases.add(alias.asname or alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = [node.module] if node.module else []
        if node.level:
            package = self.module.split(".") + ["__init__"] * self.is_package
            parts = package[: -node.level] + parts
        for alias in node.names:
            self._add(node, ".".join(parts), alias.name)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
            self._add(node, node.args[0].value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in self._aliases:
            self._add(node, "ao_core", node.attr)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        before = self._typing_only
        self._typing_only |= ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self._typing_only = before
        for child in (node.test, *node.orelse):
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before, self._in_function = self._in_function, True
        self.generic_visit(node)
        self._in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef


def read(source: str, module: str, *, is_package: bool = False) -> Reader:
    reader = Reader(module, is_package)
    reader.visit(ast.parse(source))
    return reader


@dataclass(frozen=True)
class Project:
    """What a pyproject.toml declares: its import name, its libraries, those of its extras."""

    own: str
    required: frozenset[str]
    optional: frozenset[str]

    @classmethod
    def load(cls, folder: Path) -> Project:
        table = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        extras = table.get("optional-dependencies", {}).values()
        return cls(
            import_name(table["name"]),
            frozenset(map(import_name, table["dependencies"])),
            frozenset(import_name(requirement) for extra in extras for requirement in extra),
        )


def import_name(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement).group().lower().replace("-", "_")


def modules(folder: Path) -> Iterator[Reader]:
    """Every module under the project's src folder."""
    for path in sorted((folder / "src").rglob("*.py")):
        parts = path.relative_to(folder / "src").with_suffix("").parts
        package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if package else parts)
        yield read(path.read_text("utf-8"), name, is_package=package)


def public_names() -> set[str]:
    """``ao_core.__all__``, read without importing it."""
    tree = ast.parse((ROOT / "packages/ao-core/src/ao_core/__init__.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("ao_core/__init__.py has no literal __all__")


def is_public(module: str, name: str | None, public: set[str]) -> bool:
    if not PUBLIC_MODULES.fullmatch(module):
        return False
    if name and module == "ao_core":
        return name in public or bool(PUBLIC_MODULES.fullmatch(f"ao_core.{name}"))
    return not (name or "").startswith("_")


def package_breaches(reader: Reader, project: Project, public: set[str]) -> Iterator[str]:
    """Imports a package may not make: undeclared ones, siblings, what ao_core keeps to itself."""
    optional = project.optional - project.required
    allowed = {"torch", project.own, *project.required, *optional, *sys.stdlib_module_names}
    for found in reader.found:
        where, root = f"{reader.module}:{found.line}", found.module.partition(".")[0]
        late = found.in_function or found.typing_only or "ao_core.testing" in reader.module
        if root not in allowed:
            yield f"{where}: {root} is not a declared dependency of {project.own}"
        elif root in optional and not late:
            yield f"{where}: {root} is optional: import it in the function that needs it"
        elif root == "ao_core" != project.own and not is_public(found.module, found.name, public):
            yield f"{where}: {found.module}, {found.name}: not a public name of ao_core"


def arrows(reader: Reader) -> Iterator[tuple[int, str, str]]:
    """``(line, from, to)`` between modules of ao_core, without what only a type checker reads."""
    start = reader.module.split(".")[1]
    for found in reader.found:
        parts = found.module.split(".")
        if parts[0] == "ao_core" and not found.typing_only and found.name != "__version__":
            end = parts[1] if len(parts) > 1 else found.name or "__init__"
            if end != start:
                yield found.line, start, end


def arrow_breaches(reader: Reader) -> Iterator[str]:
    for line, start, end in arrows(reader):
        where = f"{reader.module}:{line}"
        if start not in LAYER_OF:
            yield f"{where}: ao_core.{start} has no place in LAYERS: give it one"
        elif end not in LAYER_OF:
            yield f"{where}: ao_core.{end} is no module in LAYERS: import names where they are made"
        elif LAYER_OF[end] > LAYER_OF[start]:
            yield f"{where}: {start} -> {end} goes against the arrows"


def cycle(readers: list[Reader]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for reader in readers:
        for _, start, end in arrows(reader):
            graph.setdefault(start, set()).add(end)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def core_modules() -> list[Reader]:
    return [reader for reader in modules(ROOT / "packages" / "ao-core") if reader.module != "ao_core"]


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
def test_packages_import_only_what_they_may(folder):
    readers = list(modules(folder))
    assert readers, f"{folder.name} has no module under src"
    project, public = Project.load(folder), public_names()
    assert [line for reader in readers for line in package_breaches(reader, project, public)] == []


def test_the_arrows_inside_core_go_one_way():
    readers = core_modules()
    assert {"ops", "kernels", "tensor", "scheme", "plan"} <= {r.module.split(".")[1] for r in readers}
    assert [line for reader in readers for line in arrow_breaches(reader)] == []


def test_core_has_no_import_cycle():
    assert cycle(core_modules()) == []


PLUGIN = Project("ao_plugin", frozenset({"ao_core", "torch"}), frozenset({"triton"}))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import ao_quant", "ao_quant is not a declared dependency"),
        ("from ao_quant.int8 import Int8", "ao_quant is not a declared dependency"),
        ("def f():\n    import ao_quant", "ao_quant is not a declared dependency"),
        ("if TYPE_CHECKING:\n    import ao_quant", "ao_quant is not a declared dependency"),
        ("import importlib\nimportlib.import_module('ao_quant')", "ao_quant is not a declared"),
        ("import scipy", "scipy is not a declared dependency"),
        ("import triton", "triton is optional"),
        ("from ao_core.kernels import choose", "ao_core.kernels, choose: not a public"),
        ("from ao_core import registry", "ao_core, registry: not a public"),
        ("from ao_core.testing import _helper", "ao_core.testing, _helper: not a public"),
        ("import ao_core as ao\nao.registry.FAULTS", "ao_core, registry: not a public"),
        ("import ao_core.kernels", "ao_core.kernels, None: not a public"),
    ],
)
def test_a_package_breach_is_seen(source, message):
    (line,) = package_breaches(read(source, "ao_plugin.plugin"), PLUGIN, {"Scheme"})
    assert message in line


def test_a_package_within_the_rule_is_left_alone():
    source = """
        import math, torch, ao_core as ao
        from ao_core import Scheme
        from ao_core.hookspecs import hookimpl
        from ao_core.numerics.affine import quantize
        from ao_plugin.other import thing
        from . import sibling_file
        def f():
            import triton
            return ao.Scheme, ao.numerics
    """
    reader = read(textwrap.dedent(source), "ao_plugin.plugin")
    assert list(package_breaches(reader, PLUGIN, {"Scheme"})) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("ao_core.ops", "from ao_core.kernels import choose", "ops -> kernels goes against"),
        ("ao_core.ops", "def f():\n    from ao_core.kernels import choose", "ops -> kernels goes"),
        ("ao_core.ops", "from . import kernels", "ops -> kernels goes against"),
        ("ao_core.numerics.pack", "from ..tensor import T", "numerics -> tensor goes against"),
        ("ao_core.tensor", "import ao_core.plugins", "tensor -> plugins goes against"),
        (
            "ao_core.scheme",
            "from ao_core import QuantizedTensor",
            "ao_core.QuantizedTensor is no module",
        ),
        ("ao_core.newcomer", "import ao_core.errors", "ao_core.newcomer has no place"),
        (
            "ao_core.plan",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import ao_core.cli",
            "plan -> cli",
        ),
    ],
)
def test_an_arrow_breach_is_seen(module, source, message):
    (line,) = arrow_breaches(read(source, module))
    assert message in line


def test_arrows_within_the_rule_are_left_alone():
    source = "from ao_core import errors\nif TYPE_CHECKING:\n    from ao_core.plan import Plan"
    assert list(arrow_breaches(read(source, "ao_core.scheme"))) == []


def test_a_cycle_is_seen():
    readers = [
        read("import ao_core.models", "ao_core.checkpoint"),
        read("def f():\n    import ao_core.checkpoint", "ao_core.models"),
    ]
    assert set(cycle(readers)) == {"models", "checkpoint"}
