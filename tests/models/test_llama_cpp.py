"""GGUF exports computed by llama.cpp (xllamacpp), which rounds inputs of matrices to 8 bits."""

import json
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.exports import LLAMA, folders_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from qexp.commands.export import perplexities
from qexp.common.errors import UserError
from qexp.models import llama_cpp
from qexp.models.export import Options, export
from qexp.models.from_run import FromRun

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="llama.cpp (xllamacpp) is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.usefixtures("configured")

MERGES = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "a"), ("e", "r")]
ROPE = "{rope_type:llama3,rope_theta:10000.0,factor:8.0,low_freq_factor:1.0,high_freq_factor:4.0,\
original_max_position_embeddings:32}"
KL, LOSS = 2e-3, 0.01  # of 8-bit inputs, per token


def pieces() -> PreTrainedTokenizerBase:
    """A SentencePiece vocabulary: special tokens, bytes, letters, a few merges."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz", *("".join(pair) for pair in MERGES)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(
        models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_pairs() -> PreTrainedTokenizerBase:
    """Qwen 2's kind of vocabulary: bytes, a few merges, an end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
    words = [*letters, *("".join(pair) for pair in pairs), "<|endoftext|>"]
    return Qwen2Tokenizer({word: index for index, word in enumerate(words)}, pairs)


TOKENIZERS = {"model=tiny_qwen2": byte_pairs}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, configured: None):
    """`make("weight.bits=3")`: the folder of a run of a model with that vocabulary."""
    folders = folders_of(tmp_path_factory)

    def of(*overrides: str) -> Path:
        place = tmp_path_factory.mktemp("tokenizer")
        tokenizer = next((TOKENIZERS[key] for key in overrides if key in TOKENIZERS), pieces)()
        tokenizer.save_pretrained(place)
        sizes = (f"+model.tokenizer={place}", f"model.sizes.vocab_size={len(tokenizer)}")
        ends = ("model.sizes.bos_token_id=1", "model.sizes.eos_token_id=2")
        return folders(*LLAMA, *overrides, *sizes, *ends)

    return of


@pytest.fixture
def serve() -> Iterator:
    """`serve(path)`: llama.cpp with that file."""
    running = []

    def start(path: Path):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
        settings.cpuparams.n_threads, settings.verbosity = 1, -1
        running.append(xllamacpp.Server(settings))
        return running[-1]

    yield start
    running.clear()  # stops the server


CASES = {
    "Q4_0": (("weight.bits=3",), None),
    "Q5_0": ((), None),
    "Q8_0": (("weight.bits=8", "weight.symmetric=true"), None),
    "wider": ((), "Q8_0"),
    "llama3": ((f"+model.sizes.rope_parameters={ROPE}",), None),
    "qwen2": (("model=tiny_qwen2",), None),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_has_the_runs_loss_on_the_same_tokens(make, tmp_path, case):
    overrides, container = CASES[case]
    folder, out = make(*overrides), tmp_path / "a.gguf"
    export(folder, out, "gguf", Options(library=False, container=container))
    model = FromRun(str(folder)).loaded().model
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (48,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    other = llama_cpp.Engine(out, 1).logits(tokens).log_softmax(-1)
    losses = [float(-each[:-1].gather(1, tokens[1:, None]).mean()) for each in (own, other)]
    divergence = float((own.exp() * (own - other)).sum(-1).mean())
    print(
        f"{case}: loss {losses[0]:.4f} in the run, {losses[1]:.4f} in llama.cpp, {divergence=:.1e}"
    )
    assert divergence < KL and abs(losses[0] - losses[1]) < LOSS
    with torch.no_grad():  # one position further the same tokens give another model
        wrong = model(input_ids=tokens[None, 1:]).logits[0].log_softmax(-1)
    assert float((wrong.exp() * (wrong - other[1:])).sum(-1).mean()) > 10 * KL


def test_sequences_of_any_length_are_computed_alone(make, tmp_path):
    out = tmp_path / "a.gguf"
    export(make(), out, "gguf", Options(library=False))
    engine = llama_cpp.Engine(out, 1)
    tokens = torch.randint(200, (300,), generator=torch.Generator().manual_seed(1))
    first = engine.logits(tokens[:20])
    longer = engine.logits(tokens)
    assert torch.equal(engine.logits(tokens[:20]), first)
    own, other = first.log_softmax(-1), longer[:20].log_softmax(-1)
    assert float((own.exp() * (own - other)).sum(-1).mean()) < KL
    with pytest.raises(UserError, match="computes 2048 tokens at once, not 2049"):
        engine.logits(torch.zeros(2049, dtype=torch.long))
    (tmp_path / "b.gguf").write_bytes(out.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"b\.gguf: llama\.cpp cannot load it"):
        llama_cpp.Engine(tmp_path / "b.gguf", 1)


def test_a_target_computes_the_runs_perplexity(make, tmp_path):
    folder = make("eval=held_out")
    options = Options(library=False, compute=partial(perplexities, folder))
    for place, format, near in (("a", "float", 1e-6), ("a.gguf", "gguf", LOSS)):
        facts = export(folder, tmp_path / place, format, options)
        [(name, value)] = facts["computed"].items()
        assert value == pytest.approx(facts["metrics"][name], rel=near)
        fact = facts["verified"][-1]
        assert fact["level"] == 3 and fact["metrics"] == [name] and 0 <= fact["kl"] < near
        assert fact["library"].startswith("xllamacpp" if format == "gguf" else "transformers")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["model=tiny_llama", "model=tiny_qwen2"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(make, serve, tmp_path, model):
    tokenizer = TOKENIZERS.get(model, pieces)()
    export(make(model), tmp_path / "a.gguf", "gguf")
    server = serve(tmp_path / "a.gguf")
    for text in ("the other", "in a ther", "thé \U0001f600\n x", "a  b", "the"):
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["tokens"] == tokenizer(text)["input_ids"], text
