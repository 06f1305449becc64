"""Recipes `alignment` and `text-image`: what an earlier design got wrong cannot happen, and no stop changes a run."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import heterodiff as hd
from heterodiff.codecs.cnn import CNNCodec, ImageCodec, load_image_codec
from heterodiff.config import RunConfig
from heterodiff.config.file import dump_config, load_config, parse_config
from heterodiff.data.sources import LoadedData, load_data
from heterodiff.diffusion.objective import DiffusionObjective
from heterodiff.errors import CheckpointError, ConfigError, DataError, HeterodiffError, RunError
from heterodiff.models.blocks import ResBlock
from heterodiff.models.variants import VARIANTS, create_model, list_models
from heterodiff.pipelines import text_to_image as sampling
from heterodiff.pipelines.text_to_image import predict
from heterodiff.text.tokenizer import encode_texts, train_tokenizer
from heterodiff.training.build import build_recipe
from heterodiff.training.checkpoints.checkpoint import list_checkpoints, read_checkpoint
from heterodiff.training.loop import CHECKPOINTS, Trainer
from heterodiff.training.preflight.memory_plan import advice, training_memory_bytes
from heterodiff.training.preflight.trial import dry_run
from heterodiff.training.recipes import alignment_networks
from heterodiff.training.recipes import text_image as training
from heterodiff.training.recipes.text_image import JointRecipe, TextImageRecipe
from heterodiff.training.start import _doubts, train
from tests.test_cli import call
from tests.text_runs import forget_files, text_config
from tests.training_runs import last_checkpoint, losses_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
MODES = ["two phases", "joint"]
CPU = torch.device("cpu")
WIDTH = 12  # of an embedding; a map has 6 * 4 * 4 = 96 numbers


@dataclass
class Trained:
    """A run's recipe with its trained weights, in evaluation mode."""

    config: RunConfig
    data: LoadedData
    recipe: TextImageRecipe | JointRecipe

    @property
    def denoiser(self) -> nn.Module:
        return self.recipe.model.unet if isinstance(self.recipe, JointRecipe) else self.recipe.model

    @property
    def codec(self) -> ImageCodec:
        return self.recipe.networks.image_codec

    def loss(self, rows: list[int], **fixed: Tensor) -> Tensor:
        """Mean loss of training images with their first captions, none of them dropped unless ``fixed`` says so."""
        images, labels = self.data.train.batch(rows)
        draws = self.recipe.draw(0, len(rows), torch.Generator().manual_seed(0), CPU)
        draws = replace(
            draws, **{"drop": torch.zeros_like(draws.drop), "choice": torch.zeros_like(draws.choice), **fixed}
        )
        return self.recipe.losses(self.recipe.model, self.recipe.prepare(images), labels, draws).each.mean()


@cache
def trained_of(run: Path) -> Trained:
    config = load_config(run / "config.yaml")
    data = load_data(config.data)
    recipe = build_recipe(config, data)
    trainer = Trainer(config, recipe, data)
    trainer.load_checkpoint(read_checkpoint(list_checkpoints(run / CHECKPOINTS)[-1]))
    recipe.model.eval()
    return Trained(config, data, recipe)


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("joint") / "run"
    options = {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "ema_decay": 0.8}
    options = {f"training__{key}": value for key, value in options.items()}
    train(text_config(run, alignment__joint=True, alignment__contrastive_weight=5.0, **options), quiet=True)
    return run


@pytest.fixture(params=MODES)
def run(request: pytest.FixtureRequest) -> Path:
    """A trained run of either kind."""
    return request.getfixturevalue("shapes_run" if request.param == "two phases" else "joint_run")


@pytest.fixture
def trained(run: Path) -> Trained:
    return deepcopy(trained_of(run))


@contextmanager
def targets_seen() -> Iterator[list[Tensor]]:
    """What the denoiser is asked to restore while this lasts."""
    seen: list[Tensor] = []
    original = DiffusionObjective.losses

    def spy(self: Any, model_call: Any, x0: Tensor, *others: Tensor) -> Any:
        seen.append(x0)
        return original(self, model_call, x0, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionObjective, "losses", spy)
        yield seen


@contextmanager
def conditions_seen(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """What the denoiser is told while this lasts."""
    seen: list[Tensor] = []
    hook = denoiser.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["condition"].detach()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def target_of(trained: Trained, rows: list[int]) -> Tensor:
    with targets_seen() as seen, torch.no_grad():
        trained.loss(rows)
    (target,) = seen
    return target


# ---- 1: the target is the encoder's own map -------------------------------------------------------------------------


def test_1_the_target_is_the_map_of_zero_mean_and_unit_std_in_every_channel(trained: Trained) -> None:
    rows = list(range(len(trained.data.train)))
    images = trained.data.train.batch(rows)[0]
    target = target_of(trained, rows)
    with torch.no_grad():
        latents = trained.codec.encode(images * 2 - 1)
    assert target.shape == latents.shape == (len(rows), 6, 4, 4)
    centred, expected = (values - values.mean(dim=(0, 2, 3), keepdim=True) for values in (target, latents))
    expected = expected / expected.std(dim=(0, 2, 3), keepdim=True)
    assert float((centred / centred.std(dim=(0, 2, 3), keepdim=True) - expected).abs().max()) < 0.01
    mean, std = target.mean(dim=(0, 2, 3)), target.std(dim=(0, 2, 3))
    slack = (0.5, 0.3) if isinstance(trained.recipe, JointRecipe) else (0.01, 0.01)  # jointly, they run after the maps
    assert float(mean.abs().max()) < slack[0]
    assert float((std - 1).abs().max()) < slack[1]


def test_1_the_target_is_no_function_of_the_embedding(trained: Trained) -> None:
    """More dimensions than an embedding has; and images of one embedding have targets of their own."""
    target = target_of(trained, list(range(len(trained.data.train)))).flatten(1).double()
    values = torch.linalg.svdvals(target - target.mean(dim=0)).square()
    assert float(values[WIDTH:].sum() / values.sum()) > 0.02
    assert int((values > 1e-8 * values[0]).sum()) > 2 * WIDTH

    codec, image = trained.codec, trained.data.train.batch([0])[0] * 2 - 1

    def embed(x: Tensor) -> Tensor:
        return codec.embed(codec.encode(x))[0]

    jacobian = torch.autograd.functional.jacobian(embed, image).flatten(1)
    change = torch.randn(image.numel(), generator=torch.Generator().manual_seed(0))
    seen = torch.linalg.qr(jacobian.T)[0]  # the changes that embeddings see
    hidden = (change - seen @ (seen.T @ change)).view_as(image)
    with torch.no_grad():
        step = 0.02 * hidden
        of_map = (codec.encode(image + step) - codec.encode(image)).norm() / codec.encode(image).norm()
        of_embedding = (embed(image + step) - embed(image)).norm() / embed(image).norm()
    assert float(of_map) > 20 * float(of_embedding)


# ---- 2: the diffusion loss cannot shrink its target ------------------------------------------------------------------


def test_2_no_gradient_of_the_diffusion_loss_reaches_the_image_encoder(joint_run: Path) -> None:
    trained = deepcopy(trained_of(joint_run))
    zero = {"contrastive_weight": 0.0, "reconstruction_weight": 0.0}
    trained.recipe.config = trained.config.model_copy(
        update={"alignment": trained.config.alignment.model_copy(update=zero)}
    )
    model = trained.recipe.model
    model.train()
    trained.loss(list(range(8))).backward()
    for part in (model.image_codec, model.captioner):
        assert all(p.grad is None or not p.grad.any() for p in part.parameters())
    for part in (model.unet, model.text_encoder):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())


def test_losses_teach_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder and decoder learn from the image's own map, from no embedding; embeddings from all they are to know."""
    config = text_config(tmp_path / "run", recipe="alignment")
    data = load_data(config.data)
    recipe = build_recipe(config, data)
    model, (images, labels) = recipe.model, data.train.batch(range(8))
    draws = recipe.draw(0, 8, torch.Generator().manual_seed(0), CPU)
    tokens = recipe.captions.tokens(recipe.captions.rows(labels, draws.choice, 1).flatten(), CPU)
    learners = {
        "from_map": {"encoder", "decoder"},
        "image_embeddings": {"embedder"},
        "text_embeddings": {"text_encoder"},
        "from_embedding": {"embedder", "projection"},
        "map": {"embedder", "projection"},
        "caption": {"captioner", "encoder"},
        "caption_from_embedding": {"embedder", "captioner"},
        "retold": {"text_encoder", "captioner"},
    }
    draws.coin[:] = torch.arange(8) < 4  # of the two that are decoded, one of each
    found = model(recipe.prepare(images), tokens.ids, tokens.mask, draws.noise, draws.coin)
    assert found.keys() == learners.keys() | {"latents", "logit_scale"}
    for name, expected in learners.items():
        model.zero_grad(set_to_none=True)
        found[name].square().sum().backward(retain_graph=True)
        learned = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert {key.removeprefix("image_codec.").partition(".")[0] for key in learned} == expected, name
    of_captions = []
    for share in (alignment_networks.CAPTION_SHARE, 1.0):
        monkeypatch.setattr(alignment_networks, "CAPTION_SHARE", share)
        found = model(recipe.prepare(images), tokens.ids, tokens.mask, draws.noise, draws.coin)
        weights = [*model.image_codec.encoder.parameters()]
        of_captions.append(torch.cat([g.flatten() for g in torch.autograd.grad(found["caption"].sum(), weights)]))
    torch.testing.assert_close(10 * of_captions[0], of_captions[1], atol=1e-5, rtol=1e-3)


def test_2_training_on_the_diffusion_loss_alone_leaves_the_image_codec_as_it_was(tmp_path: Path) -> None:
    overrides = {"alignment__contrastive_weight": 0.0, "alignment__reconstruction_weight": 0.0}
    config = text_config(tmp_path / "run", alignment__joint=True, training__weight_decay=0.0, **overrides)
    before = build_recipe(config, load_data(config.data)).model.state_dict()
    train(config, quiet=True)
    _, tensors, _ = last_checkpoint(tmp_path / "run")
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(value, tensors[f"model/{key}"])}
    assert changed == {"unet", "text_encoder", "latents_mean", "latents_std"}


def test_2_latents_keep_their_std_through_training(run: Path) -> None:
    codec = CNNCodec(load_image_codec(run))
    data = load_data(load_config(run / "config.yaml").data).train
    std = codec.encode(data.batch(range(len(data)))[0]).std(dim=(0, 2, 3))
    assert 0.9 < float(std.min()) <= float(std.max()) < 1.1
    assert float(codec.unscale(torch.zeros(1, 6, 4, 4)).abs().max()) < 3  # and maps keep their size


# ---- 3: training sees the condition that sampling uses ---------------------------------------------------------------


def test_3_training_and_sampling_call_the_same_predict(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training.predict is sampling.predict
    calls: list[str] = []
    for module, name in ((training, "training"), (sampling, "sampling")):
        monkeypatch.setattr(module, "predict", lambda *given, name=name: calls.append(name) or predict(*given))
    trained.loss([0, 1])
    assert calls == ["training"]
    trained.recipe.pipeline().generate_from_text("a red circle", num_inference_steps=2, sampler="ddim")
    assert calls == ["training", "sampling", "sampling"]


def test_3_sampling_tells_the_denoiser_what_training_told_it(trained: Trained) -> None:
    rows = [0, 5, 9]
    texts = [trained.data.captions[int(label)][0] for label in trained.data.train.batch(rows)[1]]
    with conditions_seen(trained.denoiser) as seen, torch.no_grad():
        trained.loss(rows)
        trained.loss(rows, drop=torch.ones(3, dtype=torch.bool))
        trained.recipe.pipeline().generate_from_text(texts, num_inference_steps=1, guidance_scale=3.0, sampler="ddim")
    shown, dropped, (sampled, null) = seen[0], seen[1], seen[2].chunk(2)
    assert shown.shape == (3, WIDTH)
    assert float(shown.norm(dim=1).min()) > 1
    torch.testing.assert_close(sampled, shown, atol=1e-4, rtol=0)
    assert not dropped.any()
    assert not null.any()


def test_3_another_prompt_is_another_prediction(trained: Trained) -> None:
    with torch.no_grad():
        pipeline = trained.recipe.pipeline()
        embeddings = pipeline.encode_text(["a red circle", "a green square above a blue cross"])
        z = torch.randn(1, 6, 4, 4).expand(2, -1, -1, -1)
        time_ = torch.tensor([500.0, 500.0])
        expected = pipeline.codec.prior(embeddings)
        found = predict(trained.denoiser, z, time_, embeddings, expected)
        swapped = predict(trained.denoiser, z, time_, embeddings.flip(0), expected.flip(0))
    torch.testing.assert_close(swapped.flip(0), found, atol=1e-5, rtol=0)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_the_denoiser_sees_embeddings_as_they_vary_over_training_captions(shapes_run: Path, joint_run: Path) -> None:
    """Jointly there is nothing to measure: they change until the end."""
    pipe, data = hd.load(shapes_run), load_data(load_config(shapes_run / "config.yaml").data)
    texts = [text for label in data.train.labels for text in data.captions[label]]
    seen = pipe.unet._whitened(pipe.encode_text(texts))
    moments = [torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0) for x in (pipe.encode_text(texts), seen)]
    before, after = (x / x.sum() for x in moments)
    assert float(before[5]) < 0.5 * float(after[5])
    assert float(before[0]) > 2 * float(after[0])
    assert torch.equal(hd.load(joint_run).unet.condition_whitening, torch.eye(WIDTH))


@pytest.mark.parametrize("variant", list_models())
def test_3_an_embedding_of_zeros_is_no_condition(variant: str, shapes_run: Path) -> None:
    config = text_config(
        shapes_run, model__variant=variant, codec__path=str(shapes_run / "alignment"), model__dropout=0.0
    )
    data = load_data(config.data)
    recipe = build_recipe(config, data)
    network = recipe.model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
        z, time_, embeddings = torch.randn(3, 6, 4, 4), torch.tensor([10.0, 500.0, 900.0]), torch.randn(3, WIDTH)
        beside = z.new_zeros(3, network.config.in_channels - 6, 4, 4)
        without = network(torch.cat([z, beside], dim=1), time_, condition=None).sample
        zeros, expected = torch.zeros(3, WIDTH), recipe.codec.prior(embeddings)
        torch.testing.assert_close(
            predict(network, z, time_, zeros, recipe.codec.prior(zeros)), without, atol=1e-5, rtol=1e-5
        )
        found = predict(network, z, time_, embeddings, expected)
        assert float((found - without).abs().amax(dim=(1, 2, 3)).min()) > 1e-3
        swapped = predict(network, z[:1].expand(3, -1, -1, -1), time_[1].expand(3), embeddings, expected)
        assert float((swapped[0] - swapped[1]).abs().max()) > 1e-3


# ---- 4: the condition enters the network -----------------------------------------------------------------------------


def test_4_gradients_reach_the_text_embedding_through_every_block(trained: Trained) -> None:
    """Through each alone, all others cut off from it."""
    network = trained.denoiser
    blocks = [block for block in network.modules() if isinstance(block, ResBlock)]
    assert len(blocks) == 2 + 2 + 3
    given: list[Tensor] = []

    def leaf(_: nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
        given.append(named["condition"].detach().requires_grad_())
        return arguments, {**named, "condition": given[-1]}

    network.register_forward_pre_hook(leaf, with_kwargs=True)
    trained.recipe.model.train()
    for open_block in blocks:
        hooks = [
            block.register_forward_pre_hook(lambda _, given: (given[0], given[1].detach(), *given[2:]))
            for block in blocks
            if block is not open_block
        ]
        (found,) = torch.autograd.grad(trained.loss([0, 1, 2, 3]), given[-1:])
        assert float(found.abs().amax(dim=1).min()) > 1e-9
        for hook in hooks:
            hook.remove()


# ---- 5: padding is masked --------------------------------------------------------------------------------------------


def test_5_more_padding_changes_no_embedding(run: Path) -> None:
    pipe = hd.load(run)
    texts = ["a circle", "a red circle in the centre", "there is a green square above a blue cross"]
    tokens, _ = encode_texts(pipe.tokenizer, texts, 20)
    with torch.no_grad():
        expected = pipe.text_encoder(tokens.ids, tokens.mask)
        for more in range(1, 21 - tokens.ids.shape[1]):
            for filler in (pipe.tokenizer.pad_token_id, 7):
                ids = nn.functional.pad(tokens.ids, (0, more), value=filler)
                found = pipe.text_encoder(ids, nn.functional.pad(tokens.mask, (0, more)))
                assert float((found - expected).abs().max()) < 1e-5
        together = pipe.encode_text(texts)
        for k, text in enumerate(texts):
            assert float((pipe.encode_text([text])[0] - together[k]).abs().max()) < 1e-5


def test_5_the_text_encoder_is_always_called_with_its_mask(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, pad = trained.recipe.networks.text_encoder, trained.recipe.networks.tokenizer.pad_token_id
    seen: list[tuple[Tensor, Tensor]] = []
    hook = encoder.register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        trained.loss([0, 1, 2, 3])
        trained.recipe.pipeline().generate_from_text(["a circle", "a red circle in the centre"], num_inference_steps=1)
    finally:
        hook.remove()
    assert len(seen) >= 2
    for ids, mask in seen:
        assert torch.equal(mask.bool(), ids != pad)
    assert not all(mask.all() for _, mask in seen)


def test_5_captions_of_a_texts_embedding_do_not_depend_on_longer_texts_beside_it(run: Path) -> None:
    pipe = hd.load(run)
    texts = ["a circle", "there is a green square above a blue cross"]
    together = pipe.generate_text_from_image(pipe.encode_text(texts), 3, seed=2)
    for k, text in enumerate(texts):
        assert pipe.generate_text_from_image(pipe.encode_text([text]), 3, seed=2)[0] == together[k]


# ---- stopped and resumed --------------------------------------------------------------------------------------------


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The logged rows without what depends on the clock."""
    clock = ("images_per_second", "waiting_share", "seconds", "time")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_same_text_run(first: Path, second: Path) -> None:
    """Both runs ended bit by bit alike: weights, EMA, optimiser, what was logged, all that is saved to be used."""
    (step, tensors, state), (other_step, other_tensors, other_state) = map(last_checkpoint, (first, second))
    assert step == other_step
    assert tensors.keys() == other_tensors.keys()
    assert {key.partition("/")[0] for key in tensors} >= {"model", "optimizer", "ema"}
    assert [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])] == []
    assert state == other_state
    assert losses_of(first) == losses_of(second)
    assert rows_of(first) == rows_of(second)
    weights = [path.relative_to(first) for path in first.glob("*/*.safetensors") if path.parent.name in PARTS]
    assert len(weights) >= 3
    for name in (*weights, Path("tokenizer") / "tokenizer.json", Path("split.json"), Path("data.json")):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    (drawn,), (other_drawn,) = (list((run / "samples").glob(f"step_{step:06d}.png")) for run in (first, second))
    assert drawn.read_bytes() == other_drawn.read_bytes()


PARTS = ("image_codec", "text_encoder", "captioner", "unet")


@pytest.mark.parametrize("kind", ["alignment", "text-image", "joint"])
def test_six_steps_equal_three_and_three(kind: str, shapes_run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"training__steps": 6, "text__dropout": 0.1, "training__accumulation_steps": 2}
    if kind == "alignment":
        options["recipe"] = "alignment"
    elif kind == "joint":
        options["alignment__joint"] = True
    else:  # the embeddings' statistics are those of the run's own alignment
        options |= {"codec__path": str(shapes_run / "alignment"), "model__dropout": 0.1}
    straight, resumed = (text_config(tmp_path / name, **options) for name in ("straight", "resumed"))
    losses: dict[str, list[float]] = {"straight": [], "resumed": []}
    train(straight, quiet=True, on_step=lambda _, loss: losses["straight"].append(loss))
    assert train(resumed, quiet=True, stop_after=3, on_step=lambda _, loss: losses["resumed"].append(loss)).step == 3
    torch.manual_seed(12345)  # whatever the process did in between must not matter
    assert train(resumed, quiet=True, on_step=lambda _, loss: losses["resumed"].append(loss)).step == 6
    assert len(set(losses["straight"])) == 6
    assert losses["straight"] == losses["resumed"]
    shutil.rmtree(tmp_path / "resumed" / "samples")  # it has one of step 3, too
    (tmp_path / "resumed" / "samples").mkdir()
    for file in (tmp_path / "straight" / "samples").iterdir():
        shutil.copy(file, tmp_path / "resumed" / "samples")
    rows = tmp_path / "resumed" / "metrics.jsonl"
    kept = [line for line in rows.read_text().splitlines() if '"val_loss"' not in line or '"step": 6' in line]
    rows.write_text("\n".join(kept) + "\n")
    assert_same_text_run(tmp_path / "straight", tmp_path / "resumed")


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a file is there that ``pattern`` means."""
    while not list(folder.glob(pattern)):
        assert process.poll() is None, log.read_text()
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_in_either_stage_the_same_command_ends_as_if_never_stopped(tmp_path: Path) -> None:
    options = {"training__steps": 24, "training__checkpoint_every": 6}
    config = text_config(tmp_path / "killed", **options)
    file, log = tmp_path / "config.yaml", tmp_path / "log.txt"
    file.write_text(dump_config(config))
    for stage in ("alignment/", ""):
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "heterodiff.cli", "train", str(file), "--quiet"],
                env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_for(f"{stage}checkpoints/step_????????", tmp_path / "killed", process, log)
        time.sleep(random.uniform(0, 0.05))  # wherever it is then
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -9, log.read_text()
        step = last_checkpoint(tmp_path / "killed" / stage)[0]
        assert 6 <= step < 24
        if stage:
            assert not (tmp_path / "killed" / "config.yaml").exists()
    assert train(config, quiet=True).step == 24
    train(text_config(tmp_path / "straight", **options), quiet=True)
    for stage in ("alignment", ""):
        assert_same_text_run(tmp_path / "straight" / stage, tmp_path / "killed" / stage)


def test_a_signal_in_the_first_stage_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config(tmp_path / "run")
    original, calls = training.AlignmentRecipe.losses, []

    def losses(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(training.AlignmentRecipe, "losses", losses)
    result = train(config, quiet=True)
    assert (result.step, result.stopped_by) == (2, signal.SIGTERM)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert train(config, quiet=True).step == 3
    assert (tmp_path / "run" / "unet").is_dir()


# ---- what trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", [*VARIANTS, "film-unet"])
def test_every_denoiser_trains_a_step_and_draws(variant: str, mode: str, shapes_run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model__variant": variant, "training__steps": 1}
    options |= {"alignment__joint": True} if mode == "joint" else {"codec__path": str(shapes_run / "alignment")}
    config = text_config(tmp_path / "run", **options)
    assert train(config, quiet=True).step == 1
    pipe = hd.load(tmp_path / "run")
    assert type(pipe.unet) is type(create_model(variant, **small_arguments(variant)))
    assert getattr(pipe.unet.config, "variant", "film-unet") == variant
    drawn = pipe.generate_from_text(["a red circle", "a blue square"], 1, num_inference_steps=2).images
    assert drawn.shape == (2, 3, 16, 16)
    assert bool(torch.isfinite(drawn).all())
    (row,) = (row for row in rows_of(tmp_path / "run") if "loss" in row)
    names = {"contrastive", "from_map", "from_embedding", "caption", "diffusion"} if mode == "joint" else {"mse"}
    assert names <= row.keys()


def small_arguments(variant: str) -> dict[str, Any]:
    if variant == "film-unet":
        return {"latent_channels": 6, "model_channels": 32, "channel_mult": (1,), "num_heads": 2}
    return {"sample_size": 4, "in_channels": 6, "model_channels": 32, "channel_mult": (1, 2)}


@pytest.mark.parametrize(
    "overrides",
    [
        {"diffusion__prediction": "v", "diffusion__schedule": "cosine", "codec__path": "ALIGNMENT"},
        {"diffusion__prediction": "flow", "alignment__joint": True},
        {"diffusion__learn_variance": True, "codec__path": "ALIGNMENT"},
        {"diffusion__learn_variance": True, "alignment__joint": True},
        {"training__precision": "bfloat16", "alignment__joint": True},
        {"data__image_size": [16, 32], "alignment__joint": True},
        {"data__val_fraction": 0.0, "training__num_workers": 2, "alignment__joint": True},
        {"data__horizontal_flip": True, "codec__cache": False, "codec__path": "ALIGNMENT"},
    ],
    ids=str,
)
def test_other_settings_train_and_draw(overrides: dict[str, Any], shapes_run: Path, tmp_path: Path) -> None:
    if "codec__path" in overrides:
        overrides = overrides | {"codec__path": str(shapes_run / "alignment")}
    train(text_config(tmp_path / "run", training__steps=1, **overrides), quiet=True)
    pipe = hd.load(tmp_path / "run")
    width = 32 if "data__image_size" in overrides else 16
    drawn = pipe.generate_from_text("a red circle", num_inference_steps=2).images
    assert drawn.shape == (1, 3, 16, width)
    assert len(pipe.generate_text_from_image(drawn)) == 1


def test_a_step_that_is_left_out_leaves_no_trace_in_the_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN maps in one step of joint training, which changes nothing; the next is as sound as before."""
    original, calls = JointRecipe.prepare, []

    def prepare(self: JointRecipe, images: Tensor) -> Tensor:
        calls.append(1)
        return original(self, images) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(JointRecipe, "prepare", prepare)
    losses: list[float] = []
    config = text_config(tmp_path / "run", alignment__joint=True, training__steps=4)
    train(config, quiet=True, on_step=lambda _, loss: losses.append(loss))
    assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]


TRAIN_ALL = """
import sys
from heterodiff.config.file import load_config
from heterodiff.training.start import train
for name in sys.argv[1:]:
    train(load_config(name), quiet=True)
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """Negatives come from the images of both. Jointly, each has statistics of its own, so that losses differ."""
    common = {"training__log_every": 1, "training__steps": 5}
    train(text_config(tmp_path / "one", recipe="alignment", **common), quiet=True)
    two = text_config(tmp_path / "two", recipe="alignment", **common)
    joint = text_config(tmp_path / "joint", alignment__joint=True, **common)
    for config in (two, joint):
        config_file = tmp_path / f"{config.output.name}.yaml"  # type: ignore[union-attr]
        config_file.write_text(dump_config(config))
    phases = text_config(tmp_path / "phases", codec__path=str(tmp_path / "two"), training__steps=2)
    (tmp_path / "phases.yaml").write_text(dump_config(phases))
    (tmp_path / "train_all.py").write_text(TRAIN_ALL)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_all.py"]
    done = subprocess.run(
        [sys.executable, *launch, "two.yaml", "joint.yaml", "phases.yaml"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    one, two_rows = ([row for row in rows_of(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(one) == len(two_rows) == 5
    for expected, found in zip(one[:3], two_rows, strict=False):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    for name, steps in (("joint", 5), ("phases", 2)):
        rows = [row for row in rows_of(tmp_path / name) if "loss" in row]
        assert len(rows) == steps
        assert all(math.isfinite(value) for row in rows for value in row.values())
    assert hd.load(tmp_path / "joint").generate_from_text("a red circle", num_inference_steps=1).images.isfinite().all()


# ---- what belongs together ------------------------------------------------------------------------------------------


def test_another_denoiser_is_trained_with_the_networks_of_an_existing_run(shapes_run: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (shapes_run / "alignment").rglob("*")}
    for name, path in (("of alignment", shapes_run / "alignment"), ("of text-image", shapes_run)):
        config = text_config(tmp_path / name, codec__path=str(path), model__variant="hae-v2")
        assert config.codec.training is None
        assert train(config, quiet=True).step == 3
        assert not (tmp_path / name / "alignment").exists()
        for part in ("image_codec", "text_encoder", "captioner"):
            weights = f"{part}/diffusion_pytorch_model.safetensors"
            found, expected = load_file(tmp_path / name / weights), load_file(path / weights)
            assert found.keys() == expected.keys()
            kept = [
                key for key in expected if part != "image_codec" or not key.startswith("projection.")
            ]  # but for the prior over maps
            assert all(torch.equal(found[key], expected[key]) for key in kept)
    assert before == {p: p.stat().st_mtime_ns for p in (shapes_run / "alignment").rglob("*")}


def test_a_finished_alignment_is_not_trained_again(shapes_run: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes_run / "alignment", tmp_path / "alignment")
    before = load_config(shapes_run / "config.yaml")
    codec = before.codec.model_copy(update={"path": tmp_path / "alignment"})
    changes = {"output": tmp_path / "run", "codec": codec, "training": before.training.model_copy(update={"steps": 1})}
    config = before.model_copy(update=changes)
    weights = tmp_path / "alignment" / "image_codec" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert train(config, quiet=True).step == 1
    assert weights.stat().st_mtime_ns == written
    for section, key, value in (("text", "width", 64), ("alignment", "latent_noise", 0.5), ("data", "split_seed", 3)):
        other = getattr(config, section).model_copy(update={key: value})
        with pytest.raises(RunError, match=rf"trained with other settings(.|\n)*{section}\.{key}: .* -> {value}"):
            train(config.model_copy(update={section: other, "output": tmp_path / "other"}), quiet=True)
    assert not (tmp_path / "other").exists()


def test_resuming_with_other_settings_of_the_alignment_is_refused(tmp_path: Path) -> None:
    train(text_config(tmp_path / "run"), quiet=True, stop_after=1)
    for key, value in (("alignment__latent_noise", 0.7), ("text__max_tokens", 30), ("alignment__joint", True)):
        with pytest.raises(RunError, match=rf"another configuration(.|\n)*{key.replace('__', '.')}: .* -> {value}"):
            train(text_config(tmp_path / "run", **{key: value}), quiet=True)
    assert train(text_config(tmp_path / "run"), quiet=True).step == 3


@pytest.mark.parametrize("joint", [False, True])
def test_texts_are_told_apart_in_the_same_parts_after_a_resume(joint: bool, tmp_path: Path) -> None:
    """Within a part of a batch: fewer are easier to tell apart, so that parts alter what is learned."""
    recipe = "text-image" if joint else "alignment"
    common = {"recipe": recipe} | ({"alignment__joint": True} if joint else {})
    train(text_config(tmp_path / "run", **common), quiet=True, stop_after=1)
    with pytest.raises(RunError, match=r"training\.accumulation_steps: 1 -> 2"):
        train(text_config(tmp_path / "run", training__accumulation_steps=2, **common), quiet=True)
    parts = text_config(tmp_path / "parts", training__accumulation_steps=8, **common)
    train(parts, quiet=True, stop_after=1)
    first, alone = (rows_of(tmp_path / name)[0]["contrastive"] for name in ("run", "parts"))
    assert first > 0.5
    assert alone == 0
    assert any("nothing to compare it with" in note for note in _doubts(parts, load_data(parts.data)))
    assert advice(text_config(tmp_path / "run", **common), load_data(parts.data).spec, 1e6)[1].count("accumul") == 0


def test_memory_is_planned_for_all_captions_of_a_step(tmp_path: Path) -> None:
    spec = load_data(text_config(tmp_path).data).spec
    kept = [
        training_memory_bytes(text_config(tmp_path, recipe="alignment", alignment__captions_per_image=k), spec)
        for k in (1, 2, 8)
    ]
    assert kept[2] - kept[0] == pytest.approx(7 * (kept[1] - kept[0]), rel=0.2)
    assert kept[1] > kept[0]


def test_without_a_path_the_codec_is_trained_in_the_run(tmp_path: Path) -> None:
    assert text_config(tmp_path / "run", codec__path=None) == text_config(tmp_path / "run")


def test_maps_of_other_images_need_measured_statistics(shapes_run: Path, tmp_path: Path) -> None:
    network = load_image_codec(shapes_run / "alignment")
    CNNCodec(network).set_statistics(torch.zeros(6), torch.full((6,), 3.0))  # as if it had learned from other images
    forget_files(shutil.copytree(shapes_run / "alignment", tmp_path / "foreign"))
    network.save_pretrained(tmp_path / "foreign" / "image_codec")
    config = text_config(tmp_path / "run", codec__path=str(tmp_path / "foreign"))
    with pytest.raises(DataError, match=r"after scaling, expected 1.*set codec\.statistics=measured"):
        train(config, quiet=True)
    measured = text_config(tmp_path / "measured", codec__path=str(tmp_path / "foreign"), codec__statistics="measured")
    train(measured, quiet=True)
    codec = CNNCodec(load_image_codec(tmp_path / "measured"))
    data = load_data(measured.data).train
    std = codec.encode(data.batch(range(len(data)))[0]).std(dim=(0, 2, 3))
    torch.testing.assert_close(std, torch.ones(6), atol=0.01, rtol=0)


def test_settings_of_loaded_networks_are_ignored_with_a_note(shapes_run: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path / "run", codec__path=str(shapes_run / "alignment"), text__max_tokens=9)
    notes = _doubts(config, load_data(config.data))
    assert [note for note in notes if "is ignored" in note and "max_tokens=9" in note and "trained with 20" in note]
    assert not any("width" in note or "latent_channels" in note for note in notes)


def test_joint_previews_are_drawn_at_the_scale_of_the_moment(tmp_path: Path) -> None:
    config = text_config(tmp_path / "run", alignment__joint=True)
    recipe = build_recipe(config, load_data(config.data))
    assert isinstance(recipe, JointRecipe)
    mean, std = torch.arange(6.0), torch.linspace(0.5, 2, 6)
    recipe.model.latents_mean.copy_(mean.view(6, 1, 1))
    recipe.model.latents_std.copy_(std.view(6, 1, 1))
    recipe.preview(seed=0)
    z = torch.randn(1, 6, 4, 4)
    expected = z * std.view(6, 1, 1) + mean.view(6, 1, 1)
    torch.testing.assert_close(recipe.pipeline().codec.unscale(z), expected)


@pytest.mark.parametrize("more", [6, 0, -6])
def test_a_pretrained_bert_of_any_larger_vocabulary(more: int, tmp_path: Path) -> None:
    """Published ones are often padded to a round number; of fewer tokens than the tokenizer has, there is no way."""
    folder = tmp_path / "bert"
    config = text_config(tmp_path / "run", text__encoder=str(folder), training__steps=1)
    tokenizer = train_tokenizer([text for texts in load_data(config.data).captions for text in texts], 120)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer) + more, **sizes)).save_pretrained(folder)
    if more < 0:
        with pytest.raises(CheckpointError, match=f"{len(tokenizer) + more} tokens, found .* of {len(tokenizer)}"):
            train(config, quiet=True)
        return
    train(config, quiet=True)
    assert hd.load(tmp_path / "run").generate_from_text("a red circle", num_inference_steps=1).images.isfinite().all()


def test_a_run_that_has_begun_goes_on_with_its_own_copy(tmp_path: Path) -> None:
    config = text_config(tmp_path / "run")
    train(config, quiet=True, stop_after=2)
    shutil.rmtree(tmp_path / "run" / "alignment")
    with pytest.raises(CheckpointError, match="no finished run of recipe alignment"):
        train(config, quiet=True)
    copy = config.codec.model_copy(update={"path": tmp_path / "run"})
    assert train(config.model_copy(update={"codec": copy}), quiet=True).step == 3


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "film-unet of classes": (
        {"recipe": "diffusion", "model": {"variant": "film-unet"}},
        "film-unet is conditioned on texts; it is for recipe text-image",
    ),
    "candidates without texts": (
        {"recipe": "diffusion", "sampling": {"candidates": 4}},
        "sampling.candidates=4 is read only by recipe text-image, whose captioner ranks them",
    ),
    "cnn of classes": ({"recipe": "diffusion", "codec": {"kind": "cnn"}}, "kind cnn is for recipe text-image"),
    "cnn for a VAE": ({"recipe": "vae", "codec": {"kind": "cnn"}}, "kind cnn is for recipe text-image"),
    "another codec of texts": (
        {"recipe": "text-image", "codec": {"kind": "kl-vae", "path": "vae"}},
        "recipe text-image with codec.kind=kl-vae: .*leave codec.kind out",
    ),
    "joint with a codec": (
        {"recipe": "text-image", "alignment": {"joint": True}, "codec": {"path": "somewhere"}},
        "joint=true trains the codec too; leave codec.path and codec.training out",
    ),
    "joint with a codec's training": (
        {"recipe": "text-image", "alignment": {"joint": True}, "codec": {"training": {}}},
        "leave codec.path and codec.training out",
    ),
    "joint alignment": (
        {"recipe": "alignment", "alignment": {"joint": True}},
        "recipe alignment trains no denoiser, which alignment.joint=true needs",
    ),
    "thresholds of latents": (
        {"recipe": "text-image", "sampling": {"dynamic_threshold": 0.9}},
        "dynamic_threshold=0.9 is read only on pixels",
    ),
    "flips of stored latents": (
        {"recipe": "text-image", "data": {"horizontal_flip": True}},
        "horizontal_flip=true is read only where training sees images, not stored latents",
    ),
    "misspelt text key": ({"recipe": "text-image", "text": {"embeding_dim": 3}}, "did you mean 'embedding_dim'"),
    "misspelt alignment key": ({"recipe": "text-image", "alignment": {"joined": True}}, "did you mean 'joint'"),
    "misspelt section": ({"recipe": "text-image", "alignement": {}}, "did you mean 'alignment'"),
    "misspelt shapes key": ({"data": {"source": "shapes", "shapes": {"image": 3}}}, "did you mean 'images'"),
    "misspelt denoiser": ({"recipe": "text-image", "model": {"variant": "film_unet"}}, "did you mean 'film-unet'"),
    "misspelt sampler": ({"recipe": "text-image", "sampling": {"sampler": "ddimm"}}, "did you mean 'ddim'"),
    "misspelt recipe": ({"recipe": "text_image"}, "recipe: .*'text-image'"),
    "misspelt codec": ({"recipe": "text-image", "codec": {"kind": "cnnn"}}, "codec.kind: .*'cnn'"),
    "text of a wrong type": ({"recipe": "text-image", "text": 3}, "text: .*"),
    "codec of a wrong type": ({"recipe": "text-image", "codec": 3}, "codec: .*"),
    "too few tokens": ({"recipe": "text-image", "text": {"max_tokens": 2}}, "text.max_tokens: .*greater than or equal"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configurations_that_cannot_be_meant(case: str) -> None:
    content, message = WRONG_CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        parse_config(content)


WRONG_RUNS: dict[str, tuple[dict[str, Any], type[HeterodiffError], str]] = {
    "digits have no captions": (
        {"data__source": "digits", "data__image_size": 16, "data__shapes": {}},
        DataError,
        "data.source=digits: recipe alignment needs captions",
    ),
    "stored latents": (
        {"data__source": "latents", "data__path": "LATENTS", "codec__path": "RUN", "data__image_size": None},
        DataError,
        "captions",
    ),
    "embeddings of another width": (
        {"codec__path": "RUN", "text__embedding_dim": 10},
        ConfigError,
        "text.embedding_dim=10: .*alignment has 12; set it to that",
    ),
    "an alignment that is not there": (
        {"codec__path": "nowhere"},
        CheckpointError,
        r"nowhere: .*(no finished run of recipe alignment|missing)",
    ),
    "images of another size": ({"codec__path": "RUN", "data__image_size": 32}, ConfigError, "takes 3x16x16"),
    "sides that do not divide": ({"data__image_size": [18, 16]}, ConfigError, r"sides divisible by 4.*\[16, 16\]"),
    "a denoiser that does not fit": (
        {"model__variant": "hae-v2", "model__channel_mult": [1, 1, 1, 1]},
        ConfigError,
        "the denoiser of 6x4x4 latents: .*divisible by",
    ),
    "importance sampling, jointly": (
        {"alignment__joint": True, "diffusion__timestep_sampler": "loss-second-moment"},
        ConfigError,
        "timestep_sampler=loss-second-moment does not go with alignment.joint=true",
    ),
    "heads that do not fit": ({"text__num_heads": 5}, ConfigError, "does not split into 5 heads"),
    "a text encoder that is not there": (
        {"text__encoder": "no-such-bert"},
        CheckpointError,
        "no-such-bert: neither a folder nor in the local cache",
    ),
    "a batch that does not split": (
        {"training__batch_size": 9, "training__accumulation_steps": 2},
        ConfigError,
        "batch_size=9 does not split",
    ),
}


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_what_cannot_work_stops_before_the_first_step(case: str, shapes_run: Path, tmp_path: Path) -> None:
    overrides, kind, message = WRONG_RUNS[case]
    named = {"RUN": str(shapes_run / "alignment"), "LATENTS": str(shapes_run / "latents")}
    overrides = {key: named.get(value, value) if isinstance(value, str) else value for key, value in overrides.items()}
    config = text_config(tmp_path / "run", **overrides)
    for attempt in (lambda: train(config, quiet=True), lambda: dry_run(config)):
        with pytest.raises(kind, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
    left = list((tmp_path / "run").rglob("*")) if (tmp_path / "run").exists() else []
    assert [path.name for path in left if path.is_file() and path.name != ".lock"] == []


def test_dry_run_does_not_mind_a_folder_of_another_run(shapes_run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in shapes_run.rglob("*")}
    result = dry_run(text_config(shapes_run, alignment__latent_channels=5, codec__training={"steps": 60}))
    assert "image codec to 5x4x4" in result.parts[0].network
    notes = [text for name, text in result.rows if name == "note"]
    assert "holds a run with another configuration" in notes[0]
    assert "alignment.latent_channels: 6 -> 5" in notes[0]
    assert "other settings" in notes[1]
    assert before == {p: p.stat().st_mtime_ns for p in shapes_run.rglob("*")}


def test_captions_that_are_cut_are_named_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(text_config(tmp_path / "run", text__max_tokens=6, training__steps=1)))
    assert call("train", file) == 0
    out = capsys.readouterr().out
    first, second = (part for part in out.split("data     ")[1:])
    for part in (first, second):  # of the alignment, and of the denoiser
        notes = [line for line in part.splitlines() if line.startswith("note     text '")]
        assert len(notes) == 3
        assert all("of which 6 are used, up to '" in note and "raise text.max_tokens" in note for note in notes)
        assert "more captions like these" in part
        assert "captions, " not in notes[0]
    assert "heterodiff text2image" in out
