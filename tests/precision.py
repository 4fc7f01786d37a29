"""What a training step computes in, seen from inside: run by a rank of the CPU suite and by the GPU tests."""

from typing import Any

from runs import TINY

from hydra_scale.bench.training import random_batch
from hydra_scale.config_file import load_config
from hydra_scale.model.build import build_model, parameter_groups
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.topology import joined
from hydra_scale.training.step import train_step

VOCAB_SIZE = 512


def dtypes_of_a_step(stage: int, precision: str) -> dict[str, str]:
    """Dtypes of products, of the residual stream, of gradients and of weights in one optimizer step."""
    hybrid = ["model.layer_pattern=HAM", "model.num_layers=3", "model.attention.num_heads=4"]
    config = load_config(TINY, [f"training.precision={precision}", f"zero.stage={stage}", *hybrid])
    seen: dict[str, str] = {}
    with joined(config.parallel) as topology:
        model = build_model(config, VOCAB_SIZE, topology.accelerator.device)
        optimizer = ZeroOptimizer(model, config, topology, parameter_groups(model, config.optimizer))

        def note(name: str) -> Any:
            return lambda *call: seen.update({name: str(call[-1].dtype)})

        for layer, kind in zip(model.encoder.layers.values(), config.model.layer_kinds, strict=True):
            for name, module in layer.mixer.named_modules():
                if "weight" in dict(module.named_parameters(recurse=False)) and name != "conv1d":
                    module.register_forward_hook(note(f"{kind}.{name}"))
            layer.register_forward_hook(lambda *call: seen.update(residual=str(call[-1].x_TD.dtype)))
        model.head.dense.register_forward_hook(note("head"))
        model.embedding.word.weight.register_hook(lambda grad: seen.update(gradient=str(grad.dtype)))
        batch = random_batch(VOCAB_SIZE, 2, 24)
        train_step(optimizer, [batch], 1e-3, topology)
        seen["weight"] = str(next(optimizer.local_slices()).parameter.dtype)
    return seen


def expected_dtypes(precision: str) -> dict[str, str]:
    """bf16 for every product, fp32 for what is summed up over layers and steps."""
    product = "torch.bfloat16" if precision == "bf16" else "torch.float32"
    names = ("H.in_proj", "H.out_proj", "A.qkv", "A.out_proj", "M.up", "M.down", "head")
    return dict.fromkeys(names, product) | dict.fromkeys(("residual", "gradient", "weight"), "torch.float32")
