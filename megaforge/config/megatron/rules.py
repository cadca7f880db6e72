"""What several flags of Megatron-LM's say together: one function each, before the flags are looked up one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from megaforge.config.megatron.layer_freq import layer_freq

if TYPE_CHECKING:
    from megaforge.config.megatron.line import Line

_TYPE, _ROTARY = "--position-embedding-type", "--use-rotary-position-embeddings"
_GROUPED, _GROUPS = "--group-query-attention", "--num-query-groups"
_STRATEGY = "--data-parallel-sharding-strategy"
_STAGES = {"no_shard": "0", "optim": "1", "optim_grads": "2"}


def no_learned_positions(line: Line) -> None:
    """``--no-position-embedding`` says that there is no learned table, beside rotary positions or none at all."""
    flag = "--no-position-embedding"
    if line.find(flag) is None:
        return
    line.drop(flag)
    if line.find(_ROTARY) is not None or line.value(_TYPE) in ("rope", "none"):
        line.needless.append(flag)
    else:
        line.refused.append(
            f"{flag}: Megatron-LM takes it beside {_TYPE} rope, to say that there is no learned table; write {_TYPE} "
            "rope, or none for no positions at all"
        )


def grouped_queries(line: Line) -> None:
    """Groups need both flags there: one alone is one group, or is not read."""
    if line.find(_GROUPED) is not None:
        line.drop(_GROUPED)
        if line.find(_GROUPS) is None:
            line.add(_GROUPS, "1")
            line.notes.append(f"{_GROUPED} without {_GROUPS}: one group, as in Megatron-LM")
        else:
            line.needless.append(_GROUPED)
    elif line.as_there and line.find(_GROUPS) is not None:
        line.refused.append(
            f"{_GROUPS} {line.value(_GROUPS)}: Megatron-LM does not read it without {_GROUPED}; add that, or leave it "
            "out"
        )
        line.drop(_GROUPS)


def sharding(line: Line) -> None:
    """``--use-megatron-fsdp`` shards what its strategy says."""
    flag, strategy = "--use-megatron-fsdp", line.value(_STRATEGY)
    if line.find(flag) is None:
        if line.find(_STRATEGY) is not None:
            line.needless.append(f"{_STRATEGY} {strategy} (without {flag})")
            line.drop(_STRATEGY)
        return
    line.drop(flag, _STRATEGY, "--use-distributed-optimizer")
    strategy = strategy or "optim_grads_params"
    if strategy in _STAGES:
        line.add("--zero-stage", _STAGES[strategy])
    else:
        line.refused.append(
            f"{flag} with {_STRATEGY} {strategy}: sharded weights (ZeRO-3) are not available; write --zero-stage 2 in "
            "place of both"
        )


_MOE_ALONE = ("moe",)  # of --recompute-modules


def recomputation(line: Line) -> None:
    """What is computed again: memory only, so that a set that we do not have is taken for the nearest."""
    names = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules")
    granularity, short = line.value(names[0]), line.find("--recompute-activations")
    modules = found.values if (found := line.find(names[3])) is not None else ["core_attn"]
    given = " ".join(one.written for one in line.given if one.flag in (*names, "--recompute-activations"))
    if not given:
        return
    line.drop(*names, "--recompute-activations")
    if granularity == "full":
        line.add("--recompute", "full")
    elif granularity == "selective" or (granularity is None and short is not None):
        moe = tuple(modules) == _MOE_ALONE
        line.add("--recompute", "moe" if moe else "selective")
        if not moe and set(modules) != {"core_attn"}:
            line.notes.append(f"{given}: taken for --recompute selective, attention's mixing of tokens")
    elif granularity is None:
        line.refused.append(f"{given}: says how, not what; write --recompute full, selective or moe")
    else:
        line.refused.append(f"{given}: write --recompute full, selective or moe")


def document_resets(line: Line) -> None:
    """Positions and mask restart together here."""
    both = ("--reset-position-ids", "--reset-attention-mask")
    found = [flag for flag in both if line.find(flag) is not None]
    if line.find("--dataloader-inter-document-masking") is not None or len(found) == 2:
        line.drop("--dataloader-inter-document-masking", *both)
        line.add("--reset-at-document-boundaries")
    elif found:
        line.drop(*both)
        other = next(flag for flag in both if flag not in found)
        line.refused.append(
            f"{found[0]} without {other}: write --reset-at-document-boundaries, which does both at once"
        )


def gpt2_tokenizer(line: Line) -> None:
    """``GPT2BPETokenizer`` is what ``--vocab-file`` and ``--merge-file`` make."""
    kind = "--tokenizer-type"
    if line.value(kind) == "GPT2BPETokenizer":
        line.drop(kind)
        if line.find("--vocab-file") is None or line.find("--merge-file") is None:
            line.refused.append(f"{kind} GPT2BPETokenizer: reads two files; add --vocab-file FILE --merge-file FILE")


def resume(line: Line) -> None:
    """``--resume [DIR]``: ``--load DIR``, or what ``--save`` has."""
    found = line.find("--resume")
    if found is None:
        return
    line.drop("--resume")
    where = found.values[0] if found.values else line.value("--save")
    if where is None:
        line.refused.append("--resume: give the directory to continue from, or --save DIR, which is taken then")
    elif len(found.values) > 1:
        line.refused.append(f"{found.written}: give one directory")
    else:
        line.add("--load", where)


def wandb(line: Line) -> None:
    """``--use-wandb``: a project of our name, where the line gives none."""
    if line.find("--use-wandb") is not None:
        line.drop("--use-wandb")
        if line.find("--wandb-project") is None:
            line.add("--wandb-project", "megaforge")


def whole_numbers(line: Line) -> None:
    """Megatron-LM reads some whole numbers as others: ``--loss-scale-window 1000.0``."""
    one = line.find("--loss-scale-window")
    if one is not None and len(one.values) == 1 and re.fullmatch(r"\d+\.0*", one.values[0]):
        one.values = [one.values[0].partition(".")[0]]
        one.words = [one.flag, *one.values]


def split_in_quotes(line: Line) -> None:
    """Megatron-LM looks for numbers in the text of ``--split``, and its scripts pass quotes along."""
    one = line.find("--split")
    if one is not None and len(one.values) == 1:
        one.values = [one.values[0].strip("'\" ")]
        one.words = [one.flag, *one.values]


RULES: tuple[Callable[[Line], None], ...] = (
    no_learned_positions,
    grouped_queries,
    sharding,
    recomputation,
    document_resets,
    layer_freq,
    gpt2_tokenizer,
    resume,
    wandb,
    whole_numbers,
    split_in_quotes,
)

# The flags that rules take from a line, which no table has, and how many values each has.
TAKES = {
    **dict.fromkeys(("--no-position-embedding", _GROUPED, "--use-megatron-fsdp", "--recompute-activations"), 0),
    **dict.fromkeys(("--reset-position-ids", "--reset-attention-mask", "--dataloader-inter-document-masking"), 0),
    **dict.fromkeys((_STRATEGY, "--recompute-granularity", "--recompute-method", "--recompute-num-layers"), 1),
    "--use-wandb": 0,
}
# Those that may have any number of them.
TAKES_ANY = ("--recompute-modules", "--moe-layer-freq", "--resume")
