"""Parity of the harness adapter with the harness's own model, and of local rows with the hub's."""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from helpers import rows
from helpers.protocols import llama, protocol
from hydra.core.global_hydra import GlobalHydra

from qexp.commands import bench
from qexp.common.errors import UserError
from qexp.eval.base import FloatModel, digest
from qexp.eval.harness import Harness, local_rows
from qexp.task import CausalLM

pytest.importorskip("lm_eval")
# The warnings are lm_eval's own.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_cache")]

CHOICES = ("piqa", "winogrande", "hellaswag", "arc_easy", "boolq", "mmlu_anatomy")
WAYS = ("right_to_wrong", "wrong_to_right")
KINDS = (*CHOICES, "blimp_adjunct_island", "lambada_openai", "wikitext", "gsm8k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows.write(tmp_path_factory.mktemp("rows"))


def harness(folder: Path, *tasks: str | dict, **fields: object) -> Harness:
    defaults: dict = {"source": "local", "folder": str(folder), "batch_size": 5, "bootstrap": 10}
    return Harness(name="zero", tasks=list(tasks), **(defaults | fields))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parity_with_the_harness_own_model(name: str, family: str, folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    task = llama(family)
    ours = harness(folder, name, shots=2 if name in ("mmlu_anatomy", "gsm8k") else None)
    hf = HFLM(task.model, tokenizer=task.tokenizer, batch_size=5)
    theirs, found = ours.ask(hf), ours.outcome(task).numbers
    compared = 0
    for key, value in theirs["results"][name].items():
        metric, _, chosen = key.partition(",")
        if chosen and value != "N/A":
            place = name if chosen == "none" else f"{name}/{chosen}"
            assert found[f"{place}/{metric}"] == pytest.approx(value, rel=1e-4)
            compared += 1
    assert compared and found[f"{name}/items"] == theirs["results"][name]["sample_len"]
    samples = theirs["samples"][name]
    again = ours.ask(_adapter(ours, task))["samples"][name]
    for one, other in zip(samples, again, strict=True):
        assert one["arguments"] == other["arguments"]
        for a, b in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert a == pytest.approx(b, rel=1e-4) if name == "wikitext" else True
            if name == "gsm8k":
                assert a == b


def _adapter(ours: Harness, task: CausalLM) -> object:
    from qexp.eval.harness.model import Model

    return Model(task, ours.batch_size, ours.name)


def test_wikitext_is_the_projects_word_perplexity(folder: Path) -> None:
    from qexp.data.standard import StandardCorpus

    corpus = StandardCorpus("wikitext2", "validation", "test", "local", str(folder))
    task = llama()
    word = protocol("lm_eval_word", corpus)(task)
    found = harness(folder, "wikitext").outcome(task).numbers
    assert found["wikitext/word_perplexity"] == pytest.approx(word["ppl"], rel=1e-6)


HUB = {
    ("allenai/ai2_arc", "ARC-Easy"): {
        "id": "q1",
        "question": "What is 1?",
        "choices": {"text": ["one", "two", "ten"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    ("aps/super_glue", "boolq"): {"question": "is it 1", "passage": rows.STORY, "label": 0},
    ("EleutherAI/lambada_openai", "default"): {"text": f"{rows.STORY}Then 1 of them saw the moon"},
    ("Rowan/hellaswag", None): {
        "ctx_a": f"{rows.STORY}A man is on roof 1.",
        "ctx_b": "he",
        "ctx": f"{rows.STORY}A man is on roof 1. he",
        "activity_label": "Roof work",
        "endings": ["is up.", "is ripping tiles off.", "starts to pull.", "is up there."],
        "label": "1",
    },
    ("truthfulqa/truthful_qa", "generation"): {
        "type": "Adversarial",
        "category": "Cats",
        "question": "Where do 1 cats sit?",
        "best_answer": "On the mat",
        "correct_answers": ["On the mat", "Nowhere, or so I hear"],
        "incorrect_answers": ["On the dog"],
        "source": "https://example.org",
    },
}


@pytest.mark.parametrize("data", HUB, ids=str)
def test_local_rows_become_those_of_the_hub(data: tuple[str, str | None], folder: Path) -> None:
    path, name = data
    facts = local_rows.find(path, name)
    assert facts is not None
    [file] = [file for _, file in local_rows.local(facts, name, folder)]
    assert local_rows.rows(facts, name, file)[1] == HUB[data]
    assert facts.row(HUB[data]) == HUB[data]  # a file as the hub has it will do as well


def test_a_sentence_that_is_whole_has_no_second_part() -> None:
    facts = local_rows.find("Rowan/hellaswag", None)
    assert facts is not None
    row = {"query": 'Youth: How to rest. Sit down. Then "breathe."', "endings": [], "label": 0}
    assert facts.row(row)["ctx_b"] == ""


def test_the_prompt_is_the_hubs(folder: Path) -> None:
    def instances(name: str, shots: int) -> list:
        asked = harness(folder, name, shots=shots)
        asked.definition()
        return asked._loaded["tasks"][name].instances

    context, ending = instances("hellaswag", 0)[0].args
    assert context.endswith("A man is on roof 0. He") and ending == " is up."
    questions = instances("mmlu_anatomy", 1)
    context, letter = questions[1].args
    assert "Is 0?\nA. w" in context and letter == " B"
    assert len(questions) == 16  # one subject of the two


def test_a_group_is_its_members_and_their_mean(tmp_path: Path) -> None:
    from qexp.eval.harness.tasks import manager

    pairs = permutations(("cat", "moon", "boat", "tree"), 2)
    asked = [{"sentence_good": f"A {a} or {b}", "sentence_bad": f"A {b} or {a}"} for a, b in pairs]
    text = "".join(json.dumps(row) + "\n" for row in asked)
    entries = manager().task_index
    members = [
        name for name in entries if name.startswith("blimp_") and "task" in entries[name].cfg
    ]
    members = [name for name in members if not name.startswith("blimp_nl")]
    (tmp_path / "tasks/blimp").mkdir(parents=True)
    for name in members:
        place = tmp_path / f"tasks/blimp/{name.removeprefix('blimp_')}.jsonl"
        place.write_text(text)
    start = FloatModel({"model": "llama"}, llama, tmp_path)
    other = llama()
    for parameter in other.blocks.parameters():
        parameter.data = torch.randn_like(parameter)
    suite = harness(tmp_path, "blimp")
    numbers = suite.measure_float(start)(other)
    items = {f"{name}/acc": torch.tensor([float(at)]) for at, name in enumerate(members)}
    cached = dict(reversed(items.items()))
    assert torch.equal(
        suite._with_groups(items)["blimp/acc"], suite._with_groups(cached)["blimp/acc"]
    )
    assert len(members) == 67
    assert {key.partition("/")[0] for key in numbers} == {"blimp", *members}
    assert numbers["blimp/acc"] == pytest.approx(numbers["blimp_causative/acc"])
    flips = [f"{task}/acc_{way}" for task in ("blimp", "blimp_causative") for way in WAYS]
    assert numbers[flips[0]] == pytest.approx(numbers[flips[2]])
    assert numbers[flips[1]] == pytest.approx(numbers[flips[3]])
    assert max(numbers[key] for key in flips) > 0
    assert numbers["blimp/acc_change_stderr"] < numbers["blimp_causative/acc_change_stderr"]


def test_a_missing_file_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"piqa.*tasks/piqa/piqa_validation\.jsonl"):
        harness(tmp_path, "piqa").files()
    rows.write(tmp_path)
    with pytest.raises(UserError, match=r"2 examples come from the train.*arc_easy_train\.jsonl"):
        harness(tmp_path, "arc_easy", shots=2).files()
    assert harness(tmp_path, "arc_easy").files() == [tmp_path / "tasks/arc/arc_easy_test.jsonl"]


def own(tmp_path: Path, **fields: object) -> dict:
    """A user's task and its data file; the last of its four rows has no label."""
    file = tmp_path / "mine.jsonl"
    asked = [
        {"q": f"{n}?", "a": ["no", "yes"], "ok": 1, "more": {"label": "yes"}} for n in range(4)
    ]
    asked[3]["more"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    mine = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{q}}",
        "doc_to_choice": "a",
        "doc_to_target": "ok",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return mine | fields


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    mine = own(tmp_path)
    file = tmp_path / "mine.jsonl"
    asked = harness(tmp_path, mine)
    assert asked.files() == [file]
    assert asked(llama())["mine/items"] == 4
    file.unlink()
    with pytest.raises(UserError, match=r"mine.*mine\.jsonl is not a file"):
        harness(tmp_path, mine).files()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"doc_to_text": "{{p}}"}, r"doc_to_text: '{{p}}'.* q, a, ok, more .*'p' is undefined"),
        ({"doc_to_target": "{{a.label}}"}, r"doc_to_target: .*no attribute 'label'"),
        ({"doc_to_choice": "{{a.label}}"}, r"doc_to_choice: .*no attribute 'label'"),
        ({"doc_to_choice": None}, r"doc_to_choice: null"),
        ({"gen_prefix": "{{p}}"}, r"gen_prefix: .*'p' is undefined"),
        ({"doc_to_target": "maybe"}, r"doc_to_target: .*'maybe'.*\['no', 'yes'\]"),
        ({"doc_to_target": "{{a}}"}, r"doc_to_target: .*first row"),
        ({"validation_split": None, "test_split": "test"}, r"data_files has no rows of test"),
        ({"doc_to_txt": "q"}, r"doc_to_txt"),
        # of rows behind the first, and of the examples before it
        ({"doc_to_target": "{{more.label}}"}, r"doc_to_target: .*no attribute 'label'"),
        ({"num_fewshot": 9}, r"num_fewshot 9: .*larger than population"),
        (
            {"num_fewshot": 1, "fewshot_config": {"doc_to_text": "{{p}}", "split": "validation"}},
            r"fewshot_config\.doc_to_text: .*'p' is undefined",
        ),
    ],
    ids=str,
)
def test_a_task_that_cannot_be_rendered_is_named_before_any_is_measured(
    tmp_path: Path, fields: dict, said: str
) -> None:
    asked = harness(rows.write(tmp_path), "piqa", own(tmp_path, **fields))
    with pytest.raises(UserError, match=f"eval task mine: .*{said}") as caught:
        asked.check(llama())
    assert "\n" not in str(caught.value)


def test_the_definition_is_what_is_asked(folder: Path, tmp_path: Path) -> None:
    one = digest(harness(folder, "piqa").definition())
    assert one == digest(harness(rows.write(tmp_path), "piqa", source="auto").definition())
    for fields in ({"limit": 3}, {"batch_size": 4}, {"shots": 0, "limit": 8}):
        assert digest(harness(folder, "piqa", **fields).definition()) != one
    said = harness(folder, "gsm8k", shots=2).definition()
    assert said["lm_eval"] and said["tasks"]["gsm8k"]["shots"] == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"limit": 0}, "limit"), ({"source": "web"}, "source"), ({"batch_size": 0}, "batch_size")],
)
def test_wrong_fields_are_named(folder: Path, fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        harness(folder, "piqa", **fields)
    with pytest.raises(UserError, match="piqqa"):
        harness(folder, "piqqa").files()


def test_without_the_harness_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexp.eval.harness.evaluator.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \.\[eval\]"):
        harness(folder, "piqa").files()


def test_flips_against_the_float_model(folder: Path, tmp_path: Path) -> None:
    asked = harness(folder, "piqa", "hellaswag")
    plain = llama()
    start = FloatModel({"weights": "w"}, lambda: plain, tmp_path)
    same = asked.measure_float(start)(plain)
    assert same["piqa/acc_right_to_wrong"] == same["hellaswag/acc_norm_wrong_to_right"] == 0
    other = llama()
    for parameter in other.blocks.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    cached = FloatModel({"weights": "w"}, lambda: pytest.fail("measured twice"), tmp_path)
    found = asked.measure_float(cached)(other)
    for task in ("piqa", "hellaswag"):
        net = found[f"{task}/acc_wrong_to_right"] - found[f"{task}/acc_right_to_wrong"]
        assert found[f"{task}/acc"] - same[f"{task}/acc"] == pytest.approx(net)
        assert found[f"{task}/acc_change"] == pytest.approx(net)
    assert any(value > 0 for key, value in found.items() if key.endswith("to_wrong"))


def test_nan_is_an_error(folder: Path) -> None:
    task = llama()
    next(task.blocks.parameters()).data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"zero.*NaN"):
        harness(folder, "piqa")(task)


def test_the_bench_sets_the_harness_own_model_beside(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    monkeypatch.setenv("QEXP_DATA_DIR", str(folder))
    tasks = "eval.harness.tasks=[piqa,wikitext,gsm8k]"
    small = ("model=tiny_llama", "data=synthetic", "calibration=synthetic")
    bench.main(["zeroshot", *small, "eval=[harness,lm_eval_word]", tasks, "eval.harness.limit=2"])
    *_, piqa, wikitext, gsm8k, word = capsys.readouterr().out.splitlines()
    assert "| 4 of 4 |" in piqa and "acc" in piqa and float(piqa.split("|")[8]) < 1e-4
    assert "| 4 of 4 |" in gsm8k  # texts, by two filters
    assert "word_perplexity" in wikitext and "ppl" in word
