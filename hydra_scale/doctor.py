"""What a machine has for this program: versions, devices, and a small proof that the operations work."""

import importlib.metadata
import platform
import shutil
from collections.abc import Callable

import torch

from hydra_kernels import HydraMixer
from hydra_scale.accelerator import choose_accelerator

REQUIRED = (
    "torch", "numpy", "megatron-core", "deepspeed", "pydantic", "safetensors", "sentencepiece", "tensorboard",
)  # fmt: skip
OPTIONAL = {
    "pyarrow": "Parquet sources; pip install 'hydra-scale[parquet]'",
    "transformers": "running exported models; pip install 'hydra-scale[huggingface]'",
    "tokenizers": "Hugging Face export; pip install 'hydra-scale[huggingface]'",
}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def examine(say: Callable[[str], None]) -> bool:
    """Print a report line by line; returns whether everything needed is there and right."""
    say(f"python {platform.python_version()} on {platform.platform()}")
    sound = True
    for name in REQUIRED:
        version = _version(name)
        sound &= version is not None
        say(f"{'ok     ' if version else 'MISSING'}  {name} {version or '- reinstall with `make install`'}")
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        say(f"{'ok     ' if version else 'absent '}  {name} {version or f'- only needed for {purpose}'}")
    device = choose_accelerator(0)
    say(f"device: {device.name}, collectives: {device.collectives}, free disk here: {_free_gib():.0f} GiB")
    for dtype in (torch.float32, torch.bfloat16):
        difference = _difference_from_reference(device.device, dtype)
        good = difference < _TOLERANCE[dtype]
        sound &= good
        say(f"{'ok     ' if good else 'WRONG  '}  mixer in {dtype}: relative difference {difference:.1e} from fp64")
    return sound


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _free_gib() -> float:
    return shutil.disk_usage(".").free / 2**30


def _difference_from_reference(device: torch.device, dtype: torch.dtype) -> float:
    """Relative RMS of a mixer's output on `device` in `dtype` against the sequential definition in fp64 on the CPU."""
    torch.manual_seed(0)
    mixer = HydraMixer(64, d_state=16, headdim=16, backend="reference")
    u_BLD = torch.randn(1, 150, 64)
    with torch.no_grad():
        expected = mixer.double()(u_BLD.double())
        fast = HydraMixer(64, d_state=16, headdim=16)
        fast.load_state_dict(mixer.state_dict())
        fast = fast.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = fast(u_BLD.to(device)).double().cpu()
    return float((found - expected).norm() / expected.norm())
