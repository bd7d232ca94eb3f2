"""Every attribute of DeepSpeed's that this wing reads, calls or assigns, and whether this DeepSpeed still has it.

A test compares the lists with the wing's own code. An attribute counts as there if its class, or one it derives from,
defines it or assigns it in the code of a method, as a constructor does.
"""

from __future__ import annotations

import dis
import importlib
from collections.abc import Iterator
from types import CodeType
from typing import Any

Owner = tuple[str, str]

ENGINE = ("deepspeed.runtime.pipe.engine", "PipelineEngine")
MODULE = ("deepspeed.runtime.pipe.module", "PipelineModule")
GRID = ("deepspeed.runtime.pipe.topology", "PipelineParallelGrid")
TOPOLOGY = ("deepspeed.runtime.pipe.topology", "ProcessTopology")
CONFIG = ("deepspeed.runtime.config", "DeepSpeedConfig")
BF16 = ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer")
ZERO = ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
SCALER = ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler")
TIED = ("deepspeed.runtime.pipe.module", "TiedLayerSpec")

NEEDED: dict[Owner, str] = {
    ENGINE: """
        _compute_loss _config _configure_basic_optimizer _configure_bf16_optimizer _configure_zero_optimizer
        _INSTRUCTION_MAP _exec_send_activations
        _copy_recovery_script checkpoint_engine load_universal_checkpoint local_rank use_node_local_storage
        _exec_backward_pass _exec_forward_pass _exec_load_micro_batch
        _exec_reduce_grads _exec_reduce_tied_grads _exec_schedule _global_grad_norm _is_supported_optimizer _next_batch
        _report_progress _reserve_pipe_buffers _running_engine_backward _scale_loss_by_gas _step_applied
        agg_additional_losses agg_train_loss communication_data_type device dp_world_size eval_batch fp16_enabled
        fwd_outputs get_data_types get_lr global_rank global_samples global_steps gradient_clipping
        gradient_predivide_factor grid
        is_data_parallel is_first_stage is_grad_partitioned is_last_stage is_pipe_partitioned load_checkpoint loss
        lr_scheduler micro_batches module monitor mpu num_pipe_buffers num_stages optimizer optimizer_name
        optimizer_params param_names
        pipe_buffers postscale_gradients reset_activation_shape save_checkpoint set_dataiterator
        set_train_batch_size skipped_steps stage_id steps_per_print total_additional_losses total_loss
        train_batch_size train_micro_batch_size_per_gpu using_bf16_optimizer zero_optimization
    """,
    MODULE: """
        _grid _layer_specs _partition_layers _set_bounds _synchronize_tied_weights ckpt_layer_path_list dynamic_shape
        forward_funcs get_additional_losses load_state_dir num_stages parts stage_id tied_comms tied_modules
        tied_weight_attrs
    """,
    GRID: """
        _topo get_data_parallel_group get_data_parallel_rank get_model_parallel_group get_model_parallel_rank
        get_pipe_parallel_group
        get_slice_parallel_group get_slice_parallel_rank get_slice_parallel_world_size
    """,
    TOPOLOGY: "get_axis_comm_lists",
    CONFIG: """
        _param_dict bfloat16_config float16_config gradient_accumulation_steps optimizer_name optimizer_params
        wall_clock_breakdown zero_optimization_stage
    """,
    BF16: """
        _global_grad_norm _lazy_init_hp_params_optimizer_state _param_slice_mappings bf16_groups bf16_groups_flat
        bf16_partitioned_groups
        clear_hp_grads clear_lp_grads dp_process_group fp32_groups_flat_partition fp32_groups_gradients
        fp32_groups_gradients_flat fp32_groups_has_gradients mpu optimizer step update_hp_grads zero_grad
    """,
    ZERO: """
        _global_grad_norm _grad_acc_hooks _lazy_init_hp_params_optimizer_state _param_slice_mappings
        _update_model_bit16_weights _update_scale bit16_groups bit16_groups_flat check_grad_overflow dp_process_group
        get_data_parallel_partitions loss_scaler model_parallel_group model_parallel_rank optimizer overflow
        parallel_partitioned_bit16_groups single_partition_of_fp32_groups step zero_grad
    """,
    SCALER: "cur_scale dynamic update_scale",
    TIED: "key",
}


def missing() -> list[str]:
    """What of `NEEDED` this DeepSpeed lacks, as ``module.Class.attribute``; empty when all is well."""
    lacking = []
    for (module, name), attributes in NEEDED.items():
        try:
            owner = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            lacking.append(f"{module} ({error})")
            continue
        there = known(owner) if owner is not None else set()
        lacking += [f"{module}.{name}.{attribute}" for attribute in attributes.split() if attribute not in there]
    return lacking


def known(owner: type) -> set[str]:
    """Names that ``owner`` and the classes it derives from define, annotate, or assign in their code."""
    names = set(dir(owner))
    for kind in owner.__mro__:
        names |= set(vars(kind).get("__annotations__", ()))
        for value in vars(kind).values():
            names |= set(_names_in(value))
    return names


def _names_in(value: Any) -> Iterator[str]:
    for function in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
        while function is not None:
            code = getattr(function, "__code__", None)
            if code is not None:
                yield from _of_code(code)
            function = getattr(function, "__wrapped__", None)


def _of_code(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
        elif isinstance(constant, str):  # self.__dict__["module"] = ...
            yield constant
