"""The tools that DeepSpeed ships for its checkpoints, run on those that noflush saves."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks
from tests.multiproc.test_mixed_checkpoints import BF16, MUON, NAG, SOAP, ZERO

pytestmark = pytest.mark.multiproc

CALLS, SAVED = 10, 5
INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""What the converter insists on, and asks the script to save."""
TO_UNIVERSAL = "deepspeed.checkpoint.ds_to_universal"
TO_FP32 = "deepspeed.utils.zero_to_fp32"
CONVERTIBLE = {
    "float32 ZeRO-1": (t.NADAMW, ZERO),
    "bf16 ZeRO-1": (t.NADAMW, BF16 | ZERO),
    "bf16 ZeRO-1, fp32 sums": (t.NADAMW, BF16 | ZERO | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "AdamW": ({"type": "PipeDreamAdamW", "params": {"lr": 3e-3}}, ZERO),
    "bf16 ZeRO-1, look-ahead": ({**t.NADAMW, "params": {**t.NADAMW["params"], "look_ahead": 0.5}}, BF16 | ZERO),
    "constant mu": ({**t.NADAMW, "params": {**t.NADAMW["params"], "momentum_schedule": "constant"}}, ZERO),
}
# What the converter cannot read, and why: stock DeepSpeed's checkpoints of the same kind neither.
NOT_CONVERTIBLE = {
    "float32": (t.NADAMW, {}, "can't find *_optim_states.pt"),
    "bf16": (t.NADAMW, BF16, "param_shapes must contain dictionaries"),
    "NAG": (NAG, ZERO, "KeyError: 'exp_avg'"),
    "Muon": (MUON, BF16 | ZERO, "KeyError: 'exp_avg'"),
}
CASES = CONVERTIBLE | {name: case[:2] for name, case in NOT_CONVERTIBLE.items()} | {"SOAP": (SOAP, ZERO)}


def _outcome(engine, losses):
    """Losses, and the float32 masters that the optimizer updates: bf16 losses hide small differences."""
    engine.drain()
    return losses, [
        p.detach().clone() for group in engine.pipeline_stage.weights.rule.param_groups for p in group["params"]
    ]


def _save_and_go_on(rank, folder, names):
    results = {}
    for name in names:
        optimizer, more = CASES[name]
        engine = t.build(2, t.ds_config(1, optimizer, {}, **more))
        it = iter(t.data(CALLS, seed=engine.grid.get_data_parallel_rank()))
        losses = []
        for call in range(CALLS):
            if call == SAVED:
                engine.drain()  # the converter takes nothing of what is in flight
                engine.save_checkpoint(f"{folder}/{name}", client_state=INFO)
            losses.append(engine.train_batch(it).item())
        results[name] = _outcome(engine, losses)
    return results


def _go_on_from_universal(rank, folder, names):
    results = {}
    for name in names:
        optimizer, more = CASES[name]
        config = t.ds_config(1, optimizer, {}, checkpoint={"load_universal": True}, **more)
        engine = t.build(2, config)
        replica = engine.grid.get_data_parallel_rank()
        noise = iter(t.data(3, seed=77))
        for _ in range(3):
            engine.train_batch(noise)  # its own product of mu is not the checkpoint's
        engine.load_checkpoint(f"{folder}/{name}")
        it = itertools.islice(iter(t.data(CALLS, seed=replica)), SAVED, None)
        results[name] = _outcome(engine, [engine.train_batch(it).item() for _ in range(CALLS - SAVED)])
    return results


def _run(module, *words):
    return subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, timeout=120)


def _convert(folder, name):
    source = Path(folder) / name / f"global_step{SAVED}"
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    return _run(TO_UNIVERSAL, "--input_folder", source, "--output_folder", f"{source}_universal", *workers)


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_universal_checkpoint_goes_on_as_if_never_stopped(replicas, tmp_path):
    """Bit for bit: the converter drops the product of NAdam's mu, which must not begin anew."""
    names = list(CONVERTIBLE) if replicas > 1 else ["float32 ZeRO-1", "bf16 ZeRO-1", "bf16 ZeRO-1, look-ahead"]
    whole = run_ranks(_save_and_go_on, 2 * replicas, timeout=200, folder=str(tmp_path), names=names)
    for name in names:
        done = _convert(tmp_path, name)
        assert done.returncode == 0, done.stderr
    resumed = run_ranks(_go_on_from_universal, 2 * replicas, timeout=200, folder=str(tmp_path), names=names)
    for name in names:
        assert resumed[-1][name][0] == whole[-1][name][0][SAVED:], name
        for one, other in zip(whole, resumed, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[name][1], other[name][1], strict=True)), name


def _refused(rank, folder):
    """What NAG says of AdamW's universal checkpoint, and AdamW of one whose moments are there without a step."""
    engine = t.build(2, t.ds_config(1, NAG, {}, checkpoint={"load_universal": True}, **ZERO))
    with pytest.raises(ValueError, match=r"lacks weight, which DelayAwareNAG cannot go on without") as error:
        engine.load_checkpoint(f"{folder}/float32 ZeRO-1")
    soap = t.build(2, t.ds_config(1, SOAP, {}, checkpoint={"load_universal": True}, **ZERO))
    with pytest.raises(ValueError, match=r"lacks col_basis, col_covariance, row_basis, row_covariance, which Del"):
        soap.load_checkpoint(f"{folder}/SOAP")
    return str(error.value)


def test_what_the_tools_cannot_read_they_refuse_and_what_they_drop_is_refused(tmp_path):
    run_ranks(_save_and_go_on, 2, timeout=200, folder=str(tmp_path), names=[*NOT_CONVERTIBLE, "float32 ZeRO-1", "SOAP"])
    for name, (_, _, said) in NOT_CONVERTIBLE.items():
        done = _convert(tmp_path, name)
        assert done.returncode != 0, name
        assert said in done.stderr, (name, done.stderr)
    # No pipeline's checkpoint has the whole model in one file, and the tool reads no other.
    done = _run(TO_FP32, tmp_path / "float32 ZeRO-1", tmp_path / "fp32")
    assert done.returncode != 0
    assert "'NoneType' object has no attribute 'items'" in done.stderr
    for name in ("float32 ZeRO-1", "SOAP"):
        done = _convert(tmp_path, name)
        assert done.returncode == 0, done.stderr
    for said in run_ranks(_refused, 2, folder=str(tmp_path)):
        assert "exp_avg, exp_avg_sq" in said


def _save_ours_and_stocks(rank, folder):
    nadam = {"type": "NAdam", "params": {**t.NADAMW["params"], "decoupled_weight_decay": True}}
    for name, more in (("float32", {}), ("ZeRO-1", ZERO)):
        more = more and {**more, "zero_allow_untested_optimizer": True}
        ours = t.build(2, t.ds_config(1, t.NADAMW, {}, **more))
        ours.train_batch(iter(t.data(1)))
        ours.save_checkpoint(f"{folder}/ours {name}", tag="one", client_state={"iteration": 1})
        stock = t.build(2, t.ds_config(1, nadam, **more))
        stock.load_checkpoint(f"{folder}/ours {name}", tag="one")
        stock.save_checkpoint(f"{folder}/stock {name}", tag="one", client_state={"iteration": 1})


def _keys(value, name=""):
    """Names of all that lies in a checkpoint's file; hyper-parameters are each optimizer's own."""
    if not isinstance(value, dict):
        return {name}
    inner = {k: v for k, v in value.items() if k not in ("ds_config", "param_groups")}
    return {name}.union(*(_keys(v, f"{name}/{k}") for k, v in inner.items()))


def test_the_layout_is_stocks_for_tools_that_merge_stages(tmp_path):
    """Megatron-DeepSpeed's converters read by names and keys, through the class that DeepSpeed has of theirs."""
    from deepspeed.checkpoint import DeepSpeedCheckpoint

    run_ranks(_save_ours_and_stocks, 2, folder=str(tmp_path))
    for name in ("float32", "ZeRO-1"):
        ours, stock = tmp_path / f"ours {name}" / "one", tmp_path / f"stock {name}" / "one"
        files = sorted(path.name for path in stock.iterdir())
        more = [f"in_flight_dp_rank_00_mp_rank_0{stage}.pt" for stage in range(2)]
        assert sorted(path.name for path in ours.iterdir()) == sorted(files + more)
        for file in files:
            here, there = (torch.load(folder / file, weights_only=False) for folder in (ours, stock))
            names = {"/noflush_parts"} if file.startswith("mp_rank") else set()
            names |= {"/noflush_parameters"} if name == "float32" and names else set()
            assert _keys(here) == _keys(there) | names, file
        if name == "float32":
            continue  # DeepSpeed's own edition of the class insists on ZeRO's files
        read = [DeepSpeedCheckpoint(str(folder), 1, 1) for folder in (ours, stock)]
        for found in zip(
            [read[0].get_embedding_state(0), *read[0].get_transformer_state(0, 0), read[0].get_final_norm_state(0)],
            [read[1].get_embedding_state(0), *read[1].get_transformer_state(0, 0), read[1].get_final_norm_state(0)],
            [torch.load(ours / f"layer_{layer:02d}-model_states.pt") for layer in range(6)],
            strict=True,
        ):
            assert all(part.keys() == found[0].keys() for part in found)
            assert all(torch.equal(part[key], found[0][key]) for part in found for key in part)
