"""The tools that DeepSpeed ships for its checkpoints, run on those that noflush saves."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from noflush.methods.matrices import is_matrix, set_matrix
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
    "Muon": (MUON, BF16 | ZERO),
    "float32 Muon": (MUON, ZERO),
    "constant mu": ({**t.NADAMW, "params": {**t.NADAMW["params"], "momentum_schedule": "constant"}}, ZERO),
}
# What the converter cannot read, and why: stock DeepSpeed's checkpoints of the same kind neither.
NOT_CONVERTIBLE = {
    "float32": (t.NADAMW, {}, "can't find *_optim_states.pt"),
    "bf16": (t.NADAMW, BF16, "param_shapes must contain dictionaries"),
    "NAG": (NAG, ZERO, "KeyError: 'exp_avg'"),
}
CASES = CONVERTIBLE | {name: case[:2] for name, case in NOT_CONVERTIBLE.items()} | {"SOAP": (SOAP, ZERO)}


# Converted, and refused by other optimizers.
READ = ("float32 ZeRO-1", "SOAP", "Muon")


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
    names = list(CONVERTIBLE) if replicas > 1 else ["float32 ZeRO-1", "bf16 ZeRO-1", "bf16 ZeRO-1, look-ahead", "Muon"]
    whole = run_ranks(_save_and_go_on, 2 * replicas, timeout=200, folder=str(tmp_path), names=names)
    for name in names:
        done = _convert(tmp_path, name)
        assert done.returncode == 0, done.stderr
    resumed = run_ranks(_go_on_from_universal, 2 * replicas, timeout=200, folder=str(tmp_path), names=names)
    for name in names:
        assert resumed[-1][name][0] == whole[-1][name][0][SAVED:], name
        for one, other in zip(whole, resumed, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[name][1], other[name][1], strict=True)), name


def _fewer(parameters):
    """A stage's parameters as groups, one square matrix less: two replicas' shards of the rest end with gaps."""
    set_matrix(next(p for p in parameters if p.dim() == 2 and p.shape[0] == p.shape[1]), False)
    return parameters


def _save_and_tell(rank, folder):
    """What DeepSpeed's own accessors say of each parameter at the save: weights, and what the converter looks for."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = t.build(2, t.ds_config(1, MUON, {}, **BF16, **ZERO), groups=_fewer)
    it = iter(t.data(SAVED, seed=engine.grid.get_data_parallel_rank()))
    for _ in range(SAVED):
        engine.train_batch(it)
    engine.drain()
    engine.save_checkpoint(f"{folder}/saved", tag="one", client_state=INFO)
    told = {}
    for p in engine.module.parameters():
        state = ("momentum_buffer",) * 2 if is_matrix(p) else ("exp_avg", "exp_avg_sq")
        found = safe_get_full_fp32_param(p), *(safe_get_full_optimizer_state(p, key) for key in state)
        told[engine.param_names[p]] = [value.clone() for value in found]
    return told


def _load_and_save(rank, folder):
    config = t.ds_config(1, MUON, {}, checkpoint={"load_universal": True}, **BF16, **ZERO)
    engine = t.build(2, config, groups=_fewer)
    engine.load_checkpoint(f"{folder}/saved", tag="one_universal")
    engine.save_checkpoint(f"{folder}/again", tag="one", client_state=INFO)


def _universal(folder):
    """What the converter makes of checkpoint ``one`` in ``folder``: tensors by parameter and file."""
    made = folder / "one_universal"
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = _run(TO_UNIVERSAL, "--input_folder", folder / "one", "--output_folder", made, *workers)
    assert done.returncode == 0, done.stderr
    files = [file for file in (made / "zero").glob("*/*.pt") if "noflush_gap" not in file.parent.name]
    read = {(file.parent.name, file.stem): torch.load(file, weights_only=False) for file in files}
    return {key: value["param"] if isinstance(value, dict) else value for key, value in read.items()}


def _refused_for_its_groups(rank, folder):
    """The first stage has no matrix, as one of the embedding alone: DeepSpeed gives its groups to the second."""

    def groups(parameters):
        for p in parameters:
            set_matrix(p, is_matrix(p) and rank == 1)
        return parameters

    engine = t.build(2, t.ds_config(1, MUON, {}, **ZERO), groups=groups)
    assert len(engine.pipeline_stage.weights.rule.param_groups) == 1 + engine.stage_id
    engine.train_batch(iter(t.data(1)))
    engine.drain()
    engine.save_checkpoint(f"{folder}/saved", tag="one", client_state=INFO)
    dist.barrier()
    if rank == 0:
        _universal(folder / "saved")
    dist.barrier()
    engine = t.build(2, t.ds_config(1, MUON, {}, checkpoint={"load_universal": True}, **ZERO), groups=groups)
    with pytest.raises(ValueError, match=r"has the parameter groups of the first stage that was saved, .* run differ"):
        engine.load_checkpoint(f"{folder}/saved", tag="one_universal")
    alike = t.build(2, t.ds_config(1, MUON, {}, checkpoint={"load_universal": True}, **ZERO))
    with pytest.raises(ValueError, match=r"has the parameter groups of the first stage .* this run has others; load"):
        alike.load_checkpoint(f"{folder}/saved", tag="one_universal")


@pytest.mark.slow
def test_a_universal_checkpoint_whose_first_stage_has_other_groups_is_refused(tmp_path):
    run_ranks(_refused_for_its_groups, 2, timeout=120, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("savers", "loaders"), [(1, 2), (2, 1)])
def test_a_universal_checkpoint_of_muon_holds_its_momentum(savers, loaders, tmp_path):
    """Element for element; and it goes into other replicas, which cut between other matrices, and out again."""
    told = run_ranks(_save_and_tell, 2 * savers, timeout=200, folder=str(tmp_path))
    made = _universal(tmp_path / "saved")
    expected = {**told[0], **told[-1]}
    assert {name for name, _ in made} == set(expected)
    for name, values in expected.items():
        for key, value in zip(("fp32", "exp_avg", "exp_avg_sq"), values, strict=True):
            assert torch.equal(made[name, key], value), (name, key)
        assert values[1].any()
    # Under one name of both stages two processes of the converter would write one file.
    assert len([*tmp_path.glob("saved/one_universal/zero/noflush_gap*")]) == (0 if savers == 1 else 2)
    run_ranks(_load_and_save, 2 * loaders, timeout=200, folder=str(tmp_path))
    again = _universal(tmp_path / "again")
    assert again.keys() == made.keys()
    assert all(torch.equal(again[key], value) for key, value in made.items())


def _refused(rank, folder):
    """What NAG says of AdamW's universal checkpoint, and AdamW of one whose moments are there without a step."""
    engine = t.build(2, t.ds_config(1, NAG, {}, checkpoint={"load_universal": True}, **ZERO))
    with pytest.raises(ValueError, match=r"lacks weight, which DelayAwareNAG cannot go on without") as error:
        engine.load_checkpoint(f"{folder}/float32 ZeRO-1")
    soap = t.build(2, t.ds_config(1, SOAP, {}, checkpoint={"load_universal": True}, **ZERO))
    with pytest.raises(ValueError, match=r"lacks col_basis, col_covariance, row_basis, row_covariance, which Del"):
        soap.load_checkpoint(f"{folder}/SOAP")
    adamw = t.build(2, t.ds_config(1, CASES["AdamW"][0], {}, checkpoint={"load_universal": True}, **BF16, **ZERO))
    with pytest.raises(ValueError, match=r"has a momentum, as Muon keeps it, for \d.*, which an optimizer with two"):
        adamw.load_checkpoint(f"{folder}/Muon")
    muon = t.build(2, t.ds_config(1, MUON, {}, checkpoint={"load_universal": True}, **ZERO))
    with pytest.raises(ValueError, match=r"lacks momentum_buffer, which DelayAwareMuon cannot go on without"):
        muon.load_checkpoint(f"{folder}/SOAP")
    return str(error.value)


def test_what_the_tools_cannot_read_they_refuse_and_what_they_drop_is_refused(tmp_path):
    run_ranks(_save_and_go_on, 2, timeout=200, folder=str(tmp_path), names=[*NOT_CONVERTIBLE, *READ])
    for name, (_, _, said) in NOT_CONVERTIBLE.items():
        done = _convert(tmp_path, name)
        assert done.returncode != 0, name
        assert said in done.stderr, (name, done.stderr)
    # No pipeline's checkpoint has the whole model in one file, and the tool reads no other.
    done = _run(TO_FP32, tmp_path / "float32 ZeRO-1", tmp_path / "fp32")
    assert done.returncode != 0
    assert "'NoneType' object has no attribute 'items'" in done.stderr
    for name in READ:
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
