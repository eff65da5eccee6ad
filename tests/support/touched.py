"""What of vLLM the code of `plugin/vllm_host` touches, as far as its text tells.

The rule: what is annotated `Any` there, or comes from an import of vLLM, is vLLM's; and so is all that is got from it:
attributes, items, results, what a loop over it gives, what a function of the folder returns that says `Any`. A class
that derives from one of vLLM's, or is mixed into it, has the attributes of that. Plain data of the plugin's own is
annotated `dict[str, Any]`, and not followed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

_DATA = re.compile(r"(?:dict|Mapping)\[str, Any\]")
_PASSING = frozenset(
    ("aclosing", "deque", "dict", "enumerate", "filter", "getattr", "iter", "list", "map", "next", "replace",
     "reversed", "set", "sorted", "tuple", "vars", "zip")
)  # fmt: skip
"""Functions that give what they are given, or parts of it."""
_HELPERS = frozenset(("need", "optional"))
_BY_NAME = _HELPERS | {"getattr", "hasattr", "setattr", "delattr"}
"""Functions that are given an object, and names of its attributes."""
_KEYED = frozenset(("get", "pop", "setdefault"))
_TOLD = re.compile(r"VLLM_[A-Z0-9_]+|vllm\.\w+_plugins")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Touch:
    """A name that is asked of an object of vLLM's."""

    file: str
    line: int
    name: str
    called: bool = False
    silent: bool = False
    """whether there is a default for an object that has none"""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}{', with a default' if self.silent else ''}"


def touched(sources: Mapping[str, str]) -> list[Touch]:
    """What modules touch, given by file."""
    modules = {file: ast.parse(text) for file, text in sources.items()}
    nodes = [node for module in modules.values() for node in ast.walk(module)]
    imported = {each.asname or each.name for node in nodes if _is_import_of_vllm(node) for each in node.names}
    returns = {node.name: node.returns for node in nodes if isinstance(node, _Function) and node.returns is not None}
    answering = {name for name, annotation in returns.items() if _says_any(annotation, imported)}
    texts = {target.id: node.value.value for node in nodes
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
             for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
    found = (touch for file, module in modules.items()
             for touch in _Reader(file, module, imported, answering, texts).read())  # fmt: skip
    return sorted(set(found))


def texts_of_vllm(sources: Mapping[str, str]) -> list[Touch]:
    """The variables of vLLM's environment, and the groups of its plugins, that modules name."""
    return [
        Touch(file, node.lineno, node.value)
        for file, text in sources.items() for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _TOLD.fullmatch(node.value)
    ]  # fmt: skip


def _is_import_of_vllm(node: ast.AST) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"


def _says_any(annotation: ast.AST, imported: Iterable[str]) -> bool:
    return not {"Any", *imported}.isdisjoint(re.findall(r"\w+", _DATA.sub("", ast.unparse(annotation))))


@dataclass
class _Class:
    """A class: which of its attributes are objects of vLLM's, and which it does not define itself."""

    own: set[str]
    derived: bool
    """from a class of vLLM's"""
    complete: bool
    """whether what it does not define itself is vLLM's: it derives from nothing else"""
    fields: set[str] = field(default_factory=set)

    def is_vllm(self, name: str) -> bool:
        return name in self.fields or self.is_inherited(name)

    def is_inherited(self, name: str) -> bool:
        return self.complete and name not in self.own


@dataclass
class _Scope:
    """Names of a function, a class or a module, and whether each is an object of vLLM's."""

    names: dict[str, bool]
    outer: _Scope | None = None
    within: _Class | None = None

    def has(self, name: str) -> bool:
        return self.names[name] if name in self.names else self.outer is not None and self.outer.has(name)


class _Reader:
    """Reads one module."""

    def __init__(
        self, file: str, module: ast.Module, imported: set[str], answering: set[str], texts: Mapping[str, object]
    ) -> None:
        self._file = file
        self._module = module
        self._imported = imported
        self._answering = answering
        self._texts = texts
        self._called = {id(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
        self._found: list[Touch] = []

    def read(self) -> list[Touch]:
        for node in ast.walk(self._module):
            if _is_import_of_vllm(node):
                for each in node.names:
                    self._touch(node, each.name)
        here = {each.asname or each.name for node in ast.walk(self._module)
                if isinstance(node, ast.Import | ast.ImportFrom) for each in node.names}  # fmt: skip
        self._body(self._module.body, _Scope({name: name in self._imported or name == "vllm" for name in here}))
        return self._found

    def _touch(self, node: ast.AST, name: str, *, called: bool = False, silent: bool = False) -> None:
        self._found.append(Touch(self._file, getattr(node, "lineno", 0), name, called, silent))

    # -- what names stand for --------------------------------------------------------------------------------------

    def _body(self, body: list[ast.stmt], scope: _Scope) -> None:
        inside = list(_inside(body))
        for node in (*inside, *inside):  # what a loop binds further down is known the second time
            self._bind(node, scope)
        for node in inside:
            if isinstance(node, ast.ClassDef):
                self._class(node, scope)
            elif isinstance(node, _Function):
                if node.name not in _HELPERS | {"__getattr__"}:  # what is asked for there, others name
                    self._body(node.body, self._arguments(node, scope))
            else:
                self._look(node, scope)

    def _class(self, node: ast.ClassDef, outer: _Scope) -> None:
        methods = [each for each in node.body if isinstance(each, _Function)]
        stored = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and _is_self(each.value)
                  and isinstance(each.ctx, ast.Store)}  # fmt: skip
        fields = {each.target.id: self._any(each.annotation) for each in node.body
                  if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)}  # fmt: skip
        constants = {target.id for each in node.body if isinstance(each, ast.Assign)
                     for target in each.targets if isinstance(target, ast.Name)}  # fmt: skip
        bases = [self._is(base, outer) for base in node.bases]
        made = _Class({each.name for each in methods} | stored | {*fields} | constants, any(bases), all(bases))
        made.fields = {name for name, is_vllm in fields.items() if is_vllm}
        scope = _Scope({}, outer, made)
        for method in methods:
            arguments = self._arguments(method, scope)
            for each in (*ast.walk(method), *ast.walk(method)):
                self._bind(each, arguments)
        stands_in = any(method.name == "__getattr__" for method in methods)
        for method in methods:
            if (any(bases) or stands_in) and not method.name.startswith("_"):
                self._touch(method, method.name)
        self._body(node.body, scope)

    def _arguments(self, node: _Function, outer: _Scope) -> _Scope:
        given = node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        names = {each.arg: each.annotation is not None and self._any(each.annotation) for each in every}
        return _Scope(names, outer, outer.within)

    def _any(self, annotation: ast.AST) -> bool:
        return _says_any(annotation, self._imported)

    def _bind(self, node: ast.AST, scope: _Scope) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._give(target, value, scope)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                scope.names[name] = self._any(annotation)
            case (
                ast.NamedExpr(target=target, value=value)
                | ast.withitem(context_expr=value, optional_vars=ast.expr() as target)
            ):
                self._give(target, value, scope)
            case ast.For() | ast.AsyncFor() | ast.comprehension():
                self._give_each(node.target, node.iter, scope)

    def _give_each(self, target: ast.expr, many: ast.expr, scope: _Scope) -> None:
        if isinstance(target, ast.Tuple) and isinstance(many, ast.Call) and _last(many.func) == "zip":
            for one, each in zip(target.elts, many.args, strict=False):
                self._give(one, each, scope)
        else:
            self._give(target, many, scope)

    def _give(self, target: ast.expr, value: ast.expr, scope: _Scope) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, each in zip(target.elts, value.elts, strict=True):
                self._give(one, each, scope)
            return
        is_vllm = self._is(value, scope)
        for each in ast.walk(target):
            if isinstance(each, ast.Name):
                scope.names[each.id] = is_vllm or scope.names.get(each.id, False)
            elif isinstance(each, ast.Attribute) and _is_self(each.value) and is_vllm and scope.within is not None:
                scope.within.fields.add(each.attr)

    # -- expressions -----------------------------------------------------------------------------------------------

    def _is(self, node: ast.AST, scope: _Scope) -> bool:
        """Whether an expression gives an object of vLLM's."""
        match node:
            case ast.Name(id=name):
                return scope.has(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return scope.within is not None and scope.within.is_vllm(name)
            case ast.Call(func=ast.Name(id="super")):
                return scope.within is not None and scope.within.derived
            case ast.Call(func=called, args=given):
                passes = _last(called) in _PASSING and any(self._is(each, scope) for each in given)
                return passes or _last(called) in self._answering or self._is(called, scope)
        return any(self._is(each, scope) for each in _parts(node))

    def _look(self, node: ast.AST, scope: _Scope) -> None:
        """Note what an expression asks of an object of vLLM's."""
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                if scope.within is not None and scope.within.is_inherited(name):
                    self._touch(node, name)
            case ast.Attribute(value=value, attr=name) if self._is(value, scope):
                self._touch(node, name, called=id(node) in self._called)
            case ast.Subscript(value=value, slice=key) if self._is(value, scope):
                self._touch_text(key)
            case ast.Dict(values=values):
                if any(self._is(value, scope) for value in values):
                    self._touch_keys(node)
            case ast.Call():
                self._look_at_call(node, scope)

    def _look_at_call(self, node: ast.Call, scope: _Scope) -> None:
        name, given = _last(node.func), node.args
        asked = bool(given) and self._is(given[0], scope)
        if name in _BY_NAME and asked:
            silent = name == "hasattr" or (name == "getattr" and len(given) > 2)
            for each in given[1:] if name == "need" else given[1:2]:
                self._touch(each, (self._text(each) or ast.unparse(each)).rpartition(".")[2], silent=silent)
        if name in _KEYED and given and isinstance(node.func, ast.Attribute) and self._is(node.func.value, scope):
            self._touch_text(given[0])
        if self._is(node.func, scope) or (name == "replace" and asked):
            for named in node.keywords:
                if named.arg is not None:
                    self._touch(named.value, named.arg)
                if isinstance(named.value, ast.Dict):
                    self._touch_keys(named.value)

    def _touch_keys(self, node: ast.Dict) -> None:
        for key in filter(None, node.keys):
            self._touch_text(key)

    def _touch_text(self, node: ast.expr) -> None:
        if text := self._text(node):
            self._touch(node, text)

    def _text(self, node: ast.expr) -> str:
        text = self._texts.get(node.id) if isinstance(node, ast.Name) else getattr(node, "value", "")
        return text if isinstance(text, str) else ""


def _parts(node: ast.AST) -> list[ast.expr]:
    """The expressions of which one is an object of vLLM's if another is."""
    match node:
        case ast.Attribute() | ast.Subscript() | ast.Starred() | ast.Await() | ast.NamedExpr() | ast.DictComp():
            return [node.value]
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            return [node.elt]
        case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
            return [one, other]
        case ast.BoolOp(values=parts) | ast.Dict(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
            return parts
    return []


def _inside(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes in a body, but for what is inside the functions and classes there."""
    for node in body:
        yield node
        if not isinstance(node, _Function | ast.ClassDef):
            yield from _inside(ast.iter_child_nodes(node))


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _last(called: ast.AST) -> str:
    """The name that is called: an attribute's, or a function's."""
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
