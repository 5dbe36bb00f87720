"""The bits of sequences against integers of Python, and the codebook against its published formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.kernels.trellis_code import SIGMA, Tiles, ends, new_bits, pack, states, values


def published_value(state: int) -> float:
    """Algorithm 1 of QTIP, arXiv:2406.11235, before its scale."""
    x = (34038481 * state + 76625530) % 2**32
    return sum(x.to_bytes(4, "little")) - 510


@pytest.mark.parametrize("state_bits", [10, 16])
def test_the_codebook_is_the_published_one_and_exact_in_half_precision(state_bits: int) -> None:
    found = values(state_bits)
    assert found.tolist() == [published_value(state) / 128 for state in range(2**state_bits)]
    assert torch.equal(found.half().float(), found)
    assert found.std().item() == pytest.approx(SIGMA, rel=0.02)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.125, 3, 3.75, 4])
@pytest.mark.parametrize(("length", "state_bits"), [(256, 16), (256, 10), (251, 12), (17, 13), (12, 12)])
def test_a_state_is_the_run_of_bits_of_the_circle_that_ends_with_its_weights(
    bits: float, length: int, state_bits: int
) -> None:
    circle = ends(length, bits)[-1]
    assert circle == np.ceil(length * bits)
    assert sum(new_bits(length, bits)) == circle
    generator = torch.Generator().manual_seed(length)
    stream = torch.randint(0, 2, (3, circle), generator=generator)
    expected = torch.zeros((3, length), dtype=torch.int64)
    for t in range(length):
        end = int(np.ceil((t + 1) * bits))
        for bit in range(state_bits):
            expected[:, t] |= stream[:, (end - state_bits + bit) % circle] << bit
    sequences = pack(expected, bits, state_bits)
    in_bytes = np.packbits(stream.numpy().astype(np.uint8), axis=1, bitorder="little")
    assert sequences.numpy().tolist() == in_bytes.tolist()
    assert torch.equal(states(sequences, length, bits, state_bits).long(), expected)


@pytest.mark.parametrize("shape", [(32, 64), (172, 64), (64, 172), (5, 7), (1, 300), (300, 1)])
@pytest.mark.parametrize("width", [1, 6, 16, 256])
@pytest.mark.parametrize("bits", [1, 2.5, 4])
def test_tiles_hold_every_weight_once_and_waste_little(shape: tuple[int, int], width: int, bits: float) -> None:
    tiles = Tiles(*shape, width, bits, 12)
    weight = torch.arange(1, 1 + shape[0] * shape[1]).view(shape)
    covered = []
    for band in tiles.bands():
        assert bits * band.length >= 12
        part = weight[:, band.first : band.last]
        cut = band.cut(part)
        assert cut.shape == (band.length, band.sequences)
        assert int((cut == 0).sum()) < max(band.sequences, 12)  # filled up
        assert torch.equal(band.join(cut.T, shape[0]), part.float())
        covered += range(band.first, band.last)
    assert covered == list(range(shape[1]))


def test_a_weight_of_whole_tiles_takes_its_bits_and_nothing_else() -> None:
    for bits in (1, 1.5, 2, 2.125, 3, 4):
        bands = list(Tiles(64, 48, 16, bits, 16).bands())
        assert 8 * sum(band.sequences * band.size_bytes for band in bands) == 64 * 48 * bits
        assert {band.length for band in bands} == {256}
