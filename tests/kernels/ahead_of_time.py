"""Compiles the Triton kernels for GPUs that need not be here, and prints what came out as JSON.

    python -m tests.kernels.ahead_of_time

One line a variant and architecture: registers and spills from the cubin's resource usage, and from the PTX every
kind of global load and store, vector width included.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from noflush.kernels import fused
from noflush.kernels.launch import BLOCK, NORM_BLOCK
from noflush.methods import adamw, nadamw, nag
from noflush.methods.table import METHODS, load

HYPERS = {"nadamw": nadamw.Hyper, "adamw": adamw.Hyper, "nag": nag.Hyper}
METHOD = {load(name).__module__.split(".")[-1]: load(name).METHOD for name in METHODS}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MODEL = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


def step_source(rule, gradient, model, moments, length="i32", ahead=False):
    """The update kernel for a rule and dtypes, pointers aligned to 16 bytes."""
    types = {
        "gradient": MODEL[gradient], "weights": "*fp32", "target": MODEL[model], "state0": MODEL[moments],
        "state1": MODEL[moments], "c": "*fp32", "ahead": "fp32", "n": length,
    }  # fmt: skip
    constants = {
        "RULE": METHOD[rule].fused.rule, "STATES": len(METHOD[rule].row.state), "MASTER": model != "fp32" or ahead,
        "LOOKS": ahead, "ROUND": moments == "bf16", "BLOCK": BLOCK,
    }  # fmt: skip
    return _source(fused.step, types, constants)


def norm_source(gradient):
    return _source(fused.sum_of_squares, {"x": MODEL[gradient], "partials": "*fp32", "n": "i32"}, {"BLOCK": NORM_BLOCK})


def prepare_source(rule):
    types = {
        "hyper": "*fp64", "clocks": "*fp32", "norm": "*fp32", "scale": "*fp32", "numbers": "*fp32",
        "outcome": "*fp32", "max_norm": "*fp32", "whole": "*fp32",
    }  # fmt: skip
    of_rule = METHOD[rule].fused
    constants = {
        "FACTOR": of_rule.factor, "COEFFICIENTS": of_rule.coefficients, "HYPERS": len(HYPERS[rule]._fields),
        "WORDS": fused.COMMON + of_rule.words,
    }  # fmt: skip
    return _source(fused.prepare, types, constants)


def _source(kernel, types, constants):
    signature = types | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}
    return ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned
    )


def compile_for(source, capability, warps):
    """What the compiler made of ``source`` for an architecture such as 90 (sm_90)."""
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    accesses = collections.Counter(re.findall(r"(?:ld|st)\.global[\w.:]*", ptx))
    found = {key: int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"], "accesses": dict(accesses)}


def variants():
    """name -> (source, warps)."""
    found = {}
    for rule in ("nadamw", "adamw", "nag"):
        for gradient, model, moments in (("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32"), ("bf16", "bf16", "fp32"),
                                         ("fp16", "fp16", "fp32"), ("bf16", "bf16", "bf16")):  # fmt: skip
            if rule == "nag" and moments == "bf16":
                continue
            found[f"step {rule}, gradient {gradient}, model {model}, moments {moments}"] = (
                step_source(rule, gradient, model, moments), 4,
            )  # fmt: skip
        found[f"step {rule}, gradient bf16, model bf16, moments fp32, beyond 2^31"] = (
            step_source(rule, "bf16", "bf16", "fp32", "i64"), 4,
        )  # fmt: skip
        for model in ("fp32", "bf16"):
            found[f"step {rule}, gradient {model}, model {model}, moments fp32, looking ahead"] = (
                step_source(rule, model, model, "fp32", ahead=True), 4,
            )  # fmt: skip
        found[f"prepare {rule}"] = (prepare_source(rule), 4)
    for gradient in MODEL:
        found[f"norm of {gradient}"] = (norm_source(gradient), 8)
    return found


if __name__ == "__main__":
    for name, (source, warps) in variants().items():
        for capability in (80, 90):
            result = compile_for(source, capability, warps)
            print(json.dumps({"kernel": name, "arch": f"sm_{capability}", "triton": triton.__version__} | result))
