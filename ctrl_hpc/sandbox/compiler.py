"""From source to binary: programs and checkers compiled in a jail of their own, each once."""

from __future__ import annotations

import base64
import dataclasses
import json

from ctrl_hpc.records import Limits, TestResult
from ctrl_hpc.sandbox import languages
from ctrl_hpc.sandbox.jail import CANNOT_EXECUTE, JailFault, Kind
from ctrl_hpc.sandbox.jails import ATTEMPTS, FAULTS, Jails, Role
from ctrl_hpc.sandbox.job_files import encode, job_files, result_of
from ctrl_hpc.sandbox.languages import Binaries, Built, Language

FETCHED_BYTES = 24 << 20
"""The most, as JSON, that is taken out of a jail."""
LIMITS_OF_MOVES = Limits(cpu_s=10.0, wall_s=30.0, output_bytes=FETCHED_BYTES)
"""Limits of a job that puts files into a jail or takes them out."""


class Compiler:
    """Compiles in a worker's jails; binaries are kept."""

    def __init__(self, jails: Jails, binaries: Binaries) -> None:
        self._jails, self._binaries = jails, binaries

    def build(self, name: str, program: str, files: dict[str, str], timeout_s: float | None) -> Built:
        """The binary of a program among files (base64 by path), kept from before or made now."""
        key = languages.key(name, program, files, timeout_s)
        known = self._binaries.get(key)
        if known is not None:
            return known
        with self._binaries.building(key):
            known = self._binaries.get(key)
            if known is not None:
                return known
            built = Built(compiled=TestResult(status="not_run"))
            for _ in range(ATTEMPTS):
                try:
                    built = self._compile(languages.LANGUAGES[name], program, files, timeout_s)
                    break
                except FAULTS as error:
                    built = Built(compiled=self._jails.lost(error))
            if built.compiled.status not in ("accepted", "sandbox_error"):
                built = Built(compiled=dataclasses.replace(built.compiled, status="compile_error"))
            self._binaries.put(key, built)
            return built

    def _compile(self, language: Language, program: str, files: dict[str, str], timeout_s: float | None) -> Built:
        limits = languages.limits(language, timeout_s)
        put = files | {language.source: base64.b64encode(encode(program)).decode("ascii")}
        with (
            job_files(json.dumps(put).encode()) as sources,
            job_files("\0".join(language.command).encode()) as run,
            job_files(json.dumps([languages.BINARY]).encode()) as got,
        ):
            placed = self._jails.run(Kind.PUT, sources, LIMITS_OF_MOVES, Role.COMPILER, keep=True)
            ended = self._jails.run(Kind.EXECUTE, run, limits, Role.COMPILER, keep=True)
            compiled = result_of(ended, run, limits)
            taken = self._jails.run(Kind.FETCH, got, LIMITS_OF_MOVES, Role.COMPILER)
            if placed.exit_code != 0:
                raise ValueError("files: they do not fit into the working folder")
            if compiled.exit_code == CANNOT_EXECUTE:
                raise JailFault(compiled.stderr.decode("utf-8", "replace"))
            content, _ = got.contents(2, FETCHED_BYTES)
        if compiled.status == "accepted":
            binary = json.loads(content).get(languages.BINARY) if taken.exit_code == 0 else None
            if binary is not None:
                return Built(compiled=compiled, binary=base64.b64decode(binary))
            remark = b"the compiler made no binary, or one that is too large\n"
            compiled = dataclasses.replace(compiled, exit_code=1, stderr=compiled.stderr + remark)
        elif compiled.status != "runtime_error":
            remark = f"the compiler reached its {compiled.status.replace('_', ' ')}\n".encode()
            code = None if compiled.status == "time_limit" else 1
            compiled = dataclasses.replace(compiled, exit_code=code, stderr=compiled.stderr + remark)
        return Built(compiled=dataclasses.replace(compiled, status="compile_error", exit_code=compiled.exit_code))
