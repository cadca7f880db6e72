"""Times attention forward and backward: causal, packed by documents, with groups, deterministic or
not; prints which kernels each takes."""

from __future__ import annotations

import time

import torch
from torch.profiler import ProfilerActivity, profile

from megaforge.kernels.attention import causal_attention
from megaforge.parallel.packed_sequence import PackedSequence

LENGTH, HEADS, WIDTH, ROUNDS = 2048, 16, 128, 20


def main() -> None:
    start = torch.zeros(1, LENGTH, dtype=torch.bool)
    start[0, ::300] = True
    info = PackedSequence(1, LENGTH, torch.device("cuda"), start)
    forms = {
        "causal": {},
        "documents": {"segments": info.segments(range(LENGTH), range(LENGTH))},
    }
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        for form, given in forms.items():
            for groups in (HEADS, 4):
                name = f"{form}-{groups}-{'deterministic' if deterministic else 'free'}"
                q, k, v = (
                    torch.randn(1, h, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                    for h in (HEADS, groups, groups)
                )
                grad = torch.randn_like(q)

                def once(q=q, k=k, v=v, given=given, grad=grad) -> None:
                    torch.autograd.grad(causal_attention(q, k, v, **given), (q, k, v), grad)

                try:
                    measure(name, once)
                except RuntimeError as error:
                    print(f"{name}: {' '.join(str(error).split())[:300]}")


def measure(name: str, once) -> None:
    for _ in range(3):
        once()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        once()
    torch.cuda.synchronize()
    print(f"figure {name} = {1e3 * (time.perf_counter() - begin) / ROUNDS:.3f}")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        once()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    print("  " + "; ".join(event.key[:60] for event in events[:3]))


if __name__ == "__main__":
    main()
