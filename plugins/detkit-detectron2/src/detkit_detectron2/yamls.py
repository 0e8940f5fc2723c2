"""Detectron2's configuration files, read without running anything: its own loader builds any Python object they name.

A file inherits from the one that its ``_BASE_`` names, by Detectron2's rule: sections are merged, and what the file
itself says wins. The one expression in the zoo, the anchors of ``Base-RetinaNet.yaml``, is arithmetic on lists and is
calculated here; any other Python in a file is refused.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detkit.errors import UsageError

BASE = "_BASE_"
"""The key under which a file names the one it inherits from, or a list of them, the last of which wins."""

_MOST_BYTES = 1 << 20
_MOST_NODES = 50_000
"""Of one file with every alias written out; the largest of the zoo has about a hundred."""
_MOST_BASES = 32
_MOST_NUMBERS = 4096
"""Of the lists in an expression."""
_MOST_STEPS = 50_000
"""Of an expression, and of the numbers it goes through; the zoo's takes about a hundred."""
_LARGEST = 1e12
"""Of the numbers in an expression, and of their exponents 64."""

_OPERATORS: Mapping[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class Config(NamedTuple):
    """A configuration file with all that it inherits."""

    values: dict[str, Any]
    """Nested, as a ``CfgNode`` is made of. Texts such as ``"(60000, 80000)"`` are left for yacs to decode."""
    origins: dict[str, Path]
    """Which file set each key, by dotted name: ``SOLVER.BASE_LR``."""
    files: tuple[Path, ...]
    """The file itself, then those it inherits from."""


def read(path: Path) -> Config:
    """Read a file and what it inherits from. Raises `UsageError` for what is missing, no YAML, circular or code."""
    return _read(path.expanduser().absolute(), ())


def _read(path: Path, inheriting: tuple[Path, ...]) -> Config:
    if path.resolve() in inheriting:
        raise UsageError(f"{inheriting[-1]} inherits from itself, through {BASE}: {path}; take one of them out")
    if len(inheriting) == _MOST_BASES:
        raise UsageError(f"{inheriting[0]} inherits through more than {_MOST_BASES} files")
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _MOST_BYTES else ""
    except (OSError, UnicodeDecodeError) as error:
        named = f", which {inheriting[-1]} names as its {BASE}," if inheriting else ""
        raise UsageError(f"cannot read the configuration file {path}{named}: {error}") from None
    if size > _MOST_BYTES:
        raise UsageError(f"{path} has {size} bytes; a configuration file has at most {_MOST_BYTES}")
    own = parse(text, str(path))
    named = own.pop(BASE, [])
    values: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    files = [path]
    for base in named if isinstance(named, list) else [named]:
        if not isinstance(base, str) or "://" in base:
            raise UsageError(f"{path}: {BASE} is {base!r}; expected the path of a file, beside this one or absolute")
        file = Path(os.path.normpath(path.parent / Path(base).expanduser()))
        inherited = _read(file, (*inheriting, path.resolve()))
        _merge(inherited.values, values, f"{path}: {BASE}: {base}")
        origins |= inherited.origins
        files += [file for file in inherited.files if file not in files]
    _merge(own, values, str(path))
    origins |= dict.fromkeys(flatten(own), path)
    return Config(values, {key: origins[key] for key in flatten(values)}, tuple(files))


def _merge(own: dict[str, Any], into: dict[str, Any], where: str, section: str = "") -> None:
    for key, value in own.items():
        name = f"{section}{key}"
        if key in into and isinstance(value, dict) != isinstance(into[key], dict):
            raise UsageError(f"{where}: {name} is a section in one file and a value in the other")
        if isinstance(value, dict):
            _merge(value, into.setdefault(key, {}), where, f"{name}.")
        else:
            into[key] = value


def parse(text: str, name: str) -> dict[str, Any]:
    """Return what one file says, ``_BASE_`` as it is. Raises `UsageError`; ``name`` is what it calls the text."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _refuse_large(node, name)
        values = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise UsageError(f"{name} cannot be read{line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise UsageError(f"{name} holds no configuration; expected sections such as MODEL and SOLVER")
    return values


def flatten(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return the values of nested sections by dotted name, in their order."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{section}{key}.")
        else:
            flat[f"{section}{key}"] = value
    return flat


def _refuse_large(node: yaml.Node | None, name: str) -> None:
    """Raise `UsageError` for what would grow without end, or nearly so, when its aliases are written out."""
    waiting, count = [node] if node is not None else [], 0
    while waiting:
        one = waiting.pop()
        count += 1
        if count > _MOST_NODES:
            raise UsageError(f"{name} has more than {_MOST_NODES} values; a configuration file has hundreds")
        if isinstance(one, yaml.SequenceNode):
            waiting += one.value
        elif isinstance(one, yaml.MappingNode):
            waiting += [side for pair in one.value for side in pair]


class _Loader(yaml.SafeLoader):
    """Plain values, and the two tags of Python that stand for plain values."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key is no word", key)
            if key.value in seen:
                raise _error(f"{key.value} is there twice", key)
            seen.add(key.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep=True).items()}

    def construct_tuple(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))

    def construct_expression(self, node: yaml.Node) -> Any:
        code = self.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
        if len(code) != 1 or not isinstance(code[0], str):
            raise _error("an expression is one text", node)
        try:
            return evaluate(code[0])
        except (ValueError, ArithmeticError) as error:
            raise _error(f"the expression {code[0]!r} is not calculated: {error}", node) from None

    def refuse(self, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _error(f"{tag} would run Python code or build an object of Python; write the plain value instead", node)


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_tuple)
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _Loader.construct_expression)
_Loader.add_constructor(None, _Loader.refuse)  # what has no constructor of its own


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def evaluate(text: str) -> Any:
    """Calculate an expression of numbers, lists and ``[... for x in [...]]``.

    Raises `ValueError` for any other Python, and for numbers and lists that get too large.
    """
    try:
        return _Calculator().calculate(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no expression ({error})") from None


class _Calculator:
    """One calculation, which ends after so many steps."""

    def __init__(self) -> None:
        self._steps = 0

    def calculate(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        self._step()
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                return self._checked(value)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                made = [self.calculate(part, names) for part in parts]
                return self._checked(made if isinstance(node, ast.List) else tuple(made))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return self._checked(_OPERATORS[type(op)](_number(self.calculate(operand, names))))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                a, b = _number(self.calculate(left, names)), _number(self.calculate(right, names))
                if isinstance(op, ast.Pow) and abs(b) > 64:
                    raise ValueError(f"the exponent {b:g} is too large")
                return self._checked(_OPERATORS[type(op)](a, b))
            case ast.ListComp(elt=part, generators=[ast.comprehension(target=ast.Name(id=name), iter=over, ifs=[])]):
                items = self.calculate(over, names)
                if not isinstance(items, list | tuple):
                    raise ValueError("it goes through something that is no list")
                return self._checked([self.calculate(part, {**names, name: item}) for item in items])
        raise ValueError(f"{ast.unparse(node)!r} is neither a number, nor a list, nor arithmetic on them")

    def _checked(self, value: Any) -> Any:
        """Return a number or a list. Raises `ValueError` for one that is too large."""
        if isinstance(value, list | tuple):
            self._refuse_long(value)
        elif not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise ValueError(f"it calculates with {value!r}")
        return value

    def _refuse_long(self, value: list[Any] | tuple[Any, ...]) -> None:
        waiting, count = list(value), 0
        while waiting:
            self._step()
            one = waiting.pop()
            if isinstance(one, list | tuple):
                waiting += one
            else:
                count += 1
            if count > _MOST_NUMBERS:
                raise ValueError(f"it has more than {_MOST_NUMBERS} numbers")

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise ValueError(f"it takes more than {_MOST_STEPS} steps")


def _number(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise ValueError("it calculates with something that is no number")
    return value
