"""Attention and MLP layers against transformers' BERT with the same weights: logits, loss and every gradient."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from alone import job_of_one
from transformers import BertConfig, BertForMaskedLM

from hydra_scale.config import ModelConfig
from hydra_scale.model.masked_lm import MaskedLanguageModel

LENGTHS, VOCAB, WIDTH = (17, 1, 30), 50, 24


def ours_from_bert(bert: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The public names of BERT in this system's names; queries, keys and values are one matrix here."""
    names = {"embedding.word.weight": "bert.embeddings.word_embeddings.weight",
             "embedding.segment.weight": "bert.embeddings.token_type_embeddings.weight",
             "embedding.position.weight": "bert.embeddings.position_embeddings.weight",
             "head.bias": "cls.predictions.bias"}  # fmt: skip
    for kind in ("weight", "bias"):
        names |= {f"embedding.norm.{kind}": f"bert.embeddings.LayerNorm.{kind}",
                  f"head.dense.{kind}": f"cls.predictions.transform.dense.{kind}",
                  f"head.norm.{kind}": f"cls.predictions.transform.LayerNorm.{kind}"}  # fmt: skip
    found = {ours: bert[theirs] for ours, theirs in names.items()}
    for layer in range(num_layers):
        theirs, attention, mlp = f"bert.encoder.layer.{layer}.", *(f"encoder.layers.{2 * layer + n}." for n in (0, 1))
        for kind in ("weight", "bias"):
            found |= {
                f"{attention}mixer.qkv.{kind}": torch.cat(
                    [bert[f"{theirs}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
                ),
                f"{attention}mixer.out_proj.{kind}": bert[f"{theirs}attention.output.dense.{kind}"],
                f"{attention}norm.{kind}": bert[f"{theirs}attention.output.LayerNorm.{kind}"],
                f"{mlp}mixer.up.{kind}": bert[f"{theirs}intermediate.dense.{kind}"],
                f"{mlp}mixer.down.{kind}": bert[f"{theirs}output.dense.{kind}"],
                f"{mlp}norm.{kind}": bert[f"{theirs}output.LayerNorm.{kind}"],
            }
    return found


@pytest.fixture(autouse=True)
def _job() -> Iterator[None]:
    with job_of_one():
        yield


def test_bert() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 60}
    config = BertConfig(vocab_size=VOCAB, max_position_embeddings=32, initializer_range=0.3, **shape)
    bert = BertForMaskedLM(config).double().eval()
    model_config = ModelConfig.model_validate(
        {"d_model": WIDTH, "num_layers": 4, "layer_pattern": "AM", "norm_eps": 1e-12, "position_embedding": "learned",
         "max_positions": 32, "attention": {"num_heads": 4}, "mlp": {"expansion": 2.5}}
    )  # fmt: skip
    model = MaskedLanguageModel(model_config, VOCAB).double()
    model.load_state_dict(ours_from_bert(bert.state_dict(), 2))

    mask = torch.arange(30) < torch.tensor(LENGTHS)[:, None]
    input_ids = torch.randint(0, VOCAB, mask.shape)
    labels = torch.randint(0, VOCAB, mask.shape)
    theirs = bert(input_ids=input_ids, attention_mask=mask.long(), labels=labels.where(mask, -100))
    theirs.loss.backward()
    places = torch.arange(sum(LENGTHS))
    batch = SimpleNamespace(
        input_ids=input_ids[mask],
        position_ids=(mask.cumsum(-1) - 1)[mask],
        token_keys=places,
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        first_token=0,
        masked_positions=places,
        targets=labels[mask],
    )
    torch.testing.assert_close(model.logits(batch), theirs.logits[mask], rtol=1e-10, atol=1e-10)
    (model(batch).loss / len(places)).backward()
    expected = ours_from_bert({name: parameter.grad for name, parameter in bert.named_parameters()}, 2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
