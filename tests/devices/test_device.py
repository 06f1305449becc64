"""The test device itself, against the CPU: the same numbers, CUDA's refusals."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.devices import NAME, memory, watched

DEVICE = torch.device(NAME)


def network() -> nn.Module:
    """Convolution, normalisation, dropout, attention and a linear layer: 3x8x8 images to 5 numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(64, 4, 16, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(8 * 64, 5),
    )


def trained(device: torch.device, recompute: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps, and the weights after them."""
    model = network().to(device=device, memory_format=torch.channels_last)
    # A large epsilon: the gradient of the keys' biases is rounding alone.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.tensor([0, 1, 2, 3], device=device)
    losses = []
    torch.manual_seed(2)
    for _ in range(3):
        out = checkpoint(model, images, use_reentrant=False) if recompute else model(images)
        loss = F.cross_entropy(out, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_training_gives_the_numbers_of_the_cpu(recompute: bool) -> None:
    losses, weights = trained(DEVICE, recompute)
    expected, expected_weights = trained(torch.device("cpu"), recompute)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-5, msg=name)


def test_modules_move_with_their_parameters_and_copies_are_their_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    first = model[0].weight
    model.to(DEVICE)
    assert model[0].weight is first is model[1].weight
    assert first.device == torch.device(NAME, 0)
    clone = copy.deepcopy(model)
    assert clone[0].weight is clone[1].weight
    with torch.no_grad():
        clone[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0
    assert isinstance(clone[0].weight, nn.Parameter)
    model.cpu()
    assert model[0].weight.numpy(force=True).shape == (2, 2)


def test_tensors_that_change_their_shape_in_place() -> None:
    x = torch.arange(6, device=DEVICE).reshape(2, 3)
    x.t_()
    assert x.shape == (3, 2)
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]]
    view = x[1:]
    view.fill_(7)
    assert x.tolist() == [[0, 3], [7, 7], [7, 7]]
    out = torch.empty(0, device=DEVICE)
    torch.add(torch.ones(3, device=DEVICE), 1.0, out=out.resize_(3))
    assert out.tolist() == [2.0, 2.0, 2.0]


REFUSED = {
    "two devices": lambda x: x + torch.ones(3),
    "a CPU number to concatenate": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "a result for the CPU": lambda x: torch.zeros(()).add_(x.sum()),
    "a layer of the CPU": lambda x: nn.Linear(3, 3)(x),
    "an index on the device into the CPU": lambda x: torch.ones(3)[x.long()],
    "a loss with labels of the CPU": lambda x: F.cross_entropy(x[None], torch.tensor([1])),
    "attention to the CPU": lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 1, 3)] * 2, torch.ones(1, 1, 1, 3)),
    "a foreach factor of the CPU": lambda x: torch._foreach_mul_([x], torch.tensor(2.0)),
    "the device's generator on the CPU": lambda x: torch.randn(3, generator=torch.Generator(DEVICE)),
    "the CPU's generator on the device": lambda x: torch.randn(3, generator=torch.Generator(), device=DEVICE),
    "the CPU's generator in place": lambda x: x.normal_(generator=torch.Generator()),
    "a permutation by the CPU's generator": lambda x: torch.randperm(3, generator=torch.Generator(), device=DEVICE),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "pinned memory of the device": lambda x: x.pin_memory(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cuda_refuses(case: str) -> None:
    x = torch.ones(3, device=DEVICE)
    with pytest.raises((RuntimeError, TypeError), match=r"same device|device type|can't convert|cannot pin"):
        REFUSED[case](x)


ACCEPTED = {
    "a CPU number": lambda x: x + torch.tensor(2.0),
    "a CPU number to fill with": lambda x: torch.where(x > 0, x, torch.tensor(2.0)),
    "indices on the CPU": lambda x: x[torch.tensor([2, 0])],
    "a copy": lambda x: x.copy_(torch.ones(3)),
    "the device's generator": lambda x: x.normal_(generator=torch.Generator(DEVICE)),
    "numpy by force": lambda x: torch.from_numpy(x.numpy(force=True)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts_what_cuda_accepts(case: str) -> None:
    assert ACCEPTED[case](torch.ones(3, device=DEVICE)).numel() > 0


def test_generators_have_states_of_their_own_and_the_numbers_of_the_cpu() -> None:
    first, second = torch.Generator(DEVICE).manual_seed(1), torch.Generator(device=DEVICE).manual_seed(2)
    expected, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    assert first.device.type == NAME
    assert expected.device.type == "cpu"
    for _ in range(2):
        assert torch.rand(3, generator=first, device=DEVICE).tolist() == torch.rand(3, generator=expected).tolist()
        assert torch.rand(3, generator=second, device=DEVICE).tolist() == torch.rand(3, generator=other).tolist()
    state = first.get_state()
    once = torch.randperm(9, generator=first, device=DEVICE).tolist()
    first.set_state(state)
    assert torch.randperm(9, generator=first, device=DEVICE).tolist() == once
    assert isinstance(torch.default_generator, torch.Generator)


def test_the_default_generator_is_not_that_of_the_cpu() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2).tolist(), torch.rand(2).tolist()
    torch.manual_seed(3)
    with torch.random.fork_rng():
        assert torch.rand(2, device=DEVICE).tolist() == expected[0]
    assert torch.rand(2).tolist() == expected[0]
    assert torch.rand(2, device=DEVICE).tolist() == expected[0]  # forked: drawn again
    assert torch.rand(2, device=DEVICE).tolist() == expected[1]


def test_knows_torch_accelerator() -> None:
    accelerator = torch.accelerator
    assert accelerator.current_accelerator(check_available=True) == torch.device(NAME)
    assert accelerator.device_count() == 1
    before = accelerator.memory_allocated()
    x = torch.zeros(1000, device=DEVICE)
    view = x[:10]
    assert accelerator.memory_allocated() - before == 4000
    free, total = torch.get_device_module(NAME).mem_get_info()
    assert free == total - accelerator.memory_allocated()
    del x, view
    assert accelerator.memory_allocated() == before


def test_runs_out_of_memory_when_asked_to() -> None:
    x = torch.ones(3, device=DEVICE)
    with memory.out_of_memory(after=1):
        y = x + 1
        with pytest.raises(torch.OutOfMemoryError):
            y + 1
        assert (y + 1).tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_pin_their_batches(workers: int) -> None:
    loader = DataLoader(torch.arange(6.0), batch_size=3, pin_memory=True, num_workers=workers)  # type: ignore[arg-type]
    with watched() as counts:
        batches = [batch.to(DEVICE, non_blocking=batch.is_pinned()) for batch in loader]
    assert [batch.tolist() for batch in batches] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert (counts.copies, counts.blocking_copies, counts.waits) == (2, 0, 0)
