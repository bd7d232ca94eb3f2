"""The values of a command line while they are being understood, and the faults found in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from noflush.launch.arguments.parser import Given, defaults

# What numbers must be, by attribute; those that are needed are checked where they are read.
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (
        "ffn_hidden_size kv_channels num_query_groups num_key_value_heads make_vocab_size_divisible_by vocab_size "
        "padded_vocab_size rotary_base rope_theta rotary_seq_len_interpolation_factor recompute_num_layers "
        "checkpoint_num_layers train_iters train_samples train_tokens exit_interval "
        "log_interval save_interval eval_interval tensorboard_log_interval tensorboard_queue_size world_size "
        "distributed_timeout_minutes initial_loss_scale loss_scale_window hysteresis",
        "1 or more",
        lambda value: value >= 1,
    ),
    (
        "vocab_extra_ids lr_decay_iters lr_decay_samples lr_decay_tokens lr_warmup_iters lr_warmup_samples "
        "lr_warmup_tokens lr_warmup_init lr_wsd_decay_iters lr_wsd_decay_samples min_lr weight_decay "
        "start_weight_decay end_weight_decay clip_grad loss_scale min_loss_scale init_method_std "
        "embedding_init_method_std num_workers eval_iters ckpt_step zero_stage "
        "exit_duration_in_mins",
        "0 or more",
        lambda value: value >= 0,
    ),
    ("lr layernorm_epsilon adam_eps rope_scaling_factor", "more than 0", lambda value: value > 0),
    (
        "attention_dropout hidden_dropout adam_beta1 adam_beta2 sgd_momentum lr_warmup_fraction",
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
    ),
    ("rotary_percent", "more than 0 and at most 1", lambda value: 0 < value <= 1),
    ("seed", "between 0 and 2^32 - 1", lambda value: 0 <= value < 2**32),
)

_MOST = 2**40
"""No number of an argument list is larger."""
_MOST_OF = {
    # Made one by one before training starts.
    "num_layers": 2**16,
    "num_workers": 2**12,
    "tensorboard_queue_size": 2**20,
    # What clocks can count.
    "distributed_timeout_minutes": 60 * 24 * 365,
    "exit_duration_in_mins": 60 * 24 * 3650,
}


class Values:
    """The values of a command line, and the faults found in them."""

    def __init__(self, given: Given) -> None:
        self.values = given.values
        self.named = given.named
        self.faults = list(given.faults)
        self.notes: list[str] = []
        self._unknown: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def needed(self, name: str) -> int:
        """A whole number of one or more that must be given; 1 where it is not, with a fault."""
        value = self.values[name]
        option = "--" + name.replace("_", "-")
        if value is None:
            self.faults.append(f"{option} is missing: every Megatron GPT run needs it")
        elif value < 1:
            self.faults.append(f"{option} is {value}: it must be 1 or more")
        elif value > _MOST_OF.get(name, _MOST):
            self.faults.append(f"{option} is {value}: it must be at most {_MOST_OF.get(name, _MOST)}")
        else:
            return int(value)
        self._unknown.add(name)
        return 1

    def known(self, *names: str) -> bool:
        """Whether no fault was found in any of the values: else what follows from them is no second fault."""
        return not self._unknown & {*names}

    def one_of(self, *names: str) -> Any:
        """The value of the options that mean the same, of which at most one may be given."""
        given = [name for name in names if name in self.named]
        if len(given) > 1:
            both = " and ".join(self.named[name] for name in given)
            self.faults.append(f"{both} mean the same: give one")
        return self.values[given[0] if given else names[0]]

    def check_ranges(self) -> None:
        """Faults of numbers out of range; the default stands in for them, so that each is one fault."""
        for name, rule, holds in ((name, rule, holds) for names, rule, holds in _RANGES for name in names.split()):
            value, most = self.values[name], _MOST_OF.get(name, _MOST)
            if name not in self.named or value is None:
                continue
            if math.isfinite(value) and holds(value) and value > most:
                rule = f"at most {most}"
            if not (math.isfinite(value) and holds(value) and value <= most):
                self.faults.append(f"{self.named[name]} is {value}: it must be {rule}")
                self._unknown.add(name)
                self.values[name] = defaults()[name]
                del self.named[name]

    def at_most_one(self, *names: str) -> None:
        """A fault where several were given of which one says it all."""
        given = [name for name in names if name in self.named and self.values[name]]
        if len(given) > 1:
            shown = " and ".join(f"{self.named[name]} {self.values[name]}" for name in given)
            self.faults.append(f"{shown}: they say the same in different units; give one")

    def note_without(self, condition: bool, missing: str, *names: str) -> None:
        """A note of the options that were given and take effect only with ``missing``, which ``condition`` is."""
        given = [self.named[name] for name in names if name in self.named]
        if given and not condition:
            self.notes.append(f"{' '.join(given)}: without effect, for there is no {missing}")
