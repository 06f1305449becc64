"""Configuration of a run: all sections together."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from heterodiff.config.base import Section, UserPath
from heterodiff.config.data import DataConfig
from heterodiff.config.networks import AlignmentConfig, CodecConfig, ModelConfig, TextConfig, VAEConfig
from heterodiff.config.readers import unread_problems
from heterodiff.config.sampling import SamplingConfig, SegmentationConfig
from heterodiff.config.training import DiffusionConfig, TrainingConfig
from heterodiff.lazy import loaded
from heterodiff.tasks import recipes, task_of, task_of_recipe

if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[tuple(recipes())]


class RunConfig(Section):
    """Everything that defines a run; saved as ``config.yaml`` in its folder, which is enough to repeat it."""

    recipe: RecipeName = Field(
        "diffusion",
        description="diffusion: images of classes, or without labels; adapt: its short form for a few images of each "
        "class, with a run to go on from as model.init_from; vae: autoencoder for latent diffusion; classifier: "
        "classes of noisy images, for guidance; text-image: text to image and image to text; alignment: text-image "
        "without the denoiser",
    )
    output: UserPath | None = Field(
        None, description="run folder; default: `runs/NAME` for a configuration file `NAME.yaml`"
    )
    data: DataConfig = DataConfig()
    codec: CodecConfig = CodecConfig()
    vae: VAEConfig = Field(VAEConfig(), description="autoencoder of recipe `vae`")
    text: TextConfig = Field(TextConfig(), description="text networks of recipe `text-image`")
    alignment: AlignmentConfig = Field(AlignmentConfig(), description="image codec and losses of recipe `text-image`")
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    segmentation: SegmentationConfig = Field(
        SegmentationConfig(), description="anomaly segmentation in runs with classes of healthy and unhealthy images"
    )
    training: TrainingConfig = TrainingConfig()

    @property
    def caches_latents(self) -> bool:
        """Images are encoded once, before training; not with condition images, which go with the images themselves."""
        cached = self.codec.kind != "pixels" and self.codec.cache
        return cached and self.data.source != "latents" and self.data.condition is None

    @model_validator(mode="before")
    @classmethod
    def _has_defaults_of_its_recipe(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content  # wrong types are reported as such
        defaults = task_of_recipe(content.get("recipe", "")).defaults
        return content if defaults is None else loaded(defaults)(content)

    @model_validator(mode="after")
    def _recipe_and_networks_go_together(self) -> "RunConfig":
        sections = task_of(self).sections
        with_texts = "text" in sections
        denoises_for_texts = with_texts and "model" in sections
        if denoises_for_texts != (self.codec.kind == "cnn"):
            raise ValueError(
                f"recipe {self.recipe} with codec.kind={self.codec.kind}: kind cnn is for recipe text-image, which has "
                "no other; leave codec.kind out"
            )
        if denoises_for_texts and self.alignment.joint and (self.codec.path or self.codec.training):
            raise ValueError("alignment.joint=true trains the codec too; leave codec.path and codec.training out")
        if self.codec.training is not None and self.codec.training.fsdp:
            raise ValueError("codec.training.fsdp=true: only the denoiser's weights can be split; set training.fsdp")
        if with_texts and not denoises_for_texts and self.alignment.joint:
            raise ValueError(
                f"recipe {self.recipe} trains no denoiser, which alignment.joint=true needs; set recipe=text-image"
            )
        if self.training.fsdp and self.model.train != "all":
            raise ValueError(
                f"training.fsdp=true splits networks that are trained whole, not with model.train={self.model.train}, "
                "which needs less memory anyway; leave training.fsdp out"
            )
        if self.model.variant == "film-unet" and not denoises_for_texts:
            raise ValueError("model.variant film-unet is conditioned on texts; it is for recipe text-image")
        return self

    @model_validator(mode="after")
    def _keys_are_read(self, info: ValidationInfo) -> "RunConfig":
        """Refuse keys that differ from their default though this run does not read them.

        Of the context, ``tolerated`` names keys that may; None stands for all.
        """
        if problems := unread_problems(self, (info.context or {}).get("tolerated", ())):
            raise ValueError("\n".join(problems))
        return self
