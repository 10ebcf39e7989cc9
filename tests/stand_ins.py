"""What stands in for a GPU where there is none: a capture that is played by hand, torch's lowest CUDA calls replaced,
and tensors that say they are on the GPU."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # where something imports it, it wants torch's own calls
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from cl_bench.engine.step import get_state

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Played:
    """A capture as CUDA makes it, played by hand: nothing is computed at once, and results keep their places.

    Args:
        methods: whose BatchNorm statistics a capture must not change.

    Attributes:
        captured, replayed: how often.
        before: called at each capture.
    """

    def __init__(self, *methods: torch.nn.Module) -> None:
        self.methods, self.captured, self.replayed = list(methods), 0, 0
        self.before: Callable[[], None] = lambda: None

    def use_side_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __call__(self, compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.before()
        self.captured += 1
        states = [{name: tensor.clone() for name, tensor in get_state(method).items()} for method in self.methods]
        rng = torch.get_rng_state()
        results = compute()
        for method, state in zip(self.methods, states):
            for name, tensor in get_state(method).items():
                tensor.copy_(state[name])
        torch.set_rng_state(rng)

        def replay() -> None:
            self.replayed += 1
            losses, columns, gradients = results
            new_losses, new_columns, new_gradients = compute()
            for places, values in ((losses, new_losses), (columns, new_columns)):
                for name, value in values.items():
                    places[name].data.copy_(value)
            for place, value in zip(gradients, new_gradients):
                assert (place is None) == (value is None)
                if place is not None:
                    place.copy_(value)

        return results, replay


class Stream:
    """A CUDA stream that does nothing but say who waits for whom."""

    def __init__(self, cuda: "LowestCalls", name: str) -> None:
        self.cuda, self.name, self.device = cuda, name, CUDA

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: "Stream") -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class LowestCalls:
    """torch's lowest CUDA calls, replaced; everything above them, torch's own checks too, is left as it is.

    Attributes:
        log: what was called, in order.
        stream: the current one.
        drawing: whether the generator draws; not while a capture has it, as torch 2.11 leaves it where one fails.
        capture_fails: whether the end of a capture raises, as CUDA does after an error during it.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.log: list[str] = []
        self.stream = self.default = Stream(self, "default")
        self.drawing, self.capture_fails = True, False
        cuda, count = self, Counter()

        class Graph:
            def capture_begin(self, *pool: Any, capture_error_mode: str, **others: Any) -> None:
                cuda.log.append(f"begin {capture_error_mode} on {cuda.stream.name}")
                cuda.drawing = False

            def capture_end(self) -> None:
                cuda.log.append("end")
                if cuda.capture_fails:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                cuda.drawing = True

            def replay(self) -> None:
                cuda.log.append(f"replay on {cuda.stream.name}")

        class Generator:
            def clone_state(self) -> bool:
                return cuda.drawing

            def graphsafe_set_state(self, state: bool) -> None:
                cuda.drawing = state

            def manual_seed(self, seed: int) -> None:
                pass

        def new_stream(device: Any = None) -> Stream:
            count["streams"] += 1
            return Stream(self, f"side {count['streams']}")

        def rng_state(device: Any = None) -> Tensor:
            return torch.zeros(16, dtype=torch.uint8)

        def draw(*size: Any, original: Callable = torch.rand, **others: Any) -> Tensor:
            if others.pop("device", CPU) != CPU and not self.drawing:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            return original(*size, **others)

        nothing = lambda *arguments: None  # noqa: E731
        properties = SimpleNamespace(uuid="none", total_memory=2**33, major=9, minor=0)
        for name, call in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "is_current_stream_capturing": lambda: False,
            "Stream": new_stream,
            "current_stream": lambda device=None: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": nothing,
            "empty_cache": nothing,
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: (0, 1),
            "default_generators": (Generator(),),
            "get_rng_state": rng_state,
            "set_rng_state": nothing,
            "mem_get_info": lambda device: (2**33, 2**33),
            "max_memory_allocated": lambda device: 2**20,
            "reset_peak_memory_stats": nothing,
            "get_device_name": lambda device: "stand-in",
            "get_device_properties": lambda device: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, call)
        monkeypatch.setattr(torch, "rand", draw)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        monkeypatch.setattr(torch._C, "_host_emptyCache", nothing, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: self.log.append(f"set device {index}"))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda index, pool, name=name: self.log.append(name))


class Pretence(TorchFunctionMode):
    """While it is on, a tensor that is sent to CUDA says that it is there, and lies on the CPU.

    Tensors of both places may not meet, as with a real device. Of a tensor that comes from within torch (a batched one
    of ``vmap``, a loaded one) nobody knows; it may meet any.

    Attributes:
        copies: of each copy from the host to the device its elements, and whether it was made out of pinned memory.
        waits: names of the calls for which the host would wait for the device.
    """

    MIXING = (
        "_has_compatible_shallow_copy_type",
        "copy_",
        "__getitem__",
        "__setitem__",
        "__set__",
        "to",
        "index_put_",
        "backward",
        "set_",
    )
    WAITING = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[int, bool]] = []
        self.waits: list[str] = []
        self._place: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._pinned: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __enter__(self) -> "Pretence":
        make = torch.Tensor._make_subclass

        def made(kind: type, data: Tensor, *rest: Any) -> Tensor:  # a parameter of a tensor, which no mode hears of
            parameter = make(kind, data, *rest)
            self._mark(parameter, self._place.get(data))
            return parameter

        self._replaced = mock.patch.object(torch.Tensor, "_make_subclass", staticmethod(made))
        self._replaced.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._replaced.stop()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        owner = getattr(getattr(func, "__self__", None), "__name__", "")  # of a property's getter
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if name == "__get__" and owner == "device":
            return CUDA if self._place.get(args[0]) == "cuda" else func(*args)
        if name == "__get__" and owner == "is_cuda":
            return self._place.get(args[0]) == "cuda"
        if name == "pin_memory":
            copy = args[0].clone()
            self._place[copy], self._pinned[copy] = "cpu", True
            return copy
        if name == "numpy" and self._place.get(args[0]) == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        args, kwargs, asked = self._on_the_host(args, kwargs)
        given = list(_tensors((args, kwargs)))
        places = {self._place.get(t) for t in given if t.dim()}
        if {"cuda", "cpu"} <= places and name not in self.MIXING:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
        self._note_waits(name, args, "cuda" in {self._place.get(t) for t in given})
        result = func(*args, **kwargs)
        if name == "cpu":
            asked = "cpu"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return result
        if name in ("cpu", "to") and asked not in (None, self._place.get(args[0])):
            if asked == "cuda":
                self.copies.append((args[0].numel(), args[0] in self._pinned))
            else:
                self.waits.append(name)
            result = result.clone() if result is args[0] else result
        if name == "__set__" and owner == "data":
            self._mark(args[0], self._place.get(args[1]))
        known = {self._place.get(t) for t in given}
        inherited = "cuda" if "cuda" in known else "cpu" if not known or known == {"cpu"} else None
        for tensor in _tensors(result):
            if name in ("copy_", "__get__") and tensor in self._place:
                continue
            self._mark(tensor, asked or (self._place.get(args[0]) if name == "copy_" else inherited))
        return result

    def _mark(self, tensor: Tensor, place: str | None) -> None:
        if place is not None:
            self._place[tensor] = place

    def _on_the_host(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, str | None]:
        """The arguments with the CPU for every device, and which one they asked for."""
        asked = None

        def changed(value: Any) -> Any:
            nonlocal asked
            if isinstance(value, torch.device) or value in ("cpu", "cuda", "cuda:0"):
                asked = torch.device(value).type
                return CPU
            return value

        devices = lambda value: isinstance(value, torch.device | str)  # noqa: E731
        args = tuple(changed(value) if devices(value) else value for value in args)
        kwargs = {key: changed(value) if key == "device" and devices(value) else value for key, value in kwargs.items()}
        return args, kwargs, asked

    def _note_waits(self, name: str, args: tuple, on_device: bool) -> None:
        if not on_device:
            return
        if name in self.WAITING:
            self.waits.append(name)
        if name in ("__getitem__", "__setitem__"):
            for index in _tensors(args[1]):
                if index.dtype is torch.bool or not index.dim() or self._place.get(index) == "cpu":
                    self.waits.append(name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
