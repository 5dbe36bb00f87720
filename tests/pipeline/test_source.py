"""What makes a digest of code differ, and what does not; where its modules are found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import layerwise
from layerwise.pipeline import source
from layerwise.pipeline.source import PACKAGES, source_digest, source_modules

METHOD = '''\
"""A method."""
from typing import TYPE_CHECKING

from lw_plugin.parts import twice  # the other half

if TYPE_CHECKING:
    from lw_plugin.words import WORDS

TABLE = {"one": "lw_plugin.one:make"}


def run(context, params):
    """Double it."""
    from . import late

    return late.shift(twice(params), 3)
'''
FILES = {
    "__init__.py": "VERSION = 1\n",
    "method.py": METHOD,
    "parts.py": "import json\n\n\ndef twice(value):\n    return 2 * value\n",
    "late.py": "from .deeper.offset import OFFSET\n\n\ndef shift(value, by):\n    return value + by + OFFSET\n",
    "deeper/__init__.py": "",
    "deeper/offset.py": "OFFSET = 1\n",
    "words.py": "WORDS = []\n",
    "one.py": "def make(): ...\n",
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of another package, which is not imported."""
    folder = tmp_path / "lw_plugin"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield folder
    forget()


def forget() -> None:
    for function in (source._read, source._file, source._digest):
        function.cache_clear()


def digest_after(folder: Path, name: str, change: Callable[[str], str]) -> str:
    path = folder / name
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    forget()
    return source_digest("lw_plugin.method")


def test_it_covers_what_is_imported_however_deep_and_nothing_is_imported_for_it(plugin: Path) -> None:
    assert source_modules("lw_plugin.method") == [
        "lw_plugin.deeper.offset",
        "lw_plugin.late",
        "lw_plugin.method",
        "lw_plugin.parts",
    ]
    assert not [name for name in sys.modules if name.startswith("lw_plugin")]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("method.py", "twice(params), 3", "twice(params), 4"),
        ("method.py", "3)", "3.0)"),
        ("parts.py", "2 * value", "value * 2"),
        ("deeper/offset.py", "1", "True"),
    ],
)
def test_other_code_gives_another_digest(plugin: Path, name: str, old: str, new: str) -> None:
    before = source_digest("lw_plugin.method")
    assert digest_after(plugin, name, lambda text: text.replace(old, new)) != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("method.py", "Double it.", "Double it, and more."),
        ("method.py", '    """Double it."""\n', ""),
        ("method.py", "  # the other half", ""),
        ("method.py", "twice(params), 3", "\n        twice( params ),\n        3,\n    "),
        ("method.py", '"lw_plugin.one:make"}', '"lw_plugin.one:make", "two": "lw_plugin.two:make"}'),
        ("words.py", "[]", "[1]"),
        ("one.py", "...", "return 1"),
    ],
)
def test_the_same_code_written_otherwise_gives_the_same(plugin: Path, name: str, old: str, new: str) -> None:
    before = source_digest("lw_plugin.method")
    assert digest_after(plugin, name, lambda text: text.replace(old, new)) == before


def test_a_module_that_is_named_counts_as_one_that_is_imported(plugin: Path) -> None:
    before = source_digest("lw_plugin.method", "lw_plugin.one")
    assert before != source_digest("lw_plugin.method")
    assert before == source_digest("lw_plugin.one", "lw_plugin.method")
    (plugin / "one.py").write_text("def make():\n    return 1\n")
    forget()
    assert source_digest("lw_plugin.method", "lw_plugin.one") != before


def test_a_function_stands_for_its_module_also_half_bound() -> None:
    here = source_digest(__name__)
    assert source_digest(digest_after) == source_digest(partial(digest_after, Path())) == here


def test_a_program_has_the_digest_of_the_module_that_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from layerwise.pipeline.source import source_digest\ndef run(): ...\n"
    (tmp_path / "lw_program.py").write_text(code + "if __name__ == '__main__': print(source_digest(run))\n")
    done = subprocess.run([sys.executable, tmp_path / "lw_program.py"], capture_output=True, text=True, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert done.stdout.strip() == source_digest("lw_program")


def test_a_table_of_kernels_leads_to_every_one_and_the_pipeline_is_left_out() -> None:
    found = source_modules("layerwise.stages.latency.stage")
    assert {"layerwise.kernels.triton_backends", "layerwise.kernels.quantized"} <= set(found)
    assert all(name.startswith(PACKAGES) for name in found)
    assert "layerwise.solvers._evolve" in source_modules("layerwise.stages.allocate.stage")


def test_a_copy_without_symlinks_has_the_digest_of_the_checkout(tmp_path: Path) -> None:
    shutil.copytree(Path(layerwise.__file__ or "").parent, tmp_path / "layerwise")
    names = ["layerwise.stages.compress.stage", "layerwise.stages.compress.gptq"]
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom layerwise.pipeline import source\n"
    script += f"print(source.__file__, source.source_digest(*{names!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
    copy = tmp_path / "layerwise" / "pipeline" / "source.py"
    assert done.stdout == f"{copy} {source_digest(*names)} False\n"
