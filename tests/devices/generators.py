"""Random numbers of the test device: generators of its own, which draw the numbers that the CPU's would draw."""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.devices.names import NAME, is_on_device

CpuGenerator = torch.Generator  # torch's own class, before ours takes its place


_ours: set[int] = set()  # addresses of the device's generators: dispatch hands them over as other Python objects


class _LikeTorch(type(CpuGenerator)):  # type: ignore[misc]
    """Makes ``isinstance(x, torch.Generator)`` true for the generators that torch made itself."""

    def __instancecheck__(cls, instance: object) -> bool:
        return type.__instancecheck__(CpuGenerator, instance)


class Generator(CpuGenerator, metaclass=_LikeTorch):
    """``torch.Generator`` that knows the test device; its numbers come from a CPU generator with a state of its own."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        kind = str(device).partition(":")[0]
        made: Generator = super().__new__(cls, "cpu" if kind == NAME else device)
        if kind == NAME:
            _ours.add(made._cdata)
            weakref.finalize(made, _ours.discard, made._cdata)
        return made

    @property
    def device(self) -> torch.device:
        return device_of(self)

    def clone_state(self) -> "Generator":
        clone = Generator(self.device)
        clone.set_state(self.get_state())
        return clone


default = Generator(NAME)


def device_of(generator: CpuGenerator) -> torch.device:
    """The device that ``generator`` draws for."""
    return torch.device(NAME, 0) if generator._cdata in _ours else CpuGenerator.device.__get__(generator)


@contextmanager
def drawing_from_default() -> Iterator[None]:
    """Let operations on CPU tensors draw from the device's default generator instead of the CPU's."""
    cpu = torch.default_generator
    kept = cpu.get_state()
    cpu.set_state(default.get_state())
    try:
        yield
    finally:
        default.set_state(cpu.get_state())
        cpu.set_state(kept)


def check_generator(generator: object, on_device: bool) -> None:
    """Refuse a generator of another device than the one that is drawn on, as CUDA does."""
    if isinstance(generator, CpuGenerator):
        wanted, found = (NAME if on_device else "cpu"), device_of(generator).type
        if wanted != found:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")


FUNCTIONS = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson")
METHODS = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "bernoulli", "multinomial")


def refuse_on_cpu() -> None:
    """Let torch's random functions refuse to draw on the CPU with a generator of the device.

    Operations on the device check their generator themselves; these never come there.
    """
    for owner, names in ((torch, FUNCTIONS), (torch.Tensor, METHODS)):
        for name in names:
            setattr(owner, name, _checked(getattr(owner, name)))
    torch.Generator = Generator  # type: ignore[misc]


def _checked(draw: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(draw)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is not None:
            device = kwargs.get("device")
            on_device = any(map(is_on_device, args)) if device is None else torch.device(device).type == NAME
            check_generator(kwargs["generator"], on_device)
        return draw(*args, **kwargs)

    return checked
