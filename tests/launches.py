"""Launches of Triton's kernels without a GPU: Triton does all that it does on an H100 but the launch itself."""

import contextlib
from collections import defaultdict
from importlib import import_module

import torch

DEVICE = 99  # kernels are kept by device: on a machine with GPUs none is mistaken for one of theirs
MODULES = [f"focal_plugin.kernels.{name}_triton" for name in ("dense_focal", "ignore_band", "nms", "targets")]


class Driver:
    """Stands for Triton's driver of CUDA. Tensors are a CPU's."""

    class utils:
        load_binary = staticmethod(lambda *args: (1, 1, 32, 0, 1024))
        unload_module = staticmethod(lambda module: None)
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232_448})

    class launcher_cls:
        def __init__(self, *args):
            pass

        def __call__(self, *args):
            pass

    def get_current_device(self):
        return DEVICE

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def compiled(monkeypatch, really=True):
    """Within it kernels are compiled, but not launched; with ``really=False`` it is only counted, which takes no time.

    Yields:
        By the name of each kernel, a dict with an entry for each time that it had to be compiled: the texts of the
        compiler's stages by their names, such as "ptx", or None where nothing is compiled.
    """
    import triton
    from triton.runtime import driver

    texts = defaultdict(dict)

    def begins(key, fn, **_):
        texts[fn.jit_function.fn.__name__][key] = None
        return not really  # True stops it

    def ends(key, fn, **_):
        texts[fn.jit_function.fn.__name__][key] = fn.jit_function.device_caches[DEVICE][0][key].asm

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", begins)
        patch.setattr(triton.knobs.runtime, "jit_post_compile_hook", ends)
        patch.setattr(driver, "_active", Driver())
        try:
            yield texts
        finally:
            for kernel in (each for module in MODULES for each in vars(import_module(module)).values()):
                if isinstance(kernel, triton.JITFunction):
                    kernel.device_caches.pop(DEVICE, None)
