"""What a benchmark found, as JSON: the rows, and the facts without which they mean nothing.

{"benchmark": "emulate", "date": "2026-01-31", "device": "NVIDIA H100 80GB HBM3", "devices": 1, "torch": "2.11.0+cu130",
"python": "3.12", "dtensor_ring": "0.1.0", "packages": {"flash-attn": "2.8.3"}, "emulated": true, ..., "rows": [{...}, ...]}
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "ring-flash-attn",
    "axolotl-ringmaster",
    "yunchang",
    "transformers",
    "triton",
)


def device_name(device: torch.device) -> str:
    """What the device is called: a GPU by its name, everything else CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def facts(benchmark: str, device: torch.device, **more: object) -> dict[str, Any]:
    """Everything about a run but its rows: `more` is what only this benchmark knows."""
    installed = {name: version for name in _PACKAGES if (version := _version(name))}
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "dtensor_ring": _version("dtensor-ring") or "as in this folder",
        "packages": installed,
        **more,
    }


def save(path: Path, known: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """Write a run: its facts, and its rows, a line each."""
    listed = [json.dumps(_rounded(asdict(row) if is_dataclass(row) else row)) for row in rows]
    head = json.dumps(dict(known), indent=1)[:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + ',\n "rows": [\n  ' + ",\n  ".join(listed) + "\n ]\n}\n")


def load(path: Path) -> dict[str, Any]:
    """A run as it was saved."""
    return json.loads(path.read_text())


def _rounded(value: Any) -> Any:  # noqa: ANN401  whatever JSON holds
    """Floats to five digits: a clock gives no more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
