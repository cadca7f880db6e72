"""How large a file, a function and a constructor may be, and that every module has tests that one finds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[1]
FILE, FUNCTION, CONSTRUCTOR = 500, 60, 8  # lines, lines, arguments beside self
# Those beyond a limit today. The list may only become shorter.
BEYOND: set[str] = set()

# Modules and folders that no test imports by name: what covers them. Others have a test module of their name, or one
# that imports them.
COVERED = {
    "compliance/calls.py": "compliance/test_rules.py",
    "compliance/page.py": "compliance/test_report.py",
    "config/activation_config.py": "nn/test_compressed.py",
    "config/compliance_config.py": "training/test_phase6_output.py",
    "config/backend_config.py": "kernels/test_wkv7_backend.py",
    "config/attention_config.py": "nn/test_attention.py",
    "config/augmentation_config.py": "data/augment/test_fim.py",
    "config/blocks.py": "config/test_megatron_flags.py",
    "config/distill_config.py": "training/test_distillation.py",
    "config/dry_run_config.py": "verification/test_dry_run.py",
    "config/generation_config.py": "training/test_sampling.py",
    "config/expert_logging_config.py": "training/test_expert_balance.py",
    "config/fields.py": "config/test_cli.py",
    "config/mamba_config.py": "nn/test_mamba2.py",
    "config/micro_batch_config.py": "planning/test_auto_micro_batch.py",
    "config/rom_config.py": "nn/test_routed_mamba2.py",
    "config/megatron/": "config/test_megatron_flags.py",
    "config/data_partners.py": "config/test_partners.py",
    "config/reading_config.py": "config/test_data_schedule.py",
    "config/stage_config.py": "config/test_stages.py",
    "config/task_config.py": "data/test_task_source.py",
    "config/question_config.py": "tasks/test_questions.py",
    "config/reward_config.py": "reasoning/test_rewards.py",
    "config/position_kind.py": "config/test_partners.py",
    "config/quant_config.py": "quant/test_converter.py",
    "config/yaml_nodes.py": "data/corpus/test_recipe.py",
    "data/corpus/": "data/corpus/test_pipeline.py",
    "data/images.py": "tools/test_plot_loss.py",
    "data/left_out.py": "data/test_directory_to_jsonl.py",
    "data/stream/": "data/stream/test_source.py",
    "data/wrapped.py": "data/test_skipped.py",
    "data/outputs.py": "data/test_directory_to_jsonl.py",
    "data/preprocess/": "data/test_preprocess.py",
    "kernels/bitgemm/": "kernels/test_bitgemm.py",
    "kernels/pointwise/": "kernels/test_pointwise.py",
    "kernels/rwkv7_fused/": "kernels/test_rwkv7_fused.py",
    "kernels/ssd/": "kernels/test_ssd.py",
    "kernels/wkv7/": "kernels/test_wkv7.py",
    "checkpoint/megatron/": "checkpoint/megatron/test_importing.py",
    "checkpoint/architectures/": "checkpoint/test_architectures.py",
    "checkpoint/after_publish.py": "training/test_run_events.py",
    "checkpoint/foreign.py": "checkpoint/test_published_import.py",
    "checkpoint/sealed.py": "checkpoint/test_encryption.py",
    "models/generation_state.py": "inference/test_generation.py",
    "models/pipeline_shape.py": "config/test_check_layout.py",
    "nn/kinds/": "config/test_check_layout.py",
    "nn/moe/": "nn/test_moe.py",
    "nn/offload.py": "gpu/test_offload.py",
    "nn/activations.py": "nn/test_ffn.py",
    "nn/positions/": "nn/test_position_table.py",
    "optim/": "optim/test_adamw.py",
    "parallel/context_parallel/": "parallel/context_parallel/test_shard.py",
    "parallel/expert_columns.py": "parallel/test_routed_mamba2_parity.py",
    "parallel/expert_tokens.py": "parallel/test_expert_parallel.py",
    "parallel/pipeline/": "parallel/pipeline/test_executor.py",
    "parallel/region.py": "parallel/test_layers.py",
    "peft/": "peft/test_lora.py",
    "config/chat_config.py": "data/test_chat.py",
    "config/adalora_config.py": "peft/test_adalora.py",
    "checkpoint/adapter_formats.py": "peft/test_adapter_files.py",
    "checkpoint/peft_files.py": "peft/test_prefix.py",
    "checkpoint/prefix_files.py": "peft/test_prefix.py",
    "training/rank_budget.py": "peft/test_adalora.py",
    "training/triplets.py": "peft/test_adalora.py",
    "config/peft_config.py": "peft/test_lora.py",
    "config/peft_method.py": "config/test_partners.py",
    "config/prefix_config.py": "peft/test_prefix.py",
    "config/prometheus_config.py": "monitor/test_prometheus.py",
    "planning/report.py": "planning/test_plan_command.py",
    "config/qat_config.py": "training/test_quantization.py",
    "config/evaluation_config.py": "inference/test_at_end.py",
    "config/agent_config.py": "reasoning/test_agent.py",
    "config/rl_partners.py": "config/test_partners.py",
    "reasoning/agent/": "reasoning/test_agent.py",
    "config/rollout_config.py": "reasoning/test_rlvr.py",
    "reasoning/rlvr/": "reasoning/test_rlvr.py",
    "reasoning/resampling.py": "reasoning/test_rlvr.py",
    "reasoning/control.py": "reasoning/test_agent.py",
    "config/regularization_config.py": "training/test_regularization.py",
    "config/run_partners.py": "config/test_partners.py",
    "quant/products.py": "quant/test_linear.py",
    "optim/norms.py": "training/test_decoupled_lr.py",
    "tasks/": "tasks/test_tasks.py",
    "training/compliance_stage.py": "training/test_phase6_output.py",
    "training/fault_steps.py": "training/test_save_lock.py",
    "training/final_test.py": "training/test_decoupled_lr.py",
    "training/norms.py": "training/test_decoupled_lr.py",
    "training/penalties.py": "training/test_regularization.py",
    "training/skip_train.py": "training/test_decoupled_lr.py",
    "training/speed.py": "training/test_metrics.py",
    "verification/parity_options.py": "tools/test_parity.py",
    "pretrain.py": "end_to_end/test_bad_input.py",
}


def beyond(source: str) -> Iterator[str]:
    """What is too large in a module."""
    if (lines := source.count("\n")) > FILE:
        yield f"has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION:
                yield f"{node.name} has {lines} lines"
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    taken = method.args.posonlyargs + method.args.args + method.args.kwonlyargs
                    if len(taken) - 1 > CONSTRUCTOR:
                        yield f"{node.name} takes {len(taken) - 1} arguments"


def test_nothing_is_larger_than_one_reads_at_once() -> None:
    folders = [REPO / name for name in ("megaforge", "tests", "tools", "examples")]
    files = [*REPO.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    assert len(files) > 300
    found = {f"{file.relative_to(REPO)}: {what}" for file in files for what in beyond(file.read_text("utf-8"))}
    assert found - BEYOND == set(), "beyond a limit"
    assert BEYOND - found == set(), "within the limits now: take these off the list"


def test_each_limit_is_seen() -> None:
    class_of = "class A:\n    def __init__(self, {}): ...\n".format
    assert list(beyond(class_of("a, b, c, d, e, f, g, *, h"))) == []
    assert list(beyond(class_of("a, b, c, d, /, e, f, g, *, h, i"))) == ["A takes 9 arguments"]
    body = "def f():\n" + "    pass\n" * FUNCTION
    assert list(beyond(body)) == ["f has 61 lines"] and list(beyond(body.removesuffix("    pass\n"))) == []
    assert list(beyond("\n" * 501)) == ["has 501 lines"] and list(beyond("\n" * 500)) == []


def modules_without_tests() -> list[str]:
    """Modules with functions or classes that have no test module of their name, and whose name no test holds."""
    tests = [file.read_text("utf-8") for file in (REPO / "tests").rglob("*.py") if file != Path(__file__)]
    named = {name for text in tests for name in re.findall(r"megaforge(?:\.\w+)+", text)}
    named |= {
        f"{module}.{name}"
        for text in tests
        for module, names in re.findall(r"^ *from (megaforge[\w.]*) import (\w[\w ,]*)", text, re.MULTILINE)
        for name in re.split("[ ,]+", names)
    }
    found = []
    for file in sorted((REPO / "megaforge").rglob("*.py")):
        module = file.relative_to(REPO / "megaforge")
        own = REPO / "tests" / module.parent / f"test_{module.stem}.py"
        dotted = ".".join(("megaforge", *module.with_suffix("").parts)).removesuffix(".__init__")
        defines = re.search(r"^(def|class) ", file.read_text("utf-8"), re.MULTILINE)
        if defines and not own.is_file() and dotted not in named:
            found.append(str(module))
    return found


def test_every_module_has_tests_that_one_finds() -> None:
    alone = modules_without_tests()
    assert [module for module in alone if not any(module.startswith(row) for row in COVERED)] == []
    assert [test for test in COVERED.values() if not (REPO / "tests" / test).is_file()] == []
