"""ctrl-hpc: train code critics with reinforcement learning (CTRL, arXiv 2502.03492) on a Slurm cluster or a laptop."""

from ctrl_hpc.launch import launch

__all__ = ["launch"]
__version__ = "0.1.0"
