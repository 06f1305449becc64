"""What the test device counts, by examples that were counted by hand from CUDA's kernels."""

import torch
from torch import nn
from torch.nn import functional as F

from heterodiff.diffusion.prediction import dynamic_threshold
from tests.devices import NAME, watched
from tests.devices.counting import BLOCKING, COPY, FETCH, LAUNCH, WAIT

DEVICE = torch.device(NAME)


def test_a_training_step_counted_by_hand() -> None:
    layer = nn.Linear(4, 4).to(DEVICE)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    images = torch.ones(2, 4).pin_memory()
    for step in range(2):
        with watched() as counts:
            x = images.to(DEVICE, non_blocking=True)
            loss = F.mse_loss(layer(x), x)
            loss.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert (counts.copies, counts.blocking_copies, counts.waits) == (1, 0, 0)
        forward = {"addmm.default": 1, "mse_loss.default": 1}
        backward = {"ones_like.default": 1, "mse_loss_backward.default": 1, "mm.default": 1, "sum.dim_IntList": 1}
        norm = {"_foreach_norm.Scalar": 1, "stack.default": 1, "linalg_vector_norm.default": 1}
        factor = {"add.Tensor": 1, "reciprocal.default": 1, "mul.Tensor": 1, "clamp.default": 1}
        update = {"_foreach_mul_.Tensor": 1, "_foreach_add_.Scalar": 1, "_fused_adamw_.default": 1}
        start = {} if step else {"zeros_like.default": 4, "zero_.default": 2}  # the optimiser's state
        expected = {f"aten.{name}": n for name, n in (forward | backward | norm | factor | update | start).items()}
        assert dict(counts.operations(LAUNCH)) == expected


def test_ways_to_wait() -> None:
    x = torch.ones(2, 3, device=DEVICE)
    mask = x > 0
    waiting = {
        "item": lambda: x.sum().item(),
        "float": lambda: float(x[0, 0]),
        "condition": lambda: bool(mask.all()),
        "cpu": lambda: x.cpu(),
        "tolist": lambda: x.tolist(),
        "nonzero": lambda: mask.nonzero(),
        "mask": lambda: x[mask],
        "equal": lambda: torch.equal(x, x),
        "copy": lambda: torch.empty(2, 3).copy_(x),
        "multinomial": lambda: x.multinomial(2),
        "synchronize": lambda: torch.accelerator.synchronize(),
    }
    for name, call in waiting.items():
        with watched() as counts:
            call()
        assert counts.waits == 1, name
    with watched() as counts:
        x.masked_fill(mask, 0.0)
        x.multinomial(2, replacement=True)
        torch.where(mask, x, 0.0)
        x.to("cpu", non_blocking=True)
    assert (counts.waits, counts.total(FETCH)) == (0, 1)


def test_ways_to_copy() -> None:
    host, pinned, x = torch.ones(3), torch.ones(3).pin_memory(), torch.ones(3, device=DEVICE)
    copying = {
        "to": (1, lambda: host.to(DEVICE)),
        "tensor": (1, lambda: torch.tensor([1.0], device=DEVICE)),
        "copy_": (1, lambda: x.copy_(host)),
        "not pinned": (1, lambda: host.to(DEVICE, non_blocking=True)),
        "not asked": (1, lambda: pinned.to(DEVICE)),
        "both": (0, lambda: pinned.to(DEVICE, non_blocking=True)),
        "view of pinned": (0, lambda: pinned[1:].to(DEVICE, non_blocking=True)),
        "index": (1, lambda: x[torch.tensor([0])]),
    }
    for name, (blocking, call) in copying.items():
        with watched() as counts:
            call()
        assert (counts.copies, counts.blocking_copies) == (1, blocking), name
    with watched() as counts:
        x + torch.tensor(1.0)
        torch.full((3,), 2.0, device=DEVICE)
        x.to(torch.float64)
    assert (counts.copies, counts.launches) == (0, 3)


def test_views_and_empty_tensors_launch_nothing() -> None:
    x = torch.empty(2, 4, device=DEVICE)
    with watched() as counts:
        x.view(8).expand(3, 8).transpose(0, 1)[1:].detach().unsqueeze(0).chunk(2)
        x.new_empty(3)
        x[:0] + 1
    assert counts.launches == 0


def test_fused_attention_is_one_kernel_each_way() -> None:
    for width, kernels in ((8, 1), (9, 0)):
        query = torch.randn(1, 2, 3, width, device=DEVICE).requires_grad_()
        with watched() as counts:
            F.scaled_dot_product_attention(query, query, query).sum().backward()
        found = counts.operations(LAUNCH)
        name = "aten.scaled_dot_product_attention.default"
        assert (found[name], found[f"{name} backward"]) == (kernels, kernels)
        assert (found["aten.bmm.default"] > 0) == (kernels == 0)


def test_events_are_found_at_their_line_of_heterodiff() -> None:
    images = torch.randn(2, 1, 4, 4, device=DEVICE)
    with watched() as outer:
        with watched() as counts:
            dynamic_threshold(images, 0.9)
        images.sum().item()
    assert counts.launches > 0
    assert {line.partition(":")[0] for line in counts.lines(LAUNCH)} == {"diffusion/prediction.py"}
    assert outer.lines(WAIT)["elsewhere"] == 1
    assert outer.launches == counts.launches + 1
    assert "diffusion/prediction.py:" in outer.report()
    assert {COPY, BLOCKING} & {kind for kind, _, _ in outer.events} == set()
