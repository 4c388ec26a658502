"""Where BOS is: in calibration windows, in protocols and in the losses of both."""

import copy

import pytest
import torch
from helpers.protocols import CORPUS, full_losses, llama, protocol

from qexp.common.errors import UserError
from qexp.data.calibration import Calibration
from qexp.data.mixture import Mixture
from qexp.eval.base import digest
from qexp.task import CausalLM

pytestmark = pytest.mark.usefixtures("own_cache")
KINDS = ("none", "start", "each", "auto")
# The kinds with which a window begins with BOS, by family and whether its tokenizer adds it.
EXPECTED = {
    ("llama", True): ("each", "auto"),
    ("llama", False): (),
    ("gemma3", True): ("each", "auto"),
    ("gemma3", False): ("auto",),
}


def task_of(family: str, adds: bool) -> CausalLM:
    task = llama(family)
    task.tokenizer = copy.deepcopy(task.tokenizer)
    task.tokenizer.add_bos_token = adds
    return task


def text_of(task: CausalLM, text: str, length: int) -> torch.Tensor:
    """Windows of the text without special tokens, behind a place for BOS."""
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([-1, *ids])
    return ids[: len(ids) // length * length].view(-1, length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "adds"), EXPECTED)
def test_calibration_windows_begin_with_bos_as_asked(family: str, adds: bool, kind: str) -> None:
    task = task_of(family, adds)
    bos, length = task.tokenizer.bos_token_id, 32
    recipe = Calibration(CORPUS, bos=kind, sequences=4, length=length)
    [batch] = recipe(task)
    found = batch["input_ids"]
    begun = kind in EXPECTED[family, adds]
    if begun or (kind == "start" and adds):
        expected = text_of(task, CORPUS.text("train"), length)[:4].clone()
        expected[: 4 if begun else 1, 0] = bos
        assert torch.equal(found[:, 1:], expected[:, 1:])
        assert torch.equal(found[expected[:, 0] == bos, 0], expected[expected[:, 0] == bos, 0])
        assert (found == bos).sum() == (4 if begun else 1)
    else:
        assert not (found == bos).any()
        ids = task.tokenizer(CORPUS.text("train"), add_special_tokens=False)["input_ids"]
        assert found.flatten().tolist() == ids[: 4 * length]
    assert recipe.definition()["bos"] == kind
    assert recipe.followed(task) == ({"add_bos": begun} if kind in ("each", "auto") else {})


@pytest.mark.parametrize(
    "sampling", ["shuffled", "random_windows", "random_documents", "short_documents"]
)
def test_every_sampling_puts_bos_in_the_place_of_the_first_token(sampling: str) -> None:
    task = task_of("llama", True)
    fields = {"sampling": sampling, "sequences": 5, "length": 120, "seed": 1}
    [batch] = Calibration(CORPUS, bos="each", **fields)(task)
    found = batch["input_ids"]
    assert found.shape[1] == 120 and len(found) > 1
    assert (found[:, 0] == task.tokenizer.bos_token_id).all()
    assert not (found[:, 1:] == task.tokenizer.bos_token_id).any()
    if sampling.endswith("documents"):  # of the same text, which has no BOS of its own in front
        [plain] = Calibration(CORPUS, bos="none", **fields)(task)
        assert torch.equal(found[:, 1:], plain["input_ids"][:, 1:])


def test_the_loss_counts_the_token_after_bos_and_not_bos() -> None:
    task = task_of("gemma3", False)
    [batch] = Calibration(CORPUS, bos="auto", sequences=3, length=20)(task)
    windows = batch["input_ids"]
    losses = torch.stack([full_losses(task, window[None]) for window in windows])
    assert losses.shape == (3, 19)  # of tokens 1 to 19: token 0, BOS, has none
    with torch.no_grad():
        assert float(task.loss(batch)) == pytest.approx(float(losses.mean()), rel=1e-5)
        other = windows.clone()
        other[:, 1] = (other[:, 1] + 1) % 200  # the token after BOS is a target
        rest = torch.stack([full_losses(task, window[None]) for window in other])
    assert (rest[:, 0] != losses[:, 0]).all()


@pytest.mark.parametrize("kind", ["each", "auto"])
@pytest.mark.parametrize(("family", "adds"), EXPECTED)
def test_protocols_score_everything_but_bos(family: str, adds: bool, kind: str) -> None:
    task = task_of(family, adds)
    bos, begun = task.tokenizer.bos_token_id, kind in EXPECTED[family, adds]
    asked = protocol("held_out", length=32, limit=3, bos=kind)
    windows = [window for passage in asked.passages(task) for window in passage.windows]
    for window in windows:
        assert (window.tokens[0] == bos) == begun and window.scored == 31
        assert bos not in window.tokens[1:]
    if begun:
        text = text_of(task, CORPUS.text("test"), 32)[:3, 1:]
        assert torch.equal(torch.stack([window.tokens[1:] for window in windows]), text)
    expected = [full_losses(task, window.tokens[None]) for window in windows]
    found = asked.token_losses(task)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert asked.followed(task) == {"add_bos": begun}


def test_crops_begin_with_bos() -> None:
    task = task_of("gemma3", False)
    task.tokenizer.model_max_length = 10**6
    asked, plain = (protocol("c4_gptq", length=60, count=4, bos=x) for x in ("auto", "none"))
    for one, other in zip(asked.passages(task), plain.passages(task), strict=True):
        assert one.windows[0].tokens[0] == task.tokenizer.bos_token_id
        assert torch.equal(one.windows[0].tokens[1:], other.windows[0].tokens[1:])
    with pytest.raises(UserError, match="bos 'end' is not one of none, start, each, auto"):
        protocol("c4_gptq", bos="end")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_that_expects_bos_warns_of_windows_without_it(family: str, caplog) -> None:
    task = task_of(family, adds=True)
    for kind in KINDS:
        caplog.clear()
        Calibration(CORPUS, bos=kind, sequences=2, length=16)(task)
        asked = [protocol("held_out", length=32, limit=2, bos=kind)]
        asked.append(protocol("c4_gptq", length=60, count=2, bos=kind))
        for each in asked:
            each.passages(task)
        warned = [each.getMessage().split(":")[0] for each in caplog.records]
        said = kind == "none" and family == "gemma3"
        places = ["calibration", *(f"eval {each.name}" for each in asked)]
        assert warned == (places if said else [])


def test_definitions_without_bos_are_those_of_before() -> None:
    task = task_of("llama", True)
    without, with_bos = protocol("wikitext2_raw_512x40"), protocol("wikitext2_bos_512x40")
    digests = [digest(each.definition() | each.followed(task)) for each in (without, with_bos)]
    assert digests[0] == "de13b469" and digests[1] != digests[0]
    assert with_bos.name == "wikitext2_bos_512x40"


def test_a_mixture_says_what_its_parts_did() -> None:
    task = task_of("gemma3", True)
    parts = {name: Calibration(CORPUS, bos=name, length=16) for name in ("none", "auto")}
    assert Mixture(parts).followed(task) == {"followed": {"auto": {"add_bos": True}}}
    assert Mixture({"none": parts["none"]}).followed(task) == {}
