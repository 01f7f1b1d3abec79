"""Executors: untrusted programs run against tests, each test in its own process inside a jail."""

from ctrl_hpc.sandbox.sandbox import Sandbox

__all__ = ["Sandbox"]
