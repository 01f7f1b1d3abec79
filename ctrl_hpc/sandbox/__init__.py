"""Executors: untrusted programs run against tests, each test in its own process inside a jail.

``special.load`` makes special judges of functions in files, for ``Sandbox(judges=...)``.
"""

from ctrl_hpc.sandbox import judge as special
from ctrl_hpc.sandbox.sandbox import Sandbox

__all__ = ["Sandbox", "special"]
