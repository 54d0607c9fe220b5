"""Train the demo's teacher on two thirds of scikit-learn's digits: ``python -m adadfq.demo.train_teacher OUT``.

Takes about a minute on two cores. Prints the accuracy on the third it never saw.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from adadfq.checkpoint import write_state_dict
from adadfq.demo.digits import WEIGHTS, DigitsNet, accuracy, load_images

EPOCHS, BATCH = 60, 64


def _shifted(images: Tensor) -> Tensor:
    """Each batch moved by up to one pixel: the digits are few."""
    dx, dy = (int(v) for v in torch.randint(-1, 2, (2,)))
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    return padded[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]


def train(seed: int = 0) -> DigitsNet:
    """The trained teacher, in eval mode."""
    torch.manual_seed(seed)
    images, labels = load_images(held_out=False)
    net = DigitsNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(net(_shifted(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


if __name__ == "__main__":
    teacher = train()
    print(f"held-out accuracy: {accuracy(teacher, *load_images(held_out=True)):.2f} %")
    write_state_dict(sys.argv[1] if len(sys.argv) > 1 else WEIGHTS, teacher.state_dict())
