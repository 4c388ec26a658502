"""A GGUF file computed by llama.cpp: the task of a run with its forward pass."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qexp.common.errors import UserError
from qexp.task import CausalLM, Task

PACKAGE = "xllamacpp"  # of the package index: a build of llama.cpp, whose functions it exports


class Settings(ctypes.Structure):
    """llama.cpp's structures of settings, whose sizes differ between its versions and are below
    this one. They are passed by value and not looked into, but for the first number."""

    _fields_ = (("context", ctypes.c_uint32), ("rest", ctypes.c_byte * 4092))


class TokenBatch(ctypes.Structure):
    """`struct llama_batch` of llama.h."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.POINTER(ctypes.c_float)),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_counts", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (Log, ctypes.c_void_p)),
    "llama_model_default_params": (Settings, ()),
    "llama_context_default_params": (Settings, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, Settings)),
    "llama_model_free": (None, (ctypes.c_void_p,)),
    "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, Settings)),
    "llama_free": (None, (ctypes.c_void_p,)),
    "llama_n_ctx": (ctypes.c_uint32, (ctypes.c_void_p,)),
    "llama_n_batch": (ctypes.c_uint32, (ctypes.c_void_p,)),
    "llama_set_n_threads": (None, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
    "llama_get_memory": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_memory_clear": (None, (ctypes.c_void_p, ctypes.c_bool)),
    "llama_batch_init": (TokenBatch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    "llama_batch_free": (None, (TokenBatch,)),
    "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, TokenBatch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
}


def name() -> str:
    """The distribution with its version, which has llama.cpp's own as its last number."""
    return f"{PACKAGE} {version(PACKAGE)}"


@cache
def _library() -> dict[str, Callable[..., Any]]:
    """llama.cpp's functions. UserError where the package is missing or does not export them."""
    try:
        import xllamacpp.xllamacpp as module

        library = ctypes.CDLL(module.__file__)
        found = {key: getattr(library, key) for key in SIGNATURES}
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(
            f"llama.cpp: {PACKAGE} is not installed or exports no C functions ({error}); "
            f"pip install qexp[export]"
        ) from error
    for key, (result, arguments) in SIGNATURES.items():
        found[key].restype, found[key].argtypes = result, arguments
    found["llama_log_set"](_quiet, None)
    return found


@Log
def _quiet(level: int, text: bytes, data: None) -> None:
    """llama.cpp describes every tensor that it loads."""


class Engine:
    """A GGUF file loaded by llama.cpp on the CPU. Keys and values are float16, as by default."""

    def __init__(self, path: Path, threads: int) -> None:
        self._call, self._path, self._threads = _library(), path, threads
        self._context, self._length = None, 0
        settings = self._call["llama_model_default_params"]()
        self._model = self._call["llama_model_load_from_file"](str(path).encode(), settings)
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load it")
        vocabulary = self._call["llama_model_get_vocab"](self._model)
        self.vocabulary: int = self._call["llama_vocab_n_tokens"](vocabulary)

    def __del__(self) -> None:
        self._reserve(0)
        if self._model:
            self._call["llama_model_free"](self._model)

    def logits(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens vocabulary"]:
        """Logits after each token of one sequence, in float32."""
        count = len(tokens)
        if count > self._length:
            self._reserve(count)
        self._call["llama_memory_clear"](self._call["llama_get_memory"](self._context), True)
        batch = self._call["llama_batch_init"](count, 0, 1)
        try:
            batch.count = count
            for index, token in enumerate(tokens.tolist()):
                batch.tokens[index], batch.positions[index] = token, index
                batch.sequence_counts[index], batch.sequences[index][0] = 1, 0
                batch.wanted[index] = 1
            if self._call["llama_decode"](self._context, batch):
                raise RuntimeError(f"{self._path}: llama.cpp did not compute {count} tokens")
        finally:
            self._call["llama_batch_free"](batch)
        found = self._call["llama_get_logits"](self._context)
        return torch.from_numpy(np.ctypeslib.as_array(found, (count, self.vocabulary)).copy())

    def _reserve(self, length: int) -> None:
        """Free the context, and make one for `length` tokens unless that is 0."""
        if self._context:
            self._call["llama_free"](self._context)
        self._context, self._length = None, length
        if not length:
            return
        settings = self._call["llama_context_default_params"]()
        settings.context = length
        self._context = self._call["llama_init_from_model"](self._model, settings)
        sizes = ("llama_n_ctx", "llama_n_batch")
        held = min(self._call[size](self._context) for size in sizes) if self._context else 0
        if held < length:
            raise UserError(f"{self._path}: llama.cpp computes {held} tokens at once, not {length}")
        self._call["llama_set_n_threads"](self._context, self._threads, self._threads)


class LlamaCpp(CausalLM):
    """The task of a run whose logits llama.cpp computes from a GGUF file, without gradients. Its
    hidden states are the logits."""

    def __init__(self, task: Task, path: Path) -> None:
        super().__init__(task.model, task.tokenizer)
        self.engine = Engine(path, torch.get_num_threads())

    def hidden(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        return torch.stack([self.engine.logits(tokens) for tokens in input_ids])

    def head(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape vocabulary"]:
        return hidden
