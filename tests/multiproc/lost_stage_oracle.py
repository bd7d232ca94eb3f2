"""Groups of which one loses a stage, in one process: every stage's own order, replayed as data arrives.

Nothing here knows of schedules, links or weight rings. A stage is a list of forwards, backwards and updates; the work
that it did for another group stands where the engine says that it did it; and each step waits for what it needs.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from dataclasses import dataclass, field

import torch

from noflush.demo.gpt import next_token_loss, split_by_blocks
from noflush.methods.method import Place
from noflush.order.averaging import smoothing
from noflush.replicas.correction import correction, weighted_average
from noflush.simulated_stage import FLOAT32, SimulatedStage
from tests.multiproc import training as t
from tests.multiproc.group_training import gpt_of


def own_steps(first, end, lag, gas, until=None):
    """A stage's own order for micro-batches [first, end), full to the end of call ``until``, then drained."""
    steps, done = [], first

    def backward():
        nonlocal done
        steps.append(("B", done))
        done += 1
        if done % gas == 0:
            steps.append(("U", done // gas))

    for m in range(first, end):
        steps.append(("F", m))
        if m - first >= lag:
            backward()
    while until is None and done < end:
        backward()
    return steps


@dataclass
class Node:
    """One process of one stage: what it does, and what it has."""

    group: int
    key: str
    stage: int
    of: SimulatedStage
    steps: deque
    exchanges: list
    born_of: tuple | None
    first_update: int
    parts: dict = field(default_factory=dict)  # of micro-batches in flight: input, output, weights
    guests: int = 0
    rates: dict = field(default_factory=dict)
    visits: Counter = field(default_factory=Counter)

    def forward(self, value):
        """Output and its leaves, of weights copied now."""
        value = value.detach().requires_grad_(value.is_floating_point())
        weights = {name: p.detach().clone().requires_grad_() for name, p in self.of.params.items()}
        return value, torch.func.functional_call(self.of.module, weights, (value,)), weights

    def backward(self, value, output, weights, gradient):
        """Adds the weights' gradients; that of the input."""
        leaves = [*([value] if value.requires_grad else []), *weights.values()]
        found = torch.autograd.grad(output, leaves, gradient)
        for name, g in zip(weights, found[len(leaves) - len(weights) :], strict=True):
            self.of.accumulate(0, name, g)
        return found[0] if value.requires_grad else None


class Replay:
    """``results``: as `run_groups` gave them, of `train_losing`; ``lost``: (group, stage, calls made before it died).

    ``will``: what that process said of itself last.
    """

    def __init__(self, results, seeds, stages, calls, gas, make_optimizer, lost, will, precision=FLOAT32):
        self.gas, self.stages, self.calls = gas, stages, calls
        self.data = [
            [batch for call in range(n) for batch in t.data(gas, seed=seed + 1000 * call)]
            for n, seed in zip(calls, seeds, strict=True)
        ]
        self.make_optimizer, self.precision = make_optimizer, precision
        self.activations, self.gradients, self.sent, self.states = {}, {}, {}, {}
        self.losses = [{} for _ in calls]
        self.nodes = []
        keys = [result[0]["key"] for result in results]
        group, stage, died = lost
        self.nodes.append(
            self._node(
                group, keys[group], stage, own_steps(0, died * gas, self._lag(stage), gas, died), will["exchanges"]
            )
        )
        for g, result in enumerate(results):
            for s, rank in enumerate(result):
                if (g, s) == (group, stage) and not isinstance(rank, dict):
                    continue
                first = rank["began"] * gas
                steps = own_steps(first, calls[g] * gas, self._lag(s), gas)
                steps = _with_guests(steps, rank["served"], keys)
                node = self._node(g, keys[g], s, steps, rank["exchanges"], rank["born_of"], rank["began"])
                self.nodes.append(node)
        # What had not arrived when its process died counts for nothing: who stood in has done it again.
        self.done_again = {
            (one.kind, stage, one.micro_batch)
            for r in results
            if isinstance(r[stage], dict)
            for one in r[stage]["served"]
        }
        self.wanted = {
            (node.stage, part.key, part.update): (exchange.start, exchange.length)
            for node in self.nodes
            for exchange in node.exchanges
            for part in exchange.parts
            if part.samples
        }
        self.asked = {(node.stage, *node.born_of) for node in self.nodes if node.born_of}

    def _lag(self, stage):
        return self.stages - 1 - stage

    def _node(self, group, key, stage, steps, exchanges=(), born_of=None, began=0):
        module = split_by_blocks(t.layers(gpt_of(self.stages)), self.stages)[stage]
        of = SimulatedStage(module, self.make_optimizer, 1, self.precision, 1, ())
        if hasattr(of.optimizer, "set_stage"):
            of.optimizer.set_stage(Place(stage, self.stages, self._lag(stage) / self.gas))
        return Node(group, key, stage, of, deque(steps), list(exchanges), born_of, began)

    def run(self):
        """To the end."""
        while any(node.steps for node in self.nodes):
            moved = [self._some(node) for node in self.nodes]
            if not any(moved):
                raise RuntimeError(f"stuck: {[(n.group, n.stage, n.steps[0]) for n in self.nodes if n.steps]}")
        for node in self.nodes:
            node.of.publish()  # a drain makes the true weights those that are used

    def _some(self, node):
        moved = False
        while node.steps and self._step(node, node.steps[0]):
            node.steps.popleft()
            moved = True
        return moved

    def _step(self, node, step):
        if node.born_of:
            born = (node.stage, *node.born_of)
            if born not in self.states:
                return False
            node.of.put(node.first_update, self.states[born])
            node.born_of = None
        kind, index, *guest = step
        if kind == "U":
            return self._update(node, index)
        group = guest[0] if guest else node.group
        return (self._forward if kind == "F" else self._backward)(node, group, index, bool(guest))

    def _forward(self, node, group, m, guest):
        if node.stage and (group, node.stage - 1, m) not in self.activations:
            return False
        ran = self._run(node, group, m)
        if node.stage < self.stages - 1 and self._counts(node, "F", m, guest):
            assert (group, node.stage, m) not in self.activations
            self.activations[group, node.stage, m] = ran[1].detach()
        if not guest:
            node.parts[m] = ran
        return True

    def _counts(self, node, kind, m, guest):
        return guest or node is not self.nodes[0] or (kind, node.stage, m) not in self.done_again

    def _run(self, node, group, m):
        inputs, labels = self.data[group][m]
        value, output, weights = node.forward(self.activations[group, node.stage - 1, m] if node.stage else inputs)
        if node.stage == self.stages - 1:
            loss = next_token_loss(output, labels)
            self.losses[group][m] = loss.detach()
            output = loss / self.gas
        return value, output, weights

    def _backward(self, node, group, m, guest):
        last, gradient = node.stage == self.stages - 1, None
        if not last:
            gradient = self.gradients.get((group, node.stage + 1, m))
        if (not last and gradient is None) or (guest and (group, node.stage - 1, m) not in self.activations):
            return False
        ran = self._run(node, group, m) if guest else node.parts.pop(m)
        node.guests += guest
        found = node.backward(*ran, gradient)
        if self._counts(node, "B", m, guest):
            assert (group, node.stage, m) not in self.gradients
            self.gradients[group, node.stage, m] = found
        return True

    def batch_loss(self, group, call):
        """As the engine tells it: the mean over a batch's micro-batches."""
        parts = [self.losses[group][call * self.gas + k] for k in range(self.gas)]
        return (sum(parts[1:], parts[0]) / self.gas).item()

    def _update(self, node, update):
        due = [exchange for exchange in node.exchanges if exchange.applied_at == update]
        if any((node.stage, p.key, p.update) not in self.sent for e in due for p in e.parts if p.samples):
            return False
        node.of.take_gradients(1.0)
        for master in node.of.masters.values():
            master.grad.mul_(1.0 / ((self.gas + node.guests) / self.gas))
        node.of.step()
        node.guests = 0
        node.of.newest += 1
        for exchange in due:
            self._average(node, exchange)
        at = node.stage, node.key, update
        if at in self.wanted:
            start, length = self.wanted[at]
            self.sent[at] = _flat(node.of)[start : start + length].clone()
        if at in self.asked:
            self.states[at] = (
                [p.detach().clone() for p in node.of.in_order()],
                copy.deepcopy(node.of.optimizer.state_dict()),
                None,
            )
        return True

    def _average(self, node, exchange):
        parts = [part for part in exchange.parts if part.samples]
        slices = [self.sent[node.stage, part.key, part.update] for part in parts]
        average = weighted_average(slices, [part.samples for part in parts])
        change, rate = correction(
            "corrected",
            self.sent[node.stage, node.key, exchange.sent_at],
            average,
            _flat(node.of)[exchange.start : exchange.start + exchange.length],
            node.rates.get(exchange.start),
            exchange.applied_at - exchange.sent_at,
            smoothing(node.visits[exchange.start]),
        )
        node.visits[exchange.start] += 1
        node.rates[exchange.start] = rate
        node.of.shift(exchange.start, change)


def _flat(of):
    return torch.cat([p.detach().reshape(-1) for p in of.in_order()])


def _with_guests(steps, served, keys):
    """``steps`` with each piece of work for another group after as many of its own as it came after."""
    found, left = [], deque(served)
    for done in range(len(steps) + 1):
        while left and left[0].after == done:
            one = left.popleft()
            found.append((one.kind, one.micro_batch, keys.index(one.key)))
        if done < len(steps):
            found.append(steps[done])
    assert not left
    return found
