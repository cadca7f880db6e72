"""What the flags of fine-tuning need beside them."""

from __future__ import annotations

from megaforge.config.run_partners import Partner

_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "lora_rank_pattern", "lora_bias", "peft_targets")

FINE_TUNING = (
    Partner(
        tuple(f"model.{name}" for name in _LORA),
        lambda c: c.model.peft == "lora",
        "there are no adapters: add --peft lora",
    ),
    Partner(
        ("chat.chat_template", "chat.train_on_prompts"),
        lambda c: any(path.startswith("chat://") for path in c.data.data_path),
        "there are no conversations: give --data-path chat://FILE.jsonl",
    ),
)
