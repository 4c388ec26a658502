"""The list of options, and what the files of conf/ say at their top."""

import os
import subprocess
import sys

import pytest

from qexp.cli import command
from qexp.common.errors import UserError
from qexp.config import options

OPTIONS = [option for found in options.groups().values() for option in found]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda each: f"{each.group}={each.name}")
def test_a_file_says_at_its_top_what_it_is(option) -> None:
    assert len(option.title) > 10, f"{option.path}: begin it with `# what it is (arXiv id)`"


def test_a_group_lists_its_options_with_their_papers(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert command("ls", ["method"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80
    gptq = " ".join(" ".join(said[said.index("\ngptq ") :].split("\ngptaq")[0].split()).split())
    assert gptq.startswith("gptq GPTQ / OPTQ: quantizes column by column")
    assert "[arXiv:2210.17323]" in gptq and "(2210.17323)" not in gptq
    names = {line.split()[0] for line in lines if line and not line.startswith((" ", "groups"))}
    assert names == {option.name for option in options.group("method")}
    assert "method/hessian" in said


def test_the_overview_names_every_option_and_the_defaults(capsys) -> None:
    assert command("ls", []) == 0
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {"method:", "gptq*", "python_docs*", "spqr"} <= words
    names = {option.name for option in OPTIONS}
    assert names <= {word.rstrip("*") for word in words}


def test_an_option_is_printed_as_it_is(capsys) -> None:
    assert command("ls", ["weight=nf4"]) == 0
    assert capsys.readouterr().out == options.option("weight", "nf4").text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("methods", "did you mean method?"), ("method=gtpq", "there is no such choice; did you mean")],
)
def test_an_unknown_name_is_one_sentence(wrong, said, capsys) -> None:
    assert command("ls", [wrong]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_option_knows_its_papers_and_examples() -> None:
    option = options.option("method", "gptq")
    assert option.papers == ["2210.17323"]
    assert option.examples[0].startswith("qexp method=gptq weight.bits=3")
    with pytest.raises(UserError, match="no such group"):
        options.group("nothing")


def test_a_reader_that_leaves_is_no_error() -> None:
    program = "from qexp.cli import main; import sys; sys.argv = ['qexp', 'ls', 'method']; main()"
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does once it has its lines
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 141 and not done.stderr


def test_it_needs_no_torch() -> None:
    program = (
        "import sys; from qexp.cli import command; command('ls', ['kv'])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
