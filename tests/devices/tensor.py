"""Tensors of the test device: each wraps a CPU tensor, on which the operations that torch dispatches are computed."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch._ops import OpOverload

from tests.devices import memory
from tests.devices.counting import BLOCKING, COPY, FETCH, LAUNCH, WAIT, record
from tests.devices.generators import CpuGenerator, check_generator, drawing_from_default
from tests.devices.names import NAME
from tests.devices.operations import Operation, describe
from tests.devices.pinned import is_pinned, mark_pinned

aten = torch.ops.aten


class DeviceTensor(torch.Tensor):
    """A tensor on ``twin:0``. ``raw``, a CPU tensor, holds its numbers; views share the memory of theirs."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "DeviceTensor":
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        record(WAIT, "repr")
        return f"{self.raw!r} on {NAME}:0"

    @property  # type: ignore[misc]
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: "DeviceTensor") -> None:
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.raw = new.raw

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        record(WAIT, "tolist")
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host first."
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError(f"tensors on {NAME}:0 are not shared with other libraries")

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceTensor":
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only leaves of a graph can be copied deeply")
        copy = DeviceTensor(self.raw.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy.requires_grad_(self.requires_grad)
        if self.grad is not None:
            copy.grad = self.grad.__deepcopy__(memo)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        record(WAIT, "pickle")
        return _unpickled, (self.raw, self.requires_grad)


def _unpickled(raw: torch.Tensor, requires_grad: bool) -> DeviceTensor:
    return DeviceTensor(raw).requires_grad_(requires_grad)


def to_raw(value: Any) -> Any:
    """The CPU tensors behind ``value``: an argument of an operation, maybe a list."""
    if isinstance(value, DeviceTensor):
        return value.raw
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_raw, value))
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _to_device(value: Any, given: dict[int, DeviceTensor]) -> Any:
    """Results as tensors of the device; a CPU tensor that came in goes out as the tensor that held it."""
    if isinstance(value, torch.Tensor):
        return given[id(value)] if id(value) in given else DeviceTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(part, given) for part in value)
    return value


def dispatch(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation with at least one tensor of the device among its arguments."""
    special = SPECIAL.get(func)
    if special is not None:
        return special(func, *args, **kwargs)
    operation = describe(func)
    if torch.is_inference_mode_enabled() and func not in KEPT_WHOLE and func._can_decompose():
        return func.decompose(*args, **kwargs)  # outside inference mode torch has done so before
    if not operation.deterministic and torch.are_deterministic_algorithms_enabled():
        _refuse_floats(operation, args)
    given: dict[int, DeviceTensor] = {}
    strangers: list[torch.Tensor] = []
    raw_args = _unwrap(args, given, strangers)
    raw_kwargs = {name: _unwrap(value, given, strangers) for name, value in kwargs.items()}
    if strangers:
        _check_devices(operation, args, kwargs, strangers)
    device = raw_kwargs.get("device")
    if device is not None:
        raw_kwargs["device"] = torch.device("cpu")
    run = _draw if operation.draws else compute
    out = run(func, raw_args, raw_kwargs)
    _count(operation, args, out, given)
    if operation.waits and not isinstance(out, (torch.Tensor, tuple, list)):
        return out
    if device is not None and torch.device(device).type != NAME:
        return out
    return _results(operation, args, kwargs, _to_device(out, given))


def _unwrap(value: Any, given: dict[int, DeviceTensor], strangers: list[torch.Tensor]) -> Any:
    """:func:`to_raw`; notes the tensors of the device by the ids of their CPU tensors, and those of the CPU."""
    if isinstance(value, DeviceTensor):
        raw = value.raw
        given[id(raw)] = value
        return raw
    if type(value) in (list, tuple):
        return type(value)([_unwrap(part, given, strangers) for part in value])
    if isinstance(value, torch.Tensor):
        strangers.append(value)
    return value


def _refuse_floats(operation: Operation, args: Any) -> None:
    if any(tensor.is_floating_point() for tensor in _tensors(args)):
        raise RuntimeError(f"{operation.name} does not have a deterministic implementation")


def _draw(func: OpOverload, args: Any, kwargs: Any) -> Any:
    generator = next((value for value in (*args, *kwargs.values()) if isinstance(value, CpuGenerator)), None)
    check_generator(generator, on_device=True)
    with drawing_from_default() if generator is None else nullcontext():
        return compute(func, args, kwargs)


def _check_devices(operation: Operation, args: Any, kwargs: Any, strangers: list[torch.Tensor]) -> None:
    """Refuse CPU tensors among those of the device, but for the few that CUDA takes too."""
    indices = list(_tensors(args[1])) if operation.indexes else []
    for stranger in strangers:
        if any(stranger is index for index in indices):
            record(COPY, operation.name)
            record(BLOCKING, operation.name)
            continue
        places = [args[p] if isinstance(p, int) else kwargs.get(p) for p in operation.writes]
        written = any(stranger is target for target in _tensors(places))
        if written or stranger.dim() > 0 or not operation.takes_cpu_numbers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                f"{stranger.device}! ({operation.name}, tensor of shape {tuple(stranger.shape)})"
            )


def _count(operation: Operation, args: Any, out: Any, given: dict[int, DeviceTensor]) -> None:
    masks = operation.indexes and any(t.dtype == torch.bool for t in list(given.values())[1:])
    if operation.waits or masks or (operation.name == MULTINOMIAL and (args[1] == 1 or True not in args[2:3])):
        record(WAIT, operation.name)
    empty = isinstance(out, torch.Tensor) and out.numel() == 0
    if operation.launches and not empty:
        record(LAUNCH, operation.name)


def _results(operation: Operation, args: Any, kwargs: Any, out: Any) -> Any:
    """Results that were written into an argument are that argument; its shape may have changed."""
    targets = [None if p is None else args[p] if isinstance(p, int) else kwargs.get(p) for p in operation.written]
    if operation.reshapes:
        for place in operation.writes:
            for target in _tensors(args[place] if isinstance(place, int) else kwargs.get(place)):
                if isinstance(target, DeviceTensor) and _shape(target) != _shape(target.raw):
                    target.data = DeviceTensor(target.raw)
    if not any(target is not None for target in targets):
        return out
    if len(targets) == 1:
        return targets[0]
    return tuple(value if target is None else target for value, target in zip(out, targets, strict=True))


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


MULTINOMIAL = "aten.multinomial.default"  # waits to check its weights, unless several are drawn with replacement
HALVES = (torch.float16, torch.bfloat16)


def compute(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """Run ``func`` on CPU tensors; in float32 where the CPU has no kernel of 16 bits for it, as CUDA has."""
    memory.allocate()
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        halves = [t.dtype for t in _tensors([*args, *kwargs.values()]) if t.dtype in HALVES]
        if not halves or "not implemented for" not in str(error) or describe(func).writes:
            raise
    out = func(*_cast(args, HALVES, torch.float32), **_cast(kwargs, HALVES, torch.float32))
    return _cast(out, (torch.float32,), halves[0])


def _cast(value: Any, found: tuple[torch.dtype, ...], wanted: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(wanted) if value.dtype in found else value
    if isinstance(value, dict):
        return {name: _cast(part, found, wanted) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(part, found, wanted) for part in value)
    return wanted if isinstance(value, torch.dtype) and value in found else value


# ---- copies between memories ------------------------------------------------------------------------------------


def _to_copy(func: OpOverload, tensor: torch.Tensor, *, device: Any = None, non_blocking: bool = False, **kwargs: Any):
    """``tensor.to``: another type, layout or device."""
    kwargs.pop("pin_memory", None)
    out = compute(func, (to_raw(tensor),), kwargs)
    if device is None or torch.device(device).type == NAME:
        _record_copy(func, to_device=True, source=tensor, non_blocking=non_blocking)
        return DeviceTensor(out)
    record(FETCH if non_blocking else WAIT, str(func))
    return mark_pinned(out) if non_blocking else out


def copy(func: OpOverload, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """``target.copy_(source)`` between and within memories."""
    if isinstance(target, DeviceTensor):
        _record_copy(func, to_device=True, source=source, non_blocking=non_blocking)
    else:
        record(FETCH if non_blocking and is_pinned(target) else WAIT, str(func))
    compute(aten.copy_.default, (to_raw(target), to_raw(source)), {})
    return target


def _record_copy(func: OpOverload, to_device: bool, source: torch.Tensor, non_blocking: bool) -> None:
    if isinstance(source, DeviceTensor):
        record(LAUNCH, str(func))
        return
    record(COPY, str(func))
    if not (non_blocking and is_pinned(source)):
        record(BLOCKING, str(func))


SPECIAL = {aten._to_copy.default: _to_copy, aten.copy_.default: copy}
KEPT_WHOLE = (aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default)
