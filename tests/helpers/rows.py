"""A few rows of harness tasks as files, in the layouts that local files have."""

import json
from pathlib import Path

STORY = "The cat sat on the mat and looked at the dog that slept below the old table. "

FILES: dict[str, list[dict]] = {
    "tasks/piqa/piqa_validation.jsonl": [
        {
            "goal": f"How to keep {n} cats?",
            "sol1": f"Feed {n}.",
            "sol2": f"Feed {n} dogs.",
            "label": n % 2,
        }
        for n in range(9)
    ],
    "tasks/winogrande/winogrande_xl_validation.jsonl": [
        {
            "sentence": f"Ann was older than Mary by {n} years so _ went first to the house.",
            "option1": "Ann",
            "option2": "Mary",
            "answer": str(1 + n % 2),
        }
        for n in range(8)
    ],
    "hellaswag/hellaswag_val.jsonl": [
        {
            "ind": n,
            "query": f"Roof work: {STORY}A man is on roof {n}. he",
            "endings": ["is up.", "is ripping tiles off.", "starts to pull.", "is up there."],
            "label": n % 4,
        }
        for n in range(7)
    ],
    "tasks/arc/arc_easy_test.jsonl": [
        {
            "id": f"q{n}",
            "question": f"What is {n}?",
            "choices": ["one", "two", "ten"],
            "gold": n % 3,
        }
        for n in range(6)
    ],
    "tasks/boolq/boolq_validation.jsonl": [
        {"question": f"is it {n}", "answer": n % 2 == 0, "passage": STORY} for n in range(5)
    ],
    "tasks/mmlu/mmlu_test.jsonl": [
        {
            "question": f"Where is {n}?",
            "subject": subject,
            "choices": ["a", "b", "c", "d"],
            "answer": 1,
        }
        for subject in ("anatomy", "virology")
        for n in range(4)
    ],
    "tasks/mmlu/mmlu_dev.jsonl": [
        {
            "question": f"Is {n}?",
            "subject": "anatomy",
            "choices": ["w", "x", "y", "z"],
            "answer": n % 4,
        }
        for n in range(5)
    ],
    "tasks/gsm8k/train.jsonl": [
        {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
        for n in range(9)
    ],
    "tasks/gsm8k/test.jsonl": [
        {"question": f"What is {n} + 2?", "answer": f"It is {n + 2}.\n#### {n + 2}"}
        for n in range(5)
    ],
    "lambada/lambada_openai_test.jsonl": [
        {"context": f"{STORY}Then {n} of them saw the", "continuation": "moon"} for n in range(6)
    ],
    "tasks/blimp/adjunct_island.jsonl": [
        {"sentence_good": f"Who should {n} hug?", "sentence_bad": f"Who should {n} hugs?"}
        for n in range(6)
    ],
    "tasks/truthfulqa/TruthfulQA.csv": [
        {
            "Type": "Adversarial",
            "Category": "Cats",
            "Question": f"Where do {n} cats sit?",
            "Best Answer": "On the mat",
            "Correct Answers": "On the mat; Nowhere, or so I hear;",
            "Incorrect Answers": "On the dog",
            "Source": "https://example.org",
        }
        for n in range(3)
    ],
    "wikitext2/wiki.test.raw": [],
}


def write(folder: Path) -> Path:
    for name, rows in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".csv"):
            text = "".join(
                ",".join(f'"{v}"' for v in row) + "\n"
                for row in [list(rows[0]), *map(dict.values, rows)]
            )
        if name.endswith(".raw"):
            text = "".join(f" \n = Page {n} = \n \n {STORY * (3 * n + 1)}\n" for n in range(3))
        path.write_text(text)
    return folder
