"""Fused operations: one signature each, several backends, ``reference`` the truth."""
