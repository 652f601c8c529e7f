"""ELECTRA as pure PyTorch."""
