"""Runs any pipeline schedule over the stages of this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megaforge.parallel.context import Axis
from megaforge.parallel.pipeline.actions import Action, ActionKind, Schedule
from megaforge.parallel.pipeline.p2p_communication import Mailbox
from megaforge.parallel.pipeline.program import P2PBatch, Transfer, build_program, check_program
from megaforge.parallel.pipeline.split_backward import DeferredWeightGradients, backward_input
from megaforge.parallel.pipeline.stage_tensors import StageTensors


@dataclass(frozen=True)
class StageOutput:
    """What a stage makes of one microbatch.

    Attributes:
        payload: for the next stage: every tensor that is not carried, and the carried ones that this stage makes.
            Carried tensors received may be handed on unchanged or left out. Ignored on the last stage.
        loss: this stage's share of the loss to be differentiated, a scalar: the main loss on the last stage, a
            router's auxiliary loss on any. None: no share.
        report: anything else, returned to the caller; must not keep an autograd graph alive.
    """

    payload: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    report: Any = None


@dataclass
class _InFlight:
    """A stage's microbatch between its forward and its backward pass. Outputs are kept as gradient edges, so that
    their storage is free as soon as they are sent."""

    inputs: dict[str, Tensor]
    roots: dict[str, GradientEdge]
    loss: Tensor | None
    deferred: DeferredWeightGradients | None = None


# forward_step(chunk, microbatch, payload) -> StageOutput; the payload is empty on stage 0
ForwardStep = Callable[[nn.Module, Any, dict[str, Tensor]], StageOutput]


class PipelineExecutor:
    """Runs ``schedule`` on one rank: what is the same for every global batch.

    Attributes:
        schedule: for all ranks; checked for deadlocks here, once.
        axis: the pipeline axis of this rank (``ctx.pp``).
        chunks: this rank's stages, by chunk.
        payload: what travels between stages; the same on all ranks.
        device: where received tensors live.

    Args:
        before_weight_gradients: called as ``(chunk index, is last)`` before each action that accumulates weight
            gradients; "last" is when the chunk's gradients will be complete for this global batch.

    Raises:
        UserError: the schedule is incomplete or deadlocks.
    """

    def __init__(
        self,
        schedule: Schedule,
        axis: Axis,
        chunks: Sequence[nn.Module],
        payload: StageTensors,
        *,
        device: torch.device | str = "cpu",
        before_weight_gradients: Callable[[int, bool], None] | None = None,
    ) -> None:
        if axis.size != schedule.num_ranks or len(chunks) != schedule.num_chunks:
            raise ValueError(
                f"schedule {schedule.name} is for {schedule.num_ranks} ranks with {schedule.num_chunks} chunks, "
                f"not {axis.size} ranks with {len(chunks)}"
            )
        self.schedule, self.axis, self.chunks = schedule, axis, chunks
        self.payload, self.device = payload, torch.device(device)
        self._before_weight_gradients = before_weight_gradients
        self._programs = {}
        for train in (True, False):
            variant = schedule if train else schedule.forward_only()
            program = build_program(variant, forward_only=not train)
            check_program(variant, program)
            self._programs[train] = program[axis.rank]
        makes_weight_gradients = [
            a for a in schedule.actions[axis.rank] if a.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)
        ]
        self._last_of_chunk = set({a.stage: a for a in makes_weight_gradients}.values())

    def run(
        self,
        microbatches: Sequence[Any],
        forward_step: ForwardStep,
        *,
        gradients: bool = True,
        loss_scale: float = 1.0,
    ) -> dict[tuple[int, int], Any]:
        """One global batch: all microbatches forward and, with ``gradients``, backward.

        Args:
            microbatches: the schedule's number of them, given to ``forward_step`` as they are; all ranks get the same.
            gradients: False for evaluation.
            loss_scale: factor of the losses' gradients, for fp16.

        Returns:
            The reports of this rank's stages by (microbatch, stage), where a stage gave one.
        """
        if len(microbatches) != self.schedule.num_microbatches:
            raise ValueError(f"{len(microbatches)} microbatches for a schedule of {self.schedule.num_microbatches}")
        batch = _GlobalBatch(self, microbatches, forward_step, gradients, loss_scale)
        for step in self._programs[gradients]:
            batch.step(step)
        batch.mailbox.finish()
        return batch.reports

    def announce(self, action: Action) -> None:
        """Tells that ``action`` is about to accumulate weight gradients."""
        if self._before_weight_gradients is not None:
            self._before_weight_gradients(self.schedule.chunk_of(action.stage), action in self._last_of_chunk)


class _GlobalBatch:
    """One global batch on its way through ``executor``'s stages: what is in flight between its actions."""

    def __init__(
        self,
        executor: PipelineExecutor,
        microbatches: Sequence[Any],
        forward_step: ForwardStep,
        gradients: bool,
        loss_scale: float,
    ) -> None:
        self.executor = executor
        self.schedule = executor.schedule
        self.payload = executor.payload
        self.rank = executor.axis.rank
        self.stages = self.schedule.stages_of(self.rank)
        self.microbatches = microbatches
        self.forward_step = forward_step
        self.gradients = gradients
        self.loss_scale = loss_scale
        self.mailbox = Mailbox(self.schedule, executor.axis, self.payload, executor.device)
        self.reports: dict[tuple[int, int], Any] = {}
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        # Results on their way to a neighbouring stage, on this rank or in the mailbox.
        self._outbox: dict[Transfer, dict[str, Tensor]] = {}
        self._carried: dict[tuple[str, int], Tensor] = {}
        self._carried_gradient: dict[tuple[str, int], Tensor] = {}
        self._run_action = {
            ActionKind.FORWARD: self._forward,
            ActionKind.BACKWARD: self._backward,
            ActionKind.BACKWARD_INPUT: self._backward_input,
            ActionKind.BACKWARD_WEIGHT: self._backward_weight,
        }

    def step(self, step: Action | P2PBatch) -> None:
        """Executes one step of the program."""
        if isinstance(step, P2PBatch):
            self.mailbox.post(step, self._outbox.pop)
            return
        self._run_action[step.kind](
            step.stage, step.microbatch, self.executor.chunks[self.schedule.chunk_of(step.stage)]
        )

    def _forward(self, stage: int, microbatch: int, chunk: nn.Module) -> None:
        inputs = self._inputs(stage, microbatch)
        with torch.set_grad_enabled(self.gradients):
            output = self.forward_step(chunk, self.microbatches[microbatch], dict(inputs))
        if output.report is not None:
            self.reports[microbatch, stage] = output.report
        made = self._outputs(stage, output.payload, inputs)
        for name in made:
            if self.payload[name].carried:
                self._carried[name, microbatch] = made[name].detach()
        if stage + 1 < self.schedule.num_stages:
            hidden = {name: tensor.detach() for name, tensor in made.items() if not self.payload[name].carried}
            self._outbox[Transfer(stage, stage + 1, microbatch)] = hidden | self._carried_of(microbatch)
        if stage == self.stages[-1]:
            for name in self.payload:
                self._carried.pop((name, microbatch), None)
        if self.gradients:
            loss = output.loss if output.loss is not None and output.loss.requires_grad else None
            roots = {
                name: get_gradient_edge(tensor)
                for name, tensor in made.items()
                if self.payload[name].differentiable and tensor.requires_grad
            }
            self._in_flight[stage, microbatch] = _InFlight(inputs, roots, loss)

    def _carried_of(self, microbatch: int) -> dict[str, Tensor]:
        held = ((name, self._carried.get((name, microbatch))) for name in self.payload)
        return {name: tensor for name, tensor in held if tensor is not None}

    def _inputs(self, stage: int, microbatch: int) -> dict[str, Tensor]:
        """The payload of ``stage``: leaves of its own, so that gradients of chunks on one rank stay apart."""
        if not stage:
            return {}
        arrived = self._arrived(Transfer(stage - 1, stage, microbatch))
        for name in list(arrived):
            if self.payload[name].carried:
                self._carried[name, microbatch] = arrived.pop(name)
        arrived |= self._carried_of(microbatch)
        return {
            name: tensor.detach().requires_grad_(self.gradients and self.payload[name].differentiable)
            for name, tensor in arrived.items()
        }

    def _arrived(self, transfer: Transfer) -> dict[str, Tensor]:
        if self.schedule.rank_of(transfer.source_stage) != self.rank:
            return self.mailbox.take(transfer)
        return self._outbox.pop(transfer)

    def _outputs(self, stage: int, given: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``stage`` made, checked against the declared payload."""
        if stage + 1 == self.schedule.num_stages:
            return {}
        made = {}
        for name, spec in self.payload.items():
            if spec.carried and stage != spec.made_by:
                if name in given and given[name] is not inputs.get(name):
                    raise ValueError(
                        f"stage {stage} changed the carried payload tensor '{name}', made by stage {spec.made_by}"
                    )
                continue
            if name not in given:
                raise ValueError(f"stage {stage} did not return the payload tensor '{name}'")
            tensor = given[name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"stage {stage} returned '{name}' as {tuple(tensor.shape)} {tensor.dtype}; "
                    f"declared is {spec.shape} {spec.dtype}"
                )
            made[name] = tensor
        return made

    def _take_gradients(self, stage: int, microbatch: int, state: _InFlight) -> tuple[list[GradientEdge], list[Tensor]]:
        """Roots of the backward pass of a stage and their gradients."""
        arrived: dict[str, Tensor] = {}
        if stage + 1 < self.schedule.num_stages:
            arrived = self._arrived(Transfer(stage + 1, stage, microbatch))
            for name in list(arrived):
                if self.payload[name].carried:
                    self._add_carried_gradient(name, microbatch, arrived.pop(name))
        roots, gradients = [], []
        for name, edge in state.roots.items():
            gradient = (
                self._carried_gradient.pop((name, microbatch), None) if self.payload[name].carried else arrived[name]
            )
            if gradient is not None:
                roots.append(edge)
                gradients.append(gradient)
        if state.loss is not None:
            roots.append(get_gradient_edge(state.loss))
            gradients.append(torch.full_like(state.loss, self.loss_scale))
        return roots, gradients

    def _add_carried_gradient(self, name: str, microbatch: int, gradient: Tensor) -> None:
        known = self._carried_gradient.get((name, microbatch))
        self._carried_gradient[name, microbatch] = gradient if known is None else known + gradient

    def _give_gradients(
        self, stage: int, microbatch: int, inputs: dict[str, Tensor], gradients: Sequence[Tensor | None]
    ) -> None:
        """Passes gradients of a stage's inputs on to the stage before it."""
        if not stage:
            return
        leaving = {}
        for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
            if not self.payload[name].carried:
                leaving[name] = torch.zeros_like(tensor) if gradient is None else gradient
            elif gradient is not None:
                self._add_carried_gradient(name, microbatch, gradient)
        transfer = Transfer(stage, stage - 1, microbatch)
        if self.schedule.rank_of(stage - 1) != self.rank:
            for name in self.mailbox.names(transfer):
                if self.payload[name].carried:
                    total = self._carried_gradient.pop((name, microbatch), None)
                    leaving[name] = torch.zeros_like(inputs[name]) if total is None else total
        self._outbox[transfer] = leaving

    def _backward(self, stage: int, microbatch: int, chunk: nn.Module) -> None:
        state = self._in_flight.pop((stage, microbatch))
        roots, gradients = self._take_gradients(stage, microbatch, state)
        inputs = {name: tensor for name, tensor in state.inputs.items() if tensor.requires_grad}
        self.executor.announce(Action(ActionKind.BACKWARD, stage, microbatch))
        if roots:
            torch.autograd.backward(roots, gradients)
        self._give_gradients(stage, microbatch, inputs, [tensor.grad for tensor in inputs.values()])

    def _backward_input(self, stage: int, microbatch: int, chunk: nn.Module) -> None:
        state = self._in_flight[stage, microbatch]
        roots, gradients = self._take_gradients(stage, microbatch, state)
        inputs = {name: tensor for name, tensor in state.inputs.items() if tensor.requires_grad}
        input_gradients, state.deferred = backward_input(roots, gradients, list(inputs.values()), chunk.parameters())
        state.inputs, state.roots, state.loss = {}, {}, None
        self._give_gradients(stage, microbatch, inputs, input_gradients)

    def _backward_weight(self, stage: int, microbatch: int, chunk: nn.Module) -> None:
        self.executor.announce(Action(ActionKind.BACKWARD_WEIGHT, stage, microbatch))
        deferred = self._in_flight.pop((stage, microbatch)).deferred
        assert deferred is not None
        deferred.run()
