"""Checkpoints of NVIDIA's Megatron-LM, both ways (https://github.com/NVIDIA/Megatron-LM)."""
