"""What a run shows and writes: metrics.jsonl, ledger.jsonl, TensorBoard, the console and train.log."""
