"""The trainer's two stages, SFT and RL, on Megatron-core and the project's loss kernels."""
