"""Runs laid side by side: what differs between them, their numbers, their curves, their scores."""
