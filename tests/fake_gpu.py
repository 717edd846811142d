"""A CUDA device without a GPU: its tensors have shapes and no numbers, and what the host and its streams do is watched.

CPU tensors stay real. An operation on the device fails where

- the host would wait for it: numbers read back, shapes that depend on numbers, copies from pageable memory that do not
  say `non_blocking`, CPU tensors that torch would copy by itself;
- tensors of the device meet those of the CPU;
- a stream reads or writes what another one writes, or frees what another one still uses, without an event between.
"""

import contextlib
import weakref
from collections import Counter

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class WaitsForDevice(AssertionError):
    """The host stands still until the device has caught up."""


class Race(AssertionError):
    """Two streams use the same memory in no order."""


class Stream:
    """Its clock says up to which operation of each stream it comes after."""

    def __init__(self, device=None, priority: int = 0):
        self.clock = Counter()

    def record_event(self) -> Counter:
        return self.clock.copy()

    def wait_event(self, event: Counter) -> None:
        self.clock |= event

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Memory:
    """A tensor's storage: the stream it is from, and who wrote and used it when."""

    def __init__(self, stream: Stream):
        self.stream, self.tensors, self.written, self.used = stream, 0, Counter(), Counter()


class _Mode(FakeTensorMode):
    avoid_device_init = True  # though torch.cuda.is_available() says that there is a device


class FakeGPU(TorchDispatchMode):
    """Within it 'cuda' is such a device.

    Attributes:
        launches: of kernels and copies, by the name of the operation.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        self.fake = _Mode(allow_non_fake_inputs=True)
        self.current = Stream()
        self.memory, self.launches, self.races = {}, Counter(), []
        self.may_wait = True
        for name, value in {
            "Stream": Stream,
            "stream": self._using,
            "current_stream": lambda device=None: self.current,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: "none",
            "is_available": lambda: True,
            "is_current_stream_capturing": lambda: False,
            "is_bf16_supported": lambda *args, **kwargs: True,
            "mem_get_info": lambda device=None: (2**36, 2**36),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    @contextlib.contextmanager
    def waiting_allowed(self):
        """Where the host may wait, as while a run is set up; nowhere after that."""
        self.may_wait = True
        try:
            yield
        finally:
            self.may_wait = False

    @contextlib.contextmanager
    def _using(self, stream: Stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = tree_leaves((args, kwargs))
        inputs = [value for value in values if isinstance(value, FakeTensor)]
        if not inputs and not any(isinstance(value, torch.device) and value.type == "cuda" for value in values):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if not self.may_wait:
            self._check_host(func, name, [v for v in values if type(v) in (torch.Tensor, torch.nn.Parameter)], kwargs)
        args, kwargs = tree_map_only(
            torch.Tensor, lambda x: x if isinstance(x, FakeTensor) else self.fake.from_tensor(x), (args, kwargs)
        )
        try:
            result = None if name == "_fused_sgd_" else func(*args, **kwargs)  # that one has no rule for shapes
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WaitsForDevice(f"{func} needs numbers") from error
        outputs = [value for value in tree_leaves(result) if isinstance(value, FakeTensor)]
        if any(value.device.type != "cuda" for value in outputs):
            raise WaitsForDevice(f"{func} brings numbers back")
        if not func.is_view and func.namespace != "prim":
            self._check_streams(func, args, kwargs, inputs, outputs)
            self.launches[name] += not name.startswith(("empty", "new_empty"))
        return result

    def _check_host(self, func, name: str, from_cpu: list[torch.Tensor], kwargs: dict) -> None:
        if name in ("_to_copy", "copy_"):
            if from_cpu and not kwargs.get("non_blocking"):
                raise WaitsForDevice(f"{func} of {tuple(from_cpu[0].shape)} from pageable memory")
        elif any(value.ndim or "index_put" in name for value in from_cpu):  # others take numbers without dimensions
            raise WaitsForDevice(f"{func} of tensors of both devices")

    def _of(self, tensor: FakeTensor) -> Memory:
        key = tensor.untyped_storage()._cdata
        memory = self.memory.setdefault(key, Memory(self.current))
        if not hasattr(tensor, "watched"):
            tensor.watched = weakref.finalize(tensor, self._release, key)
            memory.tensors += 1
        return memory

    def _check_streams(self, func, args, kwargs, inputs: list[FakeTensor], outputs: list[FakeTensor]) -> None:
        stream = self.current
        stream.clock[stream] += 1
        arguments = {argument.name: argument for argument in func._schema.arguments}
        given = dict(zip(arguments, args, strict=False)) | kwargs
        changed = [
            x
            for name, value in given.items()
            if (alias := arguments[name].alias_info) and alias.is_write
            for x in tree_leaves(value)
            if isinstance(x, FakeTensor)
        ]
        for tensor in inputs:
            self._check(func, "reads", self._of(tensor).written)
        for tensor in changed:
            self._check(func, "writes", self._of(tensor).used)
        for tensor in (*inputs, *changed, *outputs):
            self._of(tensor).used[stream] = stream.clock[stream]
        for tensor in (*changed, *(x for x in outputs if not any(x is y for y in inputs))):
            self._of(tensor).written[stream] = stream.clock[stream]

    def _check(self, func, does: str, earlier: Counter) -> None:
        for stream, time in earlier.items():
            if self.current.clock[stream] < time:
                raise Race(f"{func} {does} what another stream is still busy with")

    def _release(self, key: int) -> None:
        memory = self.memory[key]
        memory.tensors -= 1
        if not memory.tensors:
            del self.memory[key]
            for stream, time in memory.used.items():
                if memory.stream.clock[stream] < time:  # an allocator would give it away at once
                    self.races.append("freed while another stream uses it")
