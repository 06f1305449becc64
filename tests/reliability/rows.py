"""The faults that training and loading survive, how the tests inject them, and the tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A fault.

    Attributes:
        fault: what happens.
        injected: how the tests make it happen.
        passes: what must come of it.
        others: what accelerate (with diffusers' examples), transformers, Lightning, nnU-Net, MONAI and guided-diffusion
            do, as read in their sources in November 2026; nothing was found where nothing is named.
        tests: beginnings of the names of the tests, without ``tests/``.
    """

    fault: str
    injected: str
    passes: str
    others: str
    tests: tuple[str, ...]


R = "reliability/"
ROWS = {
    1: Row(
        "SIGKILL at random moments of training",
        "50 kills of the process group, every other one inside a checkpoint's save",
        "resumes by itself; losses, weights, EMA and optimiser equal to the bit",
        "Lightning renames a finished file into place, but stores no generator states; none documented "
        "equality to the bit",
        (R + "test_kills.py::test_killed_at_random", "test_training_resume.py::test_killed_process_resumes_exactly"),
    ),
    2: Row(
        "SIGKILL twice in one epoch",
        "0 and 2 loader workers; the images of every step are recorded",
        "every image once an epoch, in the order of a run that was not killed",
        "transformers skips trained batches; Lightning where the loader keeps its state",
        (R + "test_kills.py::test_killed_twice",),
    ),
    3: Row(
        "disk full",
        "a small file system, full in facts, checkpoint, pipeline, preview, row or evaluation",
        "bytes needed and free are named; what was there is whole; the same command goes on",
        "Lightning keeps the earlier file; transformers removes old checkpoints last, but resumes from "
        "the unfinished one",
        (R + "test_full_disk.py", "test_latents.py::test_a_full_disk"),
    ),
    4: Row(
        "a file of the newest checkpoint, or of the finished run, truncated, changed by a bit, or missing",
        "each file in turn",
        "found by its checksum and named; the previous checkpoint is used, the pipeline made again",
        "no checksums documented in any of them",
        (
            "test_training_resume.py::test_damaged_checkpoint",
            "test_training_resume.py::test_all_checkpoints_damaged",
            R + "test_pipeline_files.py",
            R + "test_training.py::test_a_damaged_checkpoint",
        ),
    ),
    5: Row(
        "output folder read-only, renamed or gone",
        "a file system mounted read-only; a folder renamed while its run trains",
        "error before step 1; error at the next write, and nothing is lost",
        "folders are made, but not tried, before training",
        (
            R + "test_full_disk.py::test_commands_on_a_disk_that_takes_nothing",
            R + "test_training.py::test_a_run_folder_that_is_renamed",
            "test_cli.py::test_folder_that_cannot_be_written",
        ),
    ),
    6: Row(
        "SIGTERM or SIGINT",
        "sent in a step, a save, a preview, a validation and a loader worker, and to the whole process group",
        "checkpoint, exit 143 or 130, no step lost, equal to the bit afterwards",
        "transformers as an option (SIGTERM); Lightning stops after the batch, and saves under Slurm or as an option",
        (
            R + "test_kills.py::test_asked_to_stop",
            "test_training_resume.py::test_signal_to_all_processes",
            "test_training_resume.py::test_stop_during_a_preview",
        ),
    ),
    7: Row(
        "non-finite loss",
        "losses made NaN at chosen steps, and at all",
        "no update from it; step and images named; the run stops after a set number of them",
        "guided-diffusion and accelerate in float16 alone; Lightning and MONAI can stop afterwards",
        (
            "test_training_resume.py::test_nonfinite_losses",
            "test_training_processes.py::test_a_step_that_is_left_out",
            R + "test_training.py::test_a_run_whose_every_step",
        ),
    ),
    8: Row(
        "resume with another number of processes",
        "torchrun with two processes, then one, and the other way round; with whole and with split weights",
        "the same images in the same order; losses within 1e-5 of one process",
        "none documented",
        (R + "test_processes.py",),
    ),
    9: Row(
        "state of the optimiser, the sampler or the run lost",
        "each file of a checkpoint but the weights missing or cut off",
        "error; `--resume weights-only` is the explicit way on",
        "accelerate and transformers go on with a line in the log",
        (R + "test_weights_only.py",),
    ),
    10: Row(
        "a second run in the same folder",
        "two processes at once",
        "refused; the first is not touched; the lock ends with its process",
        "Lightning warns; none refuses",
        ("test_training_resume.py::test_second_run", "test_run_folder.py::test_a_lock", "test_run_links.py"),
    ),
    11: Row(
        "a run folder of an earlier version",
        "folders kept in tests/data: classes, a VAE, text and images",
        "draws the same pictures, and goes on to the same weights",
        "Lightning migrates its checkpoints",
        ("test_golden_runs.py",),
    ),
    12: Row(
        "out of memory",
        "a real limit on memory in a step and in a preview, and a loader process that is killed",
        "the setting that fits is named; no step is lost",
        "accelerate, transformers and Lightning can look for a batch size that fits",
        ("test_memory_limits.py::test_out_of_memory", R + "test_training.py::test_images_that_cannot_be_loaded"),
    ),
    13: Row(
        "code in a file",
        "pickles as .pt, .pkl, .bin and object arrays, a YAML tag, an auto_map",
        "refused; the code never runs; there is no other way to read the file",
        "transformers and MONAI's loader read tensors alone; nnU-Net unpickles",
        (
            R + "test_hostile_files.py::test_code_is_never_run",
            "test_custom_code.py",
            "test_codecs_weight_files.py::test_malicious_pickle",
            "test_data_bad_files.py::test_pickles_never_run",
        ),
    ),
    14: Row(
        "hostile safetensors and configurations of networks",
        "huge and endless headers, overlaps, missing data, NaN; a million layers beside a small file",
        "one error, at once, with less than 100 MB",
        "the safetensors library refuses headers above 100 MB and wrong offsets; NaN is not looked for",
        (
            R + "test_hostile_files.py::test_weights",
            R + "test_hostile_files.py::test_a_network_larger",
            R + "test_hostile_files.py::test_checkpoints",
            "test_codecs_weight_files.py::test_hostile_safetensors",
        ),
    ),
    15: Row(
        "hostile archives and folders of latents",
        "names above the folder, absolute names, links, 1000 to 1 compression, headers of gigabytes",
        "nothing is written outside; memory of what the header honestly needs",
        "MONAI refuses names and links that lead outside; no bound on size",
        (
            R + "test_hostile_files.py::test_archives",
            "test_latents.py::test_bad_folders",
            "test_codecs_weight_files.py",
        ),
    ),
    16: Row(
        "images that are too large",
        "a PNG of 50,000 x 50,000, strips that inflate without end, honest images of 20 megapixels",
        "refused with less than 100 MB; honest ones take the memory of their pixels",
        "Pillow refuses above 179 megapixels, for those who read with it",
        (
            "test_data_check.py::test_huge_png",
            "test_data_bad_files.py::test_tiff_strip_that_inflates",
            R + "test_large_images.py",
        ),
    ),
    17: Row(
        "images that cannot be used",
        "empty, truncated at every byte, wrong suffix, mixed kinds, NaN, latents given as images; random damage",
        "each is named with the reason; refused or left out as configured, never a black image",
        "nnU-Net names files with NaN or other shapes if asked to verify",
        (
            "test_data_bad_files.py",
            "test_data_check.py::test_every_bad_image",
            R + "test_hostile_files.py::test_latents_given_as_images",
            R + "test_fuzzing.py",
        ),
    ),
    18: Row(
        "folders and names that are odd",
        "link loops, unreadable folders, names that are not UTF-8 or control a terminal, endless captions",
        "the scan ends; what cannot be used is named; the rest trains",
        "none documented",
        (R + "test_names.py", "test_data_check.py", "test_data_captions.py::test_very_long", "test_data_metadata.py"),
    ),
    19: Row(
        "data that do not fit the run",
        "labels out of range, other channels and sizes, latents of another VAE or another scale",
        "error before step 1: expected and found",
        "nnU-Net compares labels, channels and shapes if asked to verify; no check of latents documented",
        (
            "test_latents.py::test_latents_of_something_else",
            "test_latents.py::test_bad_values",
            "test_training_latents.py::test_what_cannot_work",
            "test_data_reuse.py",
        ),
    ),
    20: Row(
        "hostile configurations",
        "100,000 keys, alias bombs, 5,000 brackets and digits, tags, dates, misspelt keys, numbers beyond memory",
        "refused in a line, in time in proportion; the nearest key is named",
        "accelerate, transformers and Lightning refuse unknown keys; no bound on size documented",
        (R + "test_configurations.py", "test_config.py::test_bad", "test_memory_limits.py::test_huge_numbers"),
    ),
}


def table() -> str:
    """The table of docs/reliability.md, in Markdown."""
    lines = ["| | fault | injected | what comes of it | other trainers |", "|---|---|---|---|---|"]
    for number, row in ROWS.items():
        lines.append(f"| {number} | {row.fault} | {row.injected} | {row.passes} | {row.others} |")
    return "\n".join(lines)
