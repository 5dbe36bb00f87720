"""How long sequences may be is the model's to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import DataError
from layerwise.stages.models.positions import length_for

CONFIGS: list[tuple[Any, int | None]] = [
    ({"max_position_embeddings": 512}, 512),
    ({"n_positions": 1024, "n_ctx": 1024}, 1024),
    ({"max_seq_len": 4096}, 4096),
    ({"text_config": {"max_position_embeddings": 64}, "vision_config": {"max_position_embeddings": 9}}, 64),
    ({"hidden_size": 8}, None),
    ({"max_position_embeddings": None}, None),
    (["no", "object"], None),
]


@pytest.mark.parametrize(("config", "most"), CONFIGS)
def test_the_length_follows_the_model_and_never_exceeds_it(config: Any, most: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert length_for("heldout", None, tmp_path) == min(2048, most or 2048)
    assert length_for("heldout", 60, tmp_path) == 60
    if most is None:
        assert length_for("heldout", 10**6, tmp_path) == 10**6
    else:
        assert length_for("heldout", most, tmp_path) == most
        with pytest.raises(DataError, match=rf"data.heldout: sequences of {most + 1} tokens, .* at most {most} "):
            length_for("heldout", most + 1, tmp_path)
