"""One training run of the speedrun that can be stopped anywhere and goes on from its last evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megaforge.config.cli import parse_config
from megaforge.data.data_source import source_kind
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.loader import Batch, GlobalBatchLoader
from megaforge.data.sidecar import read_sidecar
from megaforge.models.prepared_run import PreparedRun
from megaforge.optim import LearningRateSchedule
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.training.numerics import choose_matmul_precision
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_model_chunks, build_trainer
from tests.bench.speedrun_peers import DensePreset, LlamaLoss, SpeedrunGPT

LENGTH, BATCH, WINDOWS = 256, 8, 128
PEERS: dict[str, type[nn.Module]] = {"dense": DensePreset, "llama": LlamaLoss, "speedrun": SpeedrunGPT}
ARMS = ("ours", *PEERS)
DENSE = "--layer-schedule attention --ffn dense --num-layers 6 --ffn-hidden-size 960".split()


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is; its results have a file of this name. ``embedding_mult`` is a factor on the embedding's rate."""

    arm: str
    lr: float
    seed: int
    steps: int
    bf16: bool
    flags: tuple[str, ...] = ()
    embedding_mult: float = 1.0

    @property
    def name(self) -> str:
        own = "".join(f"_{flag.lstrip('-')}" for flag in self.flags).replace("/", ".")
        lr = f"lr{self.lr:g}" + (f"_embedding{self.embedding_mult:g}" if self.embedding_mult != 1 else "")
        return f"{self.arm}{own}_{lr}_seed{self.seed}_steps{self.steps}{'_bf16' * self.bf16}"


@dataclasses.dataclass(frozen=True)
class Text:
    """The quickstart's folder, and the held-out windows that every arm is judged by, evenly spread."""

    folder: Path
    bytes_per_token: float
    batches: list[Batch]

    @classmethod
    def open(cls, folder: Path) -> Text:
        prefix = str(folder / "heldout_text_document")
        dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
        assert sidecar is not None and sidecar.bytes_per_token is not None
        tokens = np.array(dataset.tokens, np.int64)
        first_tokens = np.zeros(len(tokens), np.bool_)
        first_tokens[dataset.document_extents()[0]] = True
        starts = np.linspace(0, len(tokens) - LENGTH - 1, WINDOWS).astype(int)
        batches = []
        for group in starts.reshape(-1, BATCH):
            rows = torch.from_numpy(np.stack([tokens[start : start + LENGTH + 1] for start in group]))
            marks = torch.from_numpy(np.stack([first_tokens[start : start + LENGTH] for start in group]))
            batches.append(Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(BATCH, LENGTH), marks))
        return cls(folder, sidecar.bytes_per_token, batches)

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2) / (WINDOWS * LENGTH * self.bytes_per_token)

    def flags(self, run: Run, folder: Path) -> list[str]:
        """The run's command line; of peers the data's, the schedule's and the batch's parts count."""
        return [
            *("--config", "cdrmix-tiny", "--device", "cpu", "--eval-iters", "0", "--num-workers", "0"),
            *("--tokenizer-model", str(self.folder / "tok.json")),
            *("--data-path", str(self.folder / "train_text_document"), "--seq-length", str(LENGTH)),
            *("--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH)),
            *("--train-iters", str(run.steps), "--seed", str(run.seed), "--lr", repr(run.lr)),
            *("--min-lr", repr(run.lr / 50), "--lr-warmup-iters", str(max(10, run.steps // 15))),
            *("--save", str(folder), "--keep-last", "1", "--save-interval", "1000000"),
            *(["--load", str(folder)] if any(folder.glob("step_*")) else []),
            *(DENSE if run.arm == "dense" else ()),
            *(["--bf16"] if run.bf16 and run.arm == "ours" else []),
            *("--lr-mult", f"embedding={run.embedding_mult}"),  # the preset has one of its own
            *run.flags,
        ]


class Session(ABC):
    """A run in memory.

    Attributes:
        curve: [step, CPU-seconds of training until then, bits per byte], from step 0 on.
    """

    iteration: int

    def __init__(self, run: Run, text: Text, folder: Path) -> None:
        self.run, self.text, self.folder = run, text, folder / run.name
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(run.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            self.prepared = prepare(parse_config(text.flags(run, self.folder)).config)
            self.open()
        self._file = self.folder / "curve.json"
        known = json.loads(self._file.read_text()) if self._file.exists() else []
        self.curve: list[list[float]] = [point for point in known if point[0] <= self.iteration]
        if not self.curve:
            self.curve = [[0, 0.0, self.evaluate()]]
        self.precision = torch.get_float32_matmul_precision()

    @abstractmethod
    def open(self) -> None:
        """Makes the model, goes on where it was saved, and compiles what is to be compiled."""

    @abstractmethod
    def step(self) -> None: ...

    @abstractmethod
    def nats(self, batch: Batch) -> float:
        """Summed cross-entropy of a held-out batch."""

    @abstractmethod
    def save(self) -> None: ...

    @property
    def finished(self) -> bool:
        return self.iteration >= self.run.steps

    @torch.no_grad()
    def evaluate(self) -> float:
        return self.text.bits_per_byte(sum(map(self.nats, self.text.batches)))

    def advance(self, steps: int) -> None:
        """Trains ``steps`` more, counts their CPU time, evaluates and saves."""
        torch.set_float32_matmul_precision(self.precision)
        start = time.process_time()
        for _ in range(min(steps, self.run.steps - self.iteration)):
            self.step()
        spent = self.curve[-1][1] + time.process_time() - start
        self.curve.append([self.iteration, round(spent, 2), round(self.evaluate(), 5)])
        self.save()
        self._file.write_text(json.dumps(self.curve))


class EngineSession(Session):
    """Ours: the trainer as the entry script makes it, on one rank."""

    def open(self) -> None:
        choose_matmul_precision("auto")
        self.trainer = build_trainer(self.prepared, ParallelContext.single())
        loader = self.trainer._loader(self.trainer.data, self.trainer.batches, self.trainer.consumed_samples)
        self._batches = iter(loader)

    @property
    def iteration(self) -> int:  # type: ignore[override]
        return self.trainer.iteration

    def step(self) -> None:
        self.trainer.train_step(next(self._batches))

    def nats(self, batch: Batch) -> float:
        model: Any = self.trainer.model
        model.eval()
        loss = model(batch.tokens, batch.labels, batch.loss_mask, batch.document_start).loss_sum
        model.train()
        return float(loss)

    def save(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.save()


class TorchSession(Session):
    """A peer under torch.compile, on the same batches at the same schedule."""

    def open(self) -> None:
        choose_matmul_precision("auto")
        config = self.prepared.config
        vocabulary = config.model.padded_vocab_size()
        self.model = PEERS[self.run.arm](vocabulary, LENGTH)
        if self.run.arm == "dense":
            self.model.load_state_dict(initial_weights(self.prepared))
        self.optimizers = self.model.optimizers(self.run.lr, self.run.embedding_mult)  # type: ignore[operator]
        self.schedule = LearningRateSchedule(config.optimizer, self.run.steps)
        self.iteration = 0
        self._state = self.folder / "state.pt"
        if self._state.exists():
            self._load(torch.load(self._state))
        data = source_kind(config.data).open(config, self.prepared.tokenizer)
        self._batches = iter(
            GlobalBatchLoader(data, self.prepared.layout.batches, BATCH, consumed_samples=self.iteration * BATCH)
        )
        self.compiled = torch.compile(self.model)
        first = self.text.batches[0]
        self._loss(first).backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    def _loss(self, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.run.bf16):
            loss: torch.Tensor = self.compiled(batch.tokens, batch.labels)
        return loss

    def step(self) -> None:
        (batch,) = next(self._batches)
        lr = self.schedule(self.iteration + 1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_mult", 1.0)
            optimizer.zero_grad()
        (self._loss(batch) / batch.labels.numel()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.iteration += 1

    def nats(self, batch: Batch) -> float:
        return float(self._loss(batch))

    def save(self) -> None:
        content = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "iteration": self.iteration,
        }
        torch.save(content, self._state.with_suffix(".new"))
        self._state.with_suffix(".new").replace(self._state)

    def _load(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.iteration = content["iteration"]


def initial_weights(prepared: PreparedRun) -> dict[str, torch.Tensor]:
    """Of the engine's model, by name."""
    ctx = ParallelContext.single()
    model = build_model_chunks(prepared.config, ctx, prepared.plan)
    initialize_parameters(model, ctx, prepared.config.training.seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def open_session(run: Run, text: Text, folder: Path) -> Session:
    return (EngineSession if run.arm == "ours" else TorchSession)(run, text, folder)


def train_in_turns(runs: list[Run], text: Text, folder: Path, evaluations: int) -> dict[Run, list[list[float]]]:
    """Trains all runs to their end, turn about, and returns their curves; what is there already is kept."""
    sessions: dict[Run, Session] = {}
    curves: dict[Run, list[list[float]]] = {}
    for run in runs:
        done = folder / run.name / "curve.json"
        curve = json.loads(done.read_text()) if done.exists() else []
        if curve and curve[-1][0] >= run.steps:
            curves[run] = curve
        else:
            sessions[run] = open_session(run, text, folder)
    while sessions:
        for run, session in list(sessions.items()):
            session.advance(-(-run.steps // evaluations))
            step, spent, bits = session.curve[-1]
            print(f"  {run.name}: step {step:g}, {spent:.0f} CPU-s, {bits:.4f} bits per byte", flush=True)
            if session.finished:
                curves[run] = session.curve
                del sessions[run]
    return {run: curves[run] for run in runs}


def crossing(curve: list[list[float]], target: float) -> float | None:
    """CPU-seconds at which the curve first reaches ``target``, between its evaluations by a straight line."""
    for (_, before, high), (_, after, low) in itertools.pairwise(curve):
        if high <= target:
            return before
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None
