"""This machine: its cores and its memory, also within a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerwise.pipeline.doctor import machine
from layerwise.pipeline.doctor.check import Surroundings
from layerwise.pipeline.executors import ray_session


@pytest.mark.parametrize(("usable", "found"), [(8, "8 usable"), (3, "3 usable of 8, by")])
def test_cores_are_those_of_a_run(here: Surroundings, monkeypatch: pytest.MonkeyPatch, usable: int, found: str) -> None:
    monkeypatch.setattr(ray_session, "available_cores", lambda: usable)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    finding = machine.cores(here)
    assert finding.state == "ok"
    assert finding.found.startswith(found)


GIB = 2**30


@pytest.mark.parametrize(
    ("available", "limit", "current", "cache", "state", "found"),
    [
        (16 * GIB, None, None, 0, "ok", "17.2 GB free"),
        (16 * GIB, "max", 0, 0, "ok", "17.2 GB free"),
        (16 * GIB, 4 * GIB, 3 * GIB, 0, "warning", "1.07 GB free"),
        (16 * GIB, 4 * GIB, 3 * GIB, 2 * GIB, "ok", "3.22 GB free"),
        (1 * GIB, 64 * GIB, 0, 0, "warning", "1.07 GB free"),
        (None, None, None, 0, "ok", "not known"),
    ],
)
def test_memory_is_what_the_machine_and_the_container_leave(
    here: Surroundings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    available: int | None,
    limit: int | str | None,
    current: int | None,
    cache: int,
    state: str,
    found: str,
) -> None:
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CONTROL_GROUP", tmp_path)
    if available is not None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\nSwapFree: 5 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 7\n")
    finding = machine.memory(here)
    assert finding.state == state
    assert found in finding.found
