"""A stage as it stands between two calls, with all that is in flight: what a checkpoint holds besides a host's own.

Taking it disturbs nothing: the pipeline stays full, and a run that takes many computes the bits of one that takes none.
`resume` puts it back into a stage that has loaded weights and optimizer, and replays the forwards in flight
(`order.replay`); from there on the run is the one that was never stopped.

Not in it: weights, masters, moments and counters of the newest version, which are the host's checkpoint, and how a
script's data and random numbers go on, which is the script's to save.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from noflush.order.replay import breaks_a_batch, in_flight
from noflush.stage.messages import Payload
from noflush.stage.replay import Sent, empty_links, replay, sent_and_not_taken

if TYPE_CHECKING:
    from noflush.stage.stage import Stage

FORMAT = 1


def why_not_taken(stage: Stage) -> str | None:
    """Why a snapshot of ``stage`` is impossible while micro-batches are in flight; None if it is possible.

    The same on every stage of a run.
    """
    schedule = stage.schedule
    if schedule.backward_sees_live_weights:
        return f"weights {schedule.weights!r} keep no version that a forward could be run with again"
    if breaks_a_batch(schedule) and not stage.update.gives_sums:
        return (
            f"the optimizer sums gradients where they cannot be taken out, and with gradient_accumulation_steps "
            f"{schedule.gas} some stage always has a part of a batch's"
        )
    return None


def why_not_resumed(snapshot: dict[str, Any], stage: Stage) -> str | None:
    """Why ``snapshot`` cannot be put back into ``stage``, so that the pipeline has to fill anew; None if it can."""
    if snapshot["format"] != FORMAT:
        return f"what was in flight has format {snapshot['format']}, and this noflush reads {FORMAT}"
    here, there = _settings(stage), snapshot["settings"]
    changed = [f"{name} {there.get(name)} is {here[name]} now" for name in here if there.get(name) != here[name]]
    if snapshot["told"]["calls"] != stage.calls:
        changed.append(f"what was in flight is of call {snapshot['told']['calls']}, and the rest of call {stage.calls}")
    if snapshot["replicas"] != stage.ranks.replicas:
        changed.append(f"{snapshot['replicas']} replicas are {stage.ranks.replicas} now")
    return ", ".join(changed) or None


def _settings(stage: Stage) -> dict[str, Any]:
    """What must be the same where a snapshot is put back."""
    wire = asdict(stage.options.wire)
    return {**asdict(stage.schedule), **{f"wire of {direction}": form for direction, form in wire.items()}}


def depth_of(snapshot: dict[str, Any]) -> int:
    """`Schedule.extra_in_flight` under which ``snapshot`` was taken."""
    extra: int = snapshot["settings"]["extra_in_flight"]
    return extra


def take(stage: Stage, with_versions: bool = True) -> dict[str, Any]:
    """The snapshot of ``stage``: plain values, tensors, and micro-batches as the script gave them.

    Its tensors are the stage's own, good until the next call: `to_host` copies them. Waits for the device, and for no
    other stage.

    Args:
        with_versions: False leaves the weight versions out, which another replica's snapshot has.
    """
    schedule, runner = stage.schedule, stage.runner
    following = runner.first_version + schedule.version(stage.stage, runner.calls * schedule.gas)
    also = {following}
    if schedule.aligned:
        also |= {*range(runner.first_version + schedule.aligned_version(runner.calls), stage.ring.newest)}
    runs_again = in_flight(schedule, stage.stage, runner.calls)
    ring = stage.ring.snapshot(also, with_newest=stage.update.looks_ahead)
    return {
        "format": FORMAT,
        "settings": _settings(stage),
        "replicas": stage.ranks.replicas,
        "ring": ring if with_versions else {**ring, "versions": {}},
        "position": runner.position(),
        "forwards": [(number, dict(stage.forwards)[number]) for number in map(runner.number, runs_again)],
        "sent": [_without_request(stage, message) for message in sent_and_not_taken(runner)],
        "sums": stage.update.sums() if runs_again.start % schedule.gas else None,
        "guests": stage.guests,
        "tied": stage.tied.snapshot(),
        "told": _told(stage),
    }


def to_host(value: Any, known: dict[int, Tensor] | None = None) -> Any:
    """A copy of ``value`` with all tensors in it on the CPU; a tensor that occurs twice is copied once."""
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().to("cpu", copy=True).contiguous()
        return known[id(value)]
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = to_host(item, known)
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_host(item, known) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_host(item, known) for item in value)
    return copy.deepcopy(value)


def resume(stage: Stage, snapshot: dict[str, Any]) -> None:
    """Puts ``snapshot`` back into a drained ``stage`` that was restarted from the checkpoint; on all ranks.

    Raises what a forward may raise.
    """
    ring, published = snapshot["ring"], snapshot["ring"]["versions"].get(snapshot["ring"]["newest"])
    if published is not None:
        stage.update.take_off(stage.ring, published)
    stage.ring.resume(ring)
    if snapshot["sums"] is not None:
        stage.update.set_sums(snapshot["sums"])
        stage.guests = snapshot.get("guests", 0)
    _hear_again(stage, snapshot["told"])
    with stage.recorder.outside_calls(), stage.on_duty(), stage.work.replaying():
        empty_links(stage.runner.neighbours, stage.stage, stage.tell_all)
        stage.runner.stand_at(snapshot["position"])
        stage.tied.resume(snapshot["tied"], stage.device)
        _run_again(stage, snapshot["sent"], dict(snapshot["forwards"]))


def _told(stage: Stage) -> dict[str, Any]:
    """What has been told and heard at ``stage``, and waits to be read or handed on."""
    return {
        "calls": stage.calls,
        "guard": stage.guard.snapshot(),
        "norm": stage.norm.snapshot(),
        "unheard": stage.intake.skipped,
        "scale": stage.scale_owner and stage.scale_owner.snapshot(),
        "heard": stage.heard.snapshot(),
        "report": (stage.reports.newest, stage.reports.step),
    }


def _hear_again(stage: Stage, told: dict[str, Any]) -> None:
    stage.calls = told["calls"]
    stage.guard.resume(told["guard"])
    stage.norm.resume(told["norm"], stage.device)
    stage.intake.resume(tuple(told["unheard"]))
    if stage.scale_owner is not None and told["scale"] is not None:
        stage.scale_owner.resume(told["scale"])
    stage.heard.resume(told["heard"])
    stage.reports.resume(*told["report"])


def _without_request(stage: Stage, message: Sent) -> Sent:
    """A gradient message whose report, if it has one, asks for no stop."""
    m, tensors, place = message
    if place is not None:
        tensors = [*tensors[:place], stage.reports.without_request(tensors[place]), *tensors[place + 1 :]]
    return m, tensors, place


def _run_again(stage: Stage, sent: list[Sent], noted: dict[int, dict[str, Any]]) -> None:
    stage.forwards.clear()

    def forward(number: int, buffer: int, received: Payload | None) -> Payload:
        note = noted[number]
        batch = None if note["batch"] is None else stage.intake.again(note["batch"])
        stage.forwards.append((number, {**note, "batch": batch}))
        stage.work.set_random_state(note["random"])
        return stage.work.forward(buffer, received, batch)

    replay(stage.runner, stage.tied, stage.posting, sent, forward)


def missing_updates(snapshot: dict[str, Any]) -> int:
    """Updates that the stage had still to make of the calls made, whose micro-batches are lost where it fills anew."""
    position = snapshot["position"]
    missing: int = position["calls"] - (snapshot["ring"]["newest"] - position["first_version"])
    return missing
