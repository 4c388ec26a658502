"""The harness's index of tasks, cached."""

from pathlib import Path

import pytest

from qexp.eval.harness import index

pytestmark = pytest.mark.usefixtures("own_cache")


class Manager:
    """The harness's, of three entries; counts how often it is made."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        folder = Path("tasks")
        self.task_index = {
            "one": index.Entry(
                "one", index.Kind.TASK, folder / "one.yaml", {"task": "one"}, {"few"}
            ),
            "both": index.Entry("both", index.Kind.GROUP, folder / "both.yaml", {"group": "both"}),
            "few": index.Entry("few", index.Kind.TAG, None, None, {"one"}),
        }


def test_it_is_built_once_for_each_installation(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index, "TaskManager", Manager)
    monkeypatch.setattr(index.tasks, "__file__", str(tmp_path / "tasks" / "__init__.py"))
    (tmp_path / "tasks").mkdir()
    built = index.entries()
    assert built == Manager().task_index and Manager.made == 2
    assert index.entries() == built and Manager.made == 2
    (tmp_path / "tasks" / "new.yaml").write_text("task: new")
    index.entries()
    assert Manager.made == 3
    monkeypatch.setattr(index, "version", lambda name: "another")
    index.entries()
    assert Manager.made == 4


@pytest.mark.slow
def test_it_is_the_harness_own() -> None:
    for _ in range(2):
        assert index.entries() == index.TaskManager().task_index
