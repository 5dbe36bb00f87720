"""Fingerprints: what Linux says of a processor, written out by hand, and what must not pass for the same machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.errors import DeviceChanged, UsageError
from layerwise.kernels import device as device_module
from layerwise.kernels.device import Device, cache_bytes, processor, require_same, this_device

SOME = Device("cpu", "Some Processor", 8, ("avx2", "avx512f"), 64, 32 << 20, 1, "2.13.0")

CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Some Xeon @ 2.00GHz
flags\t\t: fpu avx2 avx512f avx512_vnni sse

processor\t: 1
model name\t: another one
"""


def test_a_fingerprint_survives_json() -> None:
    again = Device.from_json(json.loads(json.dumps(SOME.as_json())))
    assert again == SOME
    assert again.digest == SOME.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "Another"}, "name: Some Processor and Another"),
        ({"cores": 4}, "cores: 8 and 4"),
        ({"features": ("avx2",)}, "features: avx2 avx512f and avx2"),
        ({"torch": "2.14.0"}, "torch: 2.13.0 and 2.14.0"),
        ({"threads": 2}, "threads: 1 and 2"),
        ({"driver": "driver 1.2"}, "driver: none and driver 1.2"),
    ],
)
def test_whatever_changes_is_named_and_refused(change: dict[str, object], said: str) -> None:
    other = replace(SOME, **change)  # type: ignore[arg-type]
    assert other.digest != SOME.digest
    assert SOME.differences(other) == [said]
    with pytest.raises(DeviceChanged, match=f"the table was measured on another device.*{said}"):
        require_same(SOME, other, "the table")


def test_the_same_device_passes() -> None:
    require_same(SOME, replace(SOME), "the table")


def test_a_description_with_columns_of_another_version_is_refused() -> None:
    with pytest.raises(UsageError, match="not the description of a device: colour"):
        Device.from_json({**SOME.as_json(), "colour": "green"})


def test_the_processor_is_read_from_what_linux_says_of_its_first_core(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    assert processor(path) == ("Some Xeon @ 2.00GHz (family 6, model 85)", ("avx2", "avx512f", "avx512_vnni"))


def test_the_last_level_of_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(["48K", "2048K", "33M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_bytes(tmp_path) == 33 << 20
    assert cache_bytes(tmp_path / "nothing") == 0


def test_this_machine_is_the_same_machine_in_another_process_and_loads_no_torch_to_say_so() -> None:
    program = (
        "import sys; from layerwise.kernels.device import this_device\n"
        "print(this_device('cpu').digest, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [this_device("cpu").digest, "False"]


def test_the_number_of_threads_is_part_of_the_fingerprint() -> None:
    assert this_device("cpu", threads=2).differences(this_device("cpu")) == ["threads: 2 and 1"]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        this_device("tpu")


def test_a_torch_without_cuda_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(UsageError, match="built without CUDA"):
        this_device("cuda")


def test_a_machine_without_a_gpu_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.9")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no GPU"):
        this_device("cuda")


def test_the_driver_is_read_from_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\nGCC version: 12\n")
    assert device_module._driver(path) == "driver 570.86.15"
    assert device_module._driver(tmp_path / "none") is None


@pytest.mark.gpu
def test_a_gpu_says_its_name_and_capability() -> None:
    import torch

    here = this_device("cuda")
    assert here.name == torch.cuda.get_device_name()
    assert here.features[0].startswith("sm_")
    assert here.cores > 0
    assert here.cache_bytes > 0
