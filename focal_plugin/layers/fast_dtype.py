"""The number format that a device multiplies fastest."""

import torch


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if the device has instructions to multiply it, else float32.

    That is a GPU of compute capability 8 or more, or an x86 processor with AMX or AVX512-BF16.
    """
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8  # Ampere; older ones emulate it
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        # Without these instructions oneDNN converts to float32 and back, slower than float32 itself.
        has = torch.cpu.get_capabilities()
        fast = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32
