"""Workflows that are too large, or hold what no file can keep: a message with its place, before anything is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerwise.errors import LayerwiseError, UsageError, WorkflowError
from layerwise.pipeline.workflow import limits, load_workflow

STAGES = """\
version: 1
model: .
data:
  calibration: {text: text.txt, sequence_length: 8}
stages:
  levels: {uses: compress, with: {menu: [{method: rtn, bits: [2, 4]}]}}
  profile: {uses: profile, needs: [levels]}
  search: {uses: allocate, needs: [levels, profile], with: {solver: ilp, budgets: {bits: [3, 2.5]}}}
  best: {uses: apply, needs: [search, levels]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    return tmp_path


def said(folder: Path, text: str | bytes, **options: object) -> str:
    """What loading answers; its exit code is that of a mistake of the user's, and it names the file."""
    flow = folder / "flow.yaml"
    flow.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(LayerwiseError) as caught:
        load_workflow(flow, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    if isinstance(caught.value, WorkflowError) and not options:
        assert caught.value.mistakes
        assert all(mistake.file == str(flow) and mistake.line > 0 for mistake in caught.value.mistakes)
    return str(caught.value)


def test_the_workflow_that_the_cases_change_is_sound(folder: Path) -> None:
    (folder / "flow.yaml").write_text(STAGES, encoding="utf-8")
    assert len(load_workflow(folder / "flow.yaml").nodes) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 1", f"version: 1\nname: {'n' * 250}", "too long for a name: 250 characters, at most 100"),
        ("levels:", f"{'s' * 250}:", "too long for a name: 250 characters, at most 100"),
        ("uses: apply,", f"uses: apply, foreach: [{'i' * 250}],", "characters are too long: at most 100"),
        ("version: 1", "version: 1\nresources: {cpus: .inf}", "resources.cpus: must be a finite number"),
        ("version: 1", "version: 1\nresources: {cpus: 1e308}", "resources.cpus: must be at most 1024"),
        ("version: 1", "version: 1\nresources: {cpus: 1000000}", "resources.cpus: must be at most 1024"),
        ("version: 1", "version: 1\nresources: {gpus: .nan}", "resources.gpus: must be a finite number"),
        ("version: 1", "version: 1\nresources: {memory: 1e30}", "memory: must be at most 2^63 - 1, got the number"),
        ("version: 1", "version: 1\nresources: {memory: 99999999999TiB}", "resources.memory: must be at most"),
        ("solver: ilp,", f"solver: ilp, seed: {'9' * 40},", "a whole number of 40 digits is too long"),
        ("solver: ilp,", "solver: ilp, seed: 9223372036854775808,", "a whole number is at most 2^63 - 1"),
        ("solver: ilp,", "solver: ilp, generations: 1000000000000000000,", "must be at most 1e+06"),
        ("[search, levels]", "[search, levels], with: {pick: kne}", "'kne' fits no allocation: say knee, best"),
        ("[search, levels]", "[search, levels], with: {pick: bits=4}", "bits=3, bits=2.5"),
        ("{menu:", "{targets: ['re:(a+)+(?=b)'], menu:", "neither look-around"),
        ("model: .", "model: ~nosuch/x", "'~nosuch' is no user's home folder"),
        ("text.txt", "~nosuch/x", "'~nosuch' is no user's home folder"),
        ("version: 1", "version: 1\nextends: ~nosuch/x", "'~nosuch' is no user's home folder"),
        ("text.txt", "/dev/zero", "this is a pipe, a socket or a device"),
        ("text.txt", "a" * 300, "File name too long"),
        ("model: .", f"model: ./{'a' * 300}", "File name too long"),
        ("text.txt", '"a\\0b"', "U+0000, which ends every path, may not stand in a text"),
        ("model: .", 'model: "\\ud800"', "U+D800, half of a character, may not stand in a text"),
        ("version: 1", 'version: 1\n"x-\\udfff": 1', "U+DFFF, half of a character"),
        ("version: 1", f"version: 1\nx-a: {'[' * 200}{']' * 200}", "nested too deeply"),
        ("{menu:", f"{{ignore: {'[' * 60}{']' * 60}, menu:", "nested too deeply"),
        ("version: 1", f"version: 1\nx-a: [{'1, ' * 20_000}]", "too many values"),
        ("version: 1", f"version: 1\nx-a: {'b' * 20_000}", "a text of 20,000 characters is too long"),
        ("version: 1", "version: 1\nextends: /dev/zero", "a pipe, a socket or a device"),
        ("version: 1", "version: 1\nextends: .", "Is a directory"),
        ("uses: apply,", f"uses: apply, foreach: [{', '.join(map(str, range(600)))}],", "600 items are too many"),
        (
            "version: 1",
            f"version: 1\nx-a: &a {'[' * 30}{']' * 30}\nx-b: {'[' * 30}*a{']' * 30}",
            "aliases nest too deeply",
        ),
    ],
)  # fmt: skip
def test_what_would_crash_or_never_end_is_told_with_its_place(folder: Path, old: str, new: str, message: str) -> None:
    assert message in said(folder, STAGES.replace(old, new, 1))


def test_a_file_of_comments_alone_is_not_read_beyond_the_limit(folder: Path) -> None:
    assert f"at most {limits.MAX_BYTES:,} bytes" in said(folder, "# comment\n" * 1_000_000)


def test_pipes_and_devices_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    for path in (folder / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(UsageError, match="a pipe, a socket or a device"):
            load_workflow(path)
    assert "a pipe, a socket or a device" in said(folder, "extends: pipe.yaml\n")
    os.mkfifo(folder / "pipe.txt")
    assert "a pipe, a socket or a device" in said(folder, STAGES.replace("text.txt", "pipe.txt"))


def test_files_that_extend_each_other_without_end_are_told(folder: Path) -> None:
    for number in range(30):
        (folder / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n", encoding="utf-8")
    with pytest.raises(WorkflowError, match="more than 10 files extend each other"):
        load_workflow(folder / "0.yaml")
    (folder / "link.yaml").symlink_to("link.yaml")
    assert "cannot be read" in said(folder, "extends: link.yaml\n")


@pytest.mark.parametrize("value", ["a\0b", "\udcff", "b" * 20_000])
def test_options_are_held_to_the_same(folder: Path, value: str) -> None:
    text = "params: {what: text}\n" + STAGES
    message = "too long" if value[0] == "b" else "may not stand in"
    assert message in said(folder, text, params={"what": value})
    assert message in said(folder, text, sets=[f"description={value}"])


def test_what_expressions_unfold_to_is_counted_and_not_made(folder: Path) -> None:
    numbers = ", ".join(["1"] * 5_000)
    uses = ", ".join(['"${{ params.n }}"'] * 4_000)
    big = f"stages:\n  big: {{uses: compress, with: {{a: [{uses}]}}}}"
    text = STAGES.replace("stages:", f"params: {{n: [{numbers}]}}\n{big}")
    assert "the workflow is too large: more than 50,000 values" in said(folder, text)
    long = "${{ params.n }}" * 10
    text = STAGES.replace("stages:", f"params: {{n: {'a' * 9_000}}}\nstages:\n  big: {{uses: '{long}'}}")
    assert "a text of 90,000 characters is too long" in said(folder, text)
    items = ", ".join(map(str, range(300)))
    entries = "".join(f"  more{n}: {{uses: compress, foreach: [{items}]}}\n" for n in range(4))
    assert "more than 500 stages" in said(folder, STAGES + entries)


def test_what_a_file_holds_does_not_steer_the_terminal(folder: Path) -> None:
    found = said(folder, STAGES.replace("uses: apply", 'uses: "\\e[2J\\nok"'))
    assert "\x1b" not in found
    assert "\\x1b[2J\\nok" in found
