"""Machines by name, and what a compiler is told of them."""

import re

import pytest

from nmjax.planning import hardware
from nmjax.planning.hardware import CHIPS, Hardware, parse, target_config


def test_hardware_by_name():
    assert parse("a100-80g:4") == Hardware(CHIPS["a100-80g"], 4)
    assert parse(" H100 ") == Hardware(CHIPS["h100"], 1)
    assert str(parse("v5e:16")) == "v5e:16"
    assert [parse(f"a100-40g:{n}").hosts for n in (1, 8, 16, 1024)] == [1, 1, 2, 128]
    assert [parse(f"v5p:{n}").hosts for n in (1, 4, 1024)] == [1, 1, 256]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a100:4", "hardware must read like a100-80g:4, with one of a100-40g, a100-80g, h100, .*, got 'a100:4'"),
        ("h100:x", "got 'h100:x'"),
        ("h100:12", "the number of h100 must be 1 to 8, or a multiple of 8 for whole hosts, got 12"),
        ("h100:0", "the number of h100 must be 1 to 8, .*, got 0"),
        ("v5e:3", "the number of v5e chips must be one of 1, 4, 8, 16, 32, 64, 128, 256, got 3"),
        ("v6e:512", "the number of v6e chips must be one of .*256, got 512"),
    ],
)
def test_machines_that_there_are_none_of(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_arrangements_hold_the_devices_they_are_for():
    assert hardware._arrangement(parse("a100-80g:4")) == "1x1x4"
    assert hardware._arrangement(parse("h200:1024")) == "1x128x8"
    assert hardware._arrangement(parse("v6e:8")) == "v6e:2x4"
    assert hardware._arrangement(parse("v5p:1024")) == "v5p:8x8x16"


def test_a_card_is_described_in_full():
    config = target_config(CHIPS["a100-80g"])
    fields = dict(re.findall(r"^  (\w+): (\S+)$", config, re.M))
    assert int(fields["device_memory_size"]) == CHIPS["a100-80g"].memory == 85100068864
    assert int(fields["memory_bandwidth"]) == CHIPS["a100-80g"].bandwidth == pytest.approx(2.039e12, rel=1e-3)
    assert "cuda_compute_capability { major: 8 }" in config and 'device_description_str: "a100-80g"' in config
    assert config.count("{") == config.count("}")
    # A core's peak: operations a cycle and core of the tensor cores, 2048 on Ampere and 4096 on Hopper.
    for name, a_cycle in (("a100-40g", 2048), ("h100", 4096)):
        chip = CHIPS[name]
        peak = a_cycle * int(chip.target["core_count"]) * float(chip.target["clock_rate_ghz"]) * 1e9
        assert chip.flops == pytest.approx(peak, rel=0.1)  # Hopper's data sheet is of a lower clock


def test_a_missing_compiler_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(hardware, "_installed", lambda module: False)
    with pytest.raises(
        ModuleNotFoundError, match=r"wanted the package of jax_plugins.xla_cuda12, .*'nmjax\[plan-cuda\]'"
    ):
        hardware.devices(parse("a100-80g:4"))
    with pytest.raises(ModuleNotFoundError, match=r"compile for v5e wanted the package of libtpu.*'nmjax\[plan-tpu\]'"):
        hardware.devices(parse("v5e"))


def test_what_is_installed():
    assert hardware._installed("os.path") and hardware._installed("numpy")
    assert not hardware._installed("no_such_package") and not hardware._installed("no_such_package.plugin")
