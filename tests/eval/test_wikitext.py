"""Word perplexity: pages, detokenised, in rolling windows; equal to lm-eval's."""

import math
import re

import pytest
import torch
from helpers.models import CONF
from helpers.protocols import full_losses, ids_of, llama, protocol

from qexp.data.synthetic import Synthetic
from qexp.eval.wikitext import detokenize, pages, words

pytestmark = pytest.mark.usefixtures("own_cache")


WIKI = (
    " \n = First page = \n \n It 's 3 @,@ 000 words ( or so ) ; the authors ' \" own \" ones . \n"
    " = = A section = = \n \n But N people said : no ! \n"
    " \n = Second , page = \n \n More [ text ] . \n"
    + " and on and on , for longer than one window of the model \n"
    * 3
)


class Wiki(Synthetic):
    def text(self, split: str) -> str:
        return WIKI


def test_pages_and_words() -> None:
    first, second = pages(WIKI)
    assert first.startswith(" = First page = \n") and first.endswith("no ! \n ")
    assert second.startswith(" = Second , page = \n")
    assert words(first) == len(re.split(r"\s+", first))
    clean = detokenize(first)
    assert "It's 3,000 words (or so); the authors'" in clean
    assert "== A section ==" in clean and "But 1 people said: no!" in clean


def test_word_perplexity_rolls_over_pages() -> None:
    task = llama()
    measured = protocol("lm_eval_word", Wiki(), length=40)(task)
    total, count = 0.0, 0
    for page in pages(WIKI):
        ids = ids_of(task, detokenize(page))
        ids = torch.cat([torch.tensor([[task.tokenizer.bos_token_id]]), ids], dim=1)
        for start in range(1, ids.shape[1], 40):
            end = min(start + 40, ids.shape[1])
            seen = ids[:, max(0, end - 41) : end]
            total += float(full_losses(task, seen)[-(end - start) :].sum())
        count += words(page)
    assert measured["ppl"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_word_perplexity_is_that_of_lm_eval(family: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    task = llama(family)
    path = CONF.parents[1] / "shared" / "data" / "wikitext2" / "wiki.test.raw"
    text = path.read_text()[:30_000] if path.is_file() else WIKI

    class Raw(Synthetic):
        def text(self, split: str) -> str:
            return text

    documents = [{"page": page} for page in pages(text)]
    engine = HFLM(pretrained=task.model, tokenizer=task.tokenizer, max_length=128, batch_size=4)
    requests = [
        Instance("loglikelihood_rolling", document, (wikitext_detokenizer(document),), i)
        for i, document in enumerate(documents)
    ]
    found = engine.loglikelihood_rolling(requests, disable_tqdm=True)
    pairs = [
        process_results(document, (value,))["word_perplexity"]
        for document, value in zip(documents, found, strict=True)
    ]
    expected = -sum(value for value, _ in pairs) / sum(count for _, count in pairs)
    measured = protocol("lm_eval_word", Raw(), length=128)(task)
    assert math.log(measured["ppl"]) == pytest.approx(expected, rel=1e-6)
