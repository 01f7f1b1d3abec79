"""An evaluation in the toy world that kills itself: ``killed_evaluation.py RUN_DIR BASE LOG PATIENCE [KEY=VALUE ...]``.

Every request is a line of LOG: ``ask KIND KEY`` when it is asked and ``got KIND KEY`` when it is answered, KIND chat or
run; at request number PATIENCE the process ends by SIGKILL.
"""

import hashlib
import os
import signal
import sys
import threading
from pathlib import Path

import toy_world

from ctrl_hpc.config import ROOT, load
from ctrl_hpc.evaluate.run import run
from ctrl_hpc.flow.prompts import Prompts


class Counted:
    """A generator or critic, or an executor, whose requests are logged and counted."""

    lock = threading.Lock()
    asked = 0

    def __init__(self, inner, log, patience):
        self.inner, self.log, self.patience = inner, log, patience

    def complete(self, chats, sampling):
        keys = [f"{sampling} {[message.content for message in chat]}" for chat in chats]
        return self._counted(keys, lambda: self.inner.complete(chats, sampling))

    def run_many(self, executions):
        keys = [f"run {item.program} {item.tests}" for item in executions]
        return self._counted(keys, lambda: self.inner.run_many(executions))

    def update_weights(self, place, version):
        return self.inner.update_weights(place, version)

    def _counted(self, keys, answer):
        kind = "run" if keys and keys[0].startswith("run") else "chat"
        names = [f"{kind} {hashlib.sha256(key.encode()).hexdigest()[:16]}" for key in keys]
        with Counted.lock:
            for name in names:
                self._write(f"ask {name}")
                Counted.asked += 1
                if Counted.asked == self.patience:
                    os.kill(os.getpid(), signal.SIGKILL)
            out = answer()
        self._write("\n".join(f"got {name}" for name in names))
        return out

    def _write(self, text):
        os.write(self.log, f"{text}\n".encode())


class Connections:
    """The toy world's, counted."""

    def __init__(self, log, patience):
        plain = toy_world.Connections()
        self.generator = Counted(plain.generator, log, patience)
        self.critic = Counted(plain.critic, log, patience)
        self.executor = Counted(plain.executor, log, patience)


def main(run_dir, base, log, patience, *overrides):
    settings = [f"run_dir={run_dir}", "data.eval_names=[toy]", "eval.critics=[none,base]", f"critic.model={base}"]
    settings += ["eval.chunk=4", "eval.greedy=false", "eval.stop_when_correct=false"]
    config = load(ROOT / "configs" / "tiny.yaml", [*settings, *overrides])
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    connections = Connections(out, int(patience))
    run(config, Path(run_dir), connections, {"toy": toy_world.problems(24)}, Prompts.load("default"))


if __name__ == "__main__":
    main(*sys.argv[1:])
