"""Nothing is sent or fetched: commands run with every way to the network forbidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heterodiff.config.file import dump_config
from tests.text_runs import text_config
from tests.training_runs import tiny_config

GUARDED = """
import sys
FORBIDDEN = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")

def guard(event, arguments):
    if event in FORBIDDEN:
        print("NETWORK", event, arguments, file=sys.__stderr__, flush=True)
        raise PermissionError(event)

sys.addaudithook(guard)
from heterodiff.cli import main
for command in sys.argv[1].split(" && "):
    try:
        main(command.split())
    except SystemExit as ended:
        if ended.code:
            raise
"""
CLASSES = "check {config} && train {config} && sample {run} -n 1 && evaluate {run} -n 20"
TEXTS = "check {config} && train {config}"


@pytest.mark.parametrize("kind", ["classes", pytest.param("texts", marks=pytest.mark.slow)])
def test_commands_need_no_network(kind: str, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    if kind == "classes":
        small = {"model__variant": "unet-conv", "model__channel_mult": [1], "training__tensorboard": True}
        config.write_text(dump_config(tiny_config(run, **small, training__steps=2)))
    else:
        config.write_text(dump_config(text_config(run)))
    commands = (CLASSES if kind == "classes" else TEXTS).format(config=config, run=run)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", GUARDED, commands]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
