"""Facts about torch's operations that CUDA's behaviour depends on: kernels, waits, random numbers, CPU arguments."""

from dataclasses import dataclass
from functools import cache

import torch
from torch._ops import OpOverload

# The size of the result, or a number for the host, is known only when the device has finished.
WAITS = (
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc", "_linalg_check_errors", "_assert_tensor_metadata",
)  # fmt: skip

WAITING_OVERLOADS = ("repeat_interleave.Tensor", "tensor_split.tensor_indices_or_sections")

# Memory is named or handed out; nothing is computed. Views are known by their schema.
NO_KERNEL = (
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "lift_fresh", "detach",
    "alias", "_unsafe_view", "_reshape_alias", "resize_", "resize_as_", "set_", "is_same_size", "_local_scalar_dense",
    "is_pinned", "_has_compatible_shallow_copy_type", "_nested_tensor_from_mask_left_aligned",
    "record_stream",
)  # fmt: skip

INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")

# Beside pointwise operations, these take a number that lies in a 0-dim CPU tensor.
TAKES_CPU_NUMBERS = ("where", "masked_fill", "masked_fill_", "fill", "fill_", "index_fill", "index_fill_", *INDEXING)

# Forward kernels that are not deterministic on CUDA, see torch.use_deterministic_algorithms; multinomial adds up
# probabilities. Those of backward passes are missing: an error in autograd's thread would end the process.
NOT_DETERMINISTIC = ("cumsum", "multinomial", "nll_loss2d_forward", "histc", "put_")


@dataclass(frozen=True)
class Operation:
    """One overload of one operation.

    Attributes:
        name: as ``aten.addmm.default``.
        launches: whether a kernel runs.
        waits: whether the host waits for the result.
        draws: whether random numbers are drawn.
        indexes: whether CPU tensors may stand as indices.
        deterministic: whether CUDA has a deterministic kernel.
        takes_cpu_numbers: whether 0-dim CPU tensors may stand among the device's.
        reshapes: whether a tensor that is written to may change its shape.
        written: for each result the argument's position or name that it is written into, or None.
        writes: positions or names of all arguments that are written to.
    """

    name: str
    launches: bool
    waits: bool
    draws: bool
    indexes: bool
    deterministic: bool
    takes_cpu_numbers: bool
    reshapes: bool
    written: tuple[int | str | None, ...]
    writes: tuple[int | str, ...]


@cache
def describe(func: OpOverload) -> Operation:
    """Return the facts about ``func``."""
    base = func._schema.name.removeprefix("aten::")
    into: dict[str, int | str] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            place = argument.name if argument.kwarg_only else position
            into |= dict.fromkeys(argument.alias_info.before_set, place)
    written = tuple(
        next((into[name] for name in value.alias_info.before_set if name in into), None)
        if value.alias_info is not None and value.alias_info.is_write
        else None
        for value in func._schema.returns
    )
    same_numbers = func.is_view or torch.Tag.inplace_view in func.tags or func.namespace == "prim"
    pointwise = torch.Tag.pointwise in func.tags and not base.startswith("_foreach")
    has_out = any(isinstance(place, str) for place in into.values())
    return Operation(
        name=str(func),
        launches=not (same_numbers or base in NO_KERNEL),
        waits=base in WAITS or str(func).removeprefix("aten.") in WAITING_OVERLOADS,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        indexes=base in INDEXING,
        deterministic=base not in NOT_DETERMINISTIC,
        takes_cpu_numbers=pointwise or base in TAKES_CPU_NUMBERS,
        reshapes=has_out or torch.Tag.inplace_view in func.tags or base.startswith(("resize", "set_")),
        written=written,
        writes=tuple(dict.fromkeys(into.values())),
    )
