"""Executors: untrusted programs run against tests, each test in its own process inside a jail."""

from ctrl_hpc.sandbox.pool import Sandbox

__all__ = ["Sandbox"]
