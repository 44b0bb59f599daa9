"""Layers that are cheaper or safer than PyTorch's and Detectron2's, and the number format of a device."""
