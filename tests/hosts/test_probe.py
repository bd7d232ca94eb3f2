"""The probe of DeepSpeed's attributes lists what the wing uses, all of it and nothing else, and sees a rename."""

from __future__ import annotations

import ast
from pathlib import Path
from unittest import mock

import pytest

from noflush.patches.deepspeed import probe, seam

WING = Path(__file__).parents[2] / "patches" / "deepspeed"
EXPRESSIONS = {
    "engine": ("engine.py self", "engine.py super()", "assembly.py engine", "update.py self._engine",
               "work.py self._engine", "work.py PipelineEngine", "megatron_deepspeed.py engine",
               "checkpoints.py self", "checkpoints.py super()", "checkpoints.py super(Checkpoints, self)",
               "groups.py engine", "groups.py self._engine",
               "lost_stages.py engine", "lost_stages.py self._engine",
               "evaluation.py self", "evaluation.py super()", "evaluation.py PipelineEngine",
               "in_flight.py engine", "recut.py engine", "kept_state.py engine",
               "saving.py engine", "saving.py self._engine"),
    "grid": (
        *("engine.py self.grid", "engine.py grid", "engine.py self.mpu"),
        *("assembly.py engine.grid", "assembly.py engine.mpu", "work.py self._engine.mpu"),
        *("in_flight.py engine.grid", "recut.py engine.grid", "groups.py engine.grid"),
        *("kept_state.py grid", "kept_state.py engine.grid", "cut_module.py grid"),
    ),
    "topology": ("assembly.py engine.grid._topo",),
    "module": (
        *("engine.py self.module", "engine.py kwargs['model']", "assembly.py engine.module"),
        *("seam.py model", "seam.py kwargs['model']", "shared_modules.py model"),
        *("muon_section.py kwargs['model']", "megatron_matrices.py model"),
        *("ties.py model", "recut.py engine.module", "kept_state.py engine.module", "cut_module.py self"),
        *("checkpoints.py self.module", "evaluation.py self.module"),
    ),
    "config": (
        *("engine.py host_config", "work.py self._engine._config"),
        *("seam.py host_config", "seam.py kwargs['config_class']"),
        "muon_section.py host_config",
    ),
    "optimizer": (
        *("engine.py self.optimizer", "work.py self._engine.optimizer", "assembly.py engine.optimizer"),
        *("update.py optimizer", "weights.py optimizer", "weights.py self.optimizer"),
        *("recut.py engine.optimizer", "checkpoints.py optimizer"),
    ),
    "scaler": ("update.py optimizer.loss_scaler",),
    "tied": ("seam.py spec", "ties.py spec"),
}  # fmt: skip
OWNERS = {
    "engine": [probe.ENGINE],
    "grid": [probe.GRID],
    "topology": [probe.TOPOLOGY],
    "module": [probe.MODULE],
    "config": [probe.CONFIG],
    "optimizer": [probe.BF16, probe.ZERO],
    "scaler": [probe.SCALER],
    "tied": [probe.TIED],
}
HOSTS_OWN = ("engine", "self._engine", "self.grid", "self.module", "self.mpu", "self.optimizer", "self._config",
             "self.monitor", "self.lr_scheduler", "optimizer", "grid", "model", "host_config",
             "kwargs['model']", "kwargs['config_class']")  # fmt: skip
"""What these begin is DeepSpeed's, at least at first."""
FURTHER_IN = {
    "engine.py self.monitor": "DeepSpeed's MonitorMaster, made at run time",
    "engine.py self.lr_scheduler": "whatever the script has",
    "engine.py self._nf_stage": "ours",
    "work.py self._engine.fwd_outputs": "a list",
    "seam.py host_config.bfloat16_config": "pydantic fields, read as they are",
    "seam.py host_config.float16_config": "pydantic fields, read as they are",
    "muon_section.py host_config._param_dict['optimizer']": "a dict",
    "work.py self._engine._config.bfloat16_config": "pydantic fields, read as they are",
    "update.py self._update": "ours",
    "in_flight.py engine.pipeline_stage": "ours",
    "groups.py engine.pipeline_stage": "ours",
    "groups.py engine.pipeline_stage.work": "ours",
    "groups.py self._config": "the block's",
    "lost_stages.py self._config": "the block's",
    "lost_stages.py self._engine.pipeline_stage": "ours",
    "lost_stages.py self._engine.pipeline_stage.schedule": "ours",
    "lost_stages.py engine.pipeline_stage": "ours",
    "lost_stages.py engine.pipeline_stage.schedule": "ours",
    "groups.py self._config.meeting_place": "a word",
    "in_flight.py engine.pipeline_stage.runner": "ours",
    "in_flight.py engine.saves": "ours",
    "recut.py engine.pipeline_stage": "ours",
    "recut.py engine.pipeline_stage.weights": "ours",
    "kept_state.py engine.pipeline_stage": "ours",
    "kept_state.py engine.pipeline_stage.weights": "ours",
    "recut.py engine.lr_scheduler": "whatever the script has",
    "in_flight.py engine.checkpoint_engine": "one of DeepSpeed's several, made at run time",
    "saving.py self._engine.checkpoint_engine": "one of DeepSpeed's several, made at run time",
    "ties.py optimizer": "a script's own, of torch's class",
}
OUR_ATTRIBUTES = ("has_one_norm", "evaluating", "batch_of_stage", "loss_names", "saves", "recut", "__init__")
OF_CUT_MODULES = {"slice_rule"}
TORCHS = {
    "module": {"train", "training", "parameters", "named_parameters", "named_modules", "get_submodule"},
}
OF_PROTOCOLS = {
    "engine": {"_exec_schedule"},
    "scaler": {"dynamic", "update_scale"},
    "module": {"_partition_layers"},
}
"""`eval_batch` runs DeepSpeed's own schedule; what `stage.loss_scale` asks of a scaler; where a module is cut."""


def used(owner):
    found = set()
    for file in sorted(WING.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and f"{file.name} {ast.unparse(node.value)}" in EXPRESSIONS[owner]:
                found.add(node.attr)
    if owner == "engine":
        ours = [
            node
            for file in ("engine.py", "checkpoints.py", "evaluation.py")
            for node in ast.walk(ast.parse((WING / file).read_text()))
            if isinstance(node, ast.ClassDef) and node.name in ("NoFlushEngine", "Checkpoints", "Evaluation")
        ]
        own = {f.name for of in ours for f in of.body if isinstance(f, ast.FunctionDef)}
        called_above = {
            n.attr
            for of in ours
            for n in ast.walk(of)
            if isinstance(n, ast.Attribute) and ast.unparse(n.value).startswith("super(") and n.attr != "__init__"
        }
        found = {n for n in found if not n.startswith("_nf_") and n not in OUR_ATTRIBUTES}
        found = (found - own) | called_above | {"save_checkpoint"}
    return found - TORCHS.get(owner, set()) - OF_CUT_MODULES


@pytest.mark.parametrize("owner", OWNERS)
def test_the_probe_lists_what_the_wing_uses(owner):
    listed = {name for of in OWNERS[owner] for name in probe.NEEDED[of].split()}
    assert used(owner) | OF_PROTOCOLS.get(owner, set()) == listed


def test_no_expression_of_deepspeeds_is_overlooked():
    listed = {expression for expressions in EXPRESSIONS.values() for expression in expressions} | set(FURTHER_IN)
    seen = set()
    for file in WING.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                value = ast.unparse(node.value)
                # What a call returns is somebody else's.
                if "(" not in value and any(value == own or value.startswith(f"{own}.") for own in HOSTS_OWN):
                    seen.add(f"{file.name} {value}")
    assert seen - listed == set()


def test_this_deepspeed_has_it_all():
    assert probe.missing() == []


@pytest.mark.parametrize("owner", [probe.ENGINE, probe.ZERO, probe.GRID])
def test_a_renamed_attribute_is_one_refusal_that_names_it(owner):
    renamed = mock.patch.dict(probe.NEEDED, {owner: probe.NEEDED[owner] + " was_renamed"})
    said = rf"missing {owner[0]}\.{owner[1]}\.was_renamed\. Install"
    with renamed, pytest.raises(seam.HostChangedError, match=said):
        seam.check_host()


def test_an_attribute_that_a_constructor_assigns_is_known():
    class Base:
        def __init__(self):
            self.assigned = 1

    class Derived(Base):
        @property
        def asked(self):
            return self.inside

    assert {"assigned", "asked"} <= probe.known(Derived)
    assert "inside" not in probe.known(Derived)  # read, and nowhere made
