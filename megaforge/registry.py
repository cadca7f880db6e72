"""What can be added without editing anything: tables of named parts, and how a user's own file adds a row.

A built-in part is a name and where to find it, so that its name is known before torch is imported. A user's part is a
file that registers itself, named by ``--extensions``::

    from megaforge.registry import UPDATE_RULES

    UPDATE_RULES.register("sign", SignDescent)
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megaforge.errors import UserError


class Registry:
    """Parts of one kind by name, in the order in which they were added; ``builtin`` has the names of ours."""

    def __init__(self, kind: str, builtin: Mapping[str, str], entry_points: str | None = None) -> None:
        """
        Args:
            kind: what the parts are, for messages: ``update rule``.
            builtin: ``module:attribute`` of each, imported when it is first asked for.
            entry_points: the group of entry points by which installed packages add parts.
        """
        self.kind, self.builtin, self._group = kind, tuple(builtin), entry_points
        self._parts: dict[str, Any] = dict(builtin)
        self._unread = set(builtin)

    def register(self, name: str, part: Any) -> None:
        """Adds a part. A file that is imported under two names (as a module of a package and by ``--extensions``) adds
        its parts twice: the later ones replace the earlier.

        Raises:
            UserError: the name is taken by another.
        """
        if name in self._parts and self._parts[name] is not part and not _same_source(self._parts[name], part):
            raise UserError(f"{self.kind} {name!r} is registered already; use another name")
        self._parts[name] = part

    def get(self, name: str) -> Any:
        """The part of that name.

        Raises:
            UserError: there is none; with the names that there are.
        """
        self.check(name)
        if name in self._unread:
            module, _, attribute = self._parts[name].partition(":")
            self._parts[name] = getattr(importlib.import_module(module), attribute)
            self._unread.discard(name)
        return self._parts[name]

    def check(self, name: str) -> None:
        """
        Raises:
            UserError: no part has this name.
        """
        if name not in self:
            close = get_close_matches(name, self._parts, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"{name!r} is not a known {self.kind} (there are {', '.join(self._parts) or 'none'}){meant}; "
                "a file that registers another is named by --extensions"
            )

    def names(self) -> tuple[str, ...]:
        """All names; of installed packages' parts those that were asked for already."""
        return tuple(self._parts)

    def __contains__(self, name: object) -> bool:
        if name not in self._parts:
            self._add_installed()
        return name in self._parts

    def _add_installed(self) -> None:
        """Adds, once, what installed packages have; names that are taken stay."""
        group, self._group = self._group, None
        if group is None:
            return
        from importlib.metadata import entry_points

        for point in entry_points(group=group):
            if self._parts.setdefault(point.name, point.value) is point.value:
                self._unread.add(point.name)


def _same_source(one: Any, other: Any) -> bool:
    """Whether both are the class or function of the same name of the same file."""
    return None not in _source(one) and _source(one) == _source(other)


def _source(part: Any) -> tuple[str | None, str | None]:
    module = sys.modules.get(getattr(part, "__module__", ""))
    return getattr(module, "__file__", None), getattr(part, "__qualname__", None)


UPDATE_RULES = Registry(
    "update rule",
    {
        "adam": "megaforge.optim.adamw:AdamW",
        "sgd": "megaforge.optim.sgd:SGD",
        "muon": "megaforge.optim.muon:Muon",
        "normuon": "megaforge.optim.normuon:NorMuon",
        "paged_adam": "megaforge.optim.paged_adam:PagedAdam",
        "qat_adam": "megaforge.optim.quantized:QATAdam",
        "qat_sgd": "megaforge.optim.quantized:QATSGD",
    },
)
LR_SCHEDULES = Registry(
    "learning-rate schedule",
    {
        "cosine": "megaforge.config.lr_shapes:COSINE",
        "linear": "megaforge.config.lr_shapes:LINEAR",
        "constant": "megaforge.config.lr_shapes:CONSTANT",
        "WSD": "megaforge.config.lr_shapes:WSD",
        "cosine-restarts": "megaforge.config.lr_shapes:COSINE_RESTARTS",
        "plateau": "megaforge.config.lr_shapes:PLATEAU",
        "inverse-square-root": "megaforge.config.lr_shapes:INVERSE_SQUARE_ROOT",
    },
)
GRADIENT_FILTERS = Registry(
    "gradient filter",
    {
        "ema": "megaforge.optim.grokfast:ExponentialMean",
        "ma": "megaforge.optim.grokfast:WindowMean",
    },
)
DATA_SOURCES = Registry(
    "data source",
    {
        "files": "megaforge.data.data_source:FILES",
        "mock": "megaforge.data.data_source:MOCK",
        "stream": "megaforge.data.stream.kind:STREAM",
        "chat": "megaforge.data.data_source:CHAT",
        "progressions": "megaforge.data.progressions:PROGRESSIONS",
        "tasks": "megaforge.data.task_source:TASKS",
        "questions": "megaforge.data.question_source:QUESTIONS",
    },
)
QUESTION_FORMATS = Registry(  # of lines of questions:// (megaforge.tasks.questions.QuestionFormat)
    "format of questions",
    {
        "choice": "megaforge.tasks.questions:CHOICE",
        "worked": "megaforge.tasks.questions:WORKED",
        "boxed": "megaforge.tasks.questions:BOXED",
    },
)
AUGMENTATIONS = Registry(
    "augmentation",
    {"fim": "megaforge.data.augment.fim:FillInTheMiddle", "hiding": "megaforge.data.augment.hiding:HiddenInputs"},
)
CORPUS_STAGES = Registry(  # settings of the stages of corpus.yaml
    "corpus stage",
    {
        "html": "megaforge.data.corpus.stages.html:HtmlSettings",
        "normalise": "megaforge.data.corpus.stages.normalise:NormaliseSettings",
        "length": "megaforge.data.corpus.stages.length:LengthSettings",
        "language": "megaforge.data.corpus.stages.language:LanguageSettings",
        "heuristics": "megaforge.data.corpus.stages.heuristics:HeuristicsSettings",
        "blocklist": "megaforge.data.corpus.stages.blocklist:BlocklistSettings",
        "quality": "megaforge.data.corpus.stages.quality:QualitySettings",
        "pii": "megaforge.data.corpus.stages.pii:PiiSettings",
        "exact": "megaforge.data.corpus.stages.exact:ExactSettings",
        "url": "megaforge.data.corpus.stages.url:UrlSettings",
        "host_cap": "megaforge.data.corpus.stages.host_cap:HostCapSettings",
        "paragraphs": "megaforge.data.corpus.stages.paragraphs:ParagraphsSettings",
        "minhash": "megaforge.data.corpus.stages.minhash:MinhashSettings",
        "simhash": "megaforge.data.corpus.stages.simhash:SimhashSettings",
        "decontaminate": "megaforge.data.corpus.stages.decontaminate:DecontaminateSettings",
    },
)
CORPUS_READERS = Registry(  # by what files are called in messages
    "corpus reader",
    {
        "lines": "megaforge.data.corpus.readers.lines:JsonLines",
        "table": "megaforge.data.corpus.readers.table:Tables",
        "text": "megaforge.data.corpus.readers.text:WholeTexts",
        "html": "megaforge.data.corpus.readers.html:HtmlPages",
        "man": "megaforge.data.corpus.readers.man:ManualPages",
        "pdf": "megaforge.data.corpus.readers.pdf:PdfFiles",
        "docx": "megaforge.data.corpus.readers.docx:WordFiles",
        "hub": "megaforge.data.corpus.readers.hub:HubShards",
    },
)
CORPUS_ENGINES = Registry(
    "corpus engine",
    {
        "local": "megaforge.data.corpus.engines.local:LocalEngine",
        "mpi": "megaforge.data.corpus.engines.mpi:MpiEngine",
        "ray": "megaforge.data.corpus.engines.ray:RayEngine",
    },
)
LAYER_KINDS = Registry(  # by their letters in the layer pattern
    "layer kind",
    {
        "R": "megaforge.nn.kinds.rwkv7:KIND",
        "M": "megaforge.nn.kinds.mamba2:KIND",
        "O": "megaforge.nn.kinds.routed_mamba2:KIND",
        "*": "megaforge.nn.kinds.attention:KIND",
        "E": "megaforge.nn.kinds.experts:KIND",
        "-": "megaforge.nn.kinds.dense:KIND",
    },
)
MULTI_TOKEN = Registry(
    "multi-token prediction",
    {
        "sequential": "megaforge.models.multi_token:Sequential",
        "parallel": "megaforge.models.multi_token:Parallel",
    },
)
BLOCKS = Registry(
    "style of block",
    {
        "plain": "megaforge.nn.block:Block",
        "mixture_of_depths": "megaforge.nn.mixture_of_depths:MixtureOfDepths",
    },
)
NORMS = Registry("norm", {"rmsnorm": "megaforge.nn.norms:RMSNorm", "layernorm": "megaforge.nn.norms:LayerNorm"})
POSITION_EMBEDDINGS = Registry(
    "position embedding",
    {
        "rope": "megaforge.nn.positions.rotary:KIND",
        "learned_absolute": "megaforge.nn.positions.learned_absolute:KIND",
        "none": "megaforge.config.position_kind:NONE",
    },
)
SCHEDULES = Registry(
    "pipeline schedule",
    {
        "gpipe": "megaforge.parallel.pipeline.schedules:GPIPE",
        "1f1b": "megaforge.parallel.pipeline.schedules:ONE_F_ONE_B",
        "interleaved": "megaforge.parallel.pipeline.schedules:INTERLEAVED",
        "zb-h1": "megaforge.parallel.pipeline.schedules:ZB_H1",
        "zb-v": "megaforge.parallel.pipeline.schedules:ZB_V",
    },
)
OBJECTIVES = Registry(
    "objective",
    {
        "next_token": "megaforge.training.objectives:NextToken",
        "distillation": "megaforge.training.distillation:Distillation",
        "agent": "megaforge.reasoning.agent.objective:AgentObjective",
        "rlvr": "megaforge.reasoning.rlvr.objective:Writing",
    },
)
LOSS_TERMS = Registry(
    "loss term",
    {
        "label_smoothing": "megaforge.training.regularization:label_smoothing",
        "contrastive": "megaforge.training.regularization:contrastive",
    },
)
EVALUATION_METRICS = Registry(  # of a run's own evaluations (megaforge.training.token_metrics)
    "metric of evaluations",
    {"label_probability": "megaforge.training.token_metrics:label_probability"},
    entry_points="megaforge.evaluation_metrics",
)
CALLBACKS = Registry(
    "callback",
    {
        "reduce_on_plateau": "megaforge.training.lr_plateau:reduce_on_plateau",
        "policy_control": "megaforge.reasoning.agent.control:AgentControl",
        "answer_control": "megaforge.reasoning.rlvr.control:AnswerControl",
        "first_weights": "megaforge.reasoning.first_weights:FirstWeights",
        "core_text": "megaforge.reasoning.core_text:CoreText",
        "run_memory": "megaforge.reasoning.agent.run_memory:RunMemory",
    },
)
ALERTS = Registry(  # megaforge.monitor.alert_kinds.AlertKind
    "alert",
    {
        "failure": "megaforge.monitor.alert_kinds:FAILURE",
        "no_heartbeat": "megaforge.monitor.alert_kinds:NO_HEARTBEAT",
        "nan": "megaforge.monitor.alert_kinds:NAN",
        "loss_spike": "megaforge.monitor.alert_kinds:LOSS_SPIKE",
        "throughput": "megaforge.monitor.alert_kinds:THROUGHPUT",
        "memory": "megaforge.monitor.alert_kinds:MEMORY",
        "disk": "megaforge.monitor.alert_kinds:DISK",
        "expert_collapse": "megaforge.monitor.alert_kinds:EXPERT_COLLAPSE",
        "compliance": "megaforge.monitor.alert_kinds:COMPLIANCE",
    },
)
DEVICES = Registry(  # functions that give a megaforge.device.DeviceKind
    "device",
    {"cpu": "megaforge.device:cpu", "cuda": "megaforge.device:cuda", "auto": "megaforge.device:automatic"},
    entry_points="megaforge.devices",
)
ARCHITECTURES = Registry(  # by their model_type in Hugging Face's config.json
    "published architecture",
    {
        "llama": "megaforge.checkpoint.architectures.llama:LLAMA",
        "arcee": "megaforge.checkpoint.architectures.llama:ARCEE",
        "bitnet": "megaforge.checkpoint.architectures.bitnet:BITNET",
        "qwen2": "megaforge.checkpoint.architectures.qwen:QWEN2",
        "qwen3": "megaforge.checkpoint.architectures.qwen:QWEN3",
        "mixtral": "megaforge.checkpoint.architectures.mixtral:MIXTRAL",
        "qwen3_moe": "megaforge.checkpoint.architectures.qwen:QWEN3_MOE",
        "mistral": "megaforge.checkpoint.architectures.llama:MISTRAL",
        "gpt2": "megaforge.checkpoint.architectures.gpt2:GPT2_HF",
        "rwkv7": "megaforge.checkpoint.architectures.rwkv7:RWKV7_HF",
    },
)
PEFT_METHODS = Registry(  # megaforge.config.peft_method.PeftMethod
    "method of --peft",
    {
        "lora": "megaforge.peft.methods:LORA",
        "qlora": "megaforge.peft.methods:QLORA",
        "adalora": "megaforge.peft.methods:ADALORA",
        "bitfit": "megaforge.peft.methods:BITFIT",
        "prefix": "megaforge.peft.methods:PREFIX",
        "p_tuning_v2": "megaforge.peft.methods:P_TUNING_V2",
        "state": "megaforge.peft.methods:STATE",
        "plastic": "megaforge.peft.methods:PLASTIC",
    },
)
TASKS = Registry(  # what makes examples (megaforge.tasks.example.Task)
    "task",
    {
        "passkey": "megaforge.tasks.retrieval:PASSKEY",
        "needle": "megaforge.tasks.retrieval:NEEDLE",
        "recall": "megaforge.tasks.retrieval:RECALL",
        "variable_tracking": "megaforge.tasks.tracking:VARIABLE_TRACKING",
        "copying": "megaforge.tasks.rules:COPYING",
        "modular_arithmetic": "megaforge.tasks.rules:MODULAR_ARITHMETIC",
    },
    entry_points="megaforge.tasks",
)
CHUNKED_TASKS = Registry(  # whose text comes chunk by chunk (megaforge.tasks.chunked.ChunkedTask)
    "task in chunks",
    {
        "kv_chunks": "megaforge.tasks.chunked_kinds:KV_CHUNKS",
        "needle_chunks": "megaforge.tasks.chunked_kinds:NEEDLE_CHUNKS",
        "tracking_chunks": "megaforge.tasks.chunked_kinds:TRACKING_CHUNKS",
        "recall_chunks": "megaforge.tasks.chunked_kinds:RECALL_CHUNKS",
        "running_sum": "megaforge.tasks.chunked_kinds:RUNNING_SUM",
        "arithmetic_chunks": "megaforge.tasks.chunked_kinds:ARITHMETIC_CHUNKS",
    },
    entry_points="megaforge.chunked_tasks",
)
TEXT_METRICS = Registry(  # of written answers (megaforge.tasks.metrics.TextMetric)
    "metric",
    {
        "exact_match": "megaforge.tasks.metrics:EXACT_MATCH",
        "contains": "megaforge.tasks.metrics:CONTAINS",
        "last_number": "megaforge.tasks.metrics:LAST_NUMBER",
        "choice": "megaforge.tasks.metrics:CHOICE",
        "boxed": "megaforge.tasks.metrics:BOXED",
        "bleu": "megaforge.tasks.metrics:BLEU",
        "refusal": "megaforge.tasks.metrics:REFUSAL",
    },
    entry_points="megaforge.metrics",
)
PLASTIC_RULES = Registry(
    "rule of fast weights",
    {name: f"megaforge.reasoning.rules:{name}" for name in ("hebb", "oja", "delta")},
)
PLANNED_ROUNDS = Registry(  # what a plan counts of an objective whose model makes what it learns from
    "objective that makes rounds",  # (megaforge.planning.rounds.Rounds | None) of a configuration
    {
        "agent": "megaforge.planning.playing:playing_of",
        "rlvr": "megaforge.planning.writing:writing_of",
    },
)
MEMORY_SEARCHES = Registry(  # megaforge.reasoning.memory.searches.Search
    "search of the episodic index",
    {
        "torch": "megaforge.reasoning.memory.searches:TorchSearch",
        "faiss": "megaforge.reasoning.memory.searches:FaissSearch",
    },
)
AGENT_ACTIONS = Registry(  # in the order of the policy's outputs
    "action of the agent",
    {
        "summarize": "megaforge.reasoning.agent.actions:SUMMARIZE",
        "cache_write": "megaforge.reasoning.agent.actions:CACHE_WRITE",
        "retrieve": "megaforge.reasoning.agent.actions:RETRIEVE",
        "splice_window": "megaforge.reasoning.agent.actions:SPLICE_WINDOW",
    },
)
RL_ALGORITHMS = Registry(
    "algorithm of reinforcement learning",
    {
        "grpo": "megaforge.reasoning.agent.algorithms:GroupRelative",
        "ppo": "megaforge.reasoning.agent.algorithms:ProximalPolicy",
    },
)
REWARDS = Registry(  # of written answers (megaforge.reasoning.rewards.Reward)
    "reward",
    {
        "exact": "megaforge.reasoning.rewards:exact",
        "number": "megaforge.reasoning.rewards:number",
        "choice": "megaforge.reasoning.rewards:choice",
        "boxed": "megaforge.reasoning.rewards:boxed",
        "format": "megaforge.reasoning.rewards:Format",
    },
    entry_points="megaforge.rewards",
)
TOOLS = Registry(  # that answer a model while it writes (megaforge.inference.tool_calls.Tool)
    "tool",
    {
        "calculator": "megaforge.reasoning.tools.calculator:CALCULATOR",
        "retrieval": "megaforge.reasoning.tools.retrieval:Retrieval",
    },
    entry_points="megaforge.tools",
)
CONVERTERS = Registry(
    "converter",
    {"bitnet": "megaforge.quant.converter:bitnet", "agent_heads": "megaforge.reasoning.agent.heads:agent_heads"},
)
COMPLIANCE_RULES = Registry(
    "compliance rule",
    {
        "recursion": "megaforge.compliance.flow:RECURSION",
        "bounded_loops": "megaforge.compliance.flow:BOUNDED",
        "allocation": "megaforge.compliance.allocation:ALLOCATION",
        "short_functions": "megaforge.compliance.flow:SHORT",
        "checks": "megaforge.compliance.checks:DENSITY",
        "scope": "megaforge.compliance.scope:SCOPE",
        "heeded": "megaforge.compliance.checks:HEEDED",
        "preprocessor": "megaforge.compliance.native_rules:PREPROCESSOR",
        "pointers": "megaforge.compliance.native_rules:POINTERS",
        "warnings": "megaforge.compliance.tools:CLEAN",
    },
)
COMPLIANCE_GATES = Registry(
    "compliance gate",
    {
        "warnings": "megaforge.compliance.gates:NO_WARNING",
        "swallowed": "megaforge.compliance.gates:NONE_VANISHES",
        "evaluated": "megaforge.compliance.gates:NO_TEXT_RUNS",
    },
)


def load_extensions(names: tuple[str, ...]) -> tuple[str, ...]:
    """Imports each of ``names``, a Python file or the name of a module; a second time does nothing.

    Returns:
        The names, those of files made absolute, so that a checkpoint that keeps them is read from anywhere.

    Raises:
        UserError: one cannot be found or imported.
    """
    return tuple(_load_file(name) if name.endswith(".py") else _load_module(name) for name in names)


def _load_module(name: str) -> str:
    try:
        importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--extensions {name}: importing it failed: {type(error).__name__}: {error}") from error
    return name


def _load_file(name: str) -> str:
    path = Path(name).absolute()
    if not path.is_file():
        raise UserError(f"--extensions {name}: there is no such file (looked at {path})")
    module = f"megaforge_extension_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = loaded = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(loaded)
        except UserError:
            del sys.modules[module]
            raise
        except Exception as error:
            del sys.modules[module]
            raise UserError(f"--extensions {name}: it failed: {type(error).__name__}: {error}") from error
    return str(path)
