"""What the flags of reinforcement learning need beside them."""

from __future__ import annotations

from dataclasses import fields

from megaforge.config.config import Config
from megaforge.config.core_text_config import CoreTextConfig
from megaforge.config.peft_method import PeftMethod
from megaforge.config.rl_config import ReinforcementConfig
from megaforge.config.rollout_config import RolloutConfig
from megaforge.config.run_memory_config import RunMemoryConfig
from megaforge.config.run_partners import Partner

_OF_MEMORY = tuple(f"run_memory.{one.name}" for one in fields(RunMemoryConfig))
_AGENT = ("training.objective",)
_FLAGS = tuple(f"rl.{one.name}" for one in fields(ReinforcementConfig))
_OF_AGENTS = ("rl.agent_", "rl.memory_", "rl.rl_action_cost", "rl.rl_stability", "rl.rl_entropy", "rl.rl_ce_")
_PPO = tuple(f"rl.rl_{name}" for name in ("gamma", "lambda", "horizon", "value_weight", "value_clip"))


def _plays(config: Config) -> bool:
    return config.training.objective == "agent"


def _writes(config: Config) -> bool:
    return config.training.objective == "rlvr"


def keeps_first_weights(config: Config) -> bool:
    """Whether the run keeps a copy of the weights that it began with: the reference of a policy that writes and all of
    whose weights are trained."""
    return _writes(config) and config.model.peft is None and config.rl.rl_kl > 0


def has_reference(config: Config) -> bool:
    """Whether a policy that writes is compared with another: with itself without adapters, or with the weights that
    the run began with."""
    return config.model.peft is not None or keeps_first_weights(config)


def _learns(config: Config) -> bool:
    """Whether from rewards."""
    return _plays(config) or _writes(config)


def _asks(config: Config) -> bool:
    """Whether the data are questions, or texts with a question."""
    return any(path.startswith(("tasks://", "questions://")) for path in config.data.data_path)


def _beside(config: Config) -> bool:
    """Whether adapters, if there are any, stand beside matrices, so that the model without them is at hand."""
    method: PeftMethod | None = config.model.peft_method
    return method is None or method.low_rank or config.model.peft == "plastic"


def _drops(config: Config) -> float:
    return config.model.hidden_dropout or config.model.attention_dropout or config.model.adapter_dropout


def _fits(config: Config) -> bool:
    """Whether a row has room for a full window, a chunk and a question; a word is a token or more."""
    return config.rl.agent_window + config.tasks.task_chunk_tokens < config.data.seq_length


def _grows(config: Config) -> bool:
    return bool(config.training.rampup_batch_size or config.training.step_batch_size_schedule)


REINFORCEMENT = (
    Partner(
        tuple(f"core_text.{one.name}" for one in fields(CoreTextConfig)),
        lambda c: c.stages.stage == "b",
        "it is about what stage B begins with: give it in the section stage_b or in --stage-b-flags, or add --stage b",
    ),
    Partner(
        ("model.agent_heads", *(name for name in _FLAGS if name.startswith(_OF_AGENTS)), _OF_MEMORY[0]),
        _plays,
        "nobody plays episodes: add --objective agent",
    ),
    Partner(
        tuple(name for name in _FLAGS if not name.startswith(_OF_AGENTS)),
        _learns,
        "nothing is learnt from rewards: add --objective agent or --objective rlvr",
    ),
    Partner(
        tuple(f"rollout.{one.name}" for one in fields(RolloutConfig)),
        _writes,
        "nothing is written to be rewarded: add --objective rlvr",
    ),
    Partner(
        ("rollout.rl_task_chunks", "rollout.rl_chunk_tokens"),
        lambda c: any(path.startswith("tasks://") for path in c.data.data_path),
        "questions of a file have no chunks: give --data-path tasks://kv_chunks",
    ),
    Partner(
        ("rollout.rl_memory_tokens", "rollout.rl_reading_prompt"),
        lambda c: c.rollout.rl_chunk_tokens,
        "nothing is read chunk by chunk: add --rl-chunk-tokens 64",
    ),
    Partner(_AGENT, lambda c: not _writes(c) or _asks(c), "nothing is asked: give --data-path tasks://kv_chunks"),
    Partner(
        ("rl.rl_algorithm",),
        lambda c: not _writes(c) or c.rl.rl_algorithm == "grpo",
        "there is no value head beside the model's: use --rl-algorithm grpo, or --objective agent",
    ),
    Partner(
        ("rl.rl_kl_target", "rl.rl_kl_limit", "rl.rl_kl_collapse"),
        lambda c: not _writes(c) or has_reference(c),
        "where all weights are trained and --rl-kl is 0 there is no reference: add --rl-kl 0.02, or --peft lora",
    ),
    Partner(
        ("parallel.context_parallel_size",),
        lambda c: not _writes(c),
        "answers are written by ranks that have whole texts: use --cp 1 with --objective rlvr",
    ),
    Partner(
        ("model.mtp_num_layers",),
        lambda c: not _writes(c) or c.model.peft is not None,
        "further predictions would not be trained: use --mtp-num-layers 0, or --peft lora, with --objective rlvr",
    ),
    Partner(
        ("model.memory_dim", "model.memory_stride"),
        lambda c: c.model.agent_heads,
        "there is no memory: add --agent-heads --objective agent",
    ),
    Partner(
        _AGENT, lambda c: not _plays(c) or c.model.agent_heads, "the model has no heads that decide: add --agent-heads"
    ),
    Partner(
        _AGENT,
        lambda c: not _plays(c) or any(path.startswith("tasks://") for path in c.data.data_path),
        "there are no episodes: give --data-path tasks://kv_chunks",
    ),
    Partner(
        ("rl.agent_window",),
        lambda c: not _plays(c) or _fits(c),
        "a context with a full window, a chunk and the question would be longer than a row: use a shorter "
        "--agent-window or --task-chunk-tokens, or a longer --seq-length",
    ),
    Partner(
        _AGENT,
        lambda c: not _learns(c) or not _drops(c),
        "what is dropped in a step is not in the pass that plays: use --hidden-dropout 0 --attention-dropout 0 "
        "--lora-dropout 0",
    ),
    Partner(
        _AGENT,
        lambda c: not _learns(c) or _beside(c),
        "the reference is the model without adapters, which must stand beside it: use --peft lora, qlora or plastic",
    ),
    Partner(
        _AGENT,
        lambda c: not _learns(c) or not (c.training.full_batch_size or 1) % c.rl.rl_group_size,
        "groups would be cut: make --global-batch-size a multiple of --rl-group-size",
    ),
    Partner(
        _AGENT,
        lambda c: not _learns(c) or not _grows(c),
        "groups would be cut where the batch grows: leave out --rampup-batch-size and --step-batch-size-schedule",
    ),
    Partner(
        _AGENT,
        lambda c: not _learns(c) or c.model.reset_at_document_boundaries,
        "contexts behind each other must not see each other: leave out --no-reset-at-document-boundaries",
    ),
    Partner(
        ("resilience.halve_micro_batch_on_oom",),
        lambda c: not _learns(c),
        "rows of contexts do not divide into halves: use a smaller --micro-batch-size with --objective agent or rlvr",
    ),
    Partner(
        _OF_MEMORY[1:],
        lambda c: c.run_memory.kept,
        "the run has no memory, each episode begins empty: add --agent-memory run",
    ),
    Partner(_PPO, lambda c: c.rl.rl_algorithm == "ppo", "there is no value that is learnt: add --rl-algorithm ppo"),
    Partner(
        ("rl.rl_scale_advantages",),
        lambda c: c.rl.rl_algorithm != "ppo",
        "nothing is compared within groups: add --rl-algorithm grpo",
    ),
    Partner(
        ("rewards.rl_reward", "rewards.rl_format"),
        _learns,
        "nobody is rewarded: add --objective agent or --objective rlvr",
    ),
    Partner(
        ("rewards.rl_format",),
        lambda c: "format" in c.rewards.rewards,
        "no reward reads it: add --rl-reward exact format=0.1",
    ),
    Partner(
        ("rewards.rl_reward",),
        lambda c: "format" not in c.rewards.rewards or c.rewards.rl_format is not None,
        "the reward format looks for an expression: add --rl-format '####'",
    ),
    Partner(
        ("rl.rl_ce_weight",),
        lambda c: c.model.peft,
        "nothing that foretells tokens is trained: add --peft lora or plastic",
    ),
    Partner(
        ("rl.rl_ce_samples", "rl.rl_ce_data"), lambda c: c.rl.rl_ce_weight, "no text is learnt: add --rl-ce-weight 0.1"
    ),
    Partner(
        ("rl.rl_ce_samples",),
        lambda c: c.rl.rl_ce_samples <= c.rl.rl_group_size,
        "a sample comes with one text at most: use at most --rl-group-size",
    ),
    Partner(("rl.rl_kl_horizon",), lambda c: c.rl.rl_kl_target, "the weight does not change: add --rl-kl-target 0.02"),
)
