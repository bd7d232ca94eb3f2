"""Checkpoints of `NoFlushEngine`: DeepSpeed's, of a full pipeline, loaded so that it goes on or fills anew."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.patches.deepspeed import in_flight, recut, universal
from noflush.patches.deepspeed.kept_state import PARAMETERS, SPANS
from noflush.patches.deepspeed.matrix_state import spans_of, was_laid_otherwise
from noflush.patches.deepspeed.saving import Saves
from noflush.stage import snapshot
from noflush.stage.checkpoint import CheckpointError, named_by_latest
from noflush.stage.stage import Stage

_Host: Any = PipelineEngine if TYPE_CHECKING else object


class Checkpoints(_Host):  # type: ignore[misc]
    """What the engine has of them.

    Attributes:
        saves: its checkpoints on their way to the disk.
        recut: whether the checkpoint that was loaded last was of other stages, or of as many with other layers, or of
            other replicas.
    """

    saves: Saves
    recut = False
    _nf_stage: Stage
    _nf_loads_shards = False
    _nf_said = False
    skipped_steps: int

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        finish: Callable[[Path], None] = lambda partial: None,
    ) -> Any:
        """As DeepSpeed's, on every rank; the checkpoint loads in stock DeepSpeed.

        Nothing drains: what is in flight is saved beside DeepSpeed's files (`in_flight`), training goes on as if
        nothing had been saved, and so does a run that resumes. Where that cannot be (weights ``latest``; rank 0 says
        so once), it drains first.

        The checkpoint is written beside, and put in its place once every rank's part is on the disk; then ``latest``
        names it. With ``async_save`` this returns once all has been copied into host memory, and the checkpoint is put
        in place during a later call, or by `finish_saves`.

        Args:
            save_dir, tag, client_state, save_latest, exclude_frozen_parameters: as DeepSpeed's.
            finish: called on rank 0 with the folder that holds all files, before it is put in place.

        Raises:
            NotWrittenError: on every rank, of this checkpoint or the one that was still being written.

        Where a group of several has lost a stage (``replicas.reroute``) nothing is written, and it returns False.
        """
        if self._nf_group is not None and not self._nf_group.is_whole("checkpoint"):
            return False
        stage = self._nf_stage
        why = snapshot.why_not_taken(stage)
        if why is not None:
            if not self._nf_said:
                self.say(f"every save drains the pipeline, because {why}")
            self._nf_said = True
            self.drain()
        self._nf_write_events(before=sys.maxsize)
        stage.guard.saved_to = save_dir

        # numpy's numbers are no plain values, of which a checkpoint is made.
        state = dict(client_state or {}) | {recut.PARTS: [int(part) for part in self.module.parts]}
        if self._nf_group is not None and self._nf_group.order is not None:
            state[recut.ORDER] = self._nf_group.order.kept()
        if not stage.weights.has_masters:
            groups = stage.weights.rule.param_groups
            state[PARAMETERS] = [self.param_names.get(p, "") for group in groups for p in group["params"]]
        elif spans := spans_of(stage.weights, self.param_names, self.dp_world_size):
            state[SPANS] = spans

        def collect(name: str) -> Any:
            stage.share_scaler()
            with stage.at_true_weights(), universal.momenta_as_moments(stage.weights.rule):
                result = super(Checkpoints, self).save_checkpoint(
                    save_dir, name, state, False, exclude_frozen_parameters
                )
            in_flight.save(self, Path(save_dir) / name)
            return result

        with stage.on_duty():
            return self.saves.save(
                collect, save_dir, str(tag or f"global_step{self.global_steps}"), save_latest, finish
            )

    def finish_saves(self) -> None:
        """Waits until a checkpoint that is being written (``async_save``) is in its place. Collective.

        Raises NotWrittenError on every rank if it could not be written.
        """
        if self._nf_group is None or self._nf_group.is_whole("checkpoint"):
            with self._nf_stage.on_duty():
                self.saves.finish()

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, after `drain`; numbering goes on from the checkpoint's ``global_steps``.

        What was in flight is put back, if the optimizer is loaded too and the schedule is the same (else rank 0 says
        what differs, and the pipeline fills anew): the run goes on as if it had never stopped, given that the script
        goes on with the data after those of ``global_steps`` calls, and restores its random numbers after this call.

        As DeepSpeed's it unpickles whatever the files hold: load only what you trust (launch/ looks first).
        Forgets what belongs to the run before: micro-batches kept after `DataExhausted`, the last known loss.

        A checkpoint of other stages, other layers a stage or other replicas is re-cut by layer (`recut`), and the
        pipeline fills anew.

        Raises:
            CheckpointError: some ranks' files of what was in flight are missing, or it cannot be re-cut.
            ValueError: the optimizer's state is another optimizer's, or some of it is missing.
        """
        if self._nf_group is not None and not self._nf_group.is_whole("loading"):
            raise RuntimeError(
                "load_checkpoint(): this group has lost a stage of its world, in which all ranks load; end it and "
                "start it again, when it also takes the other groups' newest weights"
            )
        self.finish_saves()
        self.drain()
        rule = self._nf_stage.weights.rule
        kept = dict(rule.state)
        if isinstance(rule, DelayAwareOptimizer):
            rule.forget_weights()
        asked = inspect.signature(PipelineEngine.load_checkpoint).bind(self, *args, **kwargs)
        asked.apply_defaults()
        wanted = asked.arguments
        alone = wanted["load_module_only"] or not wanted["load_optimizer_states"]
        if wanted["tag"] is None and not self.load_universal_checkpoint():
            wanted["tag"] = named_by_latest(wanted["load_dir"])
        there = None
        if wanted["tag"] is not None and not alone and not self.load_universal_checkpoint():
            folder = Path(wanted["load_dir"], str(wanted["tag"]))
            there = recut.other_shape(self, folder)
        self.recut = there is not None
        with_schedule = wanted["load_lr_scheduler_states"]
        if there is not None:
            client = recut.load(self, folder, there, wanted["load_module_strict"], with_schedule)
            result = str(folder / "of another shape"), client
        else:
            self._nf_loads_shards = self.using_bf16_optimizer
            try:
                with self._nf_loading_universal():
                    result = super().load_checkpoint(*asked.args[1:], **asked.kwargs)
            finally:
                self._nf_loads_shards = False
            if result[0] is None:  # nothing was loaded
                rule.state.update(kept)
            elif result[1] is not None:
                known = SPANS in result[1] or alone or not self._nf_stage.weights.has_masters
                if not known and was_laid_otherwise(self._nf_stage.weights):
                    raise CheckpointError(
                        f"checkpoint {result[0]} is of an older noflush, which kept state of square matrices in "
                        "another order: take its weights alone (load_module_only=True)"
                    )
                order = result[1].get(recut.ORDER)
                if order is not None and self._nf_group is not None and self._nf_group.order is not None:
                    self._nf_group.order.resume(order)
                for own in (PARAMETERS, recut.PARTS, recut.ORDER, SPANS):
                    result[1].pop(own, None)
            if isinstance(rule, DelayAwareOptimizer):
                rule.adopt_state()
        stage = self._nf_stage
        stage.restart(self.global_steps, self.skipped_steps)
        if result[0] is not None and there is None and not alone:
            in_flight.load(self, Path(result[0]).parent, with_schedule)
            self.skipped_steps = stage.skipped
        if self._nf_group is not None:
            self._nf_group.restarted()
        self.agg_train_loss = stage.loss
        if stage.reports.newest is not None:
            self._nf_show(stage.reports.newest)
        return result

    def _nf_loading_universal(self) -> contextlib.AbstractContextManager[None]:
        if not self.load_universal_checkpoint():
            return contextlib.nullcontext()
        optimizer: Any = self.optimizer
        groups = optimizer.bf16_groups if self.using_bf16_optimizer else optimizer.bit16_groups
        return universal.loading(self._nf_stage.weights.rule, groups, self.param_names)

    def zero_optimization(self) -> bool:
        """As DeepSpeed's; while a checkpoint is loaded also true of bf16 without ZeRO.

        `BF16_Optimizer` saves its shards as ZeRO does in either case; DeepSpeed 0.19.8 looks for them with ZeRO only.
        """
        return bool(super().zero_optimization()) or self._nf_loads_shards
