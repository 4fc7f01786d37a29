"""What must be the same on all ranks and each of them finds out by itself."""

import socket
from collections import Counter

import torch.distributed as dist

from hydra_scale.errors import DataError


def agree(where: str, own: str, advice: str) -> None:
    """Compare `own`, a hash, with that of all ranks of the job. One gather of objects.

    Raises:
        DataError: on all ranks; `where` a rank differs from most, or from the first of two, and the `advice`.
    """
    everyone: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, socket.gethostname()))
    hashes = [value for value, _ in everyone]
    usual = Counter(hashes).most_common(1)[0][0]
    like = hashes.index(usual)
    for rank, (value, host) in enumerate(everyone):
        if value != usual:
            raise DataError(
                f"{where}: rank {rank} on {host} has {value[:16]}, rank {like} on {everyone[like][1]} {usual[:16]};"
                f" {advice}"
            )
