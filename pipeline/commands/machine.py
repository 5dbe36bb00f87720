"""Commands about this machine: `bench`, `doctor`."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import typer

from layerwise.pipeline.commands.options import RESULTS, STOPPED, TO_READ, FormatOption, ResultsOption
from layerwise.pipeline.commands.printing import print_table


def bench(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="what computes")] = "cpu",
    shapes: Annotated[
        list[str] | None, typer.Option(metavar="OUTxIN", help="weights, e.g. 4096x4096,11008x4096")
    ] = None,
    m: Annotated[list[str] | None, typer.Option("--m", metavar="ROWS", help="rows of activations, e.g. 1,16")] = None,
    bits: Annotated[list[str] | None, typer.Option(metavar="BITS", help="of the codes, e.g. 4,8")] = None,
    group_size: Annotated[
        list[str] | None, typer.Option(metavar="COLUMNS", help="that share a scale, e.g. 128,-1 (-1 for the whole row)")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of the activations; float32 on a processor, float16 on a GPU if left out")
    ] = None,
    samples: Annotated[int, typer.Option(min=3, help="of each time; their median counts")] = 9,
    window_ms: Annotated[float, typer.Option(min=0.01, help="CPU time of one sample at least")] = 60.0,
    max_spread: Annotated[
        float, typer.Option(min=0.001, help="(median - minimum) / minimum above which times are refused")
    ] = 0.1,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="also save the table of times, as JSON whatever --format says"
        ),
    ] = None,
    format_: FormatOption = "table",
) -> None:
    """Time the kernels on this device, beside the dense product; `ratio` is how many times faster they are."""
    from layerwise.errors import NoisyMeasurement
    from layerwise.kernels.timing import Sampling
    from layerwise.pipeline import bench as benchmark
    from layerwise.pipeline.display import Pace, left

    if output is not None:
        benchmark.check_output(output)
    pace = Pace()

    def tell(done: int, total: int, note: str) -> None:
        if done < total:
            print(f"{done} of {total}: {note}{left(pace.remaining(done, total, ''))}", file=sys.stderr, flush=True)

    task = benchmark.Bench(
        shapes=benchmark.read_shapes(shapes or []) or benchmark.SHAPES,
        rows=benchmark.read_numbers(m or [], "rows") or benchmark.ROWS,
        bits=benchmark.read_numbers(bits or [], "bits") or benchmark.BITS,
        group_sizes=benchmark.read_numbers(group_size or [], "group size") or benchmark.GROUP_SIZES,
        device=device,
        dtype=dtype,
        sampling=Sampling(window_ms, samples, max_spread=max_spread),
    )
    for note in task.notes():
        print(f"note: {note}", file=sys.stderr)
    noisy: NoisyMeasurement | None = None
    stopped = False
    try:
        task.run(tell)
    except NoisyMeasurement as error:
        noisy = error
    except KeyboardInterrupt:
        stopped = True
        print(f"\nstopped after {len(task.measured)} times; they follow", file=sys.stderr)
    frame = task.frame()
    if format_ in TO_READ:
        print(f"device: {task.here.name}\n")
        frame = frame.drop(columns="device")
    print_table(frame, format_)
    if output is not None:
        task.save(output)
        print(f"wrote {output}", file=sys.stderr)
    if noisy is not None:
        raise noisy
    if stopped:
        raise typer.Exit(STOPPED)


def doctor(
    results: ResultsOption = RESULTS,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="also check the cluster there, e.g. http://127.0.0.1:8265")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--read-all", help="also read every file in the results folder and compare checksums")
    ] = False,
    format_: Annotated[Literal["table", "json"], typer.Option("--format", help="how to print the findings")] = "table",
) -> None:
    """Check what layerwise needs: versions, Ray, this machine, the results folder, a cluster."""
    from layerwise.pipeline.doctor import as_json, as_line, examine, read_all

    findings = []
    for name, finding in chain(examine(results, address), read_all(results) if everything else ()):
        findings.append((name, finding))
        if format_ == "table":
            print(as_line(name, finding), flush=True)
    if format_ == "json":
        print(as_json(findings))
    if any(finding.state == "problem" for _, finding in findings):
        raise typer.Exit(1)
