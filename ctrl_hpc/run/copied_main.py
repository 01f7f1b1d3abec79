"""What runs when Python is given a copy of the code as its program: ``python RUN/code/HASH -m MODULE [ARGUMENT ...]``.

The copy comes first on the module path, of this process and of those it starts: before an installed package, before
the working directory, which ``python -m`` would put there, and before what ``PYTHONPATH`` names.
"""

import os
import runpy
import sys


def main() -> None:
    """Run the module as ``python -m`` would, from this copy; ``-u`` is allowed before ``-m``."""
    here = os.path.dirname(os.path.abspath(__file__))
    words = [word for word in sys.argv[1:2] if word != "-u"] + sys.argv[2:]
    if len(words) < 2 or words[0] != "-m":
        sys.exit(f"usage: {sys.executable} {here} [-u] -m MODULE [ARGUMENT ...]")
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *(place for place in given if place not in ("", here))])
    sys.path[:] = [here, *(place for place in sys.path if os.path.abspath(place) != here)]
    sys.argv = [words[1], *words[2:]]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
