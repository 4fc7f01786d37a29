"""From corpora to a tokenizer and token shards with a manifest."""
