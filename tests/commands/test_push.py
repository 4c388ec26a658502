"""`qexp push` against a stand-in of the hub on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers.exports import LLAMA, folders_of
from huggingface_hub import constants

from qexp.cli import command
from qexp.models.export import export

pytestmark = pytest.mark.usefixtures("configured")


class Hub(BaseHTTPRequestHandler):
    """Takes commits of files that are sent in the request, as small ones are."""

    files: dict[str, bytes]
    private: list[str | None]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if type(self).refuses or self.headers.get("Authorization") != "Bearer secret":
            return self.answer(403, {"error": "You have no right to write"})
        if self.path == "/api/repos/create":
            type(self).private.append(json.loads(body).get("visibility"))
            return self.answer(200, {"url": f"http://{self.headers['Host']}/me/tiny"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/models/me/tiny/preupload/main":
            asked = json.loads(body)["files"]
            ways = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in asked
            ]
            return self.answer(200, {"files": ways})
        assert self.path == "/api/models/me/tiny/commit/main", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                type(self).files[line["value"]["path"]] = content
        url = f"http://{self.headers['Host']}/me/tiny/commit/abc"
        return self.answer(200, {"success": True, "commitOid": "abc", "commitUrl": url})

    def do_GET(self) -> None:
        self.answer(404, {"error": "not found"})

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    kind = type("OneHub", (Hub,), {"files": {}, "private": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, configured: None) -> Path:
    return folders_of(tmp_path_factory)(*LLAMA)


def test_a_run_is_exported_and_its_folder_uploaded(hub, run, tmp_path, capsys):
    assert command("push", [str(run), "me/tiny", "format=gptq", "--private"]) == 0
    out = capsys.readouterr().out
    assert "read back: 21 coded matrices" in out and out.endswith("/me/tiny/commit/abc\n")
    assert hub.private == ["private"]
    export(run, tmp_path / "tiny", "gptq")
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}


def test_an_export_is_uploaded_as_it_is(hub, run, tmp_path, capsys):
    export(run, tmp_path / "a", "awq")
    assert command("push", [str(tmp_path / "a"), "me/tiny"]) == 0
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    hub.files.clear()
    export(run, tmp_path / "a.gguf", "gguf")
    assert command("push", [str(tmp_path / "a.gguf"), "me/tiny"]) == 0
    assert hub.files == {"a.gguf": (tmp_path / "a.gguf").read_bytes()}
    assert hub.private == [None, None]


def test_what_cannot_be_pushed(hub, run, tmp_path, capsys, monkeypatch):
    export(run, tmp_path / "a", "awq")

    def said(*arguments: str) -> str:
        assert command("push", arguments) == 1
        return capsys.readouterr().err

    exported = str(tmp_path / "a")
    assert "is an export already" in said(exported, "me/tiny", "format=gptq")
    assert "is no name of a repository" in said(exported, "a/b/c")
    assert "one REPO" in said(exported, "me/tiny", "more")
    assert "weight=nf4" in said(str(run), "me/tiny", "format=nf4")
    assert "format=gguf4 is unknown" in said(str(run), "me/tiny", "format=gguf4")
    assert not hub.files and not hub.private
    hub.refuses = True
    assert "me/tiny: the hub did not take the export" in said(exported, "me/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "it needs a connection and a token" in said(exported, "me/tiny")
    assert command("push", [str(tmp_path / "nowhere"), "me/tiny"]) == 1
