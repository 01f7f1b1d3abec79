"""Harnesses: what a data set's own grader puts around a program, the same for a run and for ``/submit``.

A grader's preamble is run in the program's namespace before the program, from a source of its own: so that a
``from __future__`` import still comes first, the program's lines keep their numbers, and names that only the preamble
brought in never hide the solution's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

_LIVE_CODE_BENCH = """
from string import *;from re import *;from datetime import *;from collections import *;from heapq import *
from bisect import *;from copy import *;from math import *;from random import *;from statistics import *
from itertools import *;from functools import *;from operator import *;from io import *;from sys import *
from json import *;from builtins import *;from typing import *
import string,re,datetime,collections,heapq,bisect,copy,math,random,statistics,itertools,functools,operator,io,sys,json
sys.setrecursionlimit(600000)
__any_exit__ = True
"""
"""As in ``lcb_runner/evaluation/testing_util.py``. The limit of recursion is the larger of those that its versions set,
as SandboxFusion's too; it takes no account of how a program leaves (``__any_exit__``, see ``inside/child.py``)."""
_TACO = """
import sys,time,itertools,collections,math,fractions,random,heapq
from itertools import accumulate,product,permutations,combinations
from collections import Counter,OrderedDict,deque,defaultdict,ChainMap
from functools import lru_cache
from math import sqrt,sin,cos,tan,ceil,fabs,floor,gcd,exp,log,log2
from typing import List,Tuple
from heapq import *
stdin,stdout = sys.stdin,sys.stdout
"""
"""As in TACO's ``metrics/testing_util.py``; its ``import numpy as np`` is added to programs that say ``np``."""
_NUMPY = """
try: import numpy as np
except ImportError: pass
"""
_SAYS_NUMPY = re.compile(r"\bnp\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """What a grader does before the tests."""

    preamble: Callable[[str, str], str]
    """``(starter code, program)`` -> source that is run before the program."""
    whole: Callable[[str, str], str] = lambda _, program: program
    """``(starter code, program)`` -> the program as the grader would compile it."""


def _fixed(text: str) -> Callable[[str, str], str]:
    return lambda starter, program: text.lstrip("\n")


def _taco(starter: str, program: str) -> str:
    return (_TACO + (_NUMPY if _SAYS_NUMPY.search(program) else "")).lstrip("\n")


def _around(starter: str, program: str) -> str:
    """The imports and helpers of a prompt that is code: all but the last function, which is the one asked for."""
    tree = _parsed(starter)
    functions = _functions(tree)
    if tree is None or not functions:
        return ""
    kept = [node for node in tree.body if node is not functions[-1]]
    return "".join(ast.unparse(node) + "\n" for node in kept)


def _completed(starter: str, program: str) -> str:
    """The prompt and the program where only both together define the function asked for, else the program alone."""
    asked = _functions(_parsed(starter))
    if not asked or asked[-1].name in {node.name for node in _functions(_parsed(program))}:
        return program
    together = starter.rstrip("\n") + "\n" + program
    if _parsed(program) is None and _parsed(together) is not None:
        return together
    return program


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _functions(tree: ast.Module | None) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    body = tree.body if tree is not None else []
    return [node for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


HARNESSES: dict[str, Harness] = {
    "": Harness(preamble=_fixed("")),
    "livecodebench": Harness(preamble=_fixed(_LIVE_CODE_BENCH)),
    "taco": Harness(preamble=_taco),
    "humaneval": Harness(preamble=_around, whole=_completed),
    "mbpp": Harness(preamble=_around),
    "codecontests": Harness(preamble=_fixed("")),
}
"""Harnesses by the name that a problem gives; the empty name puts nothing around a program."""


def harness(name: str) -> Harness:
    """The harness of that name; ValueError lists the names there are."""
    if name not in HARNESSES:
        raise ValueError(f"harness: {name!r} is not one of {', '.join(filter(None, HARNESSES))}, or empty for none")
    return HARNESSES[name]


def prepared(name: str, starter_code: str | None, program: str) -> tuple[str, str]:
    """The preamble that is run before a program, and the program, as the harness of that name has them."""
    found = harness(name)
    return found.preamble(starter_code or "", program), found.whole(starter_code or "", program)
