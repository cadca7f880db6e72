"""Partner rules of what is read and how it is changed. See :mod:`megaforge.config.partners`."""

from __future__ import annotations

from megaforge.config.run_partners import Partner

_FIM = ("rate", "spm_rate", "domain_rates", "prefix_token", "middle_token", "suffix_token")

_QUESTIONS = ("format", "field", "template")

DATA_PARTNERS = (
    Partner(
        (*(f"questions.question_{name}" for name in _QUESTIONS), "questions.answer_field", "questions.choices_field"),
        lambda c: any(path.startswith("questions://") for path in (*c.data.data_path, *c.data.valid_data_path)),
        "there are no questions: give --data-path questions://FILE.jsonl",
    ),
    Partner(
        ("data.stream_round",),
        lambda c: c.data.streams or c.data.data_order == "streamed",
        "epochs are shuffled as a whole: add --data-order streamed",
    ),
    Partner(
        ("data.json_key", "data.stream_on_error"),
        lambda c: c.data.streams,
        "no text is read: use --data-path stream:FILES",
    ),
    Partner(
        ("data.data_cache_size",),
        lambda c: c.data.data_cache_dir is not None,
        "there is no cache: add --data-cache-dir DIR",
    ),
    Partner(
        tuple(f"data.fim_{name}" for name in _FIM),
        lambda c: c.data.fim_data,
        "no document is rearranged: add --fim-data",
    ),
    Partner(
        ("data.span_mask_length",),
        lambda c: c.data.span_mask_rate,
        "no span is hidden: add --span-mask-rate 0.1",
    ),
    Partner(
        ("data.mask_token",),
        lambda c: c.data.span_mask_rate or c.data.token_dropout,
        "no input is hidden: add --span-mask-rate 0.1 or --token-dropout 0.1",
    ),
)
