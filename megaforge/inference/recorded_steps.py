"""The step of one token of each text, recorded once for a number of texts and played again for each token.

A GPU computes such a step in less time than a host needs to start its kernels one by one. What is recorded reads and
writes fixed memory: slots for the memory of as many texts as there were at most, and for as many tokens. Where in them
a token goes is known on the device alone, so that one recording serves every length.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from megaforge.config.launcher import print_rank_0
from megaforge.device import Recorded
from megaforge.models.generation_state import GenerationState, chosen
from megaforge.models.hybrid import HybridModel
from megaforge.nn.sublayer import LayerState

Record = Callable[[Callable[[], Tensor]], Recorded]
LEAST_PLACES = 64


class RecordedSteps:
    """The recordings of a whole model, one a number of texts. A state that goes on by them lives in their slots, and
    gets memory of its own when another one comes."""

    def __init__(self, model: HybridModel, record: Record) -> None:
        """``record``: :func:`megaforge.device.record_graph`, or what does the same."""
        self._model, self._record, self._refused = model, record, False
        self._slots: _Slots | None = None
        self._recordings: dict[int, Recorded] = {}
        self._held: Callable[[], GenerationState | None] = lambda: None

    def logits(self, tokens: Tensor, state: GenerationState) -> Tensor | None:
        """Scores [b, vocabulary] after one more token of each text, int64 [b, 1]; None where that is not recorded."""
        if self._refused or tokens.shape[1] != 1 or state.unused_B is None:
            return None
        self._model.check_length(state.length + 1)
        if (self._held() is not state or not self._has_room(state)) and not self._take(state):
            return None
        assert self._slots is not None
        rows = len(tokens)
        self._slots.tokens[:rows] = tokens
        replay, scores = self._recordings[rows]
        replay()
        state.length += 1
        for layer in state.layers:
            if layer is not None:
                layer.stepped()
        return scores.clone()

    def release(self, state: GenerationState) -> None:
        """Gives ``state`` memory of its own, if it lives in the slots."""
        held = self._held()
        if held is state and held.unused_B is not None:
            held.layers = chosen(held, torch.arange(len(held.unused_B), device=held.unused_B.device)).layers
            self._held = lambda: None

    def _has_room(self, state: GenerationState) -> bool:
        assert state.unused_B is not None
        return self._slots is not None and self._slots.hold(len(state.unused_B), state.length + 1)

    def _take(self, state: GenerationState) -> bool:
        """Moves a state to the slots, after recording its number of texts if that is new; whether it could be."""
        assert state.unused_B is not None
        rows, held = len(state.unused_B), self._held()
        if held is not None:
            self.release(held)
        if not self._has_room(state):
            self._recordings.clear()
            self._slots = None  # before there are others
            self._slots = _Slots(state, rows)
        slots = self._slots
        assert slots is not None
        if rows not in self._recordings:
            slots.rewind()
            try:
                self._recordings[rows] = self._record(lambda: slots.step(self._model, rows))
            except RuntimeError as error:
                self._refused, self._slots = True, None
                reason = str(error).strip().partition("\n")[0]
                print_rank_0(f"--cuda-graph: the step of a token cannot be recorded ({reason}); it is computed without")
                return False
        slots.fill(state)
        self._held = weakref.ref(state)
        return True


class _Slots:
    """Memory of fixed places for the states of up to so many texts, and for their next tokens."""

    def __init__(self, state: GenerationState, rows: int) -> None:
        """As many as ``rows``, with room for what ``state`` has and expects."""
        rooms = [0 if layer is None else layer.expected for layer in state.layers]
        needed, expected = state.length + 1, max(rooms, default=0)
        self.rows = rows
        self.places = max(expected, LEAST_PLACES) if needed <= expected else max(LEAST_PLACES, 2 * needed)
        self.layers = [None if layer is None else layer.slots(rows, self.places) for layer in state.layers]
        assert state.unused_B is not None
        self.unused_B = torch.zeros_like(state.unused_B)
        self.tokens = self.unused_B.new_zeros((rows, 1))
        self.place = self.unused_B.new_zeros(1)

    def hold(self, rows: int, places: int) -> bool:
        return rows <= self.rows and places <= self.places

    def rewind(self) -> None:
        """Back to the first place, as a step that is recorded runs a few times before: none must go beyond the last."""
        self.unused_B.zero_()
        self.place.zero_()

    def fill(self, state: GenerationState) -> None:
        """Takes over a state, which then lives here."""
        assert state.unused_B is not None
        rows = len(state.unused_B)
        self.unused_B[:rows] = state.unused_B
        self.place.fill_(state.length)
        for place, (slot, given) in enumerate(zip(self.layers, state.layers, strict=True)):
            if slot is not None and given is not None:
                own = slot.first(rows)
                own.fill(given)
                state.layers[place] = own

    def step(self, model: HybridModel, rows: int) -> Tensor:
        """What is recorded: scores [b, vocabulary] after the tokens in their slots, which the states take in."""
        own = [None if slot is None else slot.first(rows) for slot in self.layers]
        layers = [None if layer is None else layer.recorded(self.place) for layer in own]
        state = GenerationState(layers, 0, self.unused_B[:rows], padded=True, place=self.place)
        scores, _ = model.stage_logits(self.tokens[:rows], state=state, last_only=True)
        for slot, made in zip(own, layers, strict=True):
            _copy(made, slot)
        self.place += 1
        assert scores is not None
        return scores[:, -1]


def _copy(made: LayerState | None, slot: LayerState | None) -> None:
    """What a layer has set in place of the memory that it was given, to that memory."""
    for field in () if slot is None else dataclasses.fields(slot):
        new, old = getattr(made, field.name), getattr(slot, field.name)
        if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
            old.copy_(new)
