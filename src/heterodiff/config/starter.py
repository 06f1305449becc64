"""Commented configurations to start from: the most often changed keys of each task."""

from pathlib import Path

from heterodiff.errors import ConfigError, unknown_name

NAME = "NAME"
"""Placeholder of the file name, without suffix, in the texts below."""

DIGITS = """\
# Handwritten digits of 8x8 pixels, which come with heterodiff. `heterodiff keys` explains every key.
data: {source: digits, val_fraction: 0.2}  # a fifth of the images is held out to measure the model
model:
  variant: hae-v2        # the network; `heterodiff models` lists all
  model_channels: 32     # its width, a multiple of 32: wider learns more and takes longer
  layers_per_block: 1    # its depth
training:
  steps: 1000            # minutes on a CPU; a finished run can be made longer
  batch_size: 64         # images of a step; fewer take less memory
  learning_rate: 1.0e-3  # lower it if the loss jumps or becomes nan
  warmup_steps: 50       # steps over which the learning rate rises
  ema_decay: 0.995       # the model used averages the weights of at most the last 1 / (1 - ema_decay) steps, here 200
diffusion: {prediction: epsilon, schedule: linear}  # what the denoiser predicts, and its noise levels
sampling:
  guidance_scale: 1.5    # 1 is unguided; larger follows the class more closely, with less variety
"""

IMAGES = """\
# Images of classes. `heterodiff keys` explains every key.
data:
  source: images         # files of png, jpg, bmp, tif or npy, of any number of channels
  path: data/images      # your folder: a subfolder for each class, or metadata.csv with file_name,label
  image_size: 64         # height and width after resizing; leave it out to keep those of the files
model:
  variant: unet-conv     # the network; `heterodiff models` lists all
  patch_size: 2          # patches of 2x2 pixels cost about a quarter; 4 for 128x128 pixels or little time, 1 on a GPU
training:
  minutes: 20            # the number of steps and the width of the network follow; a finished run can be made longer
  batch_size: 16         # images of a step; 64 on a GPU
sampling: {guidance_scale: 1.5}  # 1 is unguided; larger follows the class more closely, with less variety
"""

CAPTIONS = """\
# Text to image and image to text, from images with captions. `heterodiff keys` explains every key.
recipe: text-image       # first trains the image codec and the text networks, then the denoiser
data:
  source: captions       # as in COCO or Flickr30k, captions.txt, or metadata.csv with file_name,text
  path: data/pictures    # your folder
  image_size: 64         # height and width after resizing
  channels: 3            # RGB; 1 for greyscale images
codec:                   # the next line is for the first part of the training
  training: {steps: 2000, batch_size: 32, learning_rate: 1.0e-3, max_grad_norm: 5, ema_decay: 0.99}
alignment: {latent_channels: 16}  # channels of the maps between codec and denoiser; more for larger images
model: {model_channels: 64, channel_mult: [1, 2]}  # size of the denoiser; on a GPU 128 and [1, 2, 4]
training: {steps: 3000, batch_size: 32, learning_rate: 1.0e-3, ema_decay: 0.997}  # of the second part
sampling:
  guidance_scale: 3      # 1 is unguided; larger follows the prompt more closely
  candidates: 4          # images drawn for each one asked for; the captioner keeps the best match
"""

MRI = """\
# Lesions in MRI, learned from image labels alone; needs pip install 'heterodiff[mri]'. Not a medical device.
data:
  source: volumes        # NIfTI files, a folder for each patient
  path: data/patients    # your folder
  volumes: {layout: brats}  # names *_flair *_t1 *_t1ce *_t2 [*_seg]; for others see `heterodiff keys data.volumes`
  image_size: 64         # sides of the slices after resizing; 128 on a GPU
  test_fraction: 0.2     # share of the patients kept for the last measurement
model: {model_channels: 32, patch_size: 2}  # width, 128 on a GPU; patches of 2x2 pixels cost about a quarter
diffusion: {prediction: epsilon, schedule: linear}  # what the denoiser predicts, and its noise levels
training:
  steps: 2000            # a short training; 60000 on a GPU
  batch_size: 16         # slices of a step; fewer take less memory
  learning_rate: 4.0e-4  # 1.0e-4 for a long training
segmentation:            # the next line suits short trainings; leave both out for long ones
  {depth: 250, num_inference_steps: 25, guidance_scale: 30, score: peak, threshold: half-peak}
"""

RADAR = """\
# Radar spectrograms of six simulated movers: first a VAE, then diffusion in its latents.
data:
  source: microdoppler   # your own: source: images and path: FOLDER, with a subfolder for each class
  image_size: 64         # height and width after resizing
  microdoppler: {images_per_class: 250, snr_db: [25, 40]}  # simulated images, signal to noise; not for your own
codec:
  kind: kl-vae           # latents of a VAE, 4x16x16 here; leave section codec out to train on the pixels
  path: runs/NAME_vae    # the VAE is trained in this folder first, if it is not there yet
  training: {steps: 1200, batch_size: 16, learning_rate: 1.5e-3, warmup_steps: 50, ema_decay: 0.99}  # of the VAE
vae: {block_out_channels: [16, 32, 64], structural_weight: 0.3}  # three levels: factor 4; weight of 1 - SSIM
model: {variant: hae-v2, model_channels: 32, layers_per_block: 1}  # the denoiser; `heterodiff models` lists all
diffusion: {prediction: v, schedule: linear}  # what the denoiser predicts, and its noise levels
training: {steps: 1500, batch_size: 32, learning_rate: 1.0e-3, warmup_steps: 50, ema_decay: 0.995}  # of the denoiser
sampling: {guidance_scale: 1.5}  # 1 is unguided; larger follows the class more closely, with less variety
"""

STARTERS = {"digits": DIGITS, "images": IMAGES, "captions": CAPTIONS, "mri": MRI, "radar": RADAR}
BUILT_IN = ("digits", "radar")
"""Tasks with built-in images."""


def write_starter(task: str, path: Path) -> None:
    """Write the commented configuration of ``task``, one of ``STARTERS``, to the new file ``path``.

    Raises:
        ConfigError: no such task; the file exists, or cannot be written.
    """
    if task not in STARTERS:
        raise ConfigError(unknown_name("task", task, STARTERS))
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {path}: expected the name of a YAML file, such as {path.name or task}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTERS[task].replace(NAME, path.stem))
    except FileExistsError:
        raise ConfigError(f"{path}: exists already and is not overwritten; name another file with --out") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def next_command(task: str, path: Path) -> str:
    """Return the command to run next, for the written file."""
    if task in BUILT_IN:
        return f"heterodiff train {path}"
    return f"set data.path in {path}, then: heterodiff check {path}"
