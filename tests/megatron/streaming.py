"""A rank that loads a critic of several files under a limit on its memory, and exports it into several files.

``check`` is a rank of a job (see ``megatron_jobs.spawn``); reads FOLDER/sharded, leaves
FOLDER/sharded-export and FOLDER/streaming-RANK.json.
"""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace
from pathlib import Path

from ranks import CONFIG

from ctrl_hpc.config import ParallelConfig
from ctrl_hpc.megatron import architecture as architectures
from ctrl_hpc.megatron import export, model, parallel_state, weights

SLACK = 4 << 20
FILE_BYTES = 20 << 20


def held_bytes() -> int:
    """Private writable memory of this process: what RLIMIT_DATA counts."""
    return int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024


def loads_within(folder: Path, extra: int) -> bool:
    """Whether this rank's weights can be loaded with so many bytes beyond what the empty model takes."""
    source = folder / "sharded"
    size = int(os.environ["WORLD_SIZE"])
    config = replace(CONFIG, parallel=ParallelConfig(tensor=size))
    world = parallel_state.initialize(config)
    architecture = architectures.read(source)
    built = model.build(architecture, config.parallel, world)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held_bytes() + extra, before[1]))
    try:
        weights.load(built, source, architecture, world)
    except (RuntimeError, MemoryError):
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    export.FILE_BYTES = FILE_BYTES
    export.export(built, architecture, world, folder / "sharded-export", source=source)
    return True


def check(folder: Path) -> None:
    """Load with a tensor's bytes to spare, and two mapped files', which the limit counts though they are no memory."""
    hf = json.loads((folder / "sharded" / "config.json").read_text())
    tensor = hf["vocab_size"] * hf["hidden_size"] * 4
    mapped = sorted(file.stat().st_size for file in (folder / "sharded").glob("*.safetensors"))[-2:]
    spare = tensor + sum(mapped) + SLACK
    found = {"loaded": loads_within(folder, spare), "spare": spare}
    (folder / f"streaming-{os.environ['RANK']}.json").write_text(json.dumps(found))
