"""GPU time of one RWKV-7 block of width 4096 on 8 x 4096 tokens in bf16, forward and backward, by kind of kernel."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from tests.gpu.first_day.kernel_time import by_kind

BATCH, LENGTH, WIDTH = 8, 4096, 4096


def main(batch: int = BATCH, length: int = LENGTH, width: int = WIDTH, device: str = "cuda") -> None:
    cfg = ModelConfig(
        num_layers=2,
        hidden_size=width,
        ffn_hidden_size=4 * width,
        rwkv_head_size=64,
        layer_schedule="rwkv",
        ffn="dense",
        vocab_size=64,
    )
    ctx = ParallelContext.single(device)
    model = HybridModel(make_layer_context(cfg, ctx, dtype=torch.bfloat16))
    initialize_parameters(model, ctx, seed=0)
    block = model.layers["1"]  # the first makes v_first, all others mix it in
    info = PackedSequence(batch, length, torch.device(device))
    x, v_first, grad = (torch.randn(length, batch, width, device=device, dtype=torch.bfloat16) for _ in range(3))

    def once() -> None:
        block.zero_grad(set_to_none=True)
        block(x.requires_grad_(), info, {"v_first": v_first.requires_grad_()})[0].backward(grad)

    once()
    once()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        once()
        if device == "cuda":
            torch.cuda.synchronize()
    times = [
        (event.key, event.self_device_time_total)
        for event in seen.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    for name, time in sorted(times, key=lambda item: -item[1])[:25]:
        print(f"{time / 1e3:10.2f} ms  {name[:100]}")
    for kind, time in by_kind(times).most_common():
        print(f"figure {kind} = {time / 1e3:.2f}")
    if device == "cuda":
        print(f"figure peak = {torch.cuda.max_memory_allocated() / 1e9:.1f}")


if __name__ == "__main__":
    main()
