"""What the project wants of a GPU, against what was measured there."""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.steps import FIRST_STEP
from benchmarks.promises import Promise


def promises(rows: Mapping[str, Mapping[str, Any]]) -> list[Promise]:
    """Those whose rows were measured."""
    found = {name: row["found"] for name, row in rows.items() if row["state"] == "done"}
    made = []
    for name, row in found.items():
        if not name.startswith("B "):
            continue
        if "hae-v2" in row:
            made.append(Promise(f"{name}: hae-v2 / unet", row["hae-v2"]["to_unet"], at_most=1.25))
        peers = [peer for peer in ("diffusers", "MONAI") if isinstance(row.get(peer), dict)]
        made += [Promise(f"{name}: {peer} / unet", row[peer]["to_unet"], at_least=1.0) for peer in peers]
        if "batch 32" in name:
            share = max(row[network]["share_of_product"] for network in ("unet", "hae-v2") if network in row)
            made.append(Promise(f"{name}: share of a matrix product", share, at_least=0.4))
    if (row := found.get(FIRST_STEP)) is not None:
        made.append(Promise(f"{FIRST_STEP}, s", row["seconds"], at_most=30))
    return made
