"""A rank that publishes versions of a critic as differences while it is trained (see ``megatron_jobs.spawn``).

Leaves ``weights/vN``, and beside each, as a whole folder, ``whole/N``; older versions go as in a run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megatron_jobs import LAYOUTS, sequences
from ranks import STEADY, arranged

from ctrl_hpc.config import RLConfig
from ctrl_hpc.megatron import weights
from ctrl_hpc.train.batch import collate
from ctrl_hpc.train.losses import SFTLoss
from ctrl_hpc.train.policy import Policy
from ctrl_hpc.train.publish import Publisher

VERSIONS = 6
FULL_EVERY = 4
LAYOUT = "tp2"


def check(folder: Path) -> None:
    """Train a step between the versions."""
    weights.BUCKET_BYTES = 8 << 10  # so that both ranks have a part
    source = folder / "models" / "qwen2-tied"
    for config, world in arranged(LAYOUTS[int(os.environ["WORLD_SIZE"])][LAYOUT]):
        options = RLConfig(publish="delta", publish_full_every=FULL_EVERY)
        policy = Policy(replace(config, rl=options), world, source, optimizer=STEADY)
        batch = collate(sequences(policy.architecture.vocab_size))
        publisher = Publisher(policy, folder / "publishing", source)
        for version in range(VERSIONS):
            publisher.publish(version)
            policy.export(folder / "publishing" / "whole" / str(version), source=source)
            if version != 2:  # version 3 is version 2 again: nothing has changed
                policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), STEADY.lr)  # while the version is written
        publisher.wait()
