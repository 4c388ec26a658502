"""Benchmarks of training: a quantization-aware step, and Quadapter's phases."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torch import nn

from qexp.commands.bench.timing import loaded, peak, show, spent
from qexp.config.instantiate import instantiate
from qexp.methods.finetune import FineTune
from qexp.methods.quadapter import EndToEnd
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.parametrization import bake
from qexp.quantizers.scheme import quantize_activations
from qexp.task import Batch, Task
from qexp.training.trainable import TrainableParameters
from qexp.transforms.quadapter import Quadapter
from qexp.transforms.scale_search import first
from qexp.walk import walk

Parameters = Mapping[str, list[nn.Parameter]]


def qat(cfg: DictConfig) -> None:
    """Time and memory of a quantization-aware training step, relative to the float model's."""
    task, batches = loaded(cfg)
    method = instantiate(cfg.method)
    assert isinstance(method, FineTune)
    seconds, memory = {}, {}
    task.requires_grad_()
    every = {"weights": list(task.model.parameters())}
    seconds["float"], memory["float"] = step(task, method, batches[0], every)
    quantize_activations(task, method.activations, lambda: batches)
    seconds["quantized"], memory["quantized"] = installed_step(task, method, batches[0])
    show(seconds, "float")
    print(f"{'memory':<28}{memory['quantized'] / memory['float']:8.2f} x float")


def installed_step(task: Task, method: FineTune, whole: Batch) -> tuple[float, int]:
    """Seconds and peak bytes of a step of a method, which stays installed on the task."""
    method.install(task, task.linears())
    return step(task, method, whole, method.trained.parameters(task))


def step(task: Task, method: FineTune, whole: Batch, parameters: Parameters) -> tuple[float, int]:
    """Seconds and peak bytes of a step with the trainer's number of sequences."""
    batch = {key: value[: method.trainer.sequences] for key, value in whole.items()}
    low = method.trainer.precision.startswith("bf16")
    optimizer = method.optimizer.optimizer(parameters)

    def once() -> None:
        with torch.autocast(task.device.type, torch.bfloat16, enabled=low):
            loss = task.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    once()
    found = min(spent(task, once) for _ in range(3)), peak(task)
    optimizer.state.clear()  # frees memory: reference cycles keep the optimizer alive
    return found


def adapted(task: Task, transform: Quadapter, batches: list[Batch]) -> tuple[float, int]:
    """Seconds and peak bytes of phase 1 of Quadapter on the first block."""
    block = next(iter(walk(task, first(batches, transform.sequences), transform.batch)))
    return spent(task, lambda: transform.adapt(block)), peak(task)


def quadapter(cfg: DictConfig) -> None:
    """Costs of phase 1 on the first block, of a step of phase 2, and of a step of plain QAT."""
    task, batches = loaded(cfg)
    transform, method = instantiate(cfg.transform), instantiate(cfg.method)
    if not (isinstance(transform, Quadapter) and isinstance(method, EndToEnd)):
        raise SystemExit("bench.py quadapter: give transform=quadapter method=quadapter")
    training = method.training
    seconds, memory = {}, {}
    # In the order of memory use: on a CPU the peak is that of the whole process so far.
    name = f"phase 1, {transform.steps} steps"
    seconds[name], memory[name] = adapted(task, transform, batches)
    seconds["phase 1, step"] = seconds[name] / transform.steps
    quantize_activations(task, training.activations, lambda: batches)
    sites = method.install(task)
    seconds["phase 2, step"], memory["phase 2"] = installed_step(task, training, batches[0])
    for linear in task.linears().values():
        bake(linear)
    for channels in sites:
        channels.bake()
    for quantizer in task.quantizers.values():
        assert isinstance(quantizer, FakeQuant)
        quantizer.make_constant()
    plain = replace(training, trained=TrainableParameters(offsets=training.trained.offsets))
    seconds["QAT, step"], memory["QAT"] = installed_step(task, plain, batches[0])
    show(seconds, "QAT, step")
    for kind, held in memory.items():
        print(f"{f'memory, {kind}':<28}{held / 2**30:8.2f} GiB {held / memory['QAT']:6.2f} x QAT")
