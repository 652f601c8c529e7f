"""Text to documents, token ids, shards on disk and rows in a batch."""
