"""One run of a block that collects the statistics of its sites."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from qexp.transforms.channels import Channels
from qexp.transforms.site_statistics import SiteStatistics, first_of
from qexp.walk import Block
from qexp.walk.capture import Call


def collect_statistics(
    block: Block, sites: Iterable[Channels], replay: bool, moments: bool = False
) -> list[SiteStatistics]:
    """Runs the block once and collects statistics at each site.

    The outputs are the next block's inputs, as folded changes do not change the block's function.
    replay: also record the calls that `SiteStatistics.best` needs; moments: not where the module is
    a linear, since `SiteStatistics.moment` will be given.
    """
    attention = {block.linears[name] for group in block.groups[:2] for name in group.linears}
    statistics = [
        SiteStatistics(
            channels,
            _container(block, channels),
            per_token=attention.isdisjoint(channels.linears),
            share=block.share,
        )
        for channels in sites
    ]
    with ExitStack() as hooks:
        for each in statistics:
            hooks.enter_context(_observed(each, replay and not (moments and each.is_linear)))
        block.settle(list(block.outputs()))
    for each in statistics:
        each.merge()
    return statistics


def _container(block: Block, channels: Channels) -> nn.Module:
    """The module whose output error is measured.

    This is the linear itself if its producer is a linear, and otherwise the parent of the linears.
    """
    if len(channels.linears) == 1 and isinstance(channels.producer, nn.Linear):
        return channels.linears[0]
    names = {module: name for name, module in block.module.named_modules()}
    path = names[channels.linears[0]].rpartition(".")[0]
    return block.module.get_submodule(path) if path else channels.linears[0]


@contextmanager
def _observed(site: SiteStatistics, replay: bool) -> Iterator[None]:
    def input_hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        site.add(args[0])

    def output_hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        site.calls.append(Call(args, kwargs))
        site.outputs.append(first_of(output))

    handles = [site.channels.linears[0].register_forward_pre_hook(input_hook)]
    if replay:
        handles.append(site.module.register_forward_hook(output_hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
