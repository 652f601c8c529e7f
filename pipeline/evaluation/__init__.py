"""Downstream tasks, fine-tuning on them, and scores."""
