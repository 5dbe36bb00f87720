"""Small networks that tell classes of 8 x 8 images apart, of the two kinds that there are: for tests, and to be copied.

They are random and in evaluation mode; the same each time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10


class Stage(nn.Module):
    """A convolution in groups over places, one of 1 x 1 over channels, batch norm behind each, and a shortcut.

    Args:
        channels: in and out.
        groups: of the first convolution.
        stride: of the first convolution.
    """

    def __init__(self, channels: tuple[int, int], groups: int, stride: int = 1) -> None:
        super().__init__()
        into, out = channels
        self.spatial = nn.Conv2d(into, into, 3, stride, padding=1, groups=groups, bias=False)
        self.spatial_norm = nn.BatchNorm2d(into)
        self.mixing = nn.Conv2d(into, out, 1, bias=False)
        self.mixing_norm = nn.BatchNorm2d(out)
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width)."""
        spatial = torch.relu(self.spatial_norm(self.spatial(x)))
        return torch.relu(self.mixing_norm(self.mixing(spatial)) + self.shortcut(x))


class Cnn(nn.Module):
    """A stem, three stages, and a linear layer over the mean of all places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.stages = nn.Sequential(Stage((16, 16), 16), Stage((16, 32), 4, stride=2), Stage((32, 32), 8))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 1, height, width)."""
        logits: Tensor = self.head(self.stages(torch.relu(self.stem(images))).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Attention of several heads over all places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, places, width)."""
        batch, places, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(batch, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        answer: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, places, width))
        return answer


class VitBlock(nn.Module):
    """Attention and a feed-forward half, each added to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, places, width)."""
        x = x + self.attention(x)
        answer: Tensor = x + self.mlp(x)
        return answer


class Vit(nn.Module):
    """Patches of 2 x 2, two blocks, and a linear layer over the mean of all places."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(VitBlock(width, 4), VitBlock(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 1, 8, 8)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x).mean(1)))
        return logits


def small_cnn() -> Cnn:
    """A random CNN whose batch norms have seen images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Cnn()
        with torch.no_grad():
            network(torch.randn(64, 1, 8, 8))
    return network.eval()


def small_vit() -> Vit:
    """A random vision transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Vit()
    return network.eval()
