"""A GPU that is none: tensors computed on the CPU that behave as those of cuda:0 do, as to devices.

    with pretend(room=2**30) as gpu:   torch.cuda is there, DEVICE=cuda works
        ...
    gpu.peak                           bytes that were live at once

Whether a tensor is on the GPU is kept on its storage, so that views share it. A dispatch mode
refuses what CUDA refuses: tensors of two devices in one operator, a CPU generator for a CUDA draw,
.numpy(). Patched factories, `to`, `cpu` and `device` move the mark. Beyond `room` bytes
torch.OutOfMemoryError is raised. CUDA's own kernels are not pretended: rounding, TF32, layouts.
"""

import contextlib
import weakref
from unittest import mock

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ATEN = torch.ops.aten
# operators that may cross devices, and those whose indices may lie on the CPU
EITHER = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.set_.source_Tensor}
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default,
           ATEN._index_put_impl_.default}
FACTORIES = [torch.as_tensor, *_device_constructors()]
FROM_DATA = [torch.as_tensor, torch.asarray, torch.tensor]  # the others are computed on the GPU
METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices"
GENERATOR = "Expected a 'cuda' device type for generator but found 'cpu'"
_storage, _device = torch.Tensor.untyped_storage, torch.Tensor.device


def on_gpu(tensor: torch.Tensor) -> bool:
    return getattr(_storage(tensor), "on_gpu", False)


class Gpu(TorchDispatchMode):
    """Refuses what CUDA refuses, and marks what GPU operators make."""

    def __init__(self, room: float) -> None:
        super().__init__()
        self.room, self.live, self.peak = room, 0, 0

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, from now on the GPU's."""
        storage = _storage(tensor)
        if not on_gpu(tensor):
            size = storage.nbytes()
            if self.live + size > self.room:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            storage.on_gpu = True
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, size)
        return tensor

    def free(self, size: int) -> None:
        self.live -= size

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The tensor itself where it is on that device, or a copy there."""
        if (device.type == "cuda") == on_gpu(tensor):
            return tensor
        if device.type == "cuda":
            return self.mark(tensor.clone())
        with _disable_current_modes():  # so that the copy is not marked
            return tensor.clone()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in INDEXED:  # a CPU tensor takes no GPU indices
            indices = [index for index in args[1] if index is not None]
            if not on_gpu(args[0]) and any(map(on_gpu, indices)):
                raise RuntimeError("indices should be on the same device as the indexed tensor")
            tensors = [args[0], *args[2:3]]
        marks = [on_gpu(tensor) for tensor in tensors]
        if any(marks) and func not in EITHER:
            if any(not mark and tensor.dim() for tensor, mark in zip(tensors, marks)):
                raise RuntimeError(f"{TWO_DEVICES}, cuda:0 and cpu! ({func})")
            if isinstance(kwargs.get("generator"), torch.Generator):
                raise RuntimeError(GENERATOR)
        result = func(*args, **kwargs)
        if not tensors and torch._C._current_autograd_node():  # zeros that stand for no gradient
            marks = [True]
        if marks and (marks[0] if func in EITHER else any(marks)):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.mark(leaf)
        return result


@contextlib.contextmanager
def pretend(room: float = float("inf")):
    """torch with one GPU of `room` bytes, which does not compute in bfloat16 itself."""
    gpu = Gpu(room)

    def factory(make):
        def made(*args, device=None, generator=None, **kwargs):
            device = None if device is None else torch.device(device)
            here = device is None or device.type != "cuda"
            if generator is not None and not here:
                raise RuntimeError(GENERATOR)
            kwargs |= {"device": device} if here and device is not None else {}
            kwargs |= {} if generator is None else {"generator": generator}
            result = make(*args, **kwargs)
            if here:
                return result
            return gpu.move(result, device) if make in FROM_DATA else gpu.mark(result)
        return made

    def new(make):
        def made(like, *args, device=None, **kwargs):
            return gpu.move(make(like, *args, **kwargs), torch.device(device or like.device))
        return made

    def to(tensor, *args, **kwargs):
        like = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)),
                    None)
        if like is not None:
            device, dtype = like.device, like.dtype
        else:
            kwargs.pop("copy", None)
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensor = tensor if dtype is None else plain["to"](tensor, dtype)
        return tensor if device is None else gpu.move(tensor, device)

    def numpy(tensor, **kwargs):
        if on_gpu(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return plain["numpy"](tensor, **kwargs)

    def autocast(self, device_type, *args, **kwargs):
        enter(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    plain = {name: getattr(torch.Tensor, name) for name in ("to", "numpy", *METHODS)}
    enter = torch.autocast.__init__
    patches = [
        mock.patch.multiple(
            torch.Tensor, to=to, numpy=numpy, is_cuda=property(on_gpu),
            device=property(lambda tensor: CUDA if on_gpu(tensor) else _device.__get__(tensor)),
            is_cpu=property(lambda tensor: not on_gpu(tensor)),
            cpu=lambda tensor: gpu.move(tensor, CPU), cuda=lambda tensor: gpu.move(tensor, CUDA),
            **{name: new(plain[name]) for name in METHODS}),
        mock.patch.object(torch.autocast, "__init__", autocast),
        mock.patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
            is_bf16_supported=lambda including_emulation=True: including_emulation,
            manual_seed_all=lambda _: None, set_device=lambda _: None, empty_cache=lambda: None)]
    patches += [mock.patch.object(torch, make.__name__, factory(make)) for make in FACTORIES
                if getattr(torch, make.__name__, None) is make]
    patches += [mock.patch.object(torch.optim.Optimizer, name, lambda _: None) for name in (
        "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
        if hasattr(torch.optim.Optimizer, name)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield stack.enter_context(gpu)
