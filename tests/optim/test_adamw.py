from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim import Optimizer, adamw
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.param_spec import ParamSpec, make_parameter, named_specs
from megaforge.parallel.zero import ShardedParameters
from tests.optim.small_model import SPECS, SmallModel, global_gradients, set_gradients

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8)
RATES = (1e-2, 2e-2, 5e-3, 1e-3)


def reference(start: dict[str, torch.Tensor], gradients: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Algorithm 2 of arXiv 1711.05101 in fp64, one parameter after another."""
    weights = {}
    for spec in SPECS:
        weight = start[spec.name].double().clone()
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        for t, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
            lr = rate * spec.lr_mult
            weight *= 1 - lr * (0.1 if spec.weight_decay else 0.0)
            mean = 0.9 * mean + 0.1 * gradient[spec.name]
            square = 0.95 * square + 0.05 * gradient[spec.name] ** 2
            weight -= lr * (mean / (1 - 0.9**t)) / ((square / (1 - 0.95**t)).sqrt() + 1e-8)
        weights[spec.name] = weight
    return weights


def run_steps(optimizer: Optimizer, model: SmallModel, ctx: ParallelContext, steps: range) -> None:
    for step in steps:
        set_gradients(model, ctx, global_gradients(step))
        optimizer.step(RATES[step])


def masters(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, _, tensor in optimizer.weight_entries()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_steps_follow_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    ctx = ParallelContext.single()
    model = SmallModel(ctx, dtype)
    optimizer = Optimizer(CONFIG, model, ctx)
    start = masters(optimizer)
    run_steps(optimizer, model, ctx, range(4))
    expected = reference(start, [global_gradients(step) for step in range(4)])
    for spec, parameter in named_specs(model):
        wide_difference = (parameter.detach().double() - expected[spec.name]).norm() / expected[spec.name].norm()
        assert wide_difference < (2e-6 if spec.name == "mix" and dtype != torch.float64 else tolerance), spec.name


def test_bf16_parameters_have_fp32_masters_that_keep_small_updates() -> None:
    ctx = ParallelContext.single()
    model = SmallModel(ctx, torch.bfloat16)
    optimizer = Optimizer(CONFIG, model, ctx)
    start = masters(optimizer)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(tensor.dtype == torch.float32 for _, _, tensor in optimizer.entries())
    run_steps(optimizer, model, ctx, range(4))
    expected = reference(start, [global_gradients(step) for step in range(4)])
    after = masters(optimizer)
    for spec, parameter in named_specs(model):
        assert (after[spec.name].double() - expected[spec.name]).norm() < 2e-6 * expected[spec.name].norm()
        assert torch.equal(parameter.detach(), after[spec.name].to(parameter.dtype))
    assert not torch.equal(after["row.weight"], after["row.weight"].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_optimizer_continues_bit_for_bit(dtype: torch.dtype) -> None:
    ctx = ParallelContext.single()
    model = SmallModel(ctx, dtype)
    optimizer = Optimizer(CONFIG, model, ctx)
    run_steps(optimizer, model, ctx, range(2))
    saved = {key: tensor.clone() for key, _, tensor in optimizer.entries()}
    state = optimizer.state()

    other_model = SmallModel(ctx, dtype)
    other = Optimizer(CONFIG, other_model, ctx)
    for key, _, tensor in other.entries():
        tensor.copy_(saved[key])
    other.load_state(state)
    other.after_load()
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(one, two)
    run_steps(optimizer, model, ctx, range(2, 4))
    run_steps(other, other_model, ctx, range(2, 4))
    for (key, _, one), (_, _, two) in zip(optimizer.entries(), other.entries(), strict=True):
        assert torch.equal(one, two), key
    assert other.state() == {"step": 4, "states": ["exp_avg", "exp_avg_sq"]}


def test_entries_name_weights_and_moments() -> None:
    ctx = ParallelContext.single()
    model = SmallModel(ctx)
    model.declared[1].requires_grad_(False)
    optimizer = Optimizer(CONFIG, model, ctx)
    assert [(key, spec.name) for key, spec, _ in optimizer.entries()] == [
        ("column.weight", "column.weight"),
        ("row.weight", "row.weight"),
        ("mix", "mix"),
        ("optimizer.exp_avg.column.weight", "column.weight"),
        ("optimizer.exp_avg_sq.column.weight", "column.weight"),
        ("optimizer.exp_avg.mix", "mix"),
        ("optimizer.exp_avg_sq.mix", "mix"),
    ]


def test_who_only_loads_weights_pays_for_no_moments() -> None:
    ctx = ParallelContext.single()
    optimizer = Optimizer(CONFIG, SmallModel(ctx, torch.bfloat16), ctx)
    optimizer.weight_entries()
    optimizer.after_load()
    assert not any(main.state for main in optimizer.main.trained)


def test_shards_take_the_steps_of_the_whole() -> None:
    whole_ctx = ParallelContext.single()
    whole_model = SmallModel(whole_ctx, torch.float64)
    whole = Optimizer(CONFIG, whole_model, whole_ctx)
    run_steps(whole, whole_model, whole_ctx, range(4))
    expected = masters(whole)
    for rank in range(2):
        ctx = ParallelContext.of_rank(rank, 2, tp=2)
        model = SmallModel(ctx, torch.float64)
        optimizer = Optimizer(CONFIG, model, ctx)
        run_steps(optimizer, model, ctx, range(4))
        for key, spec, tensor in optimizer.weight_entries():
            torch.testing.assert_close(tensor, spec.take_local(expected[key], ctx), rtol=1e-13, atol=1e-14)


class FusedAdamStandIn(torch.optim.Optimizer):
    """What NVIDIA's FusedAdam documents: its arguments, its two moments, and one step count per group."""

    def __init__(self, params: list, lr: float, betas: tuple, eps: float, adam_w_mode: bool, weight_decay: float = 0.0):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                unbiased = (square / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * (mean / (1 - beta1 ** group["step"])) / unbiased)


class ApexLoop(FusedAdamStandIn):
    """The same update through a model of apex's ``multi_tensor_apply`` (csrc/multi_tensor_apply.cuh): it writes chunks
    of tensors into tables of fixed size, and launches when one is full or at the last chunk of the last tensor."""

    TENSORS, BLOCKS, CHUNK = 36, 320, 4  # of FusedAdam's four lists; a chunk has 65,536 elements there

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            tensors: list[torch.Tensor] = []
            blocks: list[tuple[torch.Tensor, int]] = []
            for t, p in enumerate(group["params"]):
                tensors.append(p)
                assert len(tensors) <= self.TENSORS, "written past the end of the table"
                chunks = -(-p.numel() // self.CHUNK)
                for chunk in range(chunks):
                    blocks.append((p, chunk))
                    is_last = chunk == chunks - 1
                    full = (len(tensors) == self.TENSORS and is_last) or len(blocks) == self.BLOCKS
                    if full or (t == len(group["params"]) - 1 and is_last):
                        for tensor, place in blocks:
                            self.update(group, tensor, slice(place * self.CHUNK, (place + 1) * self.CHUNK))
                        tensors, blocks = [] if is_last else [p], []

    def update(self, group: dict, p: torch.Tensor, part: slice) -> None:
        beta1, beta2 = group["betas"]
        state, weight, grad = self.state[p], p.view(-1)[part], p.grad.view(-1)[part]
        mean, square = (state[name].view(-1)[part] for name in ("exp_avg", "exp_avg_sq"))
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        unbiased = (square / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
        weight.sub_(group["lr"] * (mean / (1 - beta1 ** group["step"])) / unbiased)


class ManyVectors(torch.nn.Module):
    """Sizes from 1 to 9, so that slices of buckets leave ranks nothing of many of them."""

    def __init__(self, ctx: ParallelContext, number: int) -> None:
        super().__init__()
        specs = [ParamSpec(f"vector.{i:03}", (1 + i % 9,), Normal(1.0)) for i in range(number)]
        self.declared = torch.nn.ParameterList([make_parameter(spec, ctx, torch.float32) for spec in specs])
        initialize_parameters(self, ctx, seed=0)


@pytest.mark.parametrize("number", [1, 3, 60, 200])
def test_apex_updates_every_element_of_every_share(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """With ZeRO a rank has nothing of most parameters; what it has must move, wherever it stands in the list."""
    results: dict[str, dict[str, torch.Tensor]] = {"NVIDIA apex FusedAdam": {}, "torch fused AdamW": {}}
    empty = 0
    for rank in range(4):
        ctx = ParallelContext.of_rank(rank, 4)
        for apex in (True, False):
            monkeypatch.setattr(adamw, "_on_cuda", lambda masters, apex=apex: apex)
            monkeypatch.setattr(adamw, "_nvidia_fused_adam", lambda: ApexLoop)
            model = ManyVectors(ctx, number)
            shards = ShardedParameters(model, ctx, bucket_size=70)
            optimizer = Optimizer(CONFIG, model, ctx, shards)
            start = masters(optimizer)
            empty += sum(not len(tensor) for tensor in start.values())
            assert len(optimizer.state_entries()) == 2 * number, "checkpoints still name all of them"
            for parameter in model.parameters():
                held = optimizer_shard(parameter)
                parameter.main_grad = 1.0 + torch.arange(held.start, held.stop, dtype=torch.float32)
            optimizer.step(1e-2)
            after = masters(optimizer)
            assert all(bool((after[name] != tensor).all()) for name, tensor in start.items())
            has_some = any(map(len, after.values()))
            taken = "NVIDIA apex FusedAdam" if apex else "torch fused AdamW"
            assert optimizer.implementation == (taken if has_some else "nothing to update")
            results["NVIDIA apex FusedAdam" if apex else "torch fused AdamW"] |= {
                f"{rank} {name}": tensor for name, tensor in after.items()
            }
    assert empty
    apex_results, torch_results = results.values()
    for name, tensor in apex_results.items():
        torch.testing.assert_close(tensor, torch_results[name], rtol=1e-6, atol=1e-7, msg=name)


def install(monkeypatch: pytest.MonkeyPatch, **modules: types.ModuleType) -> None:
    for name, module in modules.items():
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def test_nvidia_fused_adam_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdamStandIn  # type: ignore[attr-defined]
    install(monkeypatch, apex=types.ModuleType("apex"), apex__optimizers=optimizers, amp_C=types.ModuleType("amp_C"))
    found = adamw._nvidia_fused_adam()
    assert found is FusedAdamStandIn
    ctx = ParallelContext.single()
    model, peer_model = SmallModel(ctx), SmallModel(ctx)
    peer = Optimizer(CONFIG, peer_model, ctx)
    assert peer.implementation == "torch fused AdamW"  # a CPU never takes apex
    monkeypatch.setattr(adamw, "_on_cuda", lambda masters: True)
    optimizer = Optimizer(CONFIG, model, ctx)
    assert optimizer.implementation == "NVIDIA apex FusedAdam"
    run_steps(optimizer, model, ctx, range(2))
    run_steps(peer, peer_model, ctx, range(2))
    resumed = Optimizer(CONFIG, model, ctx)
    for (_, _, new), (_, _, old) in zip(resumed.entries(), optimizer.entries(), strict=True):
        new.copy_(old)
    resumed.load_state(optimizer.state())
    optimizer = resumed
    run_steps(optimizer, model, ctx, range(2, 4))
    run_steps(peer, peer_model, ctx, range(2, 4))
    for (key, _, one), (_, _, two) in zip(optimizer.entries(), peer.entries(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=key)
    in_fp64 = Optimizer(CONFIG, SmallModel(ctx, torch.float64), ctx)
    assert in_fp64.implementation == "torch fused AdamW"  # apex has no fp64


def test_the_other_package_called_apex_and_one_without_cuda_code_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)
    install(monkeypatch, apex=types.ModuleType("apex"), amp_C=types.ModuleType("amp_C"))
    assert adamw._nvidia_fused_adam() is None
    monkeypatch.delitem(sys.modules, "amp_C")
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdamStandIn  # type: ignore[attr-defined]
    install(monkeypatch, apex__optimizers=optimizers)
    assert adamw._nvidia_fused_adam() is None


def test_plain_adam_takes_the_decay_into_the_gradient() -> None:
    """``--no-decoupled-weight-decay`` is torch's Adam with L2, and its state is that of AdamW."""
    ctx = ParallelContext.single()
    model = SmallModel(ctx, torch.float64)
    optimizer = Optimizer(replace(CONFIG, decoupled_weight_decay=False), model, ctx)
    start = masters(optimizer)
    copies = {spec.name: torch.nn.Parameter(start[spec.name].clone()) for spec in SPECS}
    plain = torch.optim.Adam(
        [
            {"params": [copies[spec.name]], "weight_decay": 0.1 if spec.weight_decay else 0.0, "mult": spec.lr_mult}
            for spec in SPECS
        ],
        betas=(0.9, 0.95),
    )
    for step, rate in enumerate(RATES):
        given = global_gradients(step)
        for group in plain.param_groups:
            group["lr"] = rate * group["mult"]
        for spec in SPECS:
            copies[spec.name].grad = given[spec.name].clone()
        plain.step()
    run_steps(optimizer, model, ctx, range(4))
    for name, tensor in masters(optimizer).items():
        torch.testing.assert_close(tensor, copies[name].detach(), rtol=1e-12, atol=1e-14)
    assert optimizer.implementation == "torch fused Adam"
    assert optimizer.state() == Optimizer(CONFIG, SmallModel(ctx), ctx).state() | {"step": 4}
