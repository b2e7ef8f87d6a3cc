"""A whole train step as a CUDA graph: one launch for the model, its gradients and the optimizer.

    python docs/examples/cuda_graph.py

The learning rate is a tensor on the device. A scheduler changes it in place, and the graph reads it
at every replay.
"""

import torch
from torch import nn
from torch.nn import functional as F

from mirror_opt import MirrorDescent, maps


def main(steps: int = 200) -> list[float]:
    if not torch.cuda.is_available():
        raise SystemExit("cuda_graph.py needs a CUDA device, and there is none")
    torch.manual_seed(0)
    device = torch.device("cuda")
    x = torch.randn(512, 64, device=device)
    y = torch.randn(512, 64, device=device) @ torch.randn(64, 10, device=device) / 8
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)).to(device)
    mirror_map = maps.SeparableNeural(model.parameters())
    lr = torch.tensor(0.05, device=device)
    optimizer = MirrorDescent(model.parameters(), lr=lr, mirror_map=mirror_map, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros((), device=device)

    def train_step() -> None:
        optimizer.zero_grad()
        value = F.mse_loss(model(x), y)
        value.backward()
        optimizer.step()  # skips a step that is not finite, without asking the host
        loss.copy_(value.detach())

    # A few steps on another stream compile the kernels and make the state, as a graph needs it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train_step()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step()

    losses = []
    for _ in range(steps):
        graph.replay()
        losses.append(loss.item())
        scheduler.step()
    print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {steps} replays")
    return losses


if __name__ == "__main__":
    main()
