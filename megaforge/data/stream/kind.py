"""What can be wrong with ``--data-path stream:...`` and be seen before torch is imported."""

from __future__ import annotations

from pkgutil import resolve_name

from megaforge.config.config import Config
from megaforge.config.data_schedule import read_schedule
from megaforge.data.blend import parse_data_path
from megaforge.data.data_source import DataSourceKind, held_out
from megaforge.data.indexed_dataset import check_files
from megaforge.data.stream.fetch import is_remote
from megaforge.data.stream.files import PREFIX, check_local, stream_names
from megaforge.errors import UserError


def check_streams(config: Config) -> None:
    """
    Raises:
        UserError: streams beside datasets, no tokenizer, no place for remote files, no files, or files of no text.
    """
    data = config.data
    for _, name in parse_data_path(data.data_path):
        if not name.startswith(PREFIX):
            raise UserError(
                f"--data-path {' '.join(data.data_path)}: {name} is a dataset and others are text: a blend is of one "
                f"kind; preprocess the text (tools/preprocess_data.py), or stream all of it"
            )
        if data.tokenizer_model is None and data.vocab_file is None:
            raise UserError(f"--data-path {name}: text needs a tokenizer: add --tokenizer-model FILE")
        for file in stream_names(name):
            if not is_remote(file):
                check_local(file, name, data.json_key)
            elif data.data_cache_dir is None:
                raise UserError(f"--data-path {name}: {file} needs a place for its copy: add --data-cache-dir DIR")
    if data.data_schedule is not None:
        read_schedule(data.data_schedule).check_lengths(data.seq_length, config.parallel.seq_len_divisor)
    for prefixes in held_out(data).values():
        for prefix in prefixes:
            check_files(prefix)


STREAM = DataSourceKind(
    lambda config, tokenizer: resolve_name("megaforge.data.stream.source:open_stream")(config, tokenizer),
    check_streams,
    ("split", "valid_data_path", "test_data_path", "data_schedule", "data_order", "data_cache_dir"),
)
