"""The picture shows the front, the knee, each solver and what the axes mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from layerwise.errors import UsageError
from layerwise.results.frontier import frontier_table
from layerwise.results.plot import plot_frontier
from layerwise.results.resources import RESOURCES
from layerwise.results.store import Store


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def recorded(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", recorded)
    return figures


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_the_front_the_solvers_and_the_knee_are_named(two_runs: Store, tmp_path: Path, drawn: list[Figure]) -> None:
    plot_frontier(frontier_table(two_runs, dominated=True), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert legend(drawn[0]) == ["front", "evolve", "ilp", "knee (3, 0.2)"]
    assert axes.lines[0].get_xydata().tolist() == [[2.0, 0.9], [3.0, 0.2], [4.0, 0.1]]
    assert axes.get_xlabel() == "average bits per weight"
    assert axes.get_ylabel() == "KL to the dense model (search data, nats/token)"
    assert axes.get_title(loc="left") == "run run-b"
    assert axes.get_yscale() == "linear"


def test_a_wide_range_of_losses_gets_a_logarithmic_axis(two_runs: Store, tmp_path: Path, drawn: list[Figure]) -> None:
    frame = frontier_table(two_runs)
    frame["kl"] = [1.0, 0.1, 0.01]
    plot_frontier(frame, tmp_path / "front.svg")
    frame["kl"] = [1.0, 0.1, 0.0]
    plot_frontier(frame, tmp_path / "front.svg")
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["log", "linear"]


@pytest.mark.parametrize("over", ["parameters", "flops"])
def test_every_resource_has_an_axis_that_says_what_it_is(
    two_runs: Store, tmp_path: Path, drawn: list[Figure], over: str
) -> None:
    plot_frontier(frontier_table(two_runs, over=over), tmp_path / "front.png", over=over)
    assert drawn[0].axes[0].get_xlabel() == RESOURCES[over].axis
    assert len({resource.axis for resource in RESOURCES.values()}) == len(RESOURCES)


def test_bytes_are_drawn_in_a_readable_unit(two_runs: Store, tmp_path: Path, drawn: list[Figure]) -> None:
    frame = frontier_table(two_runs, over="bytes")
    plot_frontier(frame, tmp_path / "front.png", over="bytes")
    assert drawn[0].axes[0].get_xlabel() == "stored size (KiB)"
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [2000 / 1024, 3000 / 1024, 4000 / 1024]


def test_allocations_after_a_repair_stand_where_their_bytes_are(
    two_runs: Store, tmp_path: Path, drawn: list[Figure]
) -> None:
    frame = frontier_table(two_runs, over="bytes")
    frame["repair"] = "eora-r4"
    frame["recovered_kl"] = frame["kl"] / 2
    frame["recovered_bytes"] = frame["bytes"] + 1024
    for over in ("bytes", "bits", "flops"):
        plot_frontier(frame, tmp_path / "front.png", over=over)
    found = [[line for line in figure.axes[0].lines if line.get_label() == "after eora-r4"] for figure in drawn]
    assert [len(lines) for lines in found] == [1, 1, 0], "what a repair costs in FLOPs is not known"
    x, y = found[0][0].get_xdata(), found[0][0].get_ydata()
    assert list(x) == pytest.approx([size / 1024 + 1 for size in frame["bytes"]])
    assert list(y) == list(frame["kl"] / 2)
    assert list(found[1][0].get_xdata()) == list(frame["bits"])


def test_the_dense_model_is_a_line_and_the_text_is_named(two_runs: Store, tmp_path: Path, drawn: list[Figure]) -> None:
    frame = frontier_table(two_runs).assign(heldout_perplexity=[9.0, 8.0, 7.0], heldout_data="wiki")
    plot_frontier(frame, tmp_path / "front.png", loss="heldout_perplexity", dense_losses={"heldout_perplexity": 6.5})
    assert "dense model" in legend(drawn[0])
    assert drawn[0].axes[0].get_ylabel() == "perplexity (held-out)"
    assert drawn[0].axes[0].get_title(loc="left") == "run run-b, measured on wiki"


def test_a_search_on_another_loss_says_so_on_the_axis(two_runs: Store, tmp_path: Path, drawn: list[Figure]) -> None:
    plot_frontier(frontier_table(two_runs).assign(metric="perplexity"), tmp_path / "front.png")
    assert drawn[0].axes[0].get_ylabel() == "perplexity (search data)"


def test_one_allocation_is_drawn_without_a_line_or_a_knee(two_runs: Store, tmp_path: Path, drawn: list[Figure]) -> None:
    plot_frontier(frontier_table(two_runs, solver="ilp"), tmp_path / "front.png")
    assert legend(drawn[0]) == ["ilp"]


def test_nothing_to_draw_and_no_picture_format_are_refused(two_runs: Store, tmp_path: Path) -> None:
    frame = frontier_table(two_runs)
    with pytest.raises(UsageError, match="no allocation"):
        plot_frontier(frame.iloc[:0], tmp_path / "front.png")
    with pytest.raises(UsageError, match=r"front\.docx"):
        plot_frontier(frame, tmp_path / "front.docx")
    with pytest.raises(UsageError, match="does not exist"):
        plot_frontier(frame, tmp_path / "nowhere" / "front.png")
