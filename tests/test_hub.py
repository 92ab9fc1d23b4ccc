"""Checkpoints on the Hugging Face Hub. A server on this machine has the Hub's routes."""
import functools
import hashlib
import http.server
import json
import threading
from pathlib import Path

import huggingface_hub
import pytest

from mmx.checkpoints import convert
from mmx.config import ConfigError
from mmx.files import hub

ORACLE = Path(__file__).parent / "oracles" / "c_partial_orig" / "ckpt"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Has org/model with the files of ORACLE, and its branch "old"; org/gated is gated."""
    paths = ()

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/model/revision/") and path.rpartition("/")[2] in ("main", "old", SHA):
            return self._send(json.dumps({"id": "org/model", "sha": SHA}).encode())
        if path == f"/api/models/org/model/tree/{SHA}":
            entries = [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                       for name, content in (self.server.files | {"pickle.bin": b""}).items()]
            return self._send(json.dumps(entries).encode())
        name = path.rpartition(f"/org/model/resolve/{SHA}/")[2]
        if name in self.server.files:
            return self._send(self.server.files[name], {"X-Repo-Commit": SHA})
        code = "GatedRepo" if "gated" in path else "RevisionNotFound" if "org/model" in path else "RepoNotFound"
        return self._send(b"{}", {"X-Error-Code": code}, 403 if code == "GatedRepo" else 404)

    def _send(self, content: bytes, headers=(), status: int = 200):
        self.send_response(status)
        own = {"Content-Length": len(content), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        for key, value in (own | dict(headers)).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in ORACLE.iterdir() if path.is_file()}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as found:
        found.files, found.asked = files, []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        download = functools.partial(huggingface_hub.snapshot_download, endpoint=f"http://127.0.0.1:{found.server_port}",
                                     cache_dir=str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.chdir(tmp_path)
        yield found
        found.shutdown()


@pytest.mark.parametrize("name", ["org/model", "hf://org/model", "hf://org/model@old", f"org/model@{SHA}"])
def test_a_checkpoint_of_the_hub_equals_its_directory(name, server):
    found, wanted = convert.open_source(name), convert.open_source(ORACLE)
    assert found.model == wanted.model and found.tensors.keys() == wanted.tensors.keys()
    assert (Path(found.directory) / "model.safetensors").read_bytes() == (ORACLE / "model.safetensors").read_bytes()
    assert not any("pickle" in path for path in server.asked)


@pytest.mark.parametrize("name, message", [
    ("hf://org/none", "there is no org/none on the Hugging Face Hub, or it is private: log in"),
    ("org/none", "checkpoint org/none is not a directory, and there is no org/none"),
    ("hf://org/gated", "org/gated on the Hugging Face Hub is gated: accept its conditions"),
    ("hf://org/model@new", "org/model on the Hugging Face Hub has no revision 'new'"), ("hf://org", "must be hf://ORG/NAME"),
])
def test_mistakes_are_one_line(name, message, server):
    with pytest.raises(ConfigError, match=message) as error:
        hub.resolve(name)
    assert "\n" not in str(error.value)


def test_paths_on_disk_are_not_asked_for(server, tmp_path):
    (tmp_path / "runs").mkdir()
    for path in ("runs/tiny", "./org/model", "/org/model", "org", "a/b/c", tmp_path / "org", "gs://org/model"):
        assert hub.resolve(path) == path
    assert not server.asked
