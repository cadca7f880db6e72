"""A training step with quantized matrices against the same model in full precision, option by option.

    bash run_scripts/bench.sh bitnet [--rounds 5] [--dtype fp32 bf16] [--options ternary hadamard ...]

A dense attention model of 384 channels and 4 layers, SwiGLU, on 2 x 256 tokens: forward, backward, clipping, AdamW, one
thread. Beside steps per CPU-second and the ratio of CPU-seconds (quantized / full) stand the loss of the first forward
pass, what a micro-batch keeps for its backward pass, the most that two steps add to the resident set of a process that
has the model and its gradients, and what is smaller by how much in true bytes: the packed matrices with their steps
against 16 bits, and the whole model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.models.hybrid import HybridModel
from megaforge.optim import Optimizer
from megaforge.optim.clip import clip_gradients
from megaforge.parallel.after_update import Update, after_update
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.quant.statistics import FULL_BYTES, quantized_layers, quantized_size
from tests.bench.harness import interleaved_ratio, print_json, print_table

TERNARY: dict[str, Any] = {"quantize_weights": "ternary"}
OPTIONS: dict[str, dict[str, Any]] = {
    "binary": {"quantize_weights": "binary"},
    "ternary": TERNARY,
    "int4": {"quantize_weights": "int4"},
    "int8": {"quantize_weights": "int8"},
    "weights alone": TERNARY | {"quantize_activations": "none"},
    "activations alone": {"quantize_activations": "int8"},
    "4-bit activations": TERNARY | {"quantize_activations": "int4"},
    "asymmetric activations": TERNARY | {"asymmetric_activations": True},
    "rows": TERNARY | {"quant_granularity": "channel"},
    "groups": TERNARY | {"quant_granularity": "group", "quant_group_size": 64},
    "asymmetric int4": {"quantize_weights": "int4", "asymmetric_weights": True},
    "noise": TERNARY | {"quant_noise": 0.1},
    "hadamard": TERNARY | {"hadamard": 64},
    "sub norm": TERNARY | {"sub_norm": True},
    "qat_adam": TERNARY | {"optimizer": "qat_adam"},  # of the optimizer, as most others are of the model
    "fp16 steps": TERNARY | {"quant_scale_dtype": "fp16"},
    "attention alone": TERNARY | {"bitnet_layers": ("attention",)},
    "static steps": TERNARY | {"online_calibration": True},
    "clipped": TERNARY | {"quant_clip": "both"},
    "lambda 0.5": TERNARY | {"share": 0.5},
    "teacher": TERNARY | {"teacher": True},
}
BATCH, LENGTH, VOCAB, RATE = 2, 256, 2048, 1e-4
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Trained:
    """A model with what trains it, and its batch."""

    options: dict[str, Any]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        ctx = self.ctx = ParallelContext.single()
        shape: dict[str, Any] = {"num_layers": 4, "hidden_size": 384, "ffn_hidden_size": 1024, "num_attention_heads": 6}
        kind: dict[str, Any] = {"layer_schedule": "attention", "ffn": "dense", "activation": "swiglu"}
        options = dict(self.options)
        rule, share = options.pop("optimizer", "adam"), options.pop("share", 1.0)
        self.teacher = Trained({}, self.dtype).model.eval() if options.pop("teacher", False) else None
        cfg = ModelConfig(**shape, **kind, vocab_size=VOCAB, **options)
        self.model = HybridModel(make_layer_context(cfg, ctx, dtype=self.dtype))
        initialize_parameters(self.model, ctx, seed=0)
        self.reducer = GradientReducer(self.model, ctx)
        self.optimizer = Optimizer(OptimizerConfig(optimizer=rule, lr=RATE), self.model, ctx)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
        self._settle(share)

    @torch.no_grad()
    def _settle(self, share: float) -> None:
        """What training would set: lambda, clips, and the range that the first batch has."""
        ops = [op for _, _, op in quantized_layers(self.model)]
        for op in ops:
            op.share = share
            if op.ranges is not None and op.ranges.clip is not None:
                op.ranges.clip.fill_(1.25)
            op.forget()
        static = [op.ranges for op in ops if op.ranges is not None and op.ranges.input is not None]
        for ranges in static:
            ranges.watches = True
        if static:
            self.loss()
        for ranges in static:
            assert ranges.input is not None and ranges.seen is not None
            ranges.watches = False
            ranges.input.copy_(ranges.seen)

    def loss(self) -> Tensor:
        tokens, mask = self.tokens[:, :-1], torch.ones(BATCH, LENGTH)
        output = self.model(tokens, self.tokens[:, 1:], mask)
        total = output.loss_sum
        if self.teacher is not None:
            with torch.no_grad():
                theirs = self.teacher.head_input(tokens, self.teacher.pack(tokens, None))
            head, x = output.head_input
            total = total + head.divergence(x, self.teacher.head, theirs, 1.0).sum()
        return total / mask.numel()

    def step(self) -> float:
        """CPU-seconds of one step."""
        start = time.process_time()
        self.reducer.zero_grad()
        self.reducer.set_last_microbatch(True)
        self.loss().backward()
        self.reducer.finish_grad_sync()
        clip_gradients(self.model, self.ctx, 1.0)
        self.optimizer.step(RATE)
        after_update(self.model, Update(self.ctx, {}))
        return time.process_time() - start

    def kept_bytes(self) -> int:
        """What one micro-batch keeps besides weights."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        assert loss.requires_grad
        return sum(kept.values())


def peak_bytes(kind: str, options: dict[str, Any]) -> int:
    """What two steps add at most to what is there before the first, in a process of its own."""
    given = json.dumps([kind, options])
    done = subprocess.run([sys.executable, __file__, "--peak-of", given], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(given: str) -> None:
    kind, options = json.loads(given)
    trained = Trained(options, TYPES[kind])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_bytes("VmRSS")
    trained.step()
    trained.step()
    print(resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        return print_peak(args.peak_of)
    cases: dict[str, dict[str, Any]] = {}
    for kind in args.dtype:
        dtype = TYPES[kind]
        full = Trained({}, dtype)
        facts = [float(full.loss().detach()), full.kept_bytes() / 1e6, peak_bytes(kind, {}) / 1e6]
        rows: list[list[object]] = []
        for name in args.options:
            quantized = Trained(OPTIONS[name], dtype)
            loss, kept = float(quantized.loss().detach()), quantized.kept_bytes() / 1e6
            peak, size = peak_bytes(kind, OPTIONS[name]) / 1e6, quantized_size(quantized.model)
            smaller = size.elements * FULL_BYTES / size.matrix_bytes if size.matrices else 1.0
            ratio = interleaved_ratio(quantized.step, full.step, args.rounds)
            if not rows:
                rows.append(["full precision", 1 / ratio.peer, 1.0, "", *facts, 1.0, 1.0])
            spread = f"{ratio.min:.2f} - {ratio.max:.2f}"
            rows.append([name, 1 / ratio.candidate, ratio.median, spread, loss, kept, peak, smaller, size.compression])
            measured = {"kept_mb": kept, "peak_mb": peak, "loss": loss, "compression": round(smaller, 3)}
            cases[f"{kind} {name}"] = ratio.case("the same model in full precision", **measured)
        header = ["option", "steps/s", "time / full", "spread", "first loss", "kept MB", "peak MB"]
        header += ["matrices smaller", "model smaller"]
        print_table(f"{kind}, CPU-seconds, one thread, {args.rounds} rounds", header, rows)
    print_json("bitnet", cases)


if __name__ == "__main__":
    main()
