"""The flags by which offline tools open a trained model, and the model that they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megaforge.config.arguments import integer, part_of
from megaforge.registry import DEVICES

if TYPE_CHECKING:
    from megaforge.inference.restore import TrainedModel


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, where its tokenizer is, and on how many ranks it computes."""
    parser.add_argument(
        "--load",
        required=True,
        metavar="DIR|FILE.safetensors",
        help="a run's --save directory, one checkpoint, or a file made of one",
    )
    parser.add_argument("--tokenizer-model", metavar="FILE", help="where the tokenizer is now, if it was moved")
    parser.add_argument("--tp", type=integer(1), help="tensor-parallel size (default: all ranks of a stage)")
    parser.add_argument("--pp", type=integer(1), default=1, help="pipeline stages, one a rank")
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="merge this adapter in (docs/finetuning.md), ours or one of Hugging Face's peft",
    )
    parser.add_argument("--ema", action="store_true", help="with the average of the weights (--ema-decay)")
    parser.add_argument(
        "--use-custom-kernels",
        action="store_true",
        help="multiply quantized matrices by packed 1-, 2- or 4-bit kernels",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of weights and activations (default: as in training)"
    )
    parser.add_argument("--device", type=part_of(DEVICES), default="auto", help="where to compute: cpu, cuda or auto")


def open_model(flags: argparse.Namespace) -> TrainedModel:
    """The model that the flags of :func:`add_model_flags` name
    (:func:`megaforge.inference.restore.load_trained_model`). Collective."""
    from megaforge.inference.restore import load_trained_model

    return load_trained_model(
        flags.load,
        tp=flags.tp,
        pp=flags.pp,
        device=flags.device,
        ema=flags.ema,
        kernels=flags.use_custom_kernels,
        dtype=flags.dtype,
        adapter=flags.adapter,
    )
