"""What a field of the configuration says of itself, once, where it stands: meaning, range, choices, what it names.

A field's type carries its facts (``steps: Positive[int] = 100``), the docstring under it its meaning. What a section is
said to be, its keys are: a bound on it holds for each, and whatever stands in a free section is free.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from math import inf
from types import GenericAlias, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from ctrl_hpc.config.functions import is_function
from ctrl_hpc.config.objectives import is_schedule

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class IsFree:
    """No result depends on it: it may change between two starts of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IsPath:
    """A file or folder, which loading makes absolute; a URL stays as it is."""

    names: tuple[str, ...] = ()
    """Words that are no path."""
    or_name: bool = False
    """Whether a word without a slash is the name of something packaged."""
    function: bool = False
    """Whether it is FILE.py:FUNCTION."""


@dataclass(frozen=True, slots=True)
class Must:
    """Whatever else a value must be."""

    hold: Callable[[Any], bool]
    told: str
    """What is allowed, in words that follow "it must"."""


@dataclass(frozen=True, slots=True)
class Example:
    """A value as one would write it behind ``KEY=``, where none can be made up from the type."""

    text: str


Positive = Annotated[T, Gt(0)]
NotNegative = Annotated[T, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Free = Annotated[T, IsFree()]
PathName = Annotated[str, IsPath()]
_OR_STAGES = "or be such numbers from steps on, as 1@0,0@50"
Number = int | float | str
"""Of a scheduled coefficient: a number, or ``VALUE@STEP, ...``; OmegaConf wants all three named."""
Scheduled = Annotated[Number, Must(lambda v: is_schedule(v, -inf, inf), f"be a number, {_OR_STAGES}")]
ScheduledShare = Annotated[Number, Must(lambda v: is_schedule(v, 0, 1), f"lie in [0, 1], {_OR_STAGES}")]
ScheduledPenalty = Annotated[Number, Must(lambda v: is_schedule(v, 0, inf), f"be 0 or greater, {_OR_STAGES}")]
_IS_FUNCTION = Must(is_function, "be FILE.py:FUNCTION of a file that exists and defines it")
FunctionName = Annotated[str, IsPath(function=True), _IS_FUNCTION]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """All that is known of a key before it has a value."""

    key: str
    owner: type
    """The section that it stands in."""
    kind: Any
    """The type, without facts and without None."""
    optional: bool
    """Whether null is allowed."""
    marks: tuple[Any, ...]
    """What is said of it: bounds and the classes above; what is said of its sections, too."""
    each: tuple[Any, ...]
    """What is said of each of its values, where it has several."""

    @property
    def about(self) -> str:
        """Its meaning: the docstring under the field."""
        return _docstrings(self.owner).get(self.key.rpartition(".")[2], "")

    @property
    def element(self) -> Any:
        """The type of each of its values where it has several; else its own."""
        places: dict[Any, int] = {tuple: 0, dict: 1}
        origin = get_origin(self.kind)
        return get_args(self.kind)[places[origin]] if origin in places else self.kind

    @property
    def is_section(self) -> bool:
        """Whether it holds keys."""
        return is_dataclass(self.kind)

    @property
    def free(self) -> bool:
        """Whether no result depends on it."""
        return self.said(IsFree) is not None

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, where it takes no others."""
        return get_args(self.element) if get_origin(self.element) is Literal else ()

    @property
    def type_name(self) -> str:
        """Its type in words, null among them where that is allowed."""
        name = "word" if self.choices else "section" if is_dataclass(self.element) else _TYPE_NAMES[self.element]
        form = {tuple: f"list of {name}", dict: f"{name} by name"}.get(get_origin(self.kind), name)
        return form + " or null" * self.optional

    @property
    def allowed(self) -> str:
        """Its range, choices and form, as a clause; empty where any value of its type will do."""
        told = [f"must {words}" for mark in self.marks if (words := _told(mark))]
        told += [f"each must {words}" for mark in self.each if (words := _told(mark))]
        if self.choices:
            told.append(f"{'each ' * (self.kind is not self.element)}must be one of {', '.join(self.choices)}")
        return "; ".join(told) + ", or null" * (bool(told) and self.optional)

    def said[M](self, kind: type[M]) -> M | None:
        """What is said of it, or of each of its values, of one kind."""
        return next((mark for mark in (*self.marks, *self.each) if isinstance(mark, kind)), None)

    def check(self, value: Any) -> None:
        """Raises ValueError in one line that names the key, the value and what is allowed."""
        if value is None and self.optional:
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(self._refusal(self.key, value, "it must be finite"))
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError(self._refusal(self.key, value, "it must be less than 2**63"))
        for mark in self.marks:
            if not _holds(mark, value):
                raise ValueError(self._refusal(self.key, value, f"it must {_told(mark)}"))
        for mark in self.each:
            if isinstance(value, dict):
                for name, item in value.items():
                    if not _holds(mark, item):
                        raise ValueError(self._refusal(f"{self.key}.{name}", item, f"it must {_told(mark)}"))
            elif not all(_holds(mark, item) for item in value):
                raise ValueError(self._refusal(self.key, value, f"each must {_told(mark)}"))

    def _refusal(self, key: str, value: Any, told: str) -> str:
        shown = list(value) if isinstance(value, tuple) else value
        return f"{key}: {shown!r} is not allowed; {told}{', or null' * self.optional}"


_TYPE_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@cache
def facts(section: type) -> Mapping[str, Fact]:
    """The facts of all that stands in a section, its sections among it, by dotted key, in order."""
    return {fact.key: fact for fact in _facts(section, "", ())}


def _facts(section: type, prefix: str, inherited: tuple[Any, ...]) -> Iterator[Fact]:
    hints = get_type_hints(section, include_extras=True)
    for item in fields(section):
        kind, optional, own, each = _unwrapped(hints[item.name])
        marks, key = (*inherited, *own), prefix + item.name
        yield Fact(key=key, owner=section, kind=kind, optional=optional, marks=marks, each=each)
        if is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _facts(kind, f"{key}.", marks)


def _unwrapped(hint: Any) -> tuple[Any, bool, tuple[Any, ...], tuple[Any, ...]]:
    """The bare type of an annotation, whether it allows None, and what it says of the value and of each of several."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, optional, marks, each = _unwrapped(arguments[0])
        return kind, optional, (*marks, *hint.__metadata__), each
    if origin in (Union, UnionType):
        if set(arguments) == {int, float, str}:  # a number, or a schedule of numbers
            return float, False, (), ()
        (inner,) = (item for item in arguments if item is not type(None))
        kind, _, marks, each = _unwrapped(inner)
        return kind, True, marks, each
    if origin in (tuple, dict):
        kind, _, each, _ = _unwrapped(arguments[0 if origin is tuple else 1])
        return GenericAlias(origin, (kind, ...) if origin is tuple else (str, kind)), False, (), each
    return hint, False, (), ()


def _told(mark: Any) -> str:
    """What must hold, in words that follow "it must"; empty for what cannot be wrong."""
    match mark:
        case Gt():
            return f"be greater than {mark.gt}"
        case Ge():
            return f"be {mark.ge} or greater"
        case Interval():
            low, high = "[" if mark.gt is None else "(", "]" if mark.lt is None else ")"
            ends = [next(end for end in pair if end is not None) for pair in ((mark.ge, mark.gt), (mark.le, mark.lt))]
            return f"lie in {low}{ends[0]}, {ends[1]}{high}"
        case Must():
            return mark.told
    return ""


def _holds(mark: Any, value: Any) -> bool:
    if is_dataclass(value) and not isinstance(mark, Must):  # a section: its keys are checked one by one
        return True
    match mark:
        case Gt():
            return value > mark.gt
        case Ge():
            return value >= mark.ge
        case Interval():
            return all(_holds(bound, value) for bound in mark)
        case Must():
            return mark.hold(value)
        case Le():
            return value <= mark.le
        case Lt():
            return value < mark.lt
    return True


@cache
def _docstrings(section: type) -> dict[str, str]:
    """The strings under the fields of a section, which Python itself does not keep."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    out = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        match node, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                out[name] = " ".join(text.split())
    return out


def is_url(place: str) -> bool:
    """Whether a place is an endpoint, not a path."""
    return "://" in place
