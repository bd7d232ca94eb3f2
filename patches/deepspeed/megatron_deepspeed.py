"""Megatron-DeepSpeed's seam: what its `pretrain_gpt.py` brings to `deepspeed.initialize`.

No symbol of Megatron's is replaced and none of its modules is imported here: once `initialize` is called, all of it
is there, and the model to train says whose it is. Its class comes from ``megatron.model.gpt_model``, which neither
pip's megatron-core nor NVIDIA's Megatron-LM nor GPT-NeoX has with that name in it. So the order of imports does not
matter, and there is nothing to undo. Three things do not fit as they come:

(1) Megatron builds its own Adam, and DeepSpeed lets a script's optimizer win over the config's: `with_our_optimizer`.
(2) Some of its flags ask for what cannot be had without a flush, and tied embeddings are its default: `facts`.
(3) Its schedule of the learning rate reads how many tokens were consumed; a stage's update is late: `follow_updates`.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noflush.config import parse_block
from noflush.methods.table import METHODS
from noflush.patches.deepspeed.faults import RunFacts

logger = logging.getLogger("noflush")
TESTED = "4efb479d"
_MODEL = ("megatron.model.gpt_model", "GPTModelPipe")


class MegatronChangedError(RuntimeError):
    """Megatron-DeepSpeed is not of the shape that noflush knows."""

    def __init__(self, missing: str) -> None:
        self.missing = missing
        super().__init__(
            f"noflush found {'.'.join(_MODEL)}, but not {missing} (tested: Megatron-DeepSpeed at commit {TESTED}). "
            "Check that commit out, or take async_pipeline out of the DeepSpeed config"
        )

    def __reduce__(self) -> tuple[type[MegatronChangedError], tuple[str]]:
        # An exception is pickled by its message, which is not what makes this one.
        return type(self), (self.missing,)


def arguments_of(model: Any) -> Any:
    """Megatron-DeepSpeed's parsed arguments if ``model`` is its `GPTModelPipe`, else None.

    Raises MegatronChangedError if they are not where that commit keeps them.
    """
    if not any((kind.__module__, kind.__name__) == _MODEL for kind in type(model).__mro__):
        return None
    get_args = getattr(sys.modules.get("megatron"), "get_args", None)
    if get_args is None:
        raise MegatronChangedError("megatron.get_args")
    args = get_args()
    for name in ("consumed_train_tokens", "lr", "rank", "seq_length", "weight_decay"):
        if not hasattr(args, name):
            raise MegatronChangedError(f"megatron.get_args().{name}")
    return args


def facts(facts: RunFacts, args: Any, ds_config: Mapping[str, Any]) -> RunFacts:
    """``facts`` with what Megatron's flags say: how to untie, and every fault in them."""
    faults = []
    if getattr(args, "enable_zbh1_pipeline", False):
        faults.append("--enable-zbh1-pipeline: that is another schedule, which noflush replaces; leave it out")
    if max(getattr(args, "num_experts", None) or [1]) > 1:
        faults.append(
            f"--num-experts {' '.join(map(str, args.num_experts))}: experts have replicas of their own, over which "
            "noflush does not reduce gradients; leave it out"
        )
    block = parse_block(ds_config)
    late = block is not None and block.schedule == "1f1b_no_flush"
    if late and getattr(args, "log_optimizer_states_to_tensorboard", False) and not _asks_for_ours(ds_config):
        faults.append(
            "--log-optimizer-states-to-tensorboard: Megatron reads the moments after the first call, when the first "
            f"stages have made no update yet; leave it out, or choose one of {', '.join(METHODS)} in the "
            "config, whose moments are there from the start"
        )
    if _asks_for_ours(ds_config):
        for key in ("lr", "weight_decay"):
            value, flag = (ds_config["optimizer"].get("params") or {}).get(key), getattr(args, key)
            if value is not None and value != flag:
                faults.append(
                    f"optimizer.params.{key} is {value}, but --{key.replace('_', '-')} {flag} is what Megatron's "
                    "schedule sets at every update: leave the key out, or make them equal"
                )
    return replace(
        facts,
        client_optimizer=facts.client_optimizer and not _asks_for_ours(ds_config),
        untie="pass --untie-embeddings-and-output-weights",
        faults=tuple(faults),
    )


def _asks_for_ours(ds_config: Mapping[str, Any]) -> bool:
    return (ds_config.get("optimizer") or {}).get("type") in METHODS


def with_our_optimizer(kwargs: dict[str, Any], args: Any, ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` of the engine with the config's optimizer in Megatron's place, if it is one of noflush's.

    It takes Megatron's parameter groups over (with and without weight decay), and Megatron's schedule goes on to set
    their learning rate and weight decay; all else is the config's. Megatron's optimizer has made no update yet.
    """
    theirs = kwargs.get("optimizer")
    if theirs is None or not _asks_for_ours(ds_config):
        return kwargs
    from noflush.patches.deepspeed.client_optimizer import with_rule

    replaced = with_rule(kwargs, ds_config["optimizer"])
    ours = replaced["optimizer"]
    if args.rank == 0:
        line = (
            f"noflush: {type(ours).__name__} of the DeepSpeed config in place of Megatron's "
            f"{type(theirs).__module__}.{type(theirs).__qualname__}"
        )
        chosen = {k: v for k, v in ours.defaults.items() if k in ("betas", "momentum", "eps")}
        print(  # noqa: T201 (Megatron has just printed its --adam-beta1 and -2, which do not apply)
            f"{line}: {', '.join(f'{k} {v}' for k, v in chosen.items())}; learning rate and weight decay by Megatron's "
            "schedule",
            flush=True,
        )
    return replaced


def follow_updates(engine: Any, args: Any) -> None:
    """Lets Megatron's schedule count the tokens of this stage's own updates.

    Left to itself it takes what the run has consumed when an update is made, which is a lag later than in a
    synchronous run: with ``--lr-decay-tokens`` stages would disagree on the same update's learning rate, and
    checkpoints of the stages on the tokens.
    """
    schedule = engine.lr_scheduler
    if schedule is None or not hasattr(schedule, "num_tokens"):
        return
    original = schedule.step

    @functools.wraps(original)
    def step(increment: int, token_num: int | None = None) -> None:
        if token_num is None:
            # The update just made belongs to a call this many calls ago.
            late = engine.global_steps - (engine.updates - 1)
            token_num = args.consumed_train_tokens - late * engine.train_batch_size() * args.seq_length
        original(increment, token_num=token_num)

    schedule.step = step
    logger.info("noflush: %s.step counts the tokens of this stage's updates", type(schedule).__qualname__)
