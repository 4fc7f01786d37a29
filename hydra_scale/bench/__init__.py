"""Speed and memory, measured beside the peers in the same run on the same device: `hydra-scale bench`."""
