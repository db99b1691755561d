"""Training with PyTorch: timm's models, eager or through torch.compile, and a plain DataLoader loop.

bfloat16 is autocast; on a GPU the images are channels-last, the optimizer is the fused one, cuDNN's convolutions are
chosen by trial, and float32 products may be TF32, as they are in JAX.
"""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

_SIZES = ("tiny", "small", "base", "large")
_TIMM = {f"vit_{size}_patch{patch}": f"vit_{size}_patch16_224" for size in _SIZES for patch in (4, 16)}
DEVICE, PLATFORM = ("cuda", "gpu") if torch.cuda.is_available() else ("cpu", "cpu")
if PLATFORM == "gpu":
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def train_step(
    name: str,
    image_size: int,
    batch: int,
    num_classes: int,
    dtype: str,
    *,
    compiled: bool = False,
    patch_size: int = 0,
    **_,
) -> tuple[Callable[[], None], int]:
    """A call that makes one SGD step and waits for it, and the number of trained parameters."""
    import timm

    torch.manual_seed(0)
    size = {"img_size": image_size, "patch_size": patch_size} if patch_size else {}
    model = timm.create_model(_TIMM.get(name, name), num_classes=num_classes, **size)
    count = sum(parameter.numel() for parameter in model.parameters())
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=DEVICE == "cuda")
    forward = torch.compile(model) if compiled else model
    images = torch.randn(batch, 3, image_size, image_size, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, num_classes, (batch,), device=DEVICE)

    def step() -> None:
        _update(forward, optimizer, images, labels, dtype)
        _wait()

    return step, count


def _update(forward: Callable, optimizer, images: torch.Tensor, labels: torch.Tensor, dtype: str) -> None:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = nn.functional.cross_entropy(forward(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class _Augmented(Dataset):
    """Images [N, 3, H, W] uint8 with a random crop out of a frame of 4 pixels, a random flip, normalised."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean, std):
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        size = self.images.shape[-1]
        image = nn.functional.pad(self.images[index], (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = image[:, top : top + size, left : left + size]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return (image.float() / 255 - self.mean) / self.std, self.labels[index]


def epoch(
    images: np.ndarray, labels: np.ndarray, batch: int, mean, std, *, dtype: str, **fields
) -> tuple[Callable[[], None], int]:
    """A call that trains for one epoch out of a DataLoader, and the number of parameters."""
    torch.manual_seed(0)
    model = ViT(images.shape[1], int(labels.max()) + 1, **fields).to(DEVICE).train()
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=DEVICE == "cuda")
    forward = torch.compile(model) if DEVICE == "cuda" else model
    loader = DataLoader(
        _Augmented(images, labels, mean, std),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        multiprocessing_context="spawn",  # the process has JAX's threads, which a fork would break
        persistent_workers=True,
        pin_memory=DEVICE == "cuda",
    )

    def train(batches: int) -> None:
        for number, (x, y) in enumerate(loader):
            if number == batches:
                break
            x, y = x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)
            _update(forward, optimizer, x, y, dtype)
        _wait()

    train(3)
    return lambda: train(len(loader)), count


class ViT(nn.Module):
    """The plain ViT with a class token and learned positions (Dosovitskiy et al. 2021)."""

    def __init__(self, image_size, num_classes, *, patch_size, hidden_dim, depth, num_heads, mlp_dim):
        super().__init__()
        self.stem = nn.Conv2d(3, hidden_dim, patch_size, patch_size)
        self.token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch_size) ** 2 + 1, hidden_dim))
        block = nn.TransformerEncoderLayer(
            hidden_dim, num_heads, mlp_dim, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(hidden_dim, 1e-6), enable_nested_tensor=False)
        self.head = nn.Linear(hidden_dim, num_classes)

    def forward(self, images):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.positions
        return self.head(self.blocks(tokens)[:, 0])
