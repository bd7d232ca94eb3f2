"""Wrong configurations: one clear error each, with the value, the rule and the fix; faults are listed together."""

from __future__ import annotations

import math
import pickle
import time
from dataclasses import replace

import pytest

from noflush.config import AsyncPipelineConfig, ConfigError, parse_block
from noflush.methods.table import METHODS
from noflush.patches.deepspeed.faults import RunFacts, check_config, check_run

GOOD = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "DelayAwareNAdamW", "params": {"lr": 3e-4}},
    "async_pipeline": {"enabled": True},
}
FACTS = RunFacts(stages=4, layers=8)
TIED = RunFacts(stages=2, layers=4, tied_keys=("embed",))
CLIENT = RunFacts(stages=4, layers=8, client_optimizer=True)


LIGHTHOUSE = {"lighthouse": "127.0.0.1:29510"}


def with_block(**block):
    return GOOD | {"async_pipeline": block}


def test_the_designs_block_is_good():
    block = {
        "enabled": True,
        "schedule": "1f1b_no_flush",
        "weights": "stash",
        "extra_in_flight": 0,
        "clip": "stage",
        "kernel": "auto",
        "trace_dir": None,
    }
    config, schedule = check_run(GOOD | {"async_pipeline": block}, FACTS)
    assert config == AsyncPipelineConfig()
    assert (schedule.stages, schedule.gas, schedule.name) == (4, 1, "1f1b_no_flush")


@pytest.mark.parametrize("ds_config", [{}, {"async_pipeline": {"enabled": False}}])
def test_absent_or_disabled_leaves_deepspeed_alone(ds_config):
    assert parse_block(ds_config) is None
    # Nothing of the host's own config is judged then, not even what noflush would refuse.
    assert check_config(ds_config | {"fp16": {"enabled": True}, "zero_optimization": {"stage": 3}}) is None


@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 1}}, {"zero_optimization": True}])
@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, {"bfloat16": {"enabled": True}}])
def test_precision_and_sharding_that_work(precision, zero):
    assert check_config(GOOD | precision | zero) == AsyncPipelineConfig()


def test_offloading_to_no_device_is_no_offloading():
    assert check_config(GOOD | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}})


@pytest.mark.parametrize("more", [{}, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}])
def test_deepspeeds_muon_is_taken_in_every_precision_and_by_every_kernel(more):
    params = {"lr": 0.02, "momentum": 0.9, "ns_method": "standard", "adam_lr": 1e-3, "look_ahead": 0.5}
    named = with_block(kernel="compile") | {"optimizer": {"type": "MUON", "params": params}} | more
    assert check_run(named, FACTS)


def test_a_clients_optimizer_is_not_judged_by_the_section_it_replaces():
    named = with_block(kernel="compile") | {"optimizer": {"type": "Adam"}}
    assert check_run(named, RunFacts(stages=2, layers=4, client_optimizer=True))


def test_one_of_ours_in_the_config_is_not_dropped_silently_for_a_clients():
    for name in METHODS:
        with pytest.raises(ConfigError, match=f"type is '{name}', but the script passes an optimizer of its own"):
            check_run(with_block() | {"optimizer": {"type": name}}, RunFacts(stages=2, layers=4, client_optimizer=True))


def test_fp16_and_fp32_accumulation_need_zero_1():
    zero = {"zero_optimization": {"stage": 1}}
    assert check_config(GOOD | zero | {"fp16": {"enabled": True}})
    assert check_config(GOOD | zero | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}})


WRONG = {
    "unknown key, near a real one": (with_block(wieghts="stash"), FACTS, r"wieghts is not a key: did you mean 'weights'"),
    "unknown key": (with_block(turbo=True), FACTS, r"turbo is not a key: the keys are enabled, schedule"),
    "misspelt block": ({**{k: v for k, v in GOOD.items() if k != "async_pipeline"}, "async_pipelin": {}}, None, "did you mean 'async_pipeline'"),
    "block is no object": (GOOD | {"async_pipeline": True}, FACTS, "async_pipeline is True: it must be a JSON object"),
    "enabled of the wrong type": (with_block(enabled="yes"), FACTS, "enabled is 'yes': input should be a valid bool"),
    "parameter of a method that it has not": (GOOD | {"optimizer": {"type": "DelayAwareNAG", "params": {"beta": 1}}}, FACTS, "optimizer.params of DelayAwareNAG: beta is not a parameter of it: they are lr, momentum"),
    "parameter of a method out of range": (GOOD | {"optimizer": {"type": "DelayAwareNAG", "params": {"lr": 1e-3, "momentum": 1.0}}}, FACTS, r"optimizer.params of DelayAwareNAG: momentum is 1.0: it must be in \[0, 1\)"),
    "parameters of a method that are no object": (GOOD | {"optimizer": {"type": "DelayAwareNAG", "params": [1]}}, FACTS, r"optimizer.params is \[1\]: it must be a JSON object"),
    "parameter of the block's rule out of range": (with_block(optimizer={"type": "DelayAwareNAG", "params": {"momentum": 2}}), CLIENT, "optimizer.params: momentum is 2"),
    "unknown schedule": (with_block(schedule="gpipe"), FACTS, "schedule is 'gpipe': input should be '1f1b_no_flush'"),
    "unknown weights": (with_block(weights="fresh"), FACTS, "weights is 'fresh': input should be 'stash'"),
    "weights that come later": (with_block(weights="predict"), FACTS, "weight prediction comes later"),
    "negative depth": (with_block(extra_in_flight=-1), FACTS, "extra_in_flight is -1: it must be from 0 to 4096"),
    "depth auto with the flush": (with_block(extra_in_flight="auto", schedule="1f1b_flush"), FACTS, "nothing to choose; set it to 0"),
    "depth of another word": (with_block(extra_in_flight="most"), FACTS, "extra_in_flight is 'most': input should be a valid integer, or input should be 'auto'"),
    "unknown wire": (with_block(wire="int2"), FACTS, "wire is 'int2': it must be one of model, bf16, int8, int4"),
    "wire of the wrong type": (with_block(wire=8), FACTS, "wire is 8: input should be a valid string, or input should be a valid dict"),
    "unknown direction": (with_block(wire={"down": "int8"}), FACTS, "down is no direction: the directions are activations"),
    "bf16 wire under fp16": (with_block(wire={"activations": "bf16"}) | {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, FACTS, "same two bytes a number .* use 'model', 'int8' or"),
    "depth of the wrong type": (with_block(extra_in_flight=1.5), FACTS, "extra_in_flight is 1.5: input should be a valid int"),
    "depth is a bool": (with_block(extra_in_flight=True), FACTS, "extra_in_flight is True: input should be a valid int"),
    "global clip without a flush": (with_block(clip="global"), FACTS, "no global norm to clip by; use 'stage', 'lagged_global'"),
    "unknown clip": (with_block(clip="value"), FACTS, "clip is 'value': input should be 'stage', 'lagged_global' or 'global'"),
    "a late norm for another's clipping": (with_block(clip="lagged_global") | {"optimizer": {"type": "Adam"}, "bf16": {"enabled": True}}, FACTS, "optimizers clip by themselves: choose one of"),
    "unknown weights to evaluate": (with_block(eval_weights="oldest"), FACTS, "eval_weights is 'oldest': input should be 'newest' or 'aligned'"),
    "aligned weights of one version": (with_block(eval_weights="aligned", weights="latest"), FACTS, "keeps its newest weights alone, and none as old as stage 0's"),
    "aligned weights with a look-ahead": (with_block(eval_weights="aligned") | {"optimizer": {"type": "DelayAwareMuon", "params": {"look_ahead": 0.9}}}, FACTS, "'aligned' with look_ahead 0.9: stages keep what forwards"),
    "aligned weights with the block's look-ahead": (with_block(eval_weights="aligned", optimizer={"type": "DelayAwareMuon", "params": {"look_ahead": 0.5}}), CLIENT, "'aligned' with look_ahead 0.5"),
    "a rule for nobody": (with_block(optimizer={"type": "DelayAwareNAG"}), FACTS, "the script passes to deepspeed.initialize, and it passes none"),
    "a rule of another's": (with_block(optimizer={"type": "Adam"}), CLIENT, "'Adam'}: it must be .* with one of DelayAwareNAdamW"),
    "a rule by name alone": (with_block(optimizer="DelayAwareNAG"), CLIENT, "optimizer is 'DelayAwareNAG': input should be a valid dict"),
    "a rule with another key": (with_block(optimizer={"type": "DelayAwareNAG", "lr": 1}), CLIENT, "optimizer.lr is not a key"),
    "a rule that sets what the schedule sets": (with_block(optimizer={"type": "DelayAwareNAG", "params": {"lr": 1}}), CLIENT, "params.lr is set: learning rate"),
    "detours of no truth": (with_block(replicas=LIGHTHOUSE | {"reroute": "yes"}), FACTS, "replicas.reroute is 'yes': input should be a valid bool"),
    "detours in step": (with_block(replicas=LIGHTHOUSE | {"reroute": True, "mode": "sync"}), FACTS, "replicas.reroute is true with mode 'sync': .*; use mode 'async'"),
    "detours with the flush": (with_block(schedule="1f1b_flush", replicas=LIGHTHOUSE | {"reroute": True}), FACTS, "reroute is true with schedule '1f1b_flush': .*; use '1f1b_no_flush'"),
    "detours with a measured depth": (with_block(extra_in_flight="auto", replicas=LIGHTHOUSE | {"reroute": True}), FACTS, "reroute is true with extra_in_flight 'auto': .*; name a number"),
    "unknown kernel": (with_block(kernel="cuda"), FACTS, "kernel is 'cuda': input should be 'auto', 'triton', 'compile' or 'torch'"),
    "kernel for another's optimizer": (with_block(kernel="compile") | {"optimizer": {"type": "Adam"}}, FACTS, "'Adam' updates by itself"),
    "no skip allowed": (with_block(max_skipped_updates=0), FACTS, "max_skipped_updates is 0: it must be from 1 to"),
    "stop_dir of the wrong type": (with_block(stop_dir=1), FACTS, "stop_dir is 1: input should be a valid string"),
    "trace_dir of the wrong type": (with_block(trace_dir=7), FACTS, "trace_dir is 7: input should be a valid string"),
    "no patience": (with_block(peer_timeout_s=0), FACTS, "peer_timeout_s is 0.0: it must be from 1 to 604800 seconds"),
    "patience of a nanosecond": (with_block(peer_timeout_s=1e-9), FACTS, "peer_timeout_s is 1e-09: it must be from 1"),
    "patience for ever": (with_block(peer_timeout_s=1e15), FACTS, r"peer_timeout_s is 1000000000000000.0: it must be from 1"),
    "patience of no number": (with_block(peer_timeout_s=math.nan), FACTS, "peer_timeout_s is nan: it must be from 1"),
    "depth beyond reason": (with_block(extra_in_flight=10**6), FACTS, "extra_in_flight is 1000000: it must be from 0 to 4096"),
    "skips for ever": (with_block(max_skipped_updates=10**12), FACTS, "max_skipped_updates is 1000000000000: it must be from 1"),
    "an order too long to prove": (GOOD, RunFacts(stages=8, layers=8, gas=10**7), "gas=10000000.*the bound is 500,000; use fewer"),
    "clipping of no number": (GOOD | {"gradient_clipping": math.nan}, FACTS, "gradient_clipping is nan: it must be a finite"),
    "infinite clipping": (GOOD | {"gradient_clipping": math.inf}, FACTS, "gradient_clipping is inf: it must be a finite"),
    "clipping as text": (GOOD | {"gradient_clipping": "1.0"}, FACTS, "gradient_clipping is '1.0': it must be a finite"),
    "micro-batches of nothing": (GOOD | {"train_micro_batch_size_per_gpu": 0}, FACTS, "train_micro_batch_size_per_gpu is 0"),
    "batches of a half": (GOOD | {"train_batch_size": 1.5}, FACTS, "train_batch_size is 1.5: it must be a whole number"),
    "a scale of no number": (GOOD | {"fp16": {"enabled": True, "loss_scale": math.nan}, "zero_optimization": {"stage": 1}}, FACTS, "fp16.loss_scale is nan"),
    "K below 1": (GOOD | {"gradient_accumulation_steps": 0}, FACTS, "gradient_accumulation_steps is 0"),
    "K of the wrong type": (GOOD | {"gradient_accumulation_steps": "4"}, FACTS, "gradient_accumulation_steps is '4'"),
    "2bw with too small a batch": (with_block(weights="2bw"), RunFacts(stages=4, layers=8, gas=2), "raise gradient_accumulation_steps to 3 or more"),
    "depth with the flush": (with_block(schedule="1f1b_flush", extra_in_flight=2), FACTS, "nothing in flight between calls"),
    "negative clipping": (GOOD | {"gradient_clipping": -1}, FACTS, "gradient_clipping is -1"),
    "ZeRO-2": (GOOD | {"zero_optimization": {"stage": 2}}, FACTS, "zero_optimization.stage is 2: ZeRO-2 and ZeRO-3"),
    "ZeRO-3": (GOOD | {"zero_optimization": {"stage": 3}}, FACTS, "zero_optimization.stage is 3: ZeRO-2 and ZeRO-3"),
    "ZeRO of no number": (GOOD | {"zero_optimization": {"stage": "one"}}, FACTS, "zero_optimization.stage is 'one': it must be 0 or 1"),
    "ZeRO-2 that only DeepSpeed sees": (GOOD, RunFacts(stages=2, layers=4, zero_stage=2), "ZeRO stage 2 as DeepSpeed reads"),
    "offload": (GOOD | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, FACTS, "offload_optimizer is set"),
    "offload, as it was once spelt": (GOOD | {"zero_optimization": {"stage": 1, "cpu_offload": True}}, FACTS, "cpu_offload is set"),
    "elastic checkpoints": (GOOD | {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, FACTS, "cannot load what it then saves"),
    "amp": (GOOD | {"amp": {"enabled": True}}, FACTS, "amp.enabled is true"),
    "fp16 without ZeRO": (GOOD | {"fp16": {"enabled": True}}, FACTS, 'fp16.enabled is true with ZeRO stage 0.*"stage": 1'),
    "fp16 with fp32 sums": (GOOD | {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, FACTS, "weights in fp16 accumulate in 'fp16'"),
    "bf16 with fp32 sums, without ZeRO": (GOOD | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, FACTS, "no optimizer for; set"),
    "bf16 with fp16 sums": (GOOD | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}}, FACTS, "accumulate in 'bf16' or 'fp32'"),
    "fp16 masters": (GOOD | {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}, "zero_optimization": {"stage": 1}}, FACTS, "keeps float32 master weights"),
    "bf16 masters": (GOOD | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, FACTS, "keeps float32 master weights"),
    "autocast": (GOOD | {"torch_autocast": {"enabled": True}}, FACTS, "torch_autocast.enabled"),
    "gradients in bf16": (GOOD | {"data_types": {"grad_accum_dtype": "bf16"}}, FACTS, "grad_accum_dtype is 'bf16'"),
    "curriculum": (GOOD | {"curriculum_learning": {"enabled": True}}, FACTS, "curriculum learning is enabled"),
    "curriculum of samples": (GOOD | {"data_efficiency": {"enabled": True, "data_sampling": {"curriculum_learning": {"enabled": True}}}}, FACTS, "data_efficiency.data_sampling.curriculum_learning.enabled is true: curriculum learning is enabled: .* pad micro-batches"),
    "curriculum that only its section enables": (GOOD | {"data_efficiency": {"data_sampling": {"curriculum_learning": {"enabled": True}}}}, FACTS, "data_sampling.curriculum_learning.enabled is true"),
    "dynamic batching": (GOOD | {"data_efficiency": {"data_sampling": {"dynamic_batching": {"enabled": True}}}}, FACTS, "data_sampling.dynamic_batching.enabled is true: .*; switch it off"),
    "token dropping": (GOOD | {"data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}}, FACTS, "data_routing.random_ltd.enabled is true: random layerwise token dropping"),
    "data efficiency of nothing": (GOOD | {"data_efficiency": {"enabled": True}}, FACTS, "data_efficiency.enabled is true, and none of its parts"),
    "deepcompile": (GOOD | {"compile": {"deepcompile": True}}, FACTS, "deepcompile"),
    "unmanaged accumulation": (GOOD | {"managed_gradient_accumulation": False}, FACTS, "managed_gradient_accumulation"),
    "LBFGS": (GOOD | {"optimizer": {"type": "LBFGS"}}, FACTS, "'LBFGS': it evaluates the loss several times"),
    "sparse gradients alone": (GOOD | {"optimizer": {"type": "SparseAdam"}}, FACTS, "'SparseAdam': it takes sparse gradients alone"),
    "Muon with a key that nobody has": (GOOD | {"optimizer": {"type": "Muon", "params": {"beta": 0.9}}}, FACTS, "optimizer.params of Muon: beta is not a parameter of it: they are lr, momentum"),
    "Muon with a momentum of 1": (GOOD | {"optimizer": {"type": "muon", "params": {"momentum": 1.0}}}, FACTS, r"of muon: momentum is 1.0: it must be in \[0, 1\)"),
    "Muon with a rate below 0": (GOOD | {"optimizer": {"type": "Muon", "params": {"muon_lr": -1}}}, FACTS, "of Muon: muon_lr is -1: it must be a finite number, 0 or more"),
    "Muon by no method": (GOOD | {"optimizer": {"type": "Muon", "params": {"ns_method": "svd"}}}, FACTS, "ns_method is 'svd': it must be gram or standard"),
    "Muon with Adam's L2": (GOOD | {"optimizer": {"type": "Muon", "params": {"adam_w_mode": False}}}, FACTS, "adam_w_mode is false: weight decay is decoupled here"),
    "Muon with no object": (GOOD | {"optimizer": {"type": "Muon", "params": [1]}}, FACTS, r"optimizer.params is \[1\]: it must be a JSON object"),
    "Adafactor on bf16's flat tensors": (GOOD | {"optimizer": {"type": "Adafactor"}, "bf16": {"enabled": True}}, FACTS, "'Adafactor': it treats each matrix as a whole, and DeepSpeed's bf16"),
    "Lamb on ZeRO's shards": (GOOD | {"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": 1}}, FACTS, "'Lamb': it treats each matrix as a whole"),
    "no optimizer": ({k: v for k, v in GOOD.items() if k != "optimizer"}, FACTS, "no optimizer"),
    "our optimizer, not enabled": (GOOD | {"async_pipeline": {"enabled": False}}, None, "set async_pipeline.enabled to true"),
    "our optimizer, no block": ({k: v for k, v in GOOD.items() if k != "async_pipeline"}, None, "is noflush's, but"),
    "more stages than layers": (GOOD, RunFacts(stages=4, layers=3), "4 stages for 3 layers: every stage needs a layer"),
    "tied layers of DeepSpeed's bf16": (GOOD | {"bf16": {"enabled": True}, "optimizer": {"type": "Adam"}}, TIED, "tied layers 'embed' with optimizer 'Adam' in mixed precision.*untie them"),
    "tied layers of DeepSpeed's ZeRO-1": (GOOD | {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}, replace(TIED, zero_stage=1), "tied layers 'embed' with optimizer 'AdamW' .*ZeRO-1.*one of DelayAware"),
    "dynamic shape": (GOOD, RunFacts(stages=2, layers=4, dynamic_shape=True), "dynamic_shape=True"),
    "old DeepSpeed": (GOOD, RunFacts(stages=2, layers=4, deepspeed_version="0.18.9"), "install deepspeed>=0.19.3"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configuration(name):
    ds_config, facts, message = WRONG[name]
    check = (lambda: check_config(ds_config)) if facts is None else (lambda: check_run(ds_config, facts))
    with pytest.raises(ConfigError, match=message) as caught:
        check()
    assert len(caught.value.faults) == 1, caught.value.faults


def test_tied_layers_train_where_their_owner_can_add_gradients_up():
    adam, bf16, zero = {"optimizer": {"type": "Adam"}}, {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}
    for section in (bf16, zero, adam, adam | bf16 | with_block(schedule="1f1b_flush")):
        assert check_run(GOOD | section, TIED)
    assert check_run(GOOD | adam | bf16, replace(TIED, stages=1)), "one copy"


def test_a_key_that_is_wrong_hides_no_other_that_is_out_of_range():
    with pytest.raises(ConfigError) as caught:
        check_config(with_block(wieghts="x", schedule=3, extra_in_flight=10**6, peer_timeout_s=0))
    assert [fault.split(" is ")[0].removeprefix("async_pipeline.") for fault in caught.value.faults] == [
        "schedule",
        "wieghts",
        "extra_in_flight",
        "peer_timeout_s",
    ]


def test_every_fault_is_listed_at_once():
    ds_config = with_block(schedule="gpipe", wieghts="x", kernel="cuda") | {"fp16": {"enabled": True}}
    with pytest.raises(ConfigError) as caught:
        check_run(ds_config, RunFacts(stages=4, layers=2))
    assert len(caught.value.faults) == 5
    assert "5 faults" in str(caught.value)


def test_what_is_refused_is_refused_at_once():
    start = time.monotonic()
    for name in ("depth beyond reason", "an order too long to prove"):
        test_wrong_configuration(name)
    assert time.monotonic() - start < 1


def test_a_refusal_survives_its_way_from_another_process():
    error = ConfigError(["one", "two"])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.faults, str(again)) == (ConfigError, error.faults, str(error))
