"""Ten thousand broken workflow files: each is valid or answered with file, line and column, soon, and with exit code 2.

    python benchmarks/mutated_workflows.py      # writes benchmarks/results/mutated_workflows.md

Every file of `workflows/` is changed at random, in one to three of the ways of `MUTATIONS`, and loaded in this process,
as `layerwise validate` does it. Seconds are those of the processor: they do not hang on what else the machine does.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import header

from layerwise.errors import Mistake, WorkflowError
from layerwise.pipeline.workflow import load_workflow

HERE = Path(__file__).parent
WORKFLOWS = HERE.parent / "workflows"
BOUND = 2.0
"""Seconds for one file."""

TOKEN = re.compile(r"[\w.%/-]+|[^\w\s]")
SCALARS = (
    *("null", "true", "[]", "{}", '""', "0", "-1", "1.5", "1e3", "1e308", "1e400", ".inf", "-.inf", ".nan", "~", "no"),
    *("10000000", "9223372036854775808", "9" * 40, "9" * 5000, "0x" + "f" * 90, "-0", "2:4", "600KB", "1e30"),
    *("99999TiB", "re:(a+)+$", "'re:['", "'re:(?=a)'", "~nosuch/x", "/dev/zero", "/dev/tty", ".", "..", "/"),
    *("'${{ params.x }}'", "'${{ item }}'", "'${{ needs.x }}'", "'${{'", "a" * 300, "b" * 20_000, "[[[]]]"),
    *("{a: {b: c}}", "!!int x", "!!python/name:os.system", "!!binary aGk=", "*missing", "&anchor 1", "<<", "|"),
    *("> folded", "2024-01-01"),
)
LETTERS = (
    *('"\\0"', '"\\ud800"', '"\\e[2J"', '"\\a"', "\ufeff", "\u2028", "\u202e", "\u0000", "é", "ﬁ", "٣", "😀"),
    *("\x85", "\t", "\r"),
)
KEYS = ("uses", "needs", "with", "foreach", "resources", "device", "inputs", "extends", "params", "profiles", "name")
TOPS = (
    *("resources: {cpus: 1e308}", "resources: {cpus: .inf, gpus: -1, memory: 1e30}", "extends: /dev/zero"),
    *("extends: {}", "extends: flow.yaml", "name: " + "n" * 300, "params: {x: [1, {y: 2}]}"),
    *("profiles: {x: {stages: {}}}", "device: tpu", "data: []", "stages: 3", "version: 2", "x-a: &a [1, 2]"),
    *("x-b: *a", "? [a]\n: b", "---", "...", "%YAML 1.1", "- a"),
)


def flipped_bytes(text: str, rng: random.Random) -> bytes:
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice((1, 1, 2, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _tokens(text: str) -> list[re.Match[str]]:
    return list(TOKEN.finditer(text)) or [re.match("", text)]  # type: ignore[list-item]


def _replaced(text: str, match: re.Match[str], new: str) -> str:
    return text[: match.start()] + new + text[match.end() :]


def swapped_tokens(text: str, rng: random.Random) -> str:
    first, second = sorted(rng.choices(_tokens(text), k=2), key=lambda match: match.start())
    if first.end() > second.start():
        return text
    between = text[first.end() : second.start()]
    return text[: first.start()] + second[0] + between + first[0] + text[second.end() :]


def other_value(text: str, rng: random.Random) -> str:
    return _replaced(text, rng.choice(_tokens(text)), rng.choice(SCALARS))


def other_key(text: str, rng: random.Random) -> str:
    keys = list(re.finditer(r"[\w-]+(?=:)", text))
    return _replaced(text, rng.choice(keys), rng.choice(KEYS)) if keys else text


def odd_letter(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(LETTERS) + text[place:]


def nested(text: str, rng: random.Random) -> str:
    depth = rng.choice((2, 30, 60, 200, 3000))
    opening, closing = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("[", "")))
    return _replaced(text, rng.choice(_tokens(text)), opening * depth + "1" + closing * depth)


def long_list(text: str, rng: random.Random) -> str:
    values = rng.choice((100, 3_000, 330_000))
    item = rng.choice(("1, ", "a, ", "{b: 1}, ", '"${{ params.x }}", '))
    return _replaced(text, rng.choice(_tokens(text)), "[" + item * values + "]")


def changed_lines(text: str, rng: random.Random) -> str:
    lines = text.splitlines() or [""]
    place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(5)
    if how == 0:
        del lines[place]
    elif how == 1:
        lines.insert(other, lines[place])
    elif how == 2:
        lines[place], lines[other] = lines[other], lines[place]
    elif how == 3:
        lines[place] = " " * rng.randrange(1, 5) + lines[place]
    else:
        lines[place] = lines[place][rng.randrange(1, 5) :]
    return "\n".join(lines) + "\n"


def other_top(text: str, rng: random.Random) -> str:
    lines = text.splitlines()
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(TOPS))
    return "\n".join(lines) + "\n"


def cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def comments(text: str, rng: random.Random) -> str:
    return "# comment\n" * rng.choice((10, 5_000, 1_000_000)) + text


def unrolled(text: str, rng: random.Random) -> str:
    """A stage many times, or one that takes everything that a parameter holds."""
    count = rng.choice((3, 300, 2_000))
    foreach = "[" + ", ".join(f"{{name: n{n}}}" for n in range(count)) + "]"
    return re.sub(r"\{uses:", f"{{foreach: {foreach}, uses:", text, count=rng.choice((1, 3)))


MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (
    *(swapped_tokens, other_value, other_key, odd_letter, changed_lines, other_top) * 3,
    *(nested, cut, unrolled) * 2,
    *(long_list, comments),
)
"""The cheap ones more often than those that make large files."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Args:
        kinds: how it was changed.
        answer: `valid`, `mistakes`, or what is wrong with the answer.
        seconds: of the processor.
    """

    kinds: tuple[str, ...]
    answer: str
    seconds: float
    content: bytes

    @property
    def wrong(self) -> bool:
        """Whether it is not as it should be."""
        return self.answer not in ("valid", "mistakes") or self.seconds > BOUND


def mutated(texts: Sequence[str], rng: random.Random) -> tuple[tuple[str, ...], bytes]:
    """One broken file and what was done to it."""
    text, kinds = rng.choice(texts), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = rng.choice(MUTATIONS)
        kinds.append(change.__name__)
        text = change(text, rng)
    if rng.random() < 0.15 and text:
        return (*kinds, flipped_bytes.__name__), flipped_bytes(text, rng)
    return tuple(kinds), text.encode("utf-8", "surrogatepass")


def judged(path: Path) -> str:
    """How loading a file ends, in the words of `Outcome.answer`."""
    try:
        load_workflow(path)
    except WorkflowError as error:
        wrong = next(filter(None, map(_unusable, error.mistakes)), None)
        listed = [str(mistake) for mistake in error.mistakes] == str(error).splitlines()[: len(error.mistakes)]
        fine = error.mistakes and listed and error.exit_code == 2
        return wrong or (
            "mistakes" if fine else f"exit code {error.exit_code}, {len(error.mistakes)} mistakes: {error}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "valid"


def _unusable(mistake: Mistake) -> str | None:
    """What is wrong with a message: it has no place or no words, or what a terminal would obey."""
    if mistake.line < 1 or mistake.column < 1 or not mistake.file or not mistake.text.strip():
        return f"without a place or words: {mistake!r}"
    return None if str(mistake).isprintable() else f"not to be printed: {mistake!r}"


def outcomes(count: int, seed: int, folder: Path) -> Iterator[Outcome]:
    """Break, load and judge `count` files in a folder."""
    (folder / "demo").symlink_to(WORKFLOWS / "demo", target_is_directory=True)
    texts = [path.read_text(encoding="utf-8") for path in sorted(WORKFLOWS.glob("*.yaml"))]
    rng = random.Random(seed)
    path = folder / "flow.yaml"
    for _ in range(count):
        kinds, content = mutated(texts, rng)
        path.write_bytes(content)
        started = time.process_time()
        answer = judged(path)
        yield Outcome(kinds, answer, time.process_time() - started, content)


def main() -> None:
    """Break, load, count, and write the table."""
    parser = argparse.ArgumentParser(description="load broken workflow files")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)

    arguments = parser.parse_args()
    made, slowest, answers = Counter[str](), dict[str, float](), dict[str, Counter[str]]()
    with tempfile.TemporaryDirectory() as scratch:
        for outcome in outcomes(arguments.count, arguments.seed, Path(scratch)):
            for kind in set(outcome.kinds):
                made[kind] += 1
                slowest[kind] = max(slowest.get(kind, 0.0), outcome.seconds)
                answers.setdefault(kind, Counter())["wrong" if outcome.wrong else outcome.answer] += 1
            answers.setdefault("all", Counter())["wrong" if outcome.wrong else outcome.answer] += 1
            slowest["all"] = max(slowest.get("all", 0.0), outcome.seconds)
            if outcome.wrong:
                print(f"{outcome.seconds:.2f} s {outcome.kinds} {outcome.answer[:300]}", flush=True)
    made["all"] = arguments.count
    lines = [
        "# Broken workflow files",
        "",
        *header("mutated_workflows.py", ["layerwise", "PyYAML", "pydantic"]),
        f"- every file of `workflows/`, changed in one to three ways; bound: {BOUND:g} s of processor time for each",
        "",
        "| change | files | valid | file:line:column, exit code 2 | wrong | slowest s |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sorted(made, key=lambda kind: (kind == "all", kind)):
        found = answers[kind]
        figures = [found[name] for name in ("valid", "mistakes", "wrong")]
        cells = [kind.replace("_", " "), *(f"{n:,}" for n in (made[kind], *figures)), f"{slowest[kind]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "mutated_workflows.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
