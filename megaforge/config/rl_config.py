"""Flags of reinforcement learning (``--objective agent``): episodes, rewards, and how a policy is trained by them."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.combined_config import CombinedLossConfig
from megaforge.config.fields import flag
from megaforge.errors import UserError
from megaforge.registry import MEMORY_SEARCHES, RL_ALGORITHMS

MEANS = ("episode", "decision", "constant")


@dataclass(frozen=True)
class ReinforcementConfig(CombinedLossConfig):
    """Reinforcement learning of a memory agent (--objective agent)."""

    rl_algorithm: str = flag(
        "grpo",
        "what episodes are compared with: their group (grpo), or a value that is learnt (ppo)",
        choices=RL_ALGORITHMS,
    )
    rl_group_size: int = flag(16, "episodes of one example, one after the other in the data", least=1, most=1 << 16)
    rl_epochs: int = flag(
        1, "steps that learn from the same episodes; the data of those in between is not played", least=1, most=1 << 16
    )
    rl_clip: float = flag(0.2, "how far below 1 the ratio of new and old probabilities counts", above=0, below=1)
    rl_clip_high: float | None = flag(None, "the same above 1; by default as --rl-clip (DAPO: 0.28)", above=0)
    rl_dual_clip: float | None = flag(
        3.0, "the most that a decision that went badly costs, times its advantage", above=1, words={"off": None}
    )
    rl_scale_advantages: bool = flag(
        True, "--rl-algorithm grpo: divide by the group's standard deviation (Dr. GRPO does not)"
    )
    rl_mean: str = flag(
        "episode",
        "what the loss is a mean of: decisions within an episode, then episodes; all decisions alike (DAPO); or sums "
        "divided by --agent-steps, over episodes (Dr. GRPO)",
        choices=MEANS,
    )
    rl_drop_equal_groups: bool = flag(
        False, "leave out groups whose episodes all have the same reward (DAPO; see --rl-resample)"
    )
    rl_resample: int = flag(
        0,
        "draw groups whose episodes all have the same reward again, of other examples, at most so many times (DAPO's "
        "dynamic sampling)",
        least=0,
        most=1 << 16,
    )
    rl_kl: float = flag(0.02, "weight of the divergence (k3) from the policy that the run began with", least=0)
    rl_kl_target: float | None = flag(None, "change that weight so that the divergence comes to be this", above=0)
    rl_kl_horizon: float = flag(50.0, "with --rl-kl-target: steps in which the weight changes by a fifth", least=1)
    rl_kl_limit: float | None = flag(
        None, "halve the learning rate while the divergence from the first policy is above this", above=0
    )
    rl_kl_collapse: float | None = flag(
        None, "go back (--spike-rollback), or end the run, where the divergence is above this", above=0
    )
    rl_entropy: float = flag(0.0, "weight of the policy's entropy, which is kept high", least=0)
    rl_gamma: float = flag(
        0.995, "--rl-algorithm ppo: a reward counts by this to the power of the decisions until it", least=0, most=1
    )
    rl_lambda: float = flag(0.95, "--rl-algorithm ppo: of generalised advantages", least=0, most=1)
    rl_horizon: int = flag(256, "--rl-algorithm ppo: decisions that an advantage looks ahead", least=1, most=1 << 24)
    rl_value_weight: float = flag(0.5, "--rl-algorithm ppo: weight of the value's loss", least=0)
    rl_value_clip: float | None = flag(
        0.2,
        "--rl-algorithm ppo: how far a value moves from the old one before that stops to pay",
        above=0,
        words={"off": None},
    )
    rl_action_cost: float = flag(0.01, "what each action but summarize takes off the reward", least=0)
    rl_stability: float = flag(
        0.1, "what the share of its group's episodes that end as it did adds to an episode's reward", least=0
    )
    agent_chunks: int = flag(16, "chunks of an episode's text", least=1, most=1 << 24)
    agent_window: int = flag(
        24, "tokens of chunks that the agent has in sight besides what it reads", least=1, most=1 << 30
    )
    agent_answer_steps: int = flag(
        4, "decisions behind the last chunk, at most, before the answer", least=0, most=1 << 20
    )
    agent_steps: int = flag(64, "decisions of an episode, at most", least=1, most=1 << 24)
    memory_slots: int = flag(1024, "chunks that the episodic index holds", least=1, most=1 << 30)
    memory_working: int = flag(1024, "summaries that working memory holds", least=1, most=1 << 30)
    memory_index: str = flag("torch", "what searches the episodic index", choices=MEMORY_SEARCHES)
    memory_top_k: int = flag(4, "chunks that retrieve finds", least=1, most=1 << 20)
    memory_loss_weight: float = flag(
        1.0, "weight of the summariser's own loss: what it cannot make again of the hidden vectors", least=0
    )

    @property
    def clip_high(self) -> float:
        """Above 1."""
        return self.rl_clip if self.rl_clip_high is None else self.rl_clip_high

    def validate(self) -> None:
        """
        Raises:
            UserError: an episode may need more decisions than it has.
        """
        needed = self.agent_chunks + self.agent_answer_steps
        if needed > self.agent_steps:
            raise UserError(
                f"--agent-steps {self.agent_steps}: {self.agent_chunks} chunks and {self.agent_answer_steps} decisions "
                f"behind them need {needed}; give at least that, or fewer --agent-chunks"
            )
