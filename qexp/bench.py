"""What a job costs, stage by stage, as ratios within one run."""

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from qexp import cli, resolvers
from qexp.activations import quantize_activations
from qexp.build import build
from qexp.hessian import second_moment
from qexp.hessian.output import through_tokens
from qexp.methods.finetune import FineTune
from qexp.methods.step import Step
from qexp.models.source import Source
from qexp.offload import place
from qexp.provenance import peak_rss
from qexp.task import TASKS, Batch, Task
from qexp.walk import walk


def main(arguments: Sequence[str] | None = None) -> None:
    """`bench.py NAME [key=value …]`: the configuration of a run, measured instead of kept."""
    name, *overrides = sys.argv[1:] if arguments is None else arguments
    if name not in BENCHES:
        raise SystemExit(f"bench.py: {name} is unknown: give one of {', '.join(BENCHES)}")
    resolvers.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf())):
        cfg = compose("config", overrides)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    print(f"{name}: {' '.join(overrides)}, {torch.get_num_threads()} threads")
    BENCHES[name](cfg)


def loaded(cfg: DictConfig) -> tuple[Task, list[Batch]]:
    """The model on its device and its calibration batches. What is done with them from here on
    finds an empty cache, which goes with the process."""
    source: Source = build(cfg.model)
    made = source.load()
    task = TASKS[source.objective](made.model, made.tokenizer).eval()
    place(task, cfg.device, cfg.offload)
    batches: list[Batch] = build(cfg.calibration)(task)
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.environ["QEXP_CACHE_DIR"] = folder.name
    return task, batches


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(stages: dict[str, float], unit: str) -> None:
    """Seconds of each stage and their ratio to `unit`."""
    for name, seconds in stages.items():
        print(f"{name:<28}{seconds:8.1f} s {seconds / stages[unit]:8.2f} x {unit}")
    print(f"{'peak memory':<28}{peak_rss() / 2**30:8.2f} GiB")


def blockwise(cfg: DictConfig) -> None:
    """The stages of a block-wise method: what one forward, the Hessians and the solver take."""
    task, batches = loaded(cfg)

    def forward() -> None:
        for block in walk(task, batches):
            block.advance(lambda names, inputs: None)

    def measure(names: tuple[str, ...], inputs: Iterator[Tensor]) -> None:
        second_moment(inputs)

    def hessians() -> None:
        for block in walk(task, batches):
            block.advance(measure)

    stages = {"forward": timed(forward)}
    stages["Hessians"] = timed(hessians) - stages["forward"]
    method: Step = build(cfg.method)
    start = time.perf_counter()
    records = method(task, lambda: batches)
    total = time.perf_counter() - start
    stages["solver"] = sum(record.seconds for record in records)
    stages["whole job"] = total
    show(stages, "forward")


def evaluation(cfg: DictConfig) -> None:
    """Evaluation after the method against evaluation before it."""
    task, batches = loaded(cfg)
    [evaluator] = [build(node) for node in cfg.eval.values()]
    evaluator(task)  # tokenises
    stages = {"float": timed(lambda: evaluator(task))}
    build(cfg.method)(task, lambda: batches)
    stages["quantized"] = timed(lambda: evaluator(task))
    show(stages, "float")


def oac(cfg: DictConfig) -> None:
    """OAC with gradients in one pass against SpQR on the same data.

    Seconds per block are those of the gradient pass over all blocks divided by their number.
    """
    task, batches = loaded(cfg)
    state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    tokens = batches[0]["input_ids"].shape[1]
    for shape in {(w.out_features, w.in_features) for w in task.linears().values()}:
        order = "X'(DD')X" if through_tokens(tokens, *shape) else "(D'X)'(D'X)"
        print(f"{shape[0]} x {shape[1]}: {order} at {tokens} tokens")
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf())):
        methods = {
            name: build(compose("config", [f"method={name}"]).method)
            for name in ("spqr", "oac_one_pass")
        }
    stages = {"SpQR job": timed(lambda: methods["spqr"](task, lambda: batches))}
    task.model.load_state_dict(state)

    def gradients() -> None:
        block = next(iter(walk(task, batches)))
        methods["oac_one_pass"].hessian(block)

    stages["gradients, all blocks"] = timed(gradients)
    stages["gradients, per block"] = stages["gradients, all blocks"] / len(task.blocks)
    rest = timed(lambda: methods["oac_one_pass"](task, lambda: batches))
    stages["OAC job, Hessians cached"] = rest
    stages["OAC job"] = stages["gradients, all blocks"] + rest
    show(stages, "SpQR job")


def harness(cfg: DictConfig) -> None:
    """Items per second beside the harness's own model `hf`: same rows, same batch size."""
    from lm_eval.models.huggingface import HFLM

    from qexp.eval.harness_model import Model

    task, _ = loaded(cfg)
    [evaluator] = [build(node) for node in cfg.eval.values()]
    evaluator.files()  # the harness's index and the rows are read here, outside the clock
    rows = evaluator.batch_size
    models = {
        "hf": HFLM(task.model, tokenizer=task.tokenizer, batch_size=rows),
        "qexp": Model(task, rows, evaluator.name),
    }
    seconds, said = {}, {}
    for name, model in models.items():
        start = time.perf_counter()
        said[name] = evaluator.ask(model)
        seconds[name] = time.perf_counter() - start
    show(seconds, "hf")
    items = sum(values["sample_len"] for values in said["hf"]["results"].values())
    for name, spent in seconds.items():
        print(f"{name:<28}{items / spent:8.2f} items/s")
    pairs = [
        (one[key], other[key])
        for task_name, samples in said["hf"]["samples"].items()
        for one, other in zip(samples, said["qexp"]["samples"][task_name], strict=True)
        for key in one["metrics"]
    ]
    print(f"{'same answers':<28}{sum(a == b for a, b in pairs):8d} of {len(pairs)}")


def qat(cfg: DictConfig) -> None:
    """A step of quantization-aware training against one of the float model: time and memory."""
    task, batches = loaded(cfg)
    method = build(cfg.method)
    assert isinstance(method, FineTune)
    batch = {key: value[: method.trainer.sequences] for key, value in batches[0].items()}
    low = method.trainer.precision.startswith("bf16")

    def steps(parameters: Mapping[str, list[torch.nn.Parameter]]) -> tuple[float, int]:
        optimizer = method.optimizer.optimizer(parameters)

        def step() -> None:
            with torch.autocast(task.device.type, torch.bfloat16, enabled=low):
                loss = task.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        found = min(spent(task, step) for _ in range(3)), peak(task)
        optimizer.state.clear()  # an optimizer stands in cycles, and outlives its last use
        return found

    seconds, memory = {}, {}
    task.requires_grad_()
    seconds["float"], memory["float"] = steps({"weights": list(task.model.parameters())})
    quantize_activations(task, method.activations, lambda: batches)
    method.install(task, task.linears())
    parameters = method.trained.parameters(task)
    seconds["quantized"], memory["quantized"] = steps(parameters)
    show(seconds, "float")
    print(f"{'memory':<28}{memory['quantized'] / memory['float']:8.2f} x float")


def spent(task: Task, work: Callable[[], object]) -> float:
    """Seconds of one call: of a GPU's clock, or of the processor's work, whoever else is at it."""
    if task.device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(task: Task) -> int:
    """Bytes held at most: since the last call on a GPU, ever on a CPU."""
    if task.device.type != "cuda":
        return peak_rss()
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return held


BENCHES: dict[str, Callable[[DictConfig], None]] = {
    "blockwise": blockwise,
    "evaluation": evaluation,
    "qat": qat,
    "harness": harness,
    "oac": oac,
}
