"""The tensor that linears read, on its way to them: online map, watchers, quantizer."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ATTRIBUTE = "_qexp_input"

See = Callable[[Tensor], None]


class SiteInput:
    """A map, watchers and a quantizer, applied in this order to a tensor that modules read.

    The modules share the result: one pass, one tensor for backward. Its hook comes before others on
    their inputs, so that these see what the modules read.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """modules: in execution order."""
        self.modules = list(modules)
        self.map: nn.Module | None = None
        self.watchers: OrderedDict[int, See] = OrderedDict()
        self.quantizer: nn.Module | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    def watch(self, see: See) -> RemovableHandle:
        """Call `see` with the mapped tensor before it is rounded, until the handle is removed."""
        handle = RemovableHandle(self.watchers)
        self.watchers[handle.id] = see
        return handle

    # A method, not a closure: a deep copy of the model then has a map and quantizer of its own.
    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.map is None and self.quantizer is None and not self.watchers:
            return None
        x, *rest = args
        if not self._kept or self._kept[0][0] is not x:
            self._kept[:] = [(x, self._read(x))]
        read = self._kept[0][1]
        if module is self.modules[-1]:
            self._kept.clear()
        return (read, *rest)

    def _read(self, x: Tensor) -> Tensor:
        y = x if self.map is None else self.map(x)
        for see in self.watchers.values():
            see(y)
        return y if self.quantizer is None else self.quantizer(y)


def site_input(modules: Sequence[nn.Module]) -> SiteInput:
    """The one of these modules, which is put on them where they have none."""
    found: SiteInput | None = getattr(modules[0], ATTRIBUTE, None)
    if found is None:
        found = SiteInput(modules)
        for module in modules:
            # Past nn.Module's bookkeeping: map and quantizer belong to the task.
            object.__setattr__(module, ATTRIBUTE, found)
            module.register_forward_pre_hook(found.hook, prepend=True)
    return found
