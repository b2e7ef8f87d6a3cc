"""A whole train step as one CUDA graph: forward, backward and the mirror step, replayed.

    python docs/examples/cuda_graph.py

A graph repeats the same kernels on the same memory. So a batch is copied to where the captured one
was, the learning rate is a tensor on the device that a scheduler changes in place, and some steps
are taken before capturing, which create the optimizer's state and compile kernels.
"""

import torch
from torch import nn
from torch.nn import functional as F

from mirror_opt import MirrorDescent, maps


def main(steps: int = 200, warm_up: int = 3) -> list[float]:
    if not torch.cuda.is_available():
        raise SystemExit("cuda_graph.py needs a CUDA device, and there is none")
    device = torch.device("cuda")
    torch.manual_seed(0)
    truth = torch.randn(64, 10, device=device) / 8
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)).to(device)
    mirror_map = maps.SeparableNeural(model.parameters())
    lr = torch.tensor(0.05, device=device)
    optimizer = MirrorDescent(model.parameters(), lr, mirror_map, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x = torch.randn(512, 64, device=device)
    y = x @ truth

    def train_step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            train_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step()

    losses = []
    for _ in range(steps):
        x.copy_(torch.randn_like(x))
        y.copy_(x @ truth)
        graph.replay()
        losses.append(loss.clone())
        scheduler.step()
    print(f"loss {losses[0].item():.4f} to {losses[-1].item():.4f} in {steps} replays")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
