"""Megatron-DeepSpeed's shape, on stubs: no code of it is here, only names and signatures that noflush counts on."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch

from noflush.config import ConfigError
from noflush.demo.port import held_port
from noflush.methods.matrices import piece_of
from noflush.patches.deepspeed import megatron_deepspeed as seam
from noflush.patches.deepspeed import muon_section
from noflush.patches.deepspeed.faults import RunFacts, check_run
from noflush.patches.deepspeed.megatron_matrices import mark_matrices
from tests.multiproc.ranks import run_ranks

LR, DECAY, SEQUENCE = 1e-3, 0.1, 4
OURS = {"type": "DelayAwareNAdamW", "params": {"betas": [0.95, 0.99]}}
CONFIG = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.0, "steps_per_print": 1000, "async_pipeline": {}}
TREE = {
    "megatron/__init__.py": """
        from argparse import Namespace
        ARGS = Namespace(lr=1e-3, weight_decay=0.1, seq_length=4, rank=0, consumed_train_tokens=0, num_experts=[1],
                         enable_zbh1_pipeline=False, tied=False)
        def get_args():
            return ARGS
    """,
    "megatron/model/__init__.py": "from .gpt_model import GPTModelPipe",
    "megatron/model/gpt_model.py": """
        import torch
        from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
        from megatron import get_args
        class GPTModelPipe(PipelineModule):
            def __init__(self, stages):
                torch.manual_seed(7)
                end = LayerSpec(torch.nn.Linear, 8, 8)
                if get_args().tied:
                    end = TiedLayerSpec("embed", torch.nn.Linear, 8, 8)
                layers = [end, LayerSpec(torch.nn.Linear, 8, 8), LayerSpec(torch.nn.Linear, 8, 8), end]
                loss = lambda out, labels: ((out - labels) ** 2).mean()
                super().__init__(layers=layers, num_stages=stages, loss_fn=loss, partition_method="uniform")
    """,
    "megatron/training.py": """
        import deepspeed, torch
        from megatron import get_args
        from megatron.model import GPTModelPipe
        class OptimizerParamScheduler:
            def __init__(self, optimizer):
                self.optimizer, self.num_steps, self.num_tokens, self.seen = optimizer, 0, 0, []
                self.step(0)
            def step(self, increment, token_num=None):
                self.num_tokens = get_args().consumed_train_tokens if token_num is None else token_num
                self.num_steps += increment
                self.seen.append((self.num_steps, self.num_tokens))
                for group in self.optimizer.param_groups:
                    group["lr"] = 1e-3 / (1 + self.num_tokens) * group["lr_mult"]
                    group["weight_decay"] = 0.1 * group["wd_mult"]
            def state_dict(self):
                return {"num_steps": self.num_steps}
            def load_state_dict(self, state):
                self.num_steps = state["num_steps"]
        def setup(config, stages):
            model = GPTModelPipe(stages)
            weights = [p for p in model.parameters() if p.dim() > 1]
            biases = [p for p in model.parameters() if p.dim() == 1]
            groups = [{"name": "wd", "params": weights, "wd_mult": 1.0, "lr_mult": 1.0},
                      {"name": "no_wd", "params": biases, "wd_mult": 0.0, "lr_mult": 1.0}]
            optimizer = torch.optim.Adam(groups, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999))
            schedule = OptimizerParamScheduler(optimizer)
            return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
        def train(engine, iterations):
            draw, args = torch.Generator().manual_seed(1), get_args()
            losses = []
            for _ in range(iterations):
                engine.set_train_batch_size(engine.train_batch_size())
                batch = [(torch.randn(3, 8, generator=draw), torch.randn(3, 8, generator=draw)) for _ in range(2)]
                losses.append(engine.train_batch(data_iter=iter(batch)).item())
                args.consumed_train_tokens += engine.train_batch_size() * args.seq_length
            return losses
    """,
    "pretrain_gpt.py": """
        import sys, deepspeed
        from deepspeed.accelerator import get_accelerator
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute's build that training never calls
        deepspeed.init_distributed("gloo")
        from megatron.training import setup, train
        engine, *_ = setup(CONFIG, 1)
        train(engine, 2)
        print(type(engine).__name__, type(engine.optimizer).__name__)
    """,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    import textwrap

    root = tmp_path_factory.mktemp("stub")
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text).replace("CONFIG", repr(config(1))))
    return str(root)


def config(gas, optimizer=OURS, **block):
    section = {} if optimizer is None else {"optimizer": optimizer}
    return CONFIG | {"gradient_accumulation_steps": gas, "async_pipeline": block} | section


def train_in_tree(rank, tree, ds_config, iterations=5, tied=False):
    sys.path.insert(0, tree)
    # The ranks are forked from a process that has imported megatron-core, which bears the same name.
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        del sys.modules[name]
    import megatron
    from megatron.training import setup, train

    megatron.ARGS.rank, megatron.ARGS.tied = rank, tied
    with contextlib.redirect_stdout(io.StringIO()) as said:
        engine, optimizer, _, schedule = setup(ds_config, 2)
    losses = train(engine, iterations)
    if hasattr(engine, "drain"):
        engine.drain()
    return {
        "said": said.getvalue(),
        "engine": type(engine).__name__,
        "optimizer": type(optimizer).__name__,
        "followed": schedule.optimizer is optimizer,
        "groups": [
            {k: v for k, v in group.items() if k not in ("params", "foreach")} for group in optimizer.param_groups
        ],
        "learnt": [len(group["params"]) for group in optimizer.param_groups],
        "seen": schedule.seen,
        "losses": losses,
        "weights": [p.detach().clone() for p in engine.module.parameters()],
    }


@pytest.mark.multiproc
def test_the_configs_optimizer_takes_megatrons_groups_and_schedule_over(tree):
    for rank in run_ranks(train_in_tree, 2, tree=tree, ds_config=config(2)):
        assert (rank["engine"], rank["optimizer"], rank["followed"]) == ("NoFlushEngine", "DelayAwareNAdamW", True)
        decayed, rest = rank["groups"]
        assert (decayed["name"], decayed["weight_decay"]) == ("wd", DECAY)
        assert (rest["name"], rest["weight_decay"]) == ("no_wd", 0.0)
        for group in rank["groups"]:
            assert group["betas"] == (0.95, 0.99)
            assert group["lr"] == LR / (1 + rank["seen"][-1][1])
            assert "amsgrad" not in group  # Adam's own settings stay with Adam


@pytest.mark.multiproc
def test_every_stage_counts_the_tokens_of_its_own_updates_as_a_synchronous_run_does(tree):
    stock = run_ranks(train_in_tree, 2, tree=tree, ds_config=config(2, None, enabled=False))
    assert stock[0]["engine"] == "PipelineEngine"
    tokens = 2 * 3 * SEQUENCE
    assert stock[0]["seen"][1:] == [((n + 1) * 6, n * tokens) for n in range(5)]
    for schedule in ("1f1b_no_flush", "1f1b_flush"):
        for rank in run_ranks(train_in_tree, 2, tree=tree, ds_config=config(2, None, schedule=schedule)):
            assert rank["optimizer"] == "Adam"
            assert rank["seen"] == stock[0]["seen"]
    twin = run_ranks(train_in_tree, 2, tree=tree, ds_config=config(2, None, schedule="1f1b_flush"))
    for a, b in zip(stock, twin, strict=True):
        assert a["losses"] == b["losses"]
        assert all(torch.equal(x, y) for x, y in zip(a["weights"], b["weights"], strict=True))


@pytest.mark.multiproc
@pytest.mark.parametrize("optimizer", [OURS, None], ids=["the config's optimizer", "Megatron's own"])
def test_tied_embeddings_are_their_owners(optimizer, tree):
    """The owner's groups have the weight and the reader's have not; after a drain both have the same."""
    first, last = run_ranks(train_in_tree, 2, tree=tree, ds_config=config(2, optimizer), tied=True)
    assert first["engine"] == "NoFlushEngine"
    assert [group["name"] for group in last["groups"]] == ["wd", "no_wd"]
    assert [result["learnt"] for result in (first, last)] == [[2, 2], [1, 2]]  # of weights, of biases
    (owned, *_), (read, *_) = first["weights"], last["weights"]
    torch.manual_seed(7)
    begun = torch.nn.Linear(8, 8).weight
    assert torch.equal(owned, read)
    assert not torch.allclose(owned, begun, atol=1e-4)
    assert len(set(first["losses"])) == 5


@pytest.mark.multiproc
def test_run_finds_the_trees_own_megatron(tree):
    environment = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    with held_port() as port:
        done = subprocess.run(
            [sys.executable, "-m", "noflush.run", "pretrain_gpt.py"],
            cwd=tree, capture_output=True, text=True, timeout=120,
            env=os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "noflush: DelayAwareNAdamW of the DeepSpeed config in place of Megatron's torch.optim" in done.stdout
    assert "betas (0.95, 0.99)" in done.stdout
    assert done.stdout.splitlines()[-1] == "NoFlushEngine DelayAwareNAdamW"


AHEAD = {"look_ahead": 0.5, "momentum": 0.9}
MUONS = {
    "ours": {"type": "DelayAwareMuon", "params": AHEAD},
    "theirs": {"type": "Muon", "params": AHEAD},
    "as theirs": muon_section.ours(AHEAD, schedules=True),
}


@pytest.mark.multiproc
def test_muon_takes_megatrons_groups_and_schedule_over(tree):
    found = {
        name: run_ranks(train_in_tree, 2, tree=tree, ds_config=config(2, section)) for name, section in MUONS.items()
    }
    for name, (first, second) in found.items():
        assert "noflush: DelayAwareMuon of the DeepSpeed config in place of Megatron's torch.optim" in first["said"]
        theirs = (
            "optimizer Muon of the DeepSpeed config is DelayAwareMuon: learning rate and weight decay by the script's"
        )
        assert (theirs in first["said"]) == (name == "theirs")
        assert "Muon" not in second["said"]
    for name, results in found.items():
        for rank in results:
            assert (rank["engine"], rank["optimizer"], rank["followed"]) == ("NoFlushEngine", "DelayAwareMuon", True)
            matrices, rest = rank["groups"]
            assert (matrices["name"], matrices["weight_decay"], "method" in matrices) == ("wd", DECAY, False)
            assert (rest["name"], rest["weight_decay"], rest["method"]) == ("no_wd", 0.0, "PipeDreamAdamW")
            assert matrices["scale_mode"] == ("spectral" if name == "ours" else "shape_scaling")
            assert (matrices["momentum"], matrices["look_ahead"]) == (0.9, 0.5)
            assert {group["lr"] for group in rank["groups"]} == {LR / (1 + rank["seen"][-1][1])}
    for theirs, ours in zip(found["theirs"], found["as theirs"], strict=True):
        assert theirs["losses"][1:] == ours["losses"][1:]  # of the first the first stage knows nothing yet
        assert all(torch.equal(a, b) for a, b in zip(theirs["weights"], ours["weights"], strict=True))


class Attention(torch.nn.Module):
    """What Megatron-DeepSpeed's attention has, of 4 heads of 3 in 2 groups."""

    hidden_size_per_attention_head, num_key_value_groups = 3, 2

    def __init__(self, rows):
        super().__init__()
        self.query_key_value = torch.nn.Linear(8, rows, bias=False)


class Thirds(Attention):
    """As at commit 4efb479d."""

    def forward(self, x):
        mixed = self.query_key_value(x)
        each_hidden_size = mixed.shape[-1] // 3
        ends = (each_hidden_size, 2 * each_hidden_size)
        return mixed[..., : ends[0]], mixed[..., ends[0] : ends[1]], mixed[..., ends[1] :]


class Grouped(Attention):
    """As in the commits before."""

    def split_tensor(self, mixed):
        return torch.split(mixed, [self.num_key_value_groups, 1, 1], dim=-2)

    def forward(self, x):
        mixed = self.query_key_value(x)
        mixed = mixed.view(*mixed.shape[:-1], -1, self.num_key_value_groups + 2, self.hidden_size_per_attention_head)
        return tuple(part.reshape(*x.shape[:-1], -1) for part in self.split_tensor(mixed))


class Other(Attention):
    def forward(self, x):
        return (self.query_key_value(x),)


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense_h_to_4h = torch.nn.Linear(8, 20, bias=False)

    def forward(self, x):
        return torch.chunk(self.dense_h_to_4h(x), 2, dim=-1)


@pytest.mark.parametrize(("kind", "rows"), [(Thirds, 36), (Grouped, 24), (Other, 36), (Gated, None)])
def test_fused_weights_are_the_matrices_that_the_trees_code_cuts(kind, rows):
    module = kind() if rows is None else kind(rows)
    mark_matrices(torch.nn.ModuleDict({"layer": module}), Namespace(swiglu=True))
    (p,) = module.parameters()
    x = torch.randn(5, 8)
    ours = [x @ matrix.of(p.detach().view(-1)).reshape(matrix.shape).T for matrix in piece_of(p).matrices()]
    for got, wanted in zip(ours, module(x), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_plain_mlp_is_one_matrix():
    module = Gated()
    mark_matrices(module, Namespace(swiglu=False))
    assert len(piece_of(module.dense_h_to_4h.weight).matrices()) == 1


FLAGS = {"lr": LR, "weight_decay": DECAY, "seq_length": SEQUENCE, "rank": 1, "consumed_train_tokens": 0}


def judge(ds_config, **flags):
    facts = RunFacts(stages=2, layers=4, client_optimizer=True)
    return check_run(ds_config, seam.facts(facts, Namespace(**(FLAGS | flags)), ds_config))


@pytest.mark.parametrize(
    ("flags", "params", "message"),
    [
        ({"enable_zbh1_pipeline": True}, {}, "--enable-zbh1-pipeline: that is another schedule"),
        ({"num_experts": [1, 4]}, {}, "--num-experts 1 4: experts have replicas of their own"),
        ({}, {"lr": 2e-3}, r"optimizer.params.lr is 0.002, but --lr 0.001 is what Megatron's schedule sets"),
        ({"lr": 3e-3}, {"lr": 2e-3}, r"optimizer.params.lr is 0.002, but --lr 0.003 is"),
        ({}, {"weight_decay": 0.0}, r"optimizer.params.weight_decay is 0.0, but --weight-decay 0.1"),
    ],
)
def test_flags_that_cannot_be_had_are_refused(flags, params, message):
    ds_config = config(1, {"type": "DelayAwareNAdamW", "params": params})
    with pytest.raises(ConfigError, match=message) as refused:
        judge(ds_config, **flags)
    assert len(refused.value.faults) == 1


def test_moments_can_be_logged_where_they_exist_after_the_first_call():
    wish = {"log_optimizer_states_to_tensorboard": True}
    with pytest.raises(ConfigError, match="--log-optimizer-states-to-tensorboard: Megatron reads the moments after"):
        judge(config(1, None), **wish)
    assert judge(config(1, None, schedule="1f1b_flush"), **wish)
    assert judge(config(1, OURS), **wish)


def test_flags_as_megatron_has_them_by_default_are_fine():
    usual = {"enable_zbh1_pipeline": False, "num_experts": [1]}
    assert judge(config(1, {"type": "DelayAwareNAdamW", "params": {"lr": LR, "weight_decay": DECAY}}), **usual)
    assert judge(config(1, None), **usual)


def model_of(module, name):
    return type(name, (type("PipelineModule", (), {}),), {"__module__": module})()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("megatron.core.models.gpt.gpt_model", "GPTModel"),
        ("megatron.model.gpt2_model", "GPT2ModelPipe"),
        ("mine.model", "GPTModelPipe"),
    ],
)
def test_other_megatrons_are_left_alone(module, name):
    assert seam.arguments_of(model_of(module, name)) is None


def test_another_shape_of_megatron_is_named(monkeypatch):
    model = model_of("megatron.model.gpt_model", "GPTModelPipe")
    host = ModuleType("megatron")
    monkeypatch.setitem(sys.modules, "megatron", host)
    with pytest.raises(seam.MegatronChangedError, match=r"not megatron\.get_args \(tested: .* at commit 4efb479d\)"):
        seam.arguments_of(model)
    host.get_args = lambda: Namespace(lr=1.0)
    with pytest.raises(seam.MegatronChangedError, match=r"not megatron\.get_args\(\)\.consumed_train_tokens"):
        seam.arguments_of(model)
    host.get_args = lambda: Namespace(**FLAGS)
    assert seam.arguments_of(model).lr == LR
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    kwargs = {"optimizer": adam, "lr_scheduler": Namespace(optim=adam)}
    with pytest.raises(ConfigError, match="Namespace has no attribute 'optimizer' that is the script's Adam"):
        seam.with_our_optimizer(kwargs, Namespace(**FLAGS), config(1))


def test_megatrons_optimizer_stays_where_the_config_names_none_of_ours():
    kwargs = {"optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])}
    for section in (None, {"type": "Adam"}):
        assert seam.with_our_optimizer(kwargs, Namespace(**FLAGS), config(1, section)) is kwargs
