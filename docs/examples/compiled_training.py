"""torch.compile of a whole train step: the model's graph and the optimizer's.

    python docs/examples/compiled_training.py

The learning rate is a tensor: a scheduler changes it in place, and nothing is compiled again.
"""

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from mirror_opt import MirrorDescent, maps


def main(steps: int = 200, backend: str = "inductor") -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    y = torch.randn(512, 64) @ torch.randn(64, 10) / 8
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    mirror_map = maps.SeparableNeural(model.parameters())
    optimizer = MirrorDescent(
        model.parameters(), lr=torch.tensor(0.05), mirror_map=mirror_map, momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    @torch.compile(backend=backend)
    def train_step(x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    before = counters["stats"]["unique_graphs"]
    losses = []
    for _ in range(steps):
        losses.append(train_step(x, y).item())
        scheduler.step()
    graphs = counters["stats"]["unique_graphs"] - before
    print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {steps} steps, {graphs} graphs")
    return losses


if __name__ == "__main__":
    main()
