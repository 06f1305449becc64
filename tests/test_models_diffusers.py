"""The networks as diffusers models: pipelines, saving and loading."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from heterodiff.models.unet import HAEUNet
from heterodiff.models.variants import VARIANTS, create_model

TINY = {"in_channels": 1, "model_channels": 32, "channel_mult": (1, 2), "layers_per_block": 1}


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_diffusers_pipelines_run_unchanged(pipeline, scheduler, num_classes, tmp_path):
    model = create_model("hae-v2", sample_size=(16, 8), num_classes=num_classes, **TINY)
    torch.nn.init.normal_(model.out[2].weight, std=0.1)
    pipe = pipeline(unet=model, scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    first, again = (
        pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images for _ in range(2)
    )
    assert first.shape == (2, 16, 8, 1)
    assert np.array_equal(first, again)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("pattern", ["multiscale", "sequence"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_saving_and_loading_keeps_every_bit(variant, pattern, tmp_path):
    model = create_model(variant, num_classes=3, attention_pattern=pattern, pattern_seed=5, **TINY).eval()
    torch.nn.init.normal_(model.out[2].weight, std=0.1)
    x, y = torch.randn(2, 1, 48, 48), torch.tensor([2, -1])
    expected = model(x, 3, y).sample
    assert torch.equal(model(x, 3, y).sample, expected)
    model.save_pretrained(tmp_path)
    loaded = HAEUNet.from_pretrained(tmp_path)
    assert loaded.config.variant == variant
    assert loaded.memory_optimization == model.memory_optimization
    assert torch.equal(loaded(x, 3, y).sample, expected)
    assert torch.equal(loaded(x, 3, y, return_dict=False)[0], expected)


@pytest.mark.parametrize("pattern", ["multiscale", "sequence"])
def test_the_pattern_seed_changes_the_network(pattern):
    models = [create_model("hae", attention_pattern=pattern, pattern_seed=seed, **TINY).eval() for seed in (0, 1)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        torch.nn.init.constant_(model.out[2].weight, 0.1)
    for size in (32, 64):
        x = torch.randn(1, 1, size, size)
        assert not torch.equal(models[0](x, 3).sample, models[1](x, 3).sample)


def test_diffusers_loads_half_precision(tmp_path):
    create_model("hae-v2", **TINY).save_pretrained(tmp_path)
    loaded = HAEUNet.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded(torch.randn(1, 1, 8, 8), 3).sample.dtype == torch.bfloat16
