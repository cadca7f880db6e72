"""The tokenizer of a run and what follows from it: the vocabulary, and the token that ends its datasets' documents."""

from __future__ import annotations

from megaforge.config.check_layout import vocabulary_cost, with_tokenizer_vocab
from megaforge.config.config import Config
from megaforge.data.blend import parse_data_path
from megaforge.data.sidecar import check_agreement, read_sidecar
from megaforge.data.tokenizer import HuggingFaceTokenizer, Tokenizer, guess_tokenizer_type, load_tokenizer
from megaforge.data.tokenizer_files import pair_of
from megaforge.errors import UserError


def with_run_tokenizer(config: Config) -> tuple[Config, Tokenizer | None, list[str]]:
    """``config`` with its vocabulary size, the tokenizer of ``--tokenizer-model`` or None, and notes to say once.

    Training, dry runs and plans all call this, so that they mean the same model. The tokenizer ends documents as those
    of ``--data-path`` were ended.

    Raises:
        UserError: no such tokenizer, a vocabulary smaller than its own, or datasets that do not belong together.
    """
    data = config.data
    pair = pair_of(data.vocab_file, data.merge_file)
    if pair is not None and data.tokenizer_model is not None:
        raise UserError(
            f"--vocab-file {data.vocab_file} and --tokenizer-model {data.tokenizer_model} are two tokenizers; give one"
        )
    model = pair or data.tokenizer_model
    if model is None:
        return config, None, []
    sources = parse_data_path(config.data.data_path) if config.data.data_path else []
    sidecars = [read_sidecar(prefix) for _, prefix in sources]
    check_agreement(sidecars)
    recorded = next((sidecar for sidecar in sidecars if sidecar is not None and sidecar.eod is not None), None)
    kind = config.data.tokenizer_type or guess_tokenizer_type(model)
    if recorded is None:
        tokenizer = load_tokenizer(kind, model)
    else:
        tokenizer = load_with_eod(kind, model, recorded.eod, recorded.eod_token)
    given, config = config, with_tokenizer_vocab(config, tokenizer.vocab_size)
    note = vocabulary_cost(given.model, tokenizer.vocab_size)
    return config, tokenizer, [note] if note else []


def load_with_eod(kind: str, model: str, eod: int | None, eod_token: str | None) -> Tokenizer:
    """The tokenizer whose documents end with token ``eod``, which ``--eod-token`` called ``eod_token`` if it was given.

    Where the tokenizer has no such token it is returned as it is: its fingerprint, which the caller compares, is then
    another one as well, and says more.
    """
    name = eod_token
    if name is None:
        plain = load_tokenizer(kind, model)
        if eod is None or plain.eod == eod or (name := _name_of(plain, eod)) is None:
            return plain
    try:
        return load_tokenizer(kind, model, name)
    except UserError:
        return load_tokenizer(kind, model)


def _name_of(tokenizer: Tokenizer, token: int | None) -> str | None:
    """The added token of this id, for datasets that record the id alone."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    return next((str(added["content"]) for added in tokenizer.definition["added_tokens"] if added["id"] == token), None)
