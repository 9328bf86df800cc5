"""The file of a recording: what was measured, by what, with hashes of the weights and of the file's own content."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import rfsr_ext
from rfsr_ext.files import save_text, sha256
from rfsr_ext.recordings.protocols import PROTOCOLS, SEED, Protocol

__all__ = ["FOLDERS", "Recording", "cpu_name", "read_recording", "record", "recorded", "say_missing", "write_recording"]

FOLDERS = tuple(
    map(Path, ("recordings", "../recordings", "results/recordings", "notebooks/results/recordings"))
)  # one's own, then those that come with the course; notebooks run in their folder
_FIELDS = (
    "protocol", "version", "stand_in", "date", "seed", "dtype", "device", "processor", "versions", "weights", "rows"
)  # fmt: skip
_PACKAGES = ("torch", "diffusers", "transformers", "pyiqa", "scikit-image", "scikit-learn")
_MOST_BYTES = 20_000


@dataclass(frozen=True)
class Recording:
    """One recording, whole and of a version that is known.

    Attributes:
        data: what the file holds, by field.
    """

    data: dict[str, Any]

    @property
    def rows(self) -> pd.DataFrame:
        """What was measured."""
        return pd.DataFrame(self.data["rows"])

    @property
    def stand_in(self) -> bool:
        """Whether a stand-in was measured instead of the published network."""
        return self.data["stand_in"]

    @property
    def provenance(self) -> str:
        """Protocol, date, machine, versions and weights in one line; of a stand-in it begins by saying that."""
        data = self.data
        files = [f"{name} {digest[:8]}" for name, digest in data["weights"].items()]
        weights = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
        return (
            f"{'STAND-IN, ' if self.stand_in else ''}{data['protocol']} (version {data['version']}), {data['date']}, "
            f"{data['processor']} ({data['device']}, {data['dtype']}), {versions}; weights {weights or 'none'}"
        )


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


def record(
    name: str, network: Any, weights: Mapping[str, Path], stand_in: bool, device: str = "cpu", dtype: str = "float32"
) -> Recording:
    """Run a protocol.

    Args:
        name: one of `PROTOCOLS`.
        network: what the protocol measures: a `Reward`, a `VGGGramLoss` or an `ISRModel`.
        weights: its files by name; their hashes are recorded.
        stand_in: whether it is anything but the published network; those that know that they are count as such anyway.
        device: where the network is, and its pictures go.
        dtype: of its weights.

    Raises:
        ValueError: if there is no such protocol.
    """
    protocol = _protocol(name)
    digests = {file: sha256(path) for file, path in weights.items()}
    drawn = getattr(getattr(network, "vgg", None), "weights", None) == "random"
    rows = [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in protocol.run(network, device)
    ]
    versions = {"rfsr_ext": rfsr_ext.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # it had no part in this
    on_gpu = device.startswith("cuda")
    processor = torch.cuda.get_device_name(device) if on_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return Recording(
        {
            "protocol": name,
            "version": protocol.version,
            "stand_in": stand_in or drawn or getattr(network, "stand_in_for", None) is not None,
            "date": datetime.now(UTC).date().isoformat(),
            "seed": SEED,
            "dtype": dtype,
            "device": device,
            "processor": processor,
            "versions": versions,
            "weights": digests,
            "rows": rows,
        }
    )


def cpu_name() -> str:
    """The processor's model, or what kind it is where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps({field: data[field] for field in _FIELDS}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_recording(recording: Recording, path: str | Path) -> None:
    """Write a recording as JSON, a line for each field and row; a file that is there is replaced.

    Raises:
        ValueError: if a number is not finite, or the file would take more than 20 kB.
    """
    rows = ",\n".join(map(json.dumps, recording.data["rows"]))
    fields = {field: json.dumps(recording.data[field]) for field in _FIELDS} | {"rows": f"[\n{rows}\n]"}
    fields["sha256"] = json.dumps(_digest(recording.data))
    content = "{\n" + ",\n".join(f'"{field}": {text}' for field, text in fields.items()) + "\n}\n"
    if len(content) > _MOST_BYTES:
        raise ValueError(
            f"recording {str(path)!r} must take at most {_MOST_BYTES} bytes, got {len(content)}; leave files of "
            "weights that are not needed out of the folders"
        )
    save_text(path, content)


def read_recording(path: str | Path) -> Recording:
    """Read what `write_recording` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not whole, was edited, or is of an unknown protocol or of another version of it.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.keys() != {*_FIELDS, "sha256"}:
            raise ValueError("it has not the fields of one")
        if data.pop("sha256") != _digest(data):
            raise ValueError("it was changed after it was written")
        if data["version"] != (known := _protocol(data["protocol"]).version):
            raise ValueError(f"version must be {known} of protocol {data['protocol']}, got {data['version']}")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no recording that can be used: {error}; record it anew") from error
    return Recording(data)


def recorded(name: str, folder: str | Path | None = None) -> Recording | None:
    """The recording of a protocol, or None if there is none.

    Args:
        name: one of `PROTOCOLS`.
        folder: where ``<name>.json`` is looked for; in `FOLDERS` by default, of which the first that has it counts.

    Raises:
        ValueError: if there is no such protocol, or the file cannot be used, is of another one, or of a stand-in.
    """
    _protocol(name)
    folders = FOLDERS if folder is None else (Path(folder),)
    path = next((place / f"{name}.json" for place in folders if (place / f"{name}.json").is_file()), None)
    if path is None:
        return None
    recording = read_recording(path)
    if recording.data["protocol"] != name or recording.stand_in:
        what = "of a stand-in" if recording.stand_in else f"of {recording.data['protocol']}"
        raise ValueError(f"{str(path)!r} must be a recording of the published {name}, got one {what}; move it away")
    return recording


def say_missing(name: str) -> None:
    """Print that there is no recording of a protocol yet, and what makes one."""
    _protocol(name)
    print(f"no recording yet: rfsr record {name} makes one")
