"""Models of megatron-core on gloo ranks, and the checkpoints that it writes of them.

megatron-core is made for GPUs. Where it asks for one, :func:`on_cpu` answers for it; what it computes and what it
writes stay its own.
"""

from __future__ import annotations

import argparse
import queue
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

LAYERS, HIDDEN, HEADS, INNER, VOCAB, LENGTH, ITERATION = 4, 32, 4, 48, 64, 32, 7
SHAPE = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": INNER}
LLAMA = {"normalization": "RMSNorm", "swiglu": True, "num_query_groups": 2, "untie_embeddings_and_output_weights": True}
# Megatron-LM's arguments of each model, beside SHAPE.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "rotary_base": 500},
    "mixtral": {
        **LLAMA,
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_shared_expert_intermediate_size": 16,
    },
    "gpt": {
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "bias_gelu_fusion": True,
        "hidden_dropout": 0.1,
    },
    # Layers of two kinds, which Megatron-LM numbers instead of stacking them.
    "qwen": {
        **LLAMA,
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_layer_freq": [0, 1, 1, 0],
        "moe_ffn_hidden_size": 24,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "qk_layernorm": True,
        "add_qkv_bias": True,
        "use_rope_scaling": True,
        "rope_scaling_factor": 4.0,
    },
    "neox": {
        "normalization": "LayerNorm",
        "rotary_percent": 0.5,
        "rotary_interleaved": True,
        "rotary_seq_len_interpolation_factor": 2,
        "bias_gelu_fusion": False,
        "squared_relu": False,
    },
}

FORMS = ("torch_dist", "torch", "singletons")  # the last: torch_dist with every expert and half under its own key
TOKENS = torch.arange(24).view(2, 12) * 5 % 61


def available() -> None:
    """Skips where megatron-core is not installed."""
    if find_spec("megatron") is None or find_spec("megatron.core") is None:  # importing it takes seconds
        pytest.skip("needs the extra 'test': megatron-core")


def arguments(kind: str, tp: int = 1, pp: int = 1, ep: int = 1) -> argparse.Namespace:
    """As Megatron-LM keeps them in a checkpoint."""
    from megatron.core.enums import ModelType

    given = SHAPE | KINDS[kind]
    silent = {"position_embedding_type": "rope", "rotary_percent": 1.0, "norm_epsilon": 1e-5, "add_bias_linear": False}
    return argparse.Namespace(
        kv_channels=HIDDEN // HEADS,
        max_position_embeddings=LENGTH,
        seq_length=LENGTH,
        padded_vocab_size=VOCAB,
        model_type=ModelType.encoder_or_decoder,
        params_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        group_query_attention="num_query_groups" in given,
        **(silent | given),
    )


@contextmanager
def on_cpu() -> Iterator[None]:
    """megatron-core without a GPU, and without processes of its own: a rank of the pool may start none."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe import moe_utils

    writer: Any = filesystem_async.FileSystemWriterAsync

    def write_here(transforms: Any, use_msc: bool, rank: int, buckets: Any, results: Any) -> None:
        written = {}
        for index, bucket in enumerate(buckets):
            one, count = queue.Queue[Any](), queue.Queue[Any]()
            count.put(index)
            writer.write_preloaded_data(transforms, index, bucket, one, count, use_fsync=False)
            written[index] = one.get_nowait()[1]
        results.put(written)

    results = queue.Queue[Any]()
    tracker = mock.Mock(fork=nullcontext)
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
        mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker),
        mock.patch.object(writer, "write_preloaded_data_multiproc", staticmethod(write_here)),
        mock.patch.object(filesystem_async, "_get_write_results_queue", lambda: results),
    ):
        warnings.simplefilter("ignore")
        yield


def _config(args: argparse.Namespace) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    squared: Callable[[torch.Tensor], torch.Tensor] = lambda x: torch.relu(x) ** 2  # noqa: E731
    activation: Any = torch.nn.functional.silu if getattr(args, "swiglu", False) else torch.nn.functional.gelu
    activation = squared if getattr(args, "squared_relu", False) else activation
    parallel = {name: getattr(args, name) for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")}
    moe: dict[str, Any] = {}
    if getattr(args, "num_experts", None):
        names = ("moe_router_topk", "moe_router_load_balancing_type", "moe_aux_loss_coeff")
        names += ("moe_shared_expert_intermediate_size", "expert_model_parallel_size", "expert_tensor_parallel_size")
        names += ("moe_layer_freq", "moe_router_score_function", "moe_router_enable_expert_bias")
        names += ("moe_router_topk_scaling_factor", "moe_router_pre_softmax", "moe_ffn_hidden_size")
        moe = {name: getattr(args, name) for name in names if hasattr(args, name)}
        moe |= {"num_moe_experts": args.num_experts, "moe_token_dispatcher_type": "allgather"}
    unfused = ("masked_softmax_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion", "persist_layer_norm")
    own = ("qk_layernorm", "add_qkv_bias", "rotary_interleaved")
    return TransformerConfig(
        **{name: getattr(args, name) for name in SHAPE},
        **parallel,
        **moe,
        **dict.fromkeys(unfused, False),
        **{name: getattr(args, name, False) for name in own},
        bias_activation_fusion=getattr(args, "bias_gelu_fusion", False),
        apply_rope_fusion=False,
        num_query_groups=getattr(args, "num_query_groups", args.num_attention_heads),
        kv_channels=args.kv_channels,
        gated_linear_unit=getattr(args, "swiglu", False),
        activation_func=activation,
        normalization=getattr(args, "normalization", "LayerNorm"),
        layernorm_epsilon=args.norm_epsilon,
        add_bias_linear=args.add_bias_linear,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def build(args: argparse.Namespace) -> Any:
    """This rank's part of the model, with megatron-core's own layers, in ``eval`` mode."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    ep = args.expert_model_parallel_size
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    torch.manual_seed(5 + parallel_state.get_pipeline_model_parallel_rank())
    config = _config(args)
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not getattr(args, "untie_embeddings_and_output_weights", False),
        position_embedding_type=args.position_embedding_type,
        rotary_base=getattr(args, "rotary_base", 10000),
        rotary_percent=args.rotary_percent,
        rope_scaling=getattr(args, "use_rope_scaling", False),
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        parallel_output=False,
    )
    return model.eval()


def _stir(model: Any) -> None:
    """Values in which no two tensors, experts or stages are alike; the same on all ranks that share a tensor."""
    from megatron.core import parallel_state

    biases = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith("expert_bias")]
    for name, tensor in (*model.named_parameters(), *biases):
        split = getattr(tensor, "tensor_model_parallel", False)
        expert = ".local_experts." in name
        if tensor.dim() == 1 or expert:
            seed = sum(map(ord, name)) + 7 * parallel_state.get_pipeline_model_parallel_rank()
            seed += 1009 * parallel_state.get_tensor_model_parallel_rank() * bool(split and not expert)
            seed += 10007 * parallel_state.get_expert_model_parallel_rank() * expert
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                tensor.add_(noise, alpha=0.1)


def write(kind: str, layout: tuple[int, int, int], folder: str, form: str = "torch_dist") -> None:
    """Called on tp * pp ranks: a checkpoint of ITERATION below ``folder``."""
    from megatron.core import dist_checkpointing, parallel_state

    args = arguments(kind, *layout)
    with on_cpu():
        try:
            model = build(args)
            _stir(model)
            path = Path(folder) / f"iter_{ITERATION:07d}"
            state = {"args": args, "iteration": ITERATION, "checkpoint_version": 3.0}
            if form != "torch":
                path.mkdir(parents=True, exist_ok=True)
                sharded = model.sharded_state_dict(metadata={"singleton_local_shards": form == "singletons"})
                dist_checkpointing.save(state | {"model": sharded}, str(path))
            else:
                tp, pp, ep = layout
                name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
                name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" if pp > 1 else ""
                name += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
                (path / name).mkdir(parents=True)
                random = {"random_rng_state": (3, (1, 2), None), "rng_tracker_states": {}}
                state |= {"model": model.state_dict_for_save_checkpoint(), "rng_state": [random]}
                torch.save(state, path / name / "model_optim_rng.pt")
            dist.barrier()
            if dist.get_rank() == 0:
                (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        finally:
            parallel_state.destroy_model_parallel()


@torch.no_grad()
def logits(folder: str, tokens: torch.Tensor) -> torch.Tensor:
    """Called on one rank: megatron-core's own [b, s, vocabulary] from the newest checkpoint (torch_dist) of ``folder``,
    of the model that its arguments say."""
    from megatron.core import dist_checkpointing, parallel_state

    path = next(Path(folder).glob("[ir]*[0-9e]"))
    args = torch.load(path / "common.pt", weights_only=False)["args"]
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
        setattr(args, name, 1)
    with on_cpu():
        try:
            model = build(args)
            # Python 3.11.0 to 3.11.3 pickles members of enumerations by getattr, which torch then wants to be allowed.
            with torch.serialization.safe_globals([getattr]):
                loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))
            model.load_state_dict(loaded["model"])
            length = tokens.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
            result: torch.Tensor = model(tokens, torch.arange(length).expand_as(tokens), mask)
            return result
        finally:
            parallel_state.destroy_model_parallel()


def import_megatron_core() -> None:
    """Without torch.compile, which it puts on small functions: that alone would import all of Inductor."""
    with warnings.catch_warnings(), mock.patch.object(torch, "compile", lambda function: function):
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_model  # noqa: F401


def write_all(folders: dict[tuple[str, str], str]) -> None:
    """Called on 4 ranks: a checkpoint of each (kind, form), at tp 2 and pp 2, experts at ep 2."""
    import_megatron_core()
    for (kind, form), folder in folders.items():
        write(kind, (2, 2, 2 if "num_experts" in KINDS[kind] else 1), folder, form)


def all_logits(folders: dict[str, str]) -> dict[str, torch.Tensor]:
    """Called on one rank: :func:`logits` of TOKENS by name."""
    import_megatron_core()
    return {name: logits(folder, TOKENS) for name, folder in folders.items()}
