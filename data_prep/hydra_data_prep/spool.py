"""Kept documents between the two passes of a preparation: lines of plain files, settled into splits.

A tokenizer that takes texts as they are keeps their line breaks, which stand in the files as the NUL that cleaning has
removed from every text. Documents of bytes stand there as hexadecimal digits, which a label may follow.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hydra_data_prep.cleaning import CleanDocument, Labelled
from hydra_scale.data.shards import Split


class Spool:
    """The kept documents as lines of two files, and which one line belongs to the other file's split."""

    def __init__(self, folder: Path, binary: bool = False) -> None:
        self._binary = binary
        self._files: dict[Split, Path] = {"train": folder / "train.lines", "eval": folder / "eval.lines"}
        self._counts: dict[Split, int] = {"train": 0, "eval": 0}
        self._moved: tuple[Split, int] | None = None
        self.num_words = 0

    def fill(self, documents: Iterator[CleanDocument], eval_fraction: float) -> None:
        """Write the documents down and settle the splits: train gets one of any, and eval if there are two."""
        lowest, highest = (2.0, 0), (-1.0, 0)  # (lot, line) of the document nearest to the other split
        with self._files["train"].open("wb") as train, self._files["eval"].open("wb") as held_out:
            for document in documents:
                text, lot = document.text, document.lot
                split: Split = "eval" if lot < eval_fraction else "train"
                if split == "train":
                    lowest = min(lowest, (lot, self._counts["train"]))
                else:
                    highest = max(highest, (lot, self._counts["eval"]))
                line = text.hex() if isinstance(text, bytes) else text.replace("\n", "\0")
                if document.label is not None:
                    line += f" {document.label}"
                (train if split == "train" else held_out).write(line.encode() + b"\n")
                self._counts[split] += 1
                self.num_words += 1 if isinstance(text, bytes) else text.count(" ") + text.count("\n") + 1
        if not any(self._counts.values()):
            return
        if not self._counts["train"]:
            self._move("eval", highest[1])
        elif not self._counts["eval"] and eval_fraction > 0 and self._counts["train"] > 1:
            self._move("train", lowest[1])

    @property
    def splits(self) -> list[Split]:
        """Splits that hold documents."""
        return [split for split, count in self._counts.items() if count]

    def size(self, split: Split) -> int:
        """Bytes of the lines of a split, but for a moved document."""
        return self._files[split].stat().st_size

    def documents(self, split: Split) -> Iterator[Any]:
        """The documents of a split, str, bytes or Labelled, in order; one that was moved here comes last."""
        for number, text in enumerate(self._lines(split)):
            if (split, number) != self._moved:
                yield text
        if self._moved and self._moved[0] != split:
            yield from islice(self._lines(self._moved[0]), self._moved[1], self._moved[1] + 1)

    def remove(self) -> None:
        """Delete the files."""
        for path in self._files.values():
            path.unlink()

    def _move(self, origin: Split, line: int) -> None:
        self._moved = (origin, line)
        self._counts[origin] -= 1
        self._counts["eval" if origin == "train" else "train"] += 1

    def _lines(self, split: Split) -> Iterator[str | bytes | Labelled]:
        with self._files[split].open("rb") as lines:
            for line in lines:
                text = line[:-1].decode()
                if not self._binary:
                    yield text.replace("\0", "\n")
                    continue
                digits, _, label = text.partition(" ")
                content = bytes.fromhex(digits)
                yield Labelled(content, int(label)) if label else content
