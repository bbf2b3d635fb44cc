"""The nets of `_nets.py` in PyTorch, with the same number of parameters."""

import torch
from torch import nn

CLASSES = 10


def dense(shape, units=2048):
    rows, columns, channels = shape
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(rows * columns * channels, units), nn.ReLU()),
        *(nn.Linear(units, units), nn.ReLU()),
        nn.Linear(units, CLASSES),
    )


def conv(shape):
    stack, before = [], shape[-1]
    for filters, strides in [(16, 1), (32, 2), (32, 1), (64, 2)]:
        stack.append(nn.Conv2d(before, filters, 3, strides, padding=1))
        stack.append(nn.ReLU())
        before = filters
    # Two strides, each of which rounds up.
    rows, columns = ((side + 3) // 4 for side in shape[:2])
    dense = nn.Linear(rows * columns * before, CLASSES)
    return nn.Sequential(*stack, nn.Flatten(), dense)


def resnet(shape, width=16, depth=3):
    channels = shape[-1]
    blocks = [_convolution(channels, width, 1), nn.ReLU()]
    before = width
    for i in range(depth):
        blocks.append(Residual(before, width * 2**i, 1 if i == 0 else 2))
        before = width * 2**i
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*blocks, *pool, nn.Linear(before, CLASSES))


def _convolution(before, filters, strides):
    return nn.Sequential(
        nn.Conv2d(before, filters, 3, strides, padding=1, bias=False),
        nn.BatchNorm2d(filters),
    )


class Residual(nn.Module):
    """Two convolutions, added to the input or a projection of it."""

    def __init__(self, before, filters, strides):
        super().__init__()
        self.convolutions = nn.Sequential(
            _convolution(before, filters, strides),
            nn.ReLU(),
            _convolution(filters, filters, 1),
        )
        self.shortcut = nn.Identity()
        if before != filters or strides > 1:
            self.shortcut = nn.Conv2d(before, filters, 1, strides)

    def forward(self, x):
        return torch.relu(self.convolutions(x) + self.shortcut(x))


class ViT(nn.Module):
    """Pre-norm blocks over patches."""

    def __init__(self, shape, dim=48, heads=4, depth=2):
        super().__init__()
        patch = max(2, shape[0] // 7)
        self.patches = nn.Conv2d(shape[-1], dim, patch, patch)
        count = (shape[0] // patch) * (shape[1] // patch)
        self.position = nn.Parameter(0.02 * torch.randn(count, dim))
        self.blocks = nn.Sequential(
            *(Block(dim, heads) for _ in range(depth)), nn.LayerNorm(dim)
        )
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x):
        patches = self.patches(4 * x - 1).flatten(2).transpose(1, 2)
        return self.head(self.blocks(patches + self.position).mean(1))


class Block(nn.Module):
    """Attention and a perceptron, each added to its input."""

    def __init__(self, dim, heads):
        super().__init__()
        self.before_attention = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * dim),
            nn.GELU(),
            nn.Linear(2 * dim, dim),
        )

    def forward(self, x):
        normalized = self.before_attention(x)
        attended, _ = self.attention(
            *(normalized, normalized, normalized), need_weights=False
        )
        x = x + attended
        return x + self.perceptron(x)


vit = ViT
