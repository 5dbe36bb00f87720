"""Two small networks that read handwritten digits, and the digits: a module as a workflow names one.

The digits are scikit-learn's (1,797 images of 8 x 8, `pip install scikit-learn`), three quarters of them for training
and calibration, the rest held out. The weights beside this file were trained by

    python workflows/vision/digits.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerwise.testing.networks import Cnn, Vit

HERE = Path(__file__).parent
EPOCHS, BATCH, LEARNING_RATE = 30, 64, 3e-3
TRAINING = 1347
"""Images of the training part; the other 450 are held out."""


def cnn() -> nn.Module:
    """A convolutional network with grouped and 1 x 1 convolutions and batch norm."""
    return _with_weights(Cnn(), HERE / "cnn.safetensors")


def vit() -> nn.Module:
    """A vision transformer of two blocks."""
    return _with_weights(Vit(), HERE / "vit.safetensors")


def training() -> tuple[Tensor, Tensor]:
    """Images (entries, 1, 8, 8) and digits (entries,) to train and calibrate on."""
    images, digits = _digits()
    return images[:TRAINING], digits[:TRAINING]


def heldout() -> tuple[Tensor, Tensor]:
    """The same, to report on."""
    images, digits = _digits()
    return images[TRAINING:], digits[TRAINING:]


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(data.target)[order]


def _with_weights(network: nn.Module, file: Path) -> nn.Module:
    network.load_state_dict(load_file(file))
    return network


def train(network: nn.Module, epochs: int = EPOCHS, seed: int = 0) -> nn.Module:
    """Train a network on the training part, by Adam with a learning rate that falls to nothing."""
    images, digits = training()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    steps = epochs * -(-len(images) // BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), digits[batch]).backward()
            optimizer.step()
            falling.step()
    return network.eval()


def accuracy(network: nn.Module) -> float:
    """Share of the held-out digits that a network reads."""
    images, digits = heldout()
    with torch.no_grad():
        return float((network(images).argmax(1) == digits).double().mean())


if __name__ == "__main__":
    for name, make in (("cnn", Cnn), ("vit", Vit)):
        torch.manual_seed(0)
        made = train(make())
        save_file(made.state_dict(), HERE / f"{name}.safetensors")
        weights = sum(parameter.numel() for parameter in made.parameters())
        print(f"{name}: {weights:,} weights, {accuracy(made):.1%} of the held-out digits")
