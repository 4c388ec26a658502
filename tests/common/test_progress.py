"""The switch of progress bars."""

import io
import sys

from tqdm import auto

from qexp.common import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_of_other_libraries_follow_the_switch(monkeypatch) -> None:
    monkeypatch.setenv("QEXP_PROGRESS", "1")  # put back afterwards
    monkeypatch.setattr(auto.tqdm, "__init__", auto.tqdm.__init__)
    for wanted in (True, False, True):
        written = Terminal()
        monkeypatch.setattr(sys, "stderr", written)
        progress.show(wanted)
        assert list(auto.tqdm(range(3), desc="of a library")) == [0, 1, 2]
        assert list(progress.bar(range(3), "ours")) == [0, 1, 2]
        assert ("of a library" in written.getvalue()) is wanted
        assert ("ours" in written.getvalue()) is wanted
