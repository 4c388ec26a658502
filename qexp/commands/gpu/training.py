"""Costs of training steps and of perplexity."""

from typing import Any

from omegaconf import DictConfig

from qexp.commands.bench.sizes import Sizes
from qexp.commands.bench.timing import empty_cache, loaded, peak, spent
from qexp.commands.bench.training import adapted, installed_step
from qexp.common.errors import first_line
from qexp.config.instantiate import instantiate
from qexp.methods.finetune import FineTune
from qexp.methods.quadapter import EndToEnd
from qexp.quantizers.scheme import quantize_activations
from qexp.transforms.quadapter import Quadapter

LOW = ("model.dtype=float32", "trainer.precision=bf16-mixed", "trainer.sequences=1")
INT8 = ("weight=channel", "weight.bits=8", "activation=int8_tensor")


def training(sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds and bytes of a step on one block, in bfloat16 with float32 weights: quantization-
    aware training, and both phases of Quadapter."""
    found: dict[str, Any] = {}
    cfg = sizes.config(device, "method=qat", *LOW, *INT8, blocks=1)
    task, batches = loaded(cfg)
    method = instantiate(cfg.method)
    assert isinstance(method, FineTune)
    quantize_activations(task, method.activations, lambda: batches)
    found["QAT, a step"] = _costs(*installed_step(task, method, batches[0]))
    words = ("transform=quadapter", f"transform.steps={sizes.steps}", "transform.batch=1")
    cfg = sizes.config(device, "method=quadapter", *words, *LOW, *INT8, blocks=1)
    del task
    task, batches = loaded(cfg)
    transform, both = instantiate(cfg.transform), instantiate(cfg.method)
    assert isinstance(transform, Quadapter) and isinstance(both, EndToEnd)
    seconds, held = adapted(task, transform, batches)
    found["Quadapter, a step of phase 1"] = _costs(seconds / sizes.steps, held)
    quantize_activations(task, both.activations, lambda: batches)
    both.install(task)
    found["Quadapter, a step of phase 2"] = _costs(*installed_step(task, both.training, batches[0]))
    return found


def distributed(sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds and bytes of two training steps with each strategy, in one process on one device,
    with everything before and after them."""
    return {strategy: _with(strategy, sizes, device) for strategy in ("auto", "ddp", "fsdp")}


def _with(strategy: str, sizes: Sizes, device: str) -> dict[str, Any]:
    words: tuple[str, ...] = (
        f"trainer.strategy={strategy}",
        "trainer.devices=1",
        "trainer.steps=2",
    )
    words += ("trainer.every=2", "method=qat", "weight=channel", "weight.bits=8")
    try:
        return _whole(sizes.config(device, *words, *LOW, blocks=1))
    except Exception as error:  # one strategy tells nothing of the others
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def _whole(cfg: DictConfig) -> dict[str, float]:
    """The costs of the method of a configuration."""
    task, batches = loaded(cfg)
    method = instantiate(cfg.method)
    peak(task)  # from here on
    return _costs(spent(task, lambda: method(task, lambda: batches)), peak(task))


def evaluation(sizes: Sizes, device: str) -> dict[str, Any]:
    """Tokens per second of perplexity on all blocks."""
    words = (f"eval.held_out.length={sizes.length}", f"eval.held_out.limit={sizes.sequences}")
    cfg = sizes.config(device, *words)
    task, _ = loaded(cfg)
    evaluator = instantiate(cfg.eval.held_out)
    empty_cache()
    perplexity = evaluator(task)["ppl"]  # cuts and tokenizes the text, and warms up
    peak(task)
    seconds = spent(task, lambda: evaluator(task))
    found = {"perplexity": perplexity, "tokens": sizes.tokens, **_costs(seconds, peak(task))}
    return {"held_out": found | {"tokens per second": sizes.tokens / seconds}}


def _costs(seconds: float, held: int) -> dict[str, float]:
    return {"seconds": seconds, "bytes": held}
