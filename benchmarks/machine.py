"""What a benchmark ran on: the machine, and the versions of what is installed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "timm", "einops", "hookattn", "transformers", "vit-pytorch", "torchlens")


def describe_machine(device: str) -> dict[str, Any]:
    """The device, its processor and how torch uses it, as it stands at the head of a file of results."""
    found = {"device": device, "cpu": name_of_cpu(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    found |= {"system": platform.platform(terse=True), "python": platform.python_version()}
    found |= {"cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "gpu_memory": about.total_memory, "cuda": torch.version.cuda}
        found |= {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    return found


def name_of_cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def installed_versions() -> dict[str, str | None]:
    """Of every package that a benchmark may use; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def in_words(results: dict[str, Any]) -> str:
    """Machine and versions of some results, in one line."""
    machine = results["machine"]
    installed = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads"
    return f"{where}; {installed}."
