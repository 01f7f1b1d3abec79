"""Requests whose answers the original SandboxFusion gave (``fusion_answers.json``), and what of an answer counts.

``python tests/sandbox/fusion_requests.py URL`` asks the server there and writes its answers.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx

ANSWERS = Path(__file__).with_name("fusion_answers.json")


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _run(code: str, language: str = "python", **options: Any) -> tuple[str, dict[str, Any]]:
    return "/run_code", {"code": code, "language": language, **options}


def _fenced(code: str, tag: str = "python") -> str:
    return f"Here it is.\n```{tag}\n{code}\n```\n"


def _oj(completion: str, cases: list[tuple[str, str]], language: str = "python", **config: Any) -> tuple[str, Any]:
    test = [{"input": {"stdin": given}, "output": {"stdout": expected}} for given, expected in cases]
    return _submit(completion, "CommonOJDataset", test, language=language, **config)


def _lcb(
    completion: str, inputs: list[str], outputs: list[str], name: str | None = None, **config: Any
) -> tuple[str, Any]:
    test = {"input_output": json.dumps({"inputs": inputs, "outputs": outputs, "fn_name": name})}
    row = {"id": 1, "content": "", "labels": "{}", "test": json.dumps(test)}
    return _submit(completion, "LiveCodeBenchDataset", row, **config)


def _submit(completion: str, kind: str, test: Any, **config: Any) -> tuple[str, dict[str, Any]]:
    row = test if isinstance(test, dict) else {"id": 1, "labels": "{}", "content": "", "test": test}
    settings = {"dataset_type": kind, "provided_data": row, **config}
    return "/submit", {"dataset": "any", "id": 1, "completion": completion, "config": settings}


_ADD = "a, b = map(int, input().split())\nprint(a + b)"
_CASES = [("1 2\n", "3\n"), ("5 6\n", "11\n"), ("0 0\n", "0\n")]
_LAST_WRONG = "a, b = map(int, input().split())\nprint(a + b if a else 1)"
_TEN = [f"{n}\n" for n in range(1, 11)]
_DOUBLED = [f"{2 * n}\n" for n in range(1, 11)]
_TWICE = "class Solution:\n    def twice(self, n: int) -> int:\n        return 2 * n"
_HELLO_CPP = '#include <iostream>\nint main() { std::cout << "hello" << std::endl; }'
_ADD_CPP = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"
_THREAD_CPP = '#include <thread>\n#include <cstdio>\nint main() { std::thread([] { puts("t"); }).join(); }'
_CONCEPT_CPP = "#include <concepts>\ntemplate <std::integral T> T f(T x) { return x; }\nint main() { f(1); }"
_READ_CPP = """#include <fstream>
#include <iostream>
int main() { std::string s; std::ifstream("x") >> s; std::cout << s; }"""
_CRASH_CPP = """#include <iostream>
int main() { int a, b; std::cin >> a >> b; if (a == 5) return 1; std::cout << a + b; }"""

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    # /run_code
    "prints": _run("print(123)"),
    "reads": _run("print(input()[::-1])", stdin="abc"),
    "no stdin is the end of the input": _run("import sys; print(repr(sys.stdin.read()))"),
    "carriage returns stay": _run("import sys; print(repr(sys.stdin.read()))", stdin="1\r\n2\r3"),
    "exit code": _run("import sys; print(1); sys.exit(3)"),
    "a word as exit code": _run("import sys; sys.exit('sorry')"),
    "negative exit code": _run("import sys; sys.exit(-1)"),
    "exception": _run("print(1)\nraise ValueError(2)"),
    "syntax error": _run("int a = 1"),
    "killed by itself": _run("import os; os.kill(os.getpid(), 9)"),
    "aborted": _run("import os; print(1, flush=True); os.abort()"),
    "time limit": _run("import time; time.sleep(3)", run_timeout=0.3),
    "no time at all": _run("print(1)", run_timeout=0),
    "less than none": _run("print(1)", run_timeout=-1),
    "bytes that are no text": _run("import sys; sys.stdout.buffer.write(b'a\\xffb')"),
    "a cut-off character": _run("import sys; sys.stderr.buffer.write('\u20ac'.encode()[:2])"),
    "text of other scripts": _run("print('\u00e4\u4e2d\U0001f600')"),
    "a file": _run("print(open('d/x').read())", files={"d/x": _encoded("inside")}),
    "base64 with newlines": _run("print(open('x').read())", files={"x": "aW5z\naWRl\n"}),
    "a file that is none": _run("import os; print(os.path.exists('x'))", files={"x": None}),
    "a file to be ignored": _run(
        "import os; print(os.path.exists('IGNORE_THIS_FILE'))", files={"IGNORE_THIS_FILE/x": "aA=="}
    ),
    "fetches": _run("open('o', 'w').write('1')", fetch_files=["o", "nowhere"]),
    "fetches by a path with a dot": _run("open('o', 'w').write('1')", fetch_files=["./o"]),
    "fetches by a longer way": _run("import os; os.mkdir('d'); open('o', 'w').write('1')", fetch_files=["d/../o"]),
    "fetches by a path with two slashes": _run(
        "import os; os.mkdir('d'); open('d/o', 'w').write('1')", fetch_files=["d//o"]
    ),
    "fetches from /mnt": _run("open('/mnt/o1', 'w').write('1')", fetch_files=["/mnt/o1"]),
    "fetches after a failure": _run("open('o', 'w').write('1'); 1 / 0", fetch_files=["o"]),
    # /submit, CommonOJDataset
    "all pass": _oj(_fenced(_ADD), _CASES),
    "stops at the first failure": _oj(_fenced("print(3)"), _CASES),
    "all cases": _oj(_fenced("print(3)"), _CASES, extra={"run_all_cases": True}),
    "only the last is wrong": _oj(_fenced(_LAST_WRONG), _CASES, extra={"run_all_cases": True}),
    "a failure in the middle": _oj(
        _fenced("n = int(input())\nprint(1 // (n - 2))"), [("1", "-1"), ("2", "0"), ("3", "1")]
    ),
    "case does not matter": _oj(_fenced("print('YES')"), [("", "yes")]),
    "numbers within 1e-5": _oj(_fenced("print(1.000001)"), [("", "1.0")]),
    "large integers within 1e-5": _oj(_fenced("print(1000000007)"), [("", "1000000000")]),
    "tokens of a line are one text": _oj(_fenced("print('1.00 2.00')"), [("", "1.0 2.0")]),
    "blank lines at the end": _oj(_fenced("print('1\\n\\n')"), [("", "1")]),
    "blank lines within": _oj(_fenced("print('1\\n\\n2')"), [("", "1\n2")]),
    "no number": _oj(_fenced("print(float('nan'))"), [("", "nan")]),
    "infinity for infinity": _oj(_fenced("print('inf')"), [("", "Infinity")]),
    "exit code after the right answer": _oj(_fenced("print(1)\nexit(1)"), [("", "1")]),
    "time limit of a case": _oj(_fenced("while True: pass"), [("", "1")], run_timeout=0.3),
    "long cases are cut where they pass": _oj(_fenced("print(input())"), [("x" * 2000, "x" * 2000)]),
    "long cases are whole where they fail": _oj(_fenced("print(1)"), [("x" * 2000, "x" * 2000)]),
    "whole by option": _oj(_fenced("print(input())"), [("x" * 2000, "x" * 2000)], extra={"return_full_case": True}),
    # what of a completion is the program
    "the first fence of the language": _oj(
        "```\nprint(0)\n```\n```py\nprint(1)\n```\n```py\nprint(2)\n```", [("", "1")]
    ),
    "another language's fence where there is no other": _oj("```java\nprint(1)\n```", [("", "1")]),
    "a fence left open": _oj("```python\nprint(1)\n", [("", "1")]),
    "no fence, a definition": _oj("import os\ndef f():\n    return 1\nprint(f())", [("", "")]),
    "no fence, a class after other text": _oj("So:\n# note\nclass A:\n    x = 1\n\n    y = 2\nDone.", [("", "")]),
    "no program": _oj("I do not know.", [("", "1")]),
    # /submit, LiveCodeBenchDataset
    "one result for all cases": _lcb(_fenced("print(2 * int(input()))"), _TEN, _DOUBLED),
    "wrong on the last of ten": _lcb(
        _fenced("n = int(input())\nprint(2 * n if n < 10 else 0)"), _TEN, _DOUBLED, extra={"run_all_cases": True}
    ),
    "wrong on the first of ten": _lcb(_fenced("n = int(input())\nprint(2 * n if n > 1 else 0)"), _TEN, _DOUBLED),
    "a call": _lcb(_fenced(_TWICE), ["1", "2"], ["2", "4"], "twice"),
    "a wrong call": _lcb(_fenced(_TWICE.replace("2 *", "3 *")), ["1"], ["2"], "twice"),
    "a call without a fence": _lcb(_TWICE, ["1"], ["2"], "twice"),
    "a call that raises": _lcb(_fenced(_TWICE.replace("2 *", "n / 0 *")), ["1"], ["2"], "twice"),
    "a function that is not there": _lcb(_fenced("x = 1"), ["1"], ["2"], "twice"),
    "keys are integers": _lcb(
        _fenced("class Solution:\n    def f(self, d):\n        return sum(d)"), ['{"1": 2, "3": 4}'], ["4"], "f"
    ),
    "does not compile": _lcb(_fenced("print(1"), ["1"], ["2"]),
    "raises": _lcb(_fenced("print(1 // 0)"), ["1"], ["2"]),
    "an endless case": _lcb(_fenced("while True: pass"), ["1"], ["2"], run_timeout=1),
    "names without imports": _lcb(_fenced("print(floor(sqrt(int(input()))))"), ["10"], ["3"]),
    "exit after the right answer": _lcb(_fenced("import sys\nprint(1)\nsys.exit(0)"), ["1"], ["1"]),
    "decimals": _lcb(_fenced("print('1.50')"), ["1"], ["1.5"]),
    "a main guard": _lcb(_fenced("if __name__ == '__main__':\n    print(input())"), ["7"], ["7"]),
}

CPP_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hello": _run(_HELLO_CPP, "cpp"),
    "reads": _run(_ADD_CPP, "cpp", stdin="3 4"),
    "exit code": _run("int main() { return 7; }", "cpp"),
    "does not compile": _run("int main() { object i = ?; }", "cpp"),
    "no main": _run("int f() { return 1; }", "cpp"),
    "aborts": _run("#include <cassert>\nint main() { assert(1 == 2); }", "cpp"),
    "a null pointer": _run("int main() { volatile int *p = nullptr; return *p; }", "cpp"),
    "throws": _run('#include <stdexcept>\nint main() { throw std::runtime_error("x"); }', "cpp"),
    "time limit": _run("int main() { for (volatile int i = 0;; i++) ; }", "cpp", run_timeout=0.3),
    "no time to compile": _run("#include <bits/stdc++.h>\nint main() {}", "cpp", compile_timeout=0.01),
    "sleeps": _run("#include <unistd.h>\nint main() { sleep(3); }", "cpp", run_timeout=0.3),
    "threads": _run(_THREAD_CPP, "cpp"),
    "C++17": _run("#include <optional>\nint main() { std::optional<int> x = 3; return *x - 3; }", "cpp"),
    "no C++20": _run(_CONCEPT_CPP, "cpp"),
    "an include of its own": _run(
        '#include "mine.h"\nint main() { return X; }', "cpp", files={"mine.h": _encoded("#define X 0\n")}
    ),
    "a file": _run(
        _READ_CPP,
        "cpp",
        files={"x": _encoded("inside")},
    ),
    "fetches": _run('#include <fstream>\nint main() { std::ofstream("o") << 1; }', "cpp", fetch_files=["o"]),
    "all pass": _oj(_fenced(_ADD_CPP, "cpp"), _CASES, "cpp"),
    "by another name": _oj(_fenced(_ADD_CPP, "c++"), _CASES, "cpp"),
    "stops at the first failure": _oj(_fenced(_HELLO_CPP, "cpp"), _CASES, "cpp"),
    "all cases": _oj(
        _fenced('#include <cstdio>\nint main() { puts("3"); }', "cpp"), _CASES, "cpp", extra={"run_all_cases": True}
    ),
    "a submission that does not compile": _oj(_fenced("int main() { return x; }", "cpp"), _CASES, "cpp"),
    "no fence": _oj(_ADD_CPP, _CASES, "cpp"),
    "crashes on the second": _oj(_fenced(_CRASH_CPP, "cpp"), _CASES, "cpp"),
}


def facts(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What of an answer clients rely on."""
    if path == "/run_code":
        return _of_run(answer)
    return {
        "accepted": answer["accepted"],
        "extracted_code": answer["extracted_code"],
        "tests": [
            {
                "passed": test["passed"],
                "test_info": test["test_info"],
                **_of_run(test["exec_info"]),
            }
            for test in answer["tests"]
        ],
    }


def _of_run(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"status": answer["status"]}
    for part in ("compile_result", "run_result"):
        result = answer[part]
        if result is not None:
            code = result["return_code"]
            found[part] = {"status": result["status"], "return_code": code}
    ran = answer["run_result"]
    if ran is not None and ran["status"] == "Finished":
        stdout, stderr = ran["stdout"], ran["stderr"]
        message = stdout.partition("'error_message': ")[2].split("'")[1:2]
        found["stdout"] = message[0] if message else stdout
        found["stderr"] = "DecodeError" if stderr.startswith("[DecodeError]") else bool(stderr)
    if answer["files"]:
        found["files"] = answer["files"]
    return found


def ask(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The facts of a server's answer."""
    answer = httpx.post(url + path, json=body, timeout=60)
    if answer.status_code != 200:
        return {"http": answer.status_code, "detail": answer.json()["detail"]}
    return facts(path, answer.json())


if __name__ == "__main__":
    asked = {"python": REQUESTS, "cpp": CPP_REQUESTS}
    told = [
        json.dumps([kind, name, ask(sys.argv[1], *request)])
        for kind, group in asked.items()
        for name, request in group.items()
    ]
    ANSWERS.write_text("[\n" + ",\n".join(told) + "\n]\n")
