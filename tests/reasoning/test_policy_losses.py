"""Advantages and losses of reinforcement learning, against the papers' sums written with loops in numpy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from megaforge.reasoning.advantages import discounted_advantages, group_advantages, over_mean, varied, whitened
from megaforge.reasoning.policy_losses import adapted, clipped_surrogate, entropy, is_clipped, k3, value_loss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages(scale: bool) -> None:
    """DeepSeekMath section 4.1; without a deviation Dr. GRPO's."""
    rewards = draw(5, 4)
    rewards[1] = 0.25  # all alike
    rewards[2] *= 1e-9
    found = group_advantages(rewards, scale=scale)
    for group, ours in zip(rewards.numpy(), found.numpy(), strict=True):
        mean = sum(group) / 4
        deviation = math.sqrt(sum((one - mean) ** 2 for one in group) / 3)
        np.testing.assert_allclose(ours, [(r - mean) / (deviation + 1e-6 if scale else 1) for r in group], atol=1e-12)
    assert group_advantages(torch.tensor([[3.0]])).tolist() == [[0.0]]
    assert varied(rewards).tolist() == [True, False, True, True, True]


def test_rewards_that_are_alike_are_at_their_mean() -> None:
    """Exactly, of any number of any size: less a rounded mean, some would be below it."""
    for value in (1.07, 0.1, -0.013333333333333334, 1e300):
        assert all(over_mean([value] * number) == [0.0] * number for number in range(1, 12)), value
    found = over_mean(numbers := [1.1, 0.93, 1.1, -0.04, 1e-9])
    np.testing.assert_allclose(found, np.array(numbers) - np.mean(numbers), atol=1e-15)
    for numbers in ([0.1, 0.7, 0.3], [-0.01, 0.99, 0.97, 0.3, 1e-17], [0.5, 0.7, 0.6, 0.6]):  # the sign is the true one
        mean = sum(map(Fraction, numbers)) / len(numbers)
        assert [one >= 0 for one in over_mean(numbers)] == [Fraction(one) >= mean for one in numbers]


@pytest.mark.parametrize("horizon", [None, 1, 2, 9])
def test_generalised_advantages(horizon: int | None) -> None:
    """Equation 16 of 1506.02438, summed term by term."""
    rewards, values, gamma, lam = draw(3, 5, seed=1), draw(3, 5, seed=2), 0.97, 0.9
    lengths = [5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    found, returns = discounted_advantages(rewards, values, mask, gamma=gamma, lam=lam, horizon=horizon)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(5):
            last = length if horizon is None else min(length, t + horizon)
            terms = [(gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, last)]
            expected = sum(terms) if t < length else 0.0
            assert found[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t] if t < length else 0.0, abs=1e-12)


def test_with_lambda_one_a_return_is_the_discounted_sum() -> None:
    rewards, mask = draw(1, 4), torch.ones(1, 4, dtype=torch.bool)
    _, returns = discounted_advantages(rewards, draw(1, 4, seed=3), mask, gamma=0.5, lam=1.0)
    assert returns[0, 0].item() == pytest.approx(sum(0.5**t * r for t, r in enumerate(rewards[0].tolist())), abs=1e-12)


def test_whitening() -> None:
    x, mask = draw(3, 4), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    found, kept = whitened(x, mask), x[mask].numpy()
    np.testing.assert_allclose(found[mask], (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), rtol=1e-12)
    assert not found[~mask].any()
    assert whitened(torch.ones(1, 2), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert whitened(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_clipped_surrogate(dual: float | None) -> None:
    old, advantage = draw(400, seed=4), draw(400, seed=5)
    new = (old + 2 * draw(400, seed=6)).requires_grad_()
    loss = clipped_surrogate(new, old, advantage, low=0.2, high=0.28, dual=dual)
    loss.sum().backward()
    told = is_clipped(new, old, advantage, low=0.2, high=0.28)
    assert new.grad is not None
    for n in range(400):
        ratio, a = math.exp(new[n].item() - old[n].item()), advantage[n].item()
        value = -min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
        slope = 0.0 if (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8) else -ratio * a
        assert bool(told[n]) == (slope == 0.0)
        if dual is not None and a < 0 and value > -dual * a:
            value, slope = -dual * a, 0.0
        assert loss[n].item() == pytest.approx(value, rel=1e-12)
        assert new.grad[n].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)


def test_at_the_old_policy_the_gradient_is_reinforce() -> None:
    old, advantage = draw(6), draw(6, seed=1)
    new = old.clone().requires_grad_()
    loss = clipped_surrogate(new, old, advantage, low=0.2, high=0.2, dual=3.0)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    torch.testing.assert_close(loss, -advantage)
    torch.testing.assert_close(gradient, -advantage)


def test_the_mean_of_k3_is_the_divergence() -> None:
    """Exactly, over all that can be decided; and its gradient is that of its formula."""
    ours, theirs = draw(4, seed=7).log_softmax(0), draw(4, seed=8).log_softmax(0)
    expected = sum(p * (math.log(p) - q) for p, q in zip(ours.exp().tolist(), theirs.tolist(), strict=True))
    assert (ours.exp() * k3(ours, theirs)).sum().item() == pytest.approx(expected, rel=1e-12)
    new = draw(9, seed=9).requires_grad_()
    assert (k3(new, draw(9)) >= 0).all() and k3(new, new).abs().max() == 0
    assert torch.autograd.gradcheck(lambda x: k3(x, draw(9)), new)


def test_value_losses() -> None:
    values, old, returns = draw(50, seed=1), draw(50, seed=2), draw(50, seed=3)
    for clip in (None, 0.3):
        for v, o, r, found in zip(values, old, returns, value_loss(values, old, returns, clip), strict=True):
            held = v if clip is None else o + max(-clip, min(clip, v - o))
            assert found.item() == pytest.approx(max((v - r) ** 2, (held - r) ** 2) / 2)


def test_entropy_leaves_out_what_cannot_be_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    found = entropy(logits.log_softmax(-1))
    weights = [math.exp(x) for x in (1.0, 2.0, 0.5)]
    shares = [w / sum(weights) for w in weights]
    assert found.tolist() == pytest.approx([-sum(p * math.log(p) for p in shares), math.log(2)])
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_the_coefficient_follows_its_target() -> None:
    assert adapted(0.1, kl=0.05, target=0.05, horizon=10) == 0.1
    assert adapted(0.1, kl=9.0, target=0.05, horizon=10) == pytest.approx(0.1 * 1.02)
    assert adapted(0.1, kl=0.0, target=0.05, horizon=10) == pytest.approx(0.1 * 0.98)
    assert adapted(0.1, kl=0.055, target=0.05, horizon=1) == pytest.approx(0.1 * 1.1)
