"""Starting hydra_scale on one machine or under Slurm, and keeping the job going until the run is done."""
