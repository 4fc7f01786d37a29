"""The encoder, or a bare mixer, as an ONNX graph for any number of rows of any length: the program of `torch_export`.

The one place that needs onnxscript and onnxruntime (extra `onnx`).
"""

import logging
from pathlib import Path
from types import ModuleType

import torch

from hydra_scale.convert.package import EncoderPackage, MixerPackage, Probe
from hydra_scale.convert.torch_export import check_suffix, exported_program
from hydra_scale.errors import ConfigError, EnvironmentFault

SUFFIX = ".onnx"
_LARGEST = 2**31 - 2**20  # bytes of one file: protobuf's limit, with room for the graph


def write_onnx(package: EncoderPackage | MixerPackage, path: Path) -> None:
    """Write the graph: inputs and attention_mask, both (batch, seqlen, ...), to vectors (batch, seqlen, d_model).

    Raises:
        ConfigError: the file's name ends otherwise, or the weights are not fp32 or too large for one file.
        CheckpointError: the parameters are not those of the model.
        EnvironmentFault: onnxscript or onnxruntime is not installed.
    """
    check_suffix(path, SUFFIX)
    _onnxruntime()
    if package.dtype != torch.float32:
        raise ConfigError(
            f"{path}: the weights are {package.dtype}, and ONNX Runtime convolves float32 only on a CPU, where the file"
            " is verified; convert --to torch-export, which keeps float64"
        )
    if (size := sum(tensor.nbytes for tensor in package.parameters.values())) > _LARGEST:
        raise ConfigError(
            f"{path}: {size:,} bytes of weights, one ONNX file holds {_LARGEST:,}; convert --to torch-export"
        )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every library that it could use
    graph = torch.onnx.export(
        exported_program(package), dynamo=True, verbose=False, output_names=["vectors"], external_data=False
    )
    assert graph is not None
    shape_of_mask = graph.model.graph.inputs[1].shape
    assert shape_of_mask is not None
    batch, seqlen = shape_of_mask
    graph.rename_axes({str(batch): "batch", str(seqlen): "seqlen"})
    path.parent.mkdir(parents=True, exist_ok=True)
    graph.save(str(path), external_data=False)


def run_onnx(path: Path, package: EncoderPackage | MixerPackage, probe: Probe) -> torch.Tensor:
    """Vectors of the file in ONNX Runtime: (batch, seqlen, d_model)."""
    session = _onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs, mask = (given.name for given in session.get_inputs())
    (vectors,) = session.run(None, {inputs: probe.inputs.numpy(), mask: probe.attention_mask.numpy()})
    return torch.from_numpy(vectors)


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx uses it
    except ImportError as error:
        raise EnvironmentFault(f"{error.name}: not installed; pip install 'hydra-scale[onnx]'") from None
    return onnxruntime
