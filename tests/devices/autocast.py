"""Mixed precision on the test device: the operations that CUDA's autocast casts, cast alike.

The lists are those of torch's documentation, "CUDA Ops that can autocast to float16" and its neighbours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from tests.devices.names import NAME, is_on_device

LOW_PRECISION = (
    "conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "linear", "matmul", "mm", "mv", "bmm", "addmm",
    "addmv", "addr", "addbmm", "baddbmm", "einsum", "prelu", "linalg_vecdot", "linalg_multi_dot", "chain_matmul",
    "scaled_dot_product_attention",
)  # fmt: skip

FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "cosine_similarity", "logsumexp", "renorm", "dist", "cdist", "pdist", "nll_loss", "nll_loss2d",
    "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "soft_margin_loss",
    "triplet_margin_loss", "cosine_embedding_loss", "binary_cross_entropy_with_logits", "hinge_embedding_loss",
    "poisson_nll_loss", "multi_margin_loss", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "upsample_trilinear3d",
)  # fmt: skip

# The result's type is asked for, instead of an argument cast: one kernel less.
FLOAT32_RESULT = (
    "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod", "prod.dim_int", "cumsum", "cumprod",
    "linalg_vector_norm", "linalg_matrix_norm", "norm.Scalar", "norm.ScalarOpt_dim",
)  # fmt: skip

WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put", "tensordot", "scatter_add",
    "cat", "stack",
)  # fmt: skip

_KEY = "AutocastPrivateUse1"
_cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a weight is cast once in a block of autocast


def _eligible(value: Any) -> bool:
    return is_on_device(value) and value.is_floating_point() and value.dtype != torch.float64


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(part, dtype) for part in value)
    if not _eligible(value) or value.dtype == dtype:
        return value
    weight = value.is_leaf and value.requires_grad and value.dtype == torch.float32 and not value._is_view()
    if not (weight and dtype != torch.float32 and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    if id(value) not in _cache:
        _cache[id(value)] = (value, value.to(dtype))
    return _cache[id(value)][1]


def _low(args: Any, kwargs: Any) -> tuple[Any, Any]:
    dtype = torch.get_autocast_dtype(NAME)
    return _cast(args, dtype), {name: _cast(value, dtype) for name, value in kwargs.items()}


def _float32(args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast(args, torch.float32), {name: _cast(value, torch.float32) for name, value in kwargs.items()}


def _widest(args: Any, kwargs: Any) -> tuple[Any, Any]:
    values = [
        value for part in (*args, *kwargs.values()) for value in (part if isinstance(part, (list, tuple)) else [part])
    ]
    wide = any(_eligible(value) and value.dtype == torch.float32 for value in values)
    return _float32(args, kwargs) if wide else (args, kwargs)


def _float32_result(func: OpOverload) -> Callable[[Any, Any], tuple[Any, Any]]:
    names = [argument.name for argument in func._schema.arguments]

    def change(args: Any, kwargs: Any) -> tuple[Any, Any]:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not (_eligible(args[0]) and given.get("dtype") is None and args[0].dtype != torch.float32):
            return args, kwargs
        if "dtype" not in names:
            return _float32(args, kwargs)
        place = names.index("dtype")
        if place < len(args):
            return (*args[:place], torch.float32, *args[place + 1 :]), kwargs
        return args, kwargs | {"dtype": torch.float32}

    return change


def teach_autocast(library: torch.library.Library) -> None:
    """Register the lists; everything else runs as it is."""
    kinds = [(LOW_PRECISION, lambda _: _low), (FLOAT32, lambda _: _float32), (WIDEST, lambda _: _widest)]
    for names, policy in [*kinds, (FLOAT32_RESULT, _float32_result)]:
        for name in names:
            base, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, base), overload or "default")
            library.impl(name, _casting(func, policy(func)), _KEY)
    forget = torch.clear_autocast_cache

    def clear_autocast_cache() -> None:
        _cache.clear()
        forget()

    torch.clear_autocast_cache = clear_autocast_cache


def _casting(func: OpOverload, change: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[..., Any]:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = change(args, kwargs)
            return func(*args, **kwargs)

    return run
