"""EleutherAI's lm-evaluation-harness over our models: its task files and its own tasks, at any layout, without a
network. It runs on the first rank; the requests that it makes are answered by all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from megaforge.config.yaml_nodes import compose, mapping_of
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError, require
from megaforge.inference.leading import Ask
from megaforge.inference.requests import Likelihood, Request, Scored, Writing
from megaforge.inference.task_run import Result
from megaforge.tasks.lm_eval_file import PREFIX, PURPOSE, stay_offline
from megaforge.tasks.task_file import SUFFIXES, read_text

_DEVIATIONS = 1.959963984540054  # of an interval of 95 %
Evaluated = tuple[list[Result], list[dict[str, Any]]]  # and each example with what was written


def results(name: str, ask: Ask, tokenizer: Tokenizer, max_length: int, limit: int | None) -> Evaluated:
    """What lm-eval says of a task (group of tasks).

    Args:
        name: as :func:`megaforge.tasks.lm_eval_file.is_lm_evals` takes it.
        max_length: tokens that a sequence may have.
        limit: of its examples; None: all.

    Raises:
        UserError: it cannot run the task.
    """
    stay_offline()
    evaluator = require("lm_eval.evaluator", extra="eval", purpose=PURPOSE)
    manager = require("lm_eval.tasks", extra="eval", purpose=PURPOSE).TaskManager
    task, tasks = _task(name, manager)
    backend = _backend(ask, tokenizer, max_length)
    try:
        with redirect_stdout(sys.stderr):  # what it says of its progress is no result
            found = evaluator.simple_evaluate(
                model=backend, tasks=[task], task_manager=tasks, limit=limit, bootstrap_iters=1000, random_seed=0
            )
    except UserError:
        raise
    except Exception as error:  # whatever a task file or its data make lm-eval, datasets or Jinja raise
        raise UserError(f"--tasks {name}: lm-eval ends with {type(error).__name__}: {error}") from error
    return [one for own in found["results"] for one in _converted(found, own)], _samples(found)


def _task(name: str, manager: Any) -> tuple[Any, Any]:
    """What lm-eval is given: a configuration whose data files are found beside it, or a name and where to look."""
    if not name.endswith(SUFFIXES):
        return name.removeprefix(PREFIX), manager()
    folder, text = Path(name).parent.absolute(), read_text(name)
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:  # its own tags, such as !function
        settings = {"include": None}
    if settings.keys() & {"include", "group"}:
        keys = mapping_of(compose(text, name), name, "the file")
        own = keys.get("group") or keys.get("task")
        return (own.value if own is not None else Path(name).stem), manager(
            include_path=str(folder), include_defaults=False
        )
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    if files:
        settings["dataset_kwargs"] = {**settings["dataset_kwargs"], "data_files": _absolute(folder, files)}
    return settings, manager(include_defaults=False)


def _absolute(folder: Path, files: Any) -> Any:
    """Paths as seen from ``folder``; a missing one is told by name."""
    if isinstance(files, dict):
        return {split: _absolute(folder, some) for split, some in files.items()}
    if isinstance(files, list):
        return [_absolute(folder, one) for one in files]
    if "://" in files or any(sign in files for sign in "*?["):
        return files if "://" in files else str(folder / files)
    if not (folder / files).is_file():
        raise UserError(f"--tasks: data file {folder / files} does not exist")
    return str(folder / files)


def _converted(found: Any, task: str) -> list[Result]:
    """Each metric of one task."""
    metrics: dict[str, Any] = found["results"][task]
    count = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
    better = found.get("higher_is_better", {}).get(task, {})
    out = []
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        half = _DEVIATIONS * error if isinstance(error, (int, float)) else float("nan")
        name = metric if filtered == "none" else key
        out.append(Result(task, name, None, count, float(value), value - half, value + half, better.get(metric)))
    return out


def _samples(found: Any) -> list[dict[str, Any]]:
    return [
        {"task": task, "prompt": one["arguments"], "answers": [one["target"]], "written": one["resps"]}
        for task, samples in (found.get("samples") or {}).items()
        for one in samples
    ]


def _backend(ask: Ask, tokenizer: Tokenizer, max_length: int) -> Any:
    """A language model as lm-eval knows them."""
    template = require("lm_eval.api.model", extra="eval", purpose=PURPOSE).TemplateLM
    utils = require("lm_eval.utils", extra="eval", purpose=PURPOSE)
    first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eod

    class MegaForge(template):  # type: ignore[misc, valid-type]
        """Our model; tokens are the tokenizer's, without control tokens."""

        tokenizer_name = tokenizer.model_path

        @property
        def eot_token_id(self) -> int:
            if first is None:
                raise UserError("a text without context needs a token to begin with, and the tokenizer has none")
            return first

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **more: Any) -> list[tuple[float, bool]]:
            pairs = [(tuple(context) or (self.eot_token_id,), tuple(rest)) for _, context, rest in requests]
            found = iter(_scores(ask, [pair for pair in pairs if pair[1]]))
            return [next(found) if rest else (0.0, True) for _, rest in pairs]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            cut = utils.get_rolling_token_windows
            windows = [
                [
                    utils.make_disjoint_window(one)
                    for one in cut(tokenizer.encode(text), self.eot_token_id, max_length, 1)
                ]
                for text in (request.args[0] for request in requests)
            ]
            flat = [(tuple(context), tuple(rest)) for own in windows for context, rest in own]
            found = iter(_scores(ask, flat))
            return [sum(next(found)[0] for _ in own) for own in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            asked = [_writing(tokenizer, self, *request.args) for request in requests]
            return [answer for answer in ask(asked) if isinstance(answer, str)]

    return MegaForge()


def _scores(ask: Ask, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[float, bool]]:
    found = ask([Likelihood(context, rest) for context, rest in pairs])
    return [(one.log_probability, one.greedy) for one in found if isinstance(one, Scored)]


def _writing(tokenizer: Tokenizer, backend: Any, context: str, settings: dict[str, Any]) -> Request:
    utils = require("lm_eval.models.utils", extra="eval", purpose=PURPOSE)
    left = utils.normalize_gen_kwargs(dict(settings), 256)
    stops = utils.handle_stop_sequences(left.pop("until", None), eos=None)
    most, temperature = int(left.pop("max_gen_toks")), float(left.pop("temperature", 0.0))
    if left.pop("do_sample", False) and left:
        raise UserError(f"generation_kwargs {', '.join(sorted(left))}: draws know temperature alone; leave them out")
    prompt = tuple(tokenizer.encode(context)) or (backend.eot_token_id,)
    return Writing(prompt, most, tuple(stop for stop in stops if stop), temperature)
