"""A simulated accelerator with two devices, `sim:0` and `sim:1`, on torch's PrivateUse1 backend.

    with simulated(), counting() as counts:
        solver(weight.to("sim:0"), hessian.to("sim:0"))
    counts.launches.total(), counts.syncs

A tensor on it wraps a CPU tensor (`SimulatedTensor.host`). Every operation runs on the CPU, so its
result is that of the CPU. It raises RuntimeError where CUDA would: for tensors of two devices, or
of a device and the host. A host tensor without dimensions may take part in a pointwise operation.
One check is stricter: CUDA also takes index tensors of the host.

`counts.launches` counts operations by name (one or several kernels each), except views and empty
allocations. `counts.syncs` counts by cause what waits for the device: `item`, `to_host`,
`to_device` (a copy from pageable memory waits), `shape` (boolean indexing, `nonzero`, `unique`),
`check` (a factorization that looks at its own error code) and `synchronize`.

The file imports torch and lightning, and nothing of this project. From outside of tests/: put that
folder on the path and import `helpers.simulated_device`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

DEVICES = ("sim:0", "sim:1")
COPIES = ("_to_copy", "copy_")
SCALARS = ("fill_", "index_put_", "_index_put_impl_", "index_put")  # take a host scalar as a value
CHECKS = ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq")
SHAPES = ("repeat_interleave", "bincount", "nonzero", "masked_select", "unique_dim", "_unique2")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
FREE = (*EMPTY, "detach", "lift_fresh", "_local_scalar_dense", "_has_compatible_shallow_copy_type")


@dataclass
class Counts:
    """Launches by operation, and synchronisations by cause."""

    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)


_counting: list[Counts] = []
_active = False
_registered = False
_visible: list[str] | None = ["0", "1"]
_process = ExitStack()
_library: Any = None  # its registrations end with it


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts until the context ends. Contexts may be nested: each counts for itself."""
    _counting.append(Counts())
    try:
        yield _counting[-1]
    finally:
        _counting.pop()


@contextmanager
def simulated(trainer: bool = True) -> Iterator[None]:
    """The devices can be used, and `torch.accelerator` finds them. Outside of the context it finds
    none, so that `device=auto` stays the CPU for the rest of the process. trainer: Lightning knows
    them too."""
    global _active
    _register()
    if trainer:
        _register_trainer()
    before = _active, torch.Generator, torch.__future__.get_swap_module_params_on_conversion()
    _active, torch.Generator = True, Generator  # type: ignore[misc]
    # As on CUDA, `Module.to` leaves parameters the objects that they are, and so keeps them tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        # Else backward would have a thread for each device, and torch knows of one device only.
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _active, torch.Generator, swapped = before  # type: ignore[misc]
        torch.__future__.set_swap_module_params_on_conversion(swapped)


def autoload() -> None:
    """As an entry point of the group `torch.backends` (`write_entry_point`): the devices can be
    used in the whole process, those of CUDA_VISIBLE_DEVICES under numbers from 0."""
    global _visible
    _visible = None
    _process.enter_context(simulated(trainer=False))


def write_entry_point(folder: Path) -> None:
    """With this folder and tests/ on its path, a process calls `autoload` when it imports torch. It
    adds its number and its device's to the file that SIMULATED_LOG names."""
    made = folder / "simulated_device-1.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated_device\nVersion: 1\n")
    entry = "[torch.backends]\nsimulated = helpers.simulated_device:autoload\n"
    (made / "entry_points.txt").write_text(entry)


def _seen() -> list[str]:
    """The numbers of the devices, read when the first tensor is made: as CUDA does."""
    global _visible
    if _visible is None:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        _visible = ["0", "1"] if named is None else [each for each in named.split(",") if each]
        if log := os.environ.get("SIMULATED_LOG"):
            with open(log, "a") as file:
                print(os.getpid(), *_visible, file=file)
        _register_trainer()  # not in `autoload`: torch is not whole there
    return _visible


class SimulatedTensor(Tensor):
    """A tensor of a simulated device; its values are those of `host`."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, index: int) -> "SimulatedTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            host.stride(),
            host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("sim", index),
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        _set_data(self, value)  # TypeError or RuntimeError if it is not of this device
        self.host = value.host  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = self.detach().clone().requires_grad_(self.requires_grad)
            made = nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = made if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = isinstance(self, nn.Parameter)
        return _restore, (self.host, self.device.index, self.requires_grad, is_parameter)

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        # torch would take the current device, which a Python backend cannot change
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.host!r} on {self.device}"

    def __format__(self, form: str) -> str:
        return format(self.item() if self.dim() == 0 else self.host, form)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]


def _restore(host: Tensor, index: int, requires_grad: bool, is_parameter: bool) -> Tensor:
    made = SimulatedTensor(host, index)
    return nn.Parameter(made, requires_grad) if is_parameter else made.requires_grad_(requires_grad)


class Generator(torch.Generator):
    """A generator of the CPU, with its numbers, that says another device: torch has none for a
    Python backend."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu" if torch.device(device).type == "sim" else device)
        made._device = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    """`func` on the host tensors, its results on their device."""
    tensors: list[Tensor] = []
    inputs = _on_host(args, tensors)
    options = {key: _on_host(value, tensors) for key, value in kwargs.items()}
    ours = [each for each in tensors if isinstance(each, SimulatedTensor)]
    operation = _operation(func)
    if not operation.copies:
        _check(func, operation, tensors, ours)
    home = ours[0].device if ours else None
    asked = options.get("device")
    target = home if asked is None else torch.device(asked)
    if asked is not None:
        options["device"] = torch.device("cpu") if target.type == "sim" else target
    if operation.name == "copy_":
        target = tensors[0].device
    result = func(*inputs, **options)
    if _counting:
        _count(operation, tensors, target)
    if target is None or target.type != "sim":
        return result
    wrappers = {id(each.host): each for each in ours} if operation.writes else {}
    return _on_device(result, target.index or 0, wrappers)


def _on_host(value: Any, found: list[Tensor]) -> Any:
    """`value` with the host tensors of simulated ones. found: gets all tensors of `value`."""
    if isinstance(value, Tensor):
        found.append(value)
        return value.host if isinstance(value, SimulatedTensor) else value
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(each, found) for each in value)
    return value


def _on_device(value: Any, index: int, wrappers: dict[int, SimulatedTensor]) -> Any:
    """`value` with simulated tensors. wrappers: those whose host tensors were written to."""
    if isinstance(value, Tensor):
        if (known := wrappers.get(id(value))) is None:
            return SimulatedTensor(value, index)
        if known.shape != value.shape or known.stride() != value.stride():
            _set_data(known, SimulatedTensor(value, index))
        return known
    if isinstance(value, (list, tuple)):
        return type(value)(_on_device(each, index, wrappers) for each in value)
    return value


@dataclass(frozen=True)
class _Operation:
    """Facts of an operator. scalars: it takes a host tensor without dimensions."""

    name: str
    copies: bool
    scalars: bool
    writes: bool
    writes_first: bool
    is_launch: bool


@cache
def _operation(func: Any) -> _Operation:
    name = func.overloadpacket.__name__
    written = [
        each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments
    ]
    return _Operation(
        name,
        name in COPIES,
        torch.Tag.pointwise in func.tags or name in SCALARS,
        any(written),
        written[:1] == [True],
        not func.is_view and name not in FREE,
    )


def _check(
    func: Any, operation: _Operation, tensors: list[Tensor], ours: list[SimulatedTensor]
) -> None:
    devices = {each.device for each in ours}
    if len(ours) < len(tensors):
        for number, each in enumerate(tensors):
            is_scalar = operation.scalars and each.dim() == 0
            if not is_scalar or (operation.writes_first and number == 0):
                devices.add(each.device)
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {found} in {func}"
        )


def _count(operation: _Operation, tensors: list[Tensor], target: torch.device | None) -> None:
    cause = _cause(operation.name, tensors, target)
    for counts in _counting:
        if operation.is_launch:
            counts.launches[operation.name] += 1
        if cause is not None:
            counts.syncs[cause] += 1


def _cause(name: str, tensors: list[Tensor], target: torch.device | None) -> str | None:
    """Why the host waits for the device, if it does."""
    if name in ("_local_scalar_dense", "equal", "is_nonzero"):
        return "item"
    if name in COPIES:
        source = tensors[-1].device
        if target is not None and source.type != target.type:
            return "to_device" if target.type == "sim" else "to_host"
        return None
    if name == "index" or (name.startswith("index_put") and len(tensors) > 2):
        # with one value, a mask is a masked_fill_
        last = len(tensors) if name == "index" else len(tensors) - 1
        masked = any(each.dtype in (torch.bool, torch.uint8) for each in tensors[1:last])
        return "shape" if masked and (name == "index" or tensors[-1].numel() > 1) else None
    if name in SHAPES or name.startswith("unique"):
        return "shape"
    return "check" if name in CHECKS else None


def _factory(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation without tensors, as `torch.empty(3, device="sim:1")`."""
    device = kwargs.get("device")
    if device is not None and (device.index or 0) >= len(_seen()):
        raise RuntimeError(f"{device}: invalid device ordinal")
    return _dispatch(func, args, kwargs)


class _Module:
    """`torch.sim`."""

    def is_available(self) -> bool:
        return _active

    def is_initialized(self) -> bool:
        return _active

    def device_count(self) -> int:
        return len(_seen()) if _active else 0

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        for counts in _counting:
            counts.syncs["synchronize"] += 1

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 2**33, 2**33

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass  # the devices draw from the CPU's generator

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_module = _Module()


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _active

    def has_primary_context(self, index: int) -> bool:
        return _active

    def is_built(self) -> bool:
        return True


def _register_trainer() -> None:
    """The devices are known to lightning, by the name that torch has for them."""
    from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry

    class Simulated(Accelerator):
        setup_device = teardown = lambda *_: None
        parse_devices = staticmethod(lambda count: count)
        get_parallel_devices = staticmethod(
            lambda count: [torch.device("sim", index) for index in range(count)]
        )
        auto_device_count = staticmethod(lambda: len(DEVICES))
        is_available = staticmethod(lambda: _active)
        name = staticmethod(lambda: "sim")

    if "sim" not in AcceleratorRegistry:
        AcceleratorRegistry.register("sim", Simulated)


def _register() -> None:
    """Once in a process: torch has no way back."""
    global _registered, _library
    if _registered:
        return
    _registered = True
    # The engine starts its threads now, while there is no device. With one it would start a thread
    # for it, after which no fork of this process could run a backward pass.
    torch.ones((), requires_grad=True).backward()
    backend_registration._setup_privateuseone_for_python_backend("sim", _module, _Hook())
    _library = torch.library.Library("_", "IMPL")
    _library.fallback(_factory, "PrivateUse1")
    _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    casts = torch.library.Library("aten", "IMPL")
    for name in LOW_PRECISION:
        casts.impl(name, _cast(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    for name in ("silu_backward", "mish_backward"):  # the CPU has kernels for them, others formulas
        operation = getattr(torch.ops.aten, name).default
        casts.impl(name, partial(_factory, operation), "PrivateUse1")
    # torch.tensor(..., device=...) copies below the level of __torch_dispatch__.
    casts.impl("copy_", partial(_factory, torch.ops.aten.copy_.default), "PrivateUse1")
    _library.casts = casts


# What torch.autocast("cpu") runs in the lower precision, as far as models use it.
LOW_PRECISION = (
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d"),
    "scaled_dot_product_attention",
)


def _cast(operation: Any) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def low(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("sim")

        def cast(each: Any) -> Any:
            floating = isinstance(each, Tensor) and each.is_floating_point()
            return each.to(dtype) if floating and each.dtype != torch.float64 else each

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return low
