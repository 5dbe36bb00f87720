"""Compile kernels for GPUs that are not there, and count what came out.

Run in a process of its own (`compiled` in conftest.py does), because a kernel that was decorated for the interpreter
cannot be compiled; one child for each core shares the work. ptxas, cuobjdump and the disassembler come with Triton.

What is compiled stands in `cases_*.py` beside this file, each with `CASES`, a list of plain dicts of this form:

    "name"       of the case, unique over all files: "n_m-m16-sm90"
    "kernel"     "layerwise.kernels.n_m_matmul:n_m_kernel"
    "arch"       compute capability: 80, 86 or 90
    "arguments"  every parameter by name: "*fp16" is a pointer, aligned to 16 bytes ("*i8", "*u8", "*i16", "*i32",
                 "*i64", "*bf16", "*fp32" too); None; an int, specialised as at a launch (1, divisible by 16); and what
                 the kernel itself annotates as constexpr
    "options"    {"num_warps": 4, "num_stages": 3}
    "weights"    weights that a program handles in one turn of its main loop; None without one
    "budget"     recorded instructions per weight; None if they are not counted
    "opcodes"    prefixes that the kernel must hold: "HMMA", "LDGSTS" (a pipelined load)
    "absent"     optional, prefixes that it must not hold; LDL and STL never pass

Instructions per weight are the SASS lines of the main loop × threads ÷ weights; the main loop is the longest region
that ends in a branch backwards. Static counts: stalls and bank conflicts show only on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448}
"""Bytes of shared memory that one program may take; above it a kernel compiles and cannot be loaded."""

SERIALIZED = "C7511"
"""ptxas's advisory that `wgmma` instructions run one after another."""


def load_cases() -> list[dict[str, Any]]:
    """The cases of every `cases_*.py` in this folder, by file and place."""
    found: list[dict[str, Any]] = []
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        spec = importlib.util.spec_from_file_location(f"kernels_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.CASES
    return found


def statistics(case: dict[str, Any]) -> dict[str, Any]:
    """Compile one case and count.

    Returns:
        `registers`, `stack` (bytes; 0 means no spill), `shared` (bytes), `opcodes` (how often each stands in the whole
        kernel), `loop` (in the main loop), `per_weight` (None without a loop), `log` (of ptxas).
    """
    import triton

    triton.runtime.driver.set_active(_offline_driver(case["arch"]))
    with contextlib.redirect_stdout(io.StringIO()) as log:
        binary = _compile(case)
    usage = _resources(binary.asm["cubin"])
    lines, loop = main_loop(binary.asm["sass"])
    threads = 32 * case["options"].get("num_warps", 4)
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": binary.metadata.shared,
        "opcodes": Counter(_opcode(line) for line in lines),
        "loop": Counter(_opcode(line) for line in loop),
        "per_weight": len(loop) * threads / case["weights"] if case["weights"] else None,
        "log": log.getvalue(),
    }


def _compile(case: dict[str, Any]) -> Any:
    import torch
    from triton.runtime.jit import MockTensor

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtypes |= {"i8": torch.int8, "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64}
    module, _, name = case["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    arguments = {
        key: MockTensor(dtypes[value[1:]]) if isinstance(value, str) and value.startswith("*") else value
        for key, value in case["arguments"].items()
    }
    return kernel.warmup(**arguments, grid=(1,), **case["options"])


def _offline_driver(arch: int) -> Any:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class OfflineCuda(DriverBase):  # type: ignore[misc]
        """A driver that knows for which device to compile and nothing more: launching with it raises."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("no device to time on")

        def get_current_device(self) -> int:
            return arch  # kernels are cached per device

        def get_current_stream(self, device: int) -> int:
            return 0

    return OfflineCuda()


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and the like, as cuobjdump counts them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", printed)}


def main_loop(sass: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the longest region that ends in a branch backwards."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"^\s*\.?(LBB\w+|L_\w+):?\s*$", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"^[-0-9A-Fa-fY]*:.*?\t(.*)$", line.rstrip()):
            lines.append(instruction[1].strip())
    regions = [
        lines[labels[branch[1]] : place + 1]
        for place, line in enumerate(lines)
        if (branch := re.search(r"BRA\S*\s.*?(LBB\w+|L_\w+)", line)) and labels.get(branch[1], place + 1) < place
    ]
    return lines, max(regions, key=len, default=[])


def _opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].rstrip(";")


def main(wanted_file: Path, statistics_file: Path) -> None:
    """Compile the cases that the first file lists; write their statistics, or why there are none, to the second."""
    wanted = set(json.loads(wanted_file.read_text()))
    cases = [case for case in load_cases() if case["name"] in wanted]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_prepare) as pool:
        found = dict(zip([case["name"] for case in cases], pool.map(_statistics_or_error, cases), strict=True))
    statistics_file.write_text(json.dumps(found))


def _prepare() -> None:
    import triton

    warnings.simplefilter("ignore")
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True


def _statistics_or_error(case: dict[str, Any]) -> dict[str, Any]:
    try:
        return statistics(case)
    except Exception as error:  # the compiler's many kinds; one case must not hide the others
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
