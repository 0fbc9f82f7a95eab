"""Finds names of other packages in our source that these have not made public."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("lightning_mgpu", "hydra_plugins")
COMPAT = ROOT / "lightning_mgpu" / "_compat"
# Functions whose second argument is the name of an attribute.
_TAKE_A_NAME = {"getattr", "setattr", "hasattr", "delattr", "object", "attrgetter", "methodcaller"}


@dataclass(frozen=True)
class Use:
    """A place where a name is used."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}"


@dataclass
class _Class:
    """What a class of ours defines, and what it is derived from."""

    names: set[str] = field(default_factory=set)
    bases: set[str] = field(default_factory=set)


@dataclass
class Names:
    """The names that our source defines, and those of others that `_compat` uses.

    Attributes:
        defined: All that start with an underscore, of modules, classes and objects.
        classes: By the class's name; of classes that share one, together.
        foreign: What `_compat` has taken over: nobody else uses it.
    """

    defined: set[str] = field(default_factory=set)
    classes: dict[str, _Class] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)

    def of_class(self, name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """What a class and those of our classes that it is derived from define."""
        known = self.classes.get(name)
        if known is None or name in seen:
            return set()
        inherited = (self.of_class(base, seen | {name}) for base in known.bases)
        return known.names.union(*inherited)

    def inherits(self, kind: str, name: str) -> bool:
        """Whether a class has a name from another class of ours."""
        return any(name in self.of_class(base) for base in self.classes[kind].bases)


def is_private(name: str) -> bool:
    """Whether a name starts with an underscore, and is none of Python's own."""
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != ""


def sources() -> dict[str, ast.Module]:
    """Our files outside of `_compat`, by path."""
    files = (file for package in OURS for file in sorted((ROOT / package).rglob("*.py")))
    return {
        str(file.relative_to(ROOT)): ast.parse(file.read_text())
        for file in files
        if COMPAT not in file.parents
    }


def names_of(modules: Iterable[ast.Module], version_dependent: Iterable[str]) -> Names:
    """What modules define, and what `_compat` has taken over.

    Args:
        modules: As `sources` finds them.
        version_dependent: Names without an underscore that are to be used in `_compat` only.
    """
    names = Names()
    for module in modules:
        _define(module, names)
    compat = [ast.parse(file.read_text()) for file in sorted(COMPAT.glob("*.py"))]
    own = Names()
    for module in compat:
        _define(module, own)
    used = {name for module in compat for _, name in _mentioned(module) if is_private(name)}
    hooks = overridden(compat, own)
    names.foreign = (used - own.defined) | hooks | set(version_dependent)
    return names


def foreign_uses(file: str, module: ast.Module, names: Names) -> Iterator[Use]:
    """The uses in a module of what it should have from `_compat`, or from nowhere."""
    finder = _Finder(names)
    finder.visit(module)
    for line, name in sorted(finder.found):
        yield Use(file, line, name)


def overridden(modules: Iterable[ast.Module], names: Names) -> set[str]:
    """The private methods that override one of another package's class."""
    return {
        method.name
        for module in modules
        for kind in ast.walk(module)
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef)
        and is_private(method.name)
        and any(_name(mark) == "override" for mark in method.decorator_list)
        and not names.inherits(kind.name, method.name)
    }


class _Finder(ast.NodeVisitor):
    def __init__(self, names: Names) -> None:
        self._names = names
        self._classes: list[str] = []
        self.found: set[tuple[int, str]] = set()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._classes.append(node.name)
        self.generic_visit(node)
        self._classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in self._names.foreign and any(map(self._is_derived, self._classes)):
            self.found.add((node.lineno, node.name))
        self.generic_visit(node)

    def _is_derived(self, kind: str) -> bool:
        """Whether a class of ours has a base class of another package."""
        return any(base not in self._names.classes for base in self._names.classes[kind].bases)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._is_foreign(node):
            self.found.add((node.lineno, node.attr))
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._check_path(node.lineno, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.partition(".")[0] in OURS:
            return
        self._check_path(node.lineno, module)
        for alias in node.names:
            if is_private(alias.name) or alias.name in self._names.foreign:
                self.found.add((node.lineno, alias.name))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                self.visit(value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value in self._names.foreign:
            self.found.add((node.lineno, node.value))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else _name(node.func)
        if name in _TAKE_A_NAME:
            for argument in node.args[:2]:
                self._check_attribute_name(argument)
        self.generic_visit(node)

    def _check_attribute_name(self, node: ast.expr) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
            if is_private(name) and name not in self._names.defined:
                self.found.add((node.lineno, name))

    def _check_path(self, line: int, path: str) -> None:
        parts = path.split(".")
        if parts[0] not in OURS:
            self.found |= {(line, part) for part in parts if is_private(part)}

    def _is_foreign(self, node: ast.Attribute) -> bool:
        name, foreign = node.attr, self._names.foreign
        if not is_private(name):
            return name in foreign
        owner = node.value
        if isinstance(owner, ast.Call) and _name(owner.func) == "super":
            return not any(self._names.inherits(kind, name) for kind in self._classes)
        if _name(owner) in ("self", "cls") and self._classes:
            own = set().union(*map(self._names.of_class, self._classes))
            return name not in own
        return name in foreign or name not in self._names.defined


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _mentioned(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name in a module: attributes, imports, and strings."""
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            for part in (*(node.module or "").split("."), *(alias.name for alias in node.names)):
                yield node.lineno, part
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _define(module: ast.Module, names: Names) -> None:
    for node in module.body:
        names.defined |= set(filter(is_private, _targets(node)))
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.defined |= {node.name} if is_private(node.name) else set()
        if isinstance(node, ast.ClassDef):
            _define_class(node, names)


def _define_class(node: ast.ClassDef, names: Names) -> None:
    known = names.classes.setdefault(node.name, _Class())
    for base in node.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        known.bases.add(inner.attr if isinstance(inner, ast.Attribute) else _name(inner))
    for part in node.body:
        known.names |= set(filter(is_private, _targets(part)))
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            known.names |= {part.name}
    for part in ast.walk(node):
        is_stored = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
        if is_stored and _name(part.value) in ("self", "cls") and is_private(part.attr):
            known.names.add(part.attr)
    names.defined |= set(filter(is_private, known.names))


def _targets(node: ast.stmt) -> Iterator[str]:
    """The names that a statement assigns to."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
