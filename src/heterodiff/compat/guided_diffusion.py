"""Drop-in network classes with the names, arguments and call signature of earlier guided-diffusion code.

    model = HAEUNetModelV2(image_size=128, in_channels=4, model_channels=128, out_channels=4, num_res_blocks=2,
                           attention_resolutions=(8, 16), num_classes=2, num_heads=4)
    model.load_state_dict(state_dict)                    # an earlier one, strict
    eps = model(x, timesteps, y, clf_free=True)          # a tensor

New code uses ``heterodiff.create_model``; a checkpoint file becomes a folder for it with
``heterodiff.compat.importing.import_checkpoint``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from heterodiff.compat.inference import is_by_scale
from heterodiff.compat.names import current_names
from heterodiff.errors import ConfigError
from heterodiff.models.conditioning import drop_condition
from heterodiff.models.unet import HAEUNet

NO_THRESHOLD = -1


class EarlierNetwork(HAEUNet):
    """A :class:`heterodiff.models.unet.HAEUNet` with the arguments and the call of the earlier networks.

    Args:
        image_size, num_res_blocks: ``sample_size`` and ``layers_per_block`` of :class:`HAEUNet`.
        in_channels, model_channels, out_channels, attention_resolutions (downsampling factors), dropout,
            channel_mult, conv_resample, dims, num_classes, use_checkpoint, num_heads, use_scale_shift_norm,
            resblock_updown, use_hae, bottleneck_ratio, memory_optimization, zero_threshold: as there. The two
            sequences may be texts, as on the command line of guided-diffusion: ``channel_mult="1,2,4"``, and
            ``attention_resolutions="16,8"``, which are sides of maps in pixels.
        num_head_channels, num_heads_upsample: as there; -1 means not given.
        use_fp16: compute under autocast, in float16 on accelerators and bfloat16 on CPUs; weights stay float32.
        use_new_attention_order: only False; the weights of these networks are in the legacy order.
        clf_free: True: class embedding through an MLP and condition tokens; False: one table of the block
            embedding's width and no condition tokens (OpenAI's class-conditional networks).
        activation: activation of the norms; default: that of the class's earlier checkpoints.
        attention_pattern, sparsity, max_keys, pattern_seed: as in :class:`HAEUNet`; the default pattern is the
            earlier ``sequence``.

    Raises:
        ConfigError: an argument that no network can be built from. Unknown arguments raise TypeError.

    Source: Dhariwal & Nichol 2021 (ADM) for the U-Net and its argument names.
    """

    variant: ClassVar[str]
    default_activation: ClassVar[str] = "silu"

    @register_to_config
    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int] | str,
        dropout: float = 0.0,
        channel_mult: Sequence[int | float] | str = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int | None = -1,
        num_heads_upsample: int | None = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        clf_free: bool = True,
        use_hae: bool = True,
        bottleneck_ratio: float = 0.25,
        memory_optimization: bool | None = None,
        zero_threshold: float = 1e-6,
        activation: str | None = None,
        attention_pattern: str = "sequence",
        sparsity: float = 0.9,
        max_keys: int = 1024,
        pattern_seed: int = 0,
    ):
        if isinstance(channel_mult, str):
            channel_mult = _numbers("channel_mult", channel_mult)
        if isinstance(attention_resolutions, str):
            attention_resolutions = _factors(attention_resolutions, image_size)
        if use_new_attention_order:
            raise ConfigError(
                "use_new_attention_order=True: these networks hold their weights in the legacy order; import such a "
                "checkpoint with `heterodiff import CHECKPOINT --format guided-diffusion use_new_attention_order=true`"
            )
        arguments = {name: value for name, value in locals().items() if name not in _NOT_PASSED_ON}
        arguments["activation"] = activation or self.default_activation
        if not clf_free:
            arguments |= {"class_embedding": "direct", "condition_tokens": False}
        super().__init__(variant=self.variant, **current_names(arguments))
        self.use_fp16 = use_fp16
        self.register_load_state_dict_pre_hook(_drop_unused_token_weights)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        threshold: float = NO_THRESHOLD,
        null: bool = False,
        clf_free: bool = False,
    ) -> Tensor:
        """Predict from noisy images.

        Args:
            x: (B, in_channels, H, W).
            timesteps: (B,).
            y: (B,) class labels; not needed with ``null``.
            threshold: > 0: training; each label is dropped with this probability (drawn from torch's global
                generator, as before). -1: no dropping.
            null: predict without a condition.
            clf_free: accepted and ignored; with it, as without it, the condition is ``y``, or none if ``null``.

        Returns:
            (B, out_channels, H, W), a plain tensor.

        Raises:
            ConfigError: a threshold outside (0, 1] other than -1, or a class-conditional network called with
                neither ``y`` nor ``null``; and what :meth:`HAEUNet.forward` refuses.
        """
        if threshold != NO_THRESHOLD and not 0 < threshold <= 1:
            raise ConfigError(f"threshold: expected a probability in (0, 1], or -1 for no dropping, found {threshold}")
        if self.config.num_classes is not None:
            y = _labels(y, threshold, null)
        low = torch.bfloat16 if x.device.type == "cpu" else torch.float16
        with torch.autocast(x.device.type, low, enabled=self.use_fp16):
            return super().forward(x, timesteps, y, return_dict=False)[0].to(x.dtype)


def _labels(y: Tensor | None, threshold: float, null: bool) -> Tensor | None:
    training = threshold != NO_THRESHOLD
    if null and training:
        raise ConfigError(f"null=True and threshold={threshold}: null is for sampling; leave one of them out")
    if null:
        return None
    if y is None:
        raise ConfigError(
            "this network is class-conditional: pass the labels y, or null=True (with clf_free=True) "
            "for a prediction without a condition"
        )
    if y.is_floating_point() or y.is_complex():
        raise ConfigError(f"y: expected integers, found {y.dtype}")
    return drop_condition(y.long(), threshold) if training else y.long()


def _factors(sides: str, image_size: int | tuple[int, int]) -> list[int]:
    """Downsampling factors of maps with these ``sides`` in pixels; larger ones than the whole are never reached."""
    whole = image_size if isinstance(image_size, int) else max(image_size)
    return [whole // int(side) for side in _numbers("attention_resolutions", sides) if 1 <= side <= whole]


def _numbers(name: str, text: str) -> tuple[int | float, ...]:
    """Read ``1,2,4``; raises ConfigError for anything else."""
    try:
        return tuple(float(part) if "." in part else int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{name}={text!r}: expected numbers such as '1,2,4'") from None


_NOT_PASSED_ON = ("self", "__class__", "use_fp16", "use_new_attention_order", "clf_free")


def _drop_unused_token_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Earlier networks without classes stored an ``encoder_kv`` in each attention block and never applied it."""
    if isinstance(module, HAEUNet) and module.config.num_classes is None:
        for name in [name for name in state_dict if name.startswith(prefix) and ".encoder_kv." in name]:
            del state_dict[name]


class UNetModel(EarlierNetwork):
    """The plain U-Net; its earlier norms ignored their activation."""

    variant = "unet"
    default_activation = "identity"


class HAEUNetModel(EarlierNetwork):
    """``hae``; its earlier norms ignored their activation."""

    variant = "hae"
    default_activation = "identity"


class HAEUNetModelLite(EarlierNetwork):
    """``hae-lite``."""

    variant = "hae-lite"


class HAEUNetModelV2(EarlierNetwork):
    """``hae-v2``."""

    variant = "hae-v2"


class HAEUNetModelV2Conservative(EarlierNetwork):
    """``hae-v2-conservative``, or the published network of this name, ``hae-v2-conservative-public``.

    Which one is read from the weights that are loaded. The networks have different parameters, so make optimisers
    after loading.
    """

    variant = "hae-v2-conservative"

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights, of the published network too; otherwise as of ``torch.nn.Module``."""
        published = is_by_scale(state_dict)
        variant = "hae-v2-conservative-public" if published else "hae-v2-conservative"
        if variant != self.config.variant and (published or any(".transformer_branch." in name for name in state_dict)):
            self._become(variant)
        return super().load_state_dict(state_dict, *args, **kwargs)
