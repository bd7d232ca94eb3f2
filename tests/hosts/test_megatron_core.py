"""megatron-core's seam: found in what is installed, put back, and refused where it does not fit."""

from __future__ import annotations

import importlib
from importlib import metadata
from unittest import mock

import pytest

from noflush.patches.megatron_core import dropout, releases


def test_the_installed_release_fits():
    assert metadata.version("megatron-core") in releases.TESTED
    assert dropout.missing_seams() == []


def test_patches_and_puts_back():
    from deepspeed.runtime.activation_checkpointing import checkpointing

    names = ("megatron.core.tensor_parallel", "megatron.core.tensor_parallel.layers")
    modules = [importlib.import_module(name) for name in names]
    own = [module.get_cuda_rng_tracker for module in modules]
    dropout.patch()
    dropout.patch()
    try:
        assert dropout.is_patched()
        for module in modules:
            assert module.get_cuda_rng_tracker() is checkpointing.get_cuda_rng_tracker()
    finally:
        dropout.unpatch()
    assert [module.get_cuda_rng_tracker for module in modules] == own
    assert not dropout.is_patched()


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("0.16.0", False),
        ("0.16.1", True),
        ("0.17.0", True),
        ("0.19.2+0123abc", True),
        ("0.19.3", False),
        ("0.20.0rc0", False),
    ],
)
def test_a_release_outside_those_tested_is_refused(version, taken):
    with mock.patch("megatron.core.__version__", version):
        missing = dropout.missing_seams()
        assert (missing == []) == taken, missing
        if not taken:
            assert missing == [f"version {version}: it must be 0.16.1 or newer, and 0.19.2 or older"]
            with pytest.raises(dropout.MegatronCoreChangedError, match=r"pip install 'megatron-core>=0\.16\.1,<=0\.19"):
                dropout.patch()
    assert not dropout.is_patched()


def test_what_is_gone_is_named():
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    with mock.patch.object(layers, "get_cuda_rng_tracker"):
        del layers.get_cuda_rng_tracker
        with pytest.raises(dropout.MegatronCoreChangedError, match=r"parallel\.layers\.get_cuda_rng_tracker is gone"):
            dropout.patch()
        layers.get_cuda_rng_tracker = None  # for mock to put back
