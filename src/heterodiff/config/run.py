"""All sections together."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from heterodiff.config.base import Section
from heterodiff.config.data import DataConfig
from heterodiff.config.networks import AlignmentConfig, CodecConfig, ModelConfig, TextConfig, VAEConfig
from heterodiff.config.readers import unread_problems
from heterodiff.config.sampling import SamplingConfig, SegmentationConfig
from heterodiff.config.training import DiffusionConfig, TrainingConfig
from heterodiff.models.defaults import FILM_CHANNEL_MULT, FILM_MODEL_CHANNELS
from heterodiff.tasks import recipes

if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[tuple(recipes())]


class RunConfig(Section):
    """Everything that defines a run; saved as ``config.yaml`` in its folder, which is enough to repeat it."""

    recipe: RecipeName = Field(
        "diffusion",
        description="diffusion: images of classes, or without labels; vae: the autoencoder of latents; text-image: "
        "text to image and back; alignment: its first half alone, all but the denoiser",
    )
    output: Path | None = Field(
        None, description="run folder; default: `runs/NAME` for a configuration file `NAME.yaml`"
    )
    data: DataConfig = DataConfig()
    codec: CodecConfig = CodecConfig()
    vae: VAEConfig = Field(VAEConfig(), description="the autoencoder of recipe `vae`")
    text: TextConfig = Field(TextConfig(), description="text networks of recipe `text-image`")
    alignment: AlignmentConfig = Field(AlignmentConfig(), description="image codec and losses of recipe `text-image`")
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    segmentation: SegmentationConfig = Field(
        SegmentationConfig(), description="of runs whose classes are healthy and unhealthy images"
    )
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_text_image(cls, content: Any) -> Any:
        """The codec and denoiser of recipe `text-image` where the user names none."""
        if not isinstance(content, dict) or content.get("recipe") != "text-image":
            return content
        sections = {name: content.get(name) or {} for name in ("codec", "model", "alignment", "training")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return content  # wrong types are reported as such
        codec: dict[str, Any] = {"kind": "cnn"}
        if not sections["alignment"].get("joint") and sections["codec"].get("path") is None:
            output = content.get("output") or "runs/text-image"
            codec |= {"path": f"{output}/alignment", "training": sections["training"]}
        model = {"variant": "film-unet", "model_channels": FILM_MODEL_CHANNELS, "channel_mult": FILM_CHANNEL_MULT}
        if sections["model"].get("variant", "film-unet") != "film-unet":
            model = {}
        given = {name: value for name, value in sections["codec"].items() if (name, value) != ("path", None)}
        return content | {"codec": codec | given, "model": model | sections["model"]}

    @model_validator(mode="after")
    def _recipe_and_codec_go_together(self) -> "RunConfig":
        with_text = self.recipe == "text-image"
        if with_text != (self.codec.kind == "cnn"):
            raise ValueError(
                f"recipe {self.recipe} with codec.kind={self.codec.kind}: kind cnn is for recipe text-image, which has "
                "no other; leave codec.kind out"
            )
        if with_text and self.alignment.joint and (self.codec.path or self.codec.training):
            raise ValueError("alignment.joint=true trains the codec too; leave codec.path and codec.training out")
        if self.recipe == "alignment" and self.alignment.joint:
            raise ValueError(
                "recipe alignment trains no denoiser, so alignment.joint=true has none to join; set recipe=text-image"
            )
        if self.model.variant == "film-unet" and not with_text:
            raise ValueError("model.variant film-unet is steered by texts; it is for recipe text-image")
        return self

    @model_validator(mode="after")
    def _keys_are_read(self, info: ValidationInfo) -> "RunConfig":
        """Refuse keys that differ from their default though this run does not read them.

        Of the context, ``tolerated`` names keys that may; None stands for all.
        """
        if problems := unread_problems(self, (info.context or {}).get("tolerated", ())):
            raise ValueError("\n".join(problems))
        return self
