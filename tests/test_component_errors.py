"""Mistakes that would end in PyTorch or the network: the message names the component or the file, and its config key."""
