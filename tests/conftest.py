"""What every test needs: few threads that do not spin, no network, no user settings of wandb, kernels interpreted."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest
import submitit  # noqa: F401 (first of all: it sets up logging, which closes the handlers that are there)
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton's first import, whichever test file causes it
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background of a shell: children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("project", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("project")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A service that is started in the tests' process sets torch's threads, which change the order of sums."""
    yield
    torch = sys.modules.get("torch")
    wanted = int(os.environ["OMP_NUM_THREADS"])
    if torch is not None and torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
