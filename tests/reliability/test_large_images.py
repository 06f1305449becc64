"""Large honest images take the memory of their pixels, not many times that."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHECK = """
import resource, sys
from heterodiff.config import DataConfig
from heterodiff.data.check import check_data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
check_data(DataConfig(path=sys.argv[1], image_size=32))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux")
def test_three_images_of_twenty_megapixels(tmp_path: Path) -> None:
    """60 MB of pixels each; they used to take half a gigabyte each, all at once."""
    rows = np.arange(4000, dtype=np.uint8)[:, None, None]
    image = np.broadcast_to(rows + np.arange(5000, dtype=np.uint8)[None, :, None], (4000, 5000, 3))
    for number in range(3):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / f"{number}.png", compress_level=1)
    found = subprocess.run([sys.executable, "-c", CHECK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(found.stdout.split()[-1]) < 4 * 60 + 200
