"""``--dry-run``: the plan, the ranks and the memory of every stage; nothing is started and no weight allocated."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from noflush.launch.arguments.pipelining import schedule_of
from noflush.launch.arguments.settings import Ranks, Settings
from noflush.launch.gpt.size import bytes_by_stage, parameters_by_stage
from noflush.order.plan import communicator_line, human_bytes, make_plan


def ranks_of_stage(ranks: Ranks, stage: int) -> str:
    """The global ranks of a stage, as DeepSpeed's and Megatron's layout numbers them: ``8-15``."""
    each = ranks.data * ranks.tensor
    first, last = stage * each, (stage + 1) * each - 1
    return str(first) if first == last else f"{first}-{last}"


def print_dry_run(settings: Settings, lines: Sequence[str]) -> None:
    """Prints ``lines``, then a row a stage, then what the flush costs."""
    console = Console(width=120)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    schedule = schedule_of(settings)
    ranks = settings.ranks
    counts = parameters_by_stage(settings.model, settings.layers_by_stage, ranks.tensor)
    plan = make_plan(schedule, counts, data=ranks.data, tensor=ranks.tensor)
    memory = bytes_by_stage(settings, schedule)
    table = Table(title=f"{schedule.stages} stages, K = {schedule.gas}, {schedule.name}, weights {schedule.weights}")
    for column in ("stage", "ranks", "layers", "weights", "delay", "versions", "in flight"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("weights, gradients, optimizer", "stash", "activations (estimate)", "a rank"):
        table.add_column(column, justify="right")
    for row, count, needed in zip(plan.stages, counts, memory, strict=True):
        table.add_row(
            str(row.stage),
            ranks_of_stage(ranks, row.stage),
            str(settings.layers_by_stage[row.stage]),
            f"{count / 1e6:.1f} M",
            str(row.delay),
            str(row.versions),
            str(row.in_flight),
            human_bytes(needed.weights),
            human_bytes(needed.stash),
            human_bytes(needed.activations),
            human_bytes(needed.total),
        )
    console.print(table)
    if settings.block is not None:
        console.print(communicator_line(plan), highlight=False)
        console.print(
            f"predicted utilisation: {plan.no_flush:.1%} without the flush, {plan.flush:.1%} with it"
            + ", if the stages take equally long" * (len(set(settings.layers_by_stage)) > 1),
            highlight=False,
        )
    console.print("dry run: nothing was started", highlight=False)
