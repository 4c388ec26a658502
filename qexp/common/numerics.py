"""Settings of the digits that a device may change: TF32, sums in low precision, determinism."""

import logging
import os
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from omegaconf import DictConfig

from qexp.common.errors import UserError, check_bool

log = logging.getLogger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATING = ":4096:8"  # with which cuBLAS repeats its digits, by its documentation
_environment = os.environ.get(WORKSPACE)  # before any run of this process


@dataclass(frozen=True)
class Numerics:
    """The defaults compute as a CPU does, as far as the device can; torch's own allow TF32 in
    convolutions and sums in low precision.

    tf32: float32 products and convolutions may drop 13 bits of their factors, where the device can.
    reduced_sums: products of bfloat16 and float16 may be added up in that dtype.
    deterministic: only algorithms that repeat their digits on the same device; torch raises
    RuntimeError at an operation that has none.
    cublas_workspace: the value of CUBLAS_WORKSPACE_CONFIG; None keeps that of the environment, and
    is ":4096:8" with `deterministic`.
    """

    tf32: bool = False
    reduced_sums: bool = False
    deterministic: bool = False
    cublas_workspace: str | None = None

    def __post_init__(self) -> None:
        check_bool("numerics", self, "tf32", "reduced_sums", "deterministic")
        value = self.cublas_workspace
        if value is not None and not re.fullmatch(r"(:\d+:\d+)+", str(value)):
            raise UserError(
                f"numerics.cublas_workspace={value}: give buffers as :KiB:count, such as "
                f"{REPEATING}, or null."
            )

    @property
    def workspace(self) -> str | None:
        """What CUBLAS_WORKSPACE_CONFIG has to be; None for unset."""
        return self.cublas_workspace or (REPEATING if self.deterministic else _environment)

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their default."""
        default = Numerics()
        pairs = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: v for name, v in pairs.items() if v != getattr(default, name)}

    def apply(self) -> None:
        """Set them for this process. Raises UserError where cuBLAS already uses another workspace:
        it reads the variable once."""
        global _applied
        import torch

        if os.environ.get(WORKSPACE) != self.workspace:
            if torch.cuda.is_initialized():
                raise UserError(
                    f"numerics.cublas_workspace: this process has begun with "
                    f"{os.environ.get(WORKSPACE)} and cannot change to {self.workspace}; give each "
                    "job its own process, as hydra/launcher=gpu_pool does."
                )
            os.environ.pop(WORKSPACE, None)
            if self.workspace is not None:
                os.environ[WORKSPACE] = self.workspace
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        products = torch.backends.cuda.matmul
        products.allow_bf16_reduced_precision_reduction = self.reduced_sums
        products.allow_fp16_reduced_precision_reduction = self.reduced_sums
        torch.use_deterministic_algorithms(self.deterministic)
        _applied = self


_applied = Numerics()


def of(cfg: DictConfig) -> Numerics:
    """The node `numerics` of a configuration; runs of older versions have none. Raises UserError
    for a value that a key cannot have."""
    node = cfg.get("numerics", {})
    if not isinstance(node, DictConfig | dict):
        raise UserError(f"numerics={node!r}: give single fields, such as numerics.tf32=true")
    known = [each.name for each in fields(Numerics)]
    for key in map(str, node):
        if key not in known:
            raise UserError(f"numerics.{key}: is unknown; the keys are {', '.join(known)}")
    return Numerics(**{str(key): value for key, value in node.items()})


def current() -> Numerics:
    """Those that were applied last."""
    return _applied


def facts(device: Any) -> dict[str, Any]:
    """For the provenance of a run on a `torch.device`: its model, and what was applied."""
    return {
        **asdict(_applied),
        "device": model_of(device),
        "cublas_workspace": os.environ.get(WORKSPACE),
    }


def identity(device: Any) -> dict[str, Any]:
    """What the key of a cached tensor says of the device that computed it."""
    changed = _applied.changed()
    return {"device": device.type} | ({"numerics": changed} if changed else {})


def device_of(name: str) -> Any:
    """The `torch.device` of a name; `auto` is the accelerator, or the CPU where there is none."""
    import torch

    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@cache  # one line for each key
def warn_of_slow_bfloat16(setting: str, device_type: str) -> None:
    """Log a warning where products of bfloat16 take many times as long as those of float32: on x86
    processors without AVX-512. setting: the key and its value."""
    import torch

    if device_type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log.warning(
            "%s: this processor has no AVX-512, and products of bfloat16 take many times as long "
            "as those of float32 here; give float32.",
            setting,
        )


def model_of(device: Any) -> str:
    """The model of a CUDA device, `none` where this machine has none; the type of any other."""
    import torch

    if device.type != "cuda":
        return str(device.type)
    if not torch.cuda.is_available():
        return "none"
    return str(torch.cuda.get_device_name(device))
