"""The text of the progress line that a run prints every ``steps_per_print`` calls. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def progress_line(
    steps: int,
    loss: float,
    loss_step: int | None,
    additional: Mapping[str, float],
    seconds: float,
    samples: int,
    bubbles: Sequence[float],
    skipped: Sequence[int] = (),
    scale: float | None = None,
    breakdown: Mapping[str, float] | None = None,
) -> str:
    """DeepSpeed's line with the measured bubble behind it.

    Args:
        steps: calls made.
        loss, loss_step: the newest batch loss known and the call it belongs to (None: none known yet).
        additional: the module's additional losses by name.
        seconds: time of a call, averaged over the interval.
        samples: samples a call.
        bubbles: by stage, share of the interval without compute; nan where not heard from yet.
        skipped: by stage, updates skipped so far for gradients that are not finite; named if there are any.
        scale: the newest loss scale known (None: there is none).
        breakdown: milliseconds an action by name, to be appended.
    """
    words = [f"steps: {steps}"]
    if loss_step is None:
        words.append("loss: not known yet (it travels back with the gradients)")
    else:
        words.append(f"loss: {loss:0.4f}" + (f" (of step {loss_step})" if loss_step != steps else ""))
    words += [f"{name}: {value:0.4f}" for name, value in additional.items()]
    rate = samples / seconds if seconds > 0 else math.nan
    words.append(f"iter time (s): {seconds:0.3f} samples/sec: {rate:0.3f}")
    known = [b for b in bubbles if not math.isnan(b)]
    if known:
        by_stage = " ".join("-" if math.isnan(b) else f"{100 * b:.1f}" for b in bubbles)
        words.append(f"bubble: {100 * sum(known) / len(known):.1f}% (by stage: {by_stage})")
    if any(skipped):
        words.append(f"skipped updates: {sum(skipped)} (by stage: {' '.join(map(str, skipped))})")
    if scale is not None:
        words.append(f"loss scale: {scale:g}")
    if breakdown is not None:
        actions = [f"{k} {v:.2f}" for k, v in breakdown.items() if k not in ("seconds", "bubble")]
        words.append("ms an action: " + ", ".join(actions))
    return " ".join(words)
