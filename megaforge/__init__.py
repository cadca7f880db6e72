"""MegaForge: model-parallel pretraining of hybrid language models on torch.distributed."""

__version__ = "0.1.0"
