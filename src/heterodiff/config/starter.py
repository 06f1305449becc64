"""Commented configurations to start from: the most often changed keys of each task."""

from pathlib import Path

from heterodiff.errors import ConfigError, unknown_name

DIGITS = """\
# Handwritten digits of 8x8 pixels, which come with heterodiff. `heterodiff keys` explains every key.
data: {source: digits, val_fraction: 0.2}  # a fifth of the images is held out to measure the model
model:
  variant: hae-v3        # the network; `heterodiff models` lists all
  model_channels: 32     # its width, a multiple of 32: wider learns more and takes longer
  layers_per_block: 1    # its depth
training:
  steps: 2400            # minutes on a CPU; a finished run can be made longer
  batch_size: 64         # images of a step; fewer take less memory
  learning_rate: 1.0e-3  # lower it if the loss jumps or becomes nan
sampling:
  guidance_scale: 1.25   # 1 is unguided; larger follows the class more closely, with less variety
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
  source: volumes        # NIfTI files, a folder for each patient; or AnoFPDM's patient_*/slice_*.npz
  path: data/patients    # your folder
  volumes: {layout: brats}  # names *_flair *_t1 *_t1ce *_t2 [*_seg]; for others see `heterodiff keys data.volumes`
  image_size: 64         # sides of the slices after resizing; 128 on a GPU
  horizontal_flip: true  # mirrored heads are heads, too
  val_fraction: 0.2      # share of the slices whose labels teach thresholds
  test_fraction: 0.2     # share of the patients kept for the last measurement
model: {model_channels: 32, patch_size: 2}  # width, 128 on a GPU; patches of 2x2 pixels cost about a quarter
training:
  steps: 6500            # about half an hour on two CPU cores; 60000 on a GPU
  batch_size: 16         # slices of a step; fewer take less memory
"""

RADAR = """\
# Radar spectrograms of six simulated movers. `heterodiff keys` explains every key.
data:
  source: microdoppler   # your own: source: images and path: FOLDER, with a subfolder for each class
  image_size: 64         # height and width after resizing
  microdoppler: {images_per_class: 250, snr_db: [25, 40]}  # simulated images, signal to noise; not for your own
model:
  variant: hae-v3        # the network; `heterodiff models` lists all
  model_channels: 64     # its width, a multiple of 32
  channel_mult: [1, 1, 2]  # three levels, the last of twice that width
  layers_per_block: 1    # its depth
  patch_size: 4          # patches of 4x4 pixels cost a sixteenth; 2 or 1 on a GPU
training:
  steps: 5000            # minutes on a CPU; a finished run can be made longer
  batch_size: 16         # images of a step; fewer take less memory
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
            file.write(STARTERS[task])
    except FileExistsError:
        raise ConfigError(f"{path}: exists already and is not overwritten; name another file with --out") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def next_command(task: str, path: Path) -> str:
    """Return the command to run next, for the written file."""
    if task in BUILT_IN:
        return f"heterodiff train {path}"
    return f"set data.path in {path}, then: heterodiff check {path}"
