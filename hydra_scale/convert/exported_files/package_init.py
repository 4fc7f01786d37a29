"""A Hydra encoder, its weights and its tokenizer.

    encoder = load()
    encoder.fill_mask("The film was [MASK].")
    encoder.embed(["a sentence", "another"])

`encoder.model` is an ordinary torch module, to be fine-tuned or put into another one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from .encoder_hydra import Embedding, EncoderConfig, Head, encode_rows, mean_over_tokens
from .encoder_hydra import Encoder as Layers
from .tokenizer import Tokenizer

__all__ = ["Encoder", "MaskedLanguageModel", "load"]

_FOLDER = Path(__file__).parent


class Trunk(nn.Module):
    """Embedding and layers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = Layers(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors (batch, seqlen, d_model) of token ids (batch, seqlen), zeros where the mask is 0."""
        return encode_rows(self.embedding, self.encoder, input_ids, attention_mask)[0]


class MaskedLanguageModel(nn.Module):
    """The encoder (`hydra`) and its masked language model head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.hydra = Trunk(config)
        self.head = Head(config)
        self.head.decoder.weight = self.hydra.embedding.word.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scores (batch, seqlen, vocab_size) of every token at every place."""
        return self.head(self.hydra(input_ids, attention_mask))


class Encoder:
    """A loaded model with its tokenizer."""

    def __init__(self, model: MaskedLanguageModel, tokenizer: Tokenizer | None) -> None:
        self.model = model
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training. Raises ValueError if the package was made without one."""
        if self._tokenizer is None:
            raise ValueError("this package has no tokenizer: use model and logits with token ids of your own")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.dense.weight.device

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, as in the training: normalised, [CLS] in front and [SEP] behind."""
        return self.tokenizer.encode([self.tokenizer.normalise(text)])[0].tolist()

    @torch.inference_mode()
    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scores (batch, seqlen, vocab_size) of token ids (batch, seqlen); the mask is 0 at padding."""
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return self.model(input_ids.to(self.device), mask)

    def fill_mask(self, text: str, top: int = 5) -> list[tuple[str, float]]:
        """The likeliest tokens for the first mask token of a text, with their probabilities.

        The mask token is [MASK], unless the tokenizer has one of its own. Raises ValueError if the text holds none.
        """
        tokenizer, special = self.tokenizer, self.tokenizer.special
        mask = tokenizer.piece(special.mask)
        if mask not in text:
            raise ValueError(f"{text!r}: holds no {mask}; put one where a word is to be guessed")
        ids = [special.cls]
        for number, part in enumerate(text.split(mask)):
            ids += [special.mask] if number else []
            ids += tokenizer.encode([tokenizer.normalise(part)], frame=False)[0].tolist()
        place = ids.index(special.mask)
        probabilities = self.logits(torch.tensor([[*ids, special.sep]]))[0, place].float().softmax(-1)
        known = probabilities[: tokenizer.vocab_size]  # the model may have more rows than there are tokens
        best = known.topk(min(top, len(known)))
        words = [tokenizer.decode([token]).strip() or tokenizer.piece(token) for token in best.indices.tolist()]
        return list(zip(words, best.values.tolist(), strict=True))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
        """Vectors (len(texts), d_model) on the CPU: the mean of the final vectors over the tokens of each text."""
        if isinstance(texts, str):
            raise ValueError("texts is one string, which would be taken letter by letter; give a list: [text]")
        vectors = []
        for first in range(0, len(texts), batch_size):
            rows = [torch.tensor(self.tokenize(text)) for text in texts[first : first + batch_size]]
            pad = nn.utils.rnn.pad_sequence
            input_ids = pad(rows, batch_first=True, padding_value=self.tokenizer.special.pad).to(self.device)
            mask = pad([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
            vectors.append(mean_over_tokens(self.model.hydra(input_ids, mask), mask).cpu())
        weight = self.model.head.dense.weight
        return torch.cat(vectors) if vectors else torch.empty(0, weight.shape[1], dtype=weight.dtype)


def load(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Encoder:
    """The encoder, ready to use.

    device: absent: the GPU if there is one, else the CPU. dtype: absent: that of the weights as they were written.
    """
    config = SimpleNamespace(**json.loads((_FOLDER / "config.json").read_text(encoding="utf-8")))
    weights = load_file(_FOLDER / "model.safetensors")
    with torch.device("meta"):
        model = MaskedLanguageModel(config)
    weights["head.decoder.weight"] = weights["hydra.embedding.word.weight"]
    model.load_state_dict(weights, assign=True)
    model.head.decoder.weight = model.hydra.embedding.word.weight
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype).eval()
    folder = _FOLDER / "training_tokenizer"
    return Encoder(model, Tokenizer.load(folder) if folder.is_dir() else None)
