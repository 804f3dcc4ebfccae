"""Models of the hub: a local server answers as it does, since no test may need a network."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load_file, save_file

from conftest import ROOT

GATED = "Access to model acme/gated is restricted. Visit https://huggingface.co/acme/gated to ask for access."


class Hub(BaseHTTPRequestHandler):
    """Serves the folders of server.root as the repositories acme/NAME; acme/gated to nobody."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0].strip("/").split("/")
        self.server.asked.append(path[-1])
        if "gated" in path:
            return self.answer(403, **{"X-Error-Code": "GatedRepo", "X-Error-Message": GATED})
        if path[:2] == ["api", "models"]:
            folder = self.server.root / path[3]
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            names = [str(file.relative_to(folder)) for file in files]
            tree = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": "1" * 40}
                    for name, file in zip(names, files)]
            about = {"id": f"acme/{path[3]}", "sha": "0" * 40, "siblings": [{"rfilename": n} for n in names]}
            return self.answer(200, json.dumps(tree if "tree" in path else about).encode())
        file = self.server.root.joinpath(path[1], *path[4:])
        if not file.is_file():
            return self.answer(404, **{"X-Error-Code": "EntryNotFound"})
        self.answer(200, file.read_bytes())

    do_HEAD = do_GET

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": "0" * 40,
                            "ETag": hashlib.sha1(body).hexdigest(), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Runs lines of code, in which load is load_pipeline. Returns what they print, and files asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.asked = tmp_path / "hub", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1",
           "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def run(*lines):
        code = "\n".join(["from pathlib import Path", "from rewards import load_reward",
                          "from support.loading import load_pipeline as load", *lines])
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-2000:]
        return done.stdout.splitlines(), server.asked

    yield run
    server.shutdown()


def test_a_gated_model_is_told_in_the_hubs_own_words_be_it_a_pipeline_or_a_rewards_network(hub):
    told, _ = hub("for work in (lambda: load('acme/gated'),",
                  "             lambda: load_reward('pickscore', reward_model='acme/gated'),",
                  "             lambda: load_reward('imagereward', reward_model='acme/gated')):",
                  "    try: work()", "    except ValueError as error: print(error)")
    assert len(told) == 3 and all("'acme/gated': 403" in line and line.endswith(GATED) for line in told)


def test_half_precision_alone_is_found_and_a_half_filled_cache_is_filled(hub, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "hub" / "half")
    for path in folder.rglob("*.safetensors"):
        save_file(load_file(path), path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    told, asked = hub("for lost in ('unet/*.safetensors', 'tokenizer/tokenizer.json', 'vae/config.json'):",
                      "    print(load('acme/half').unet.dtype)",
                      f"    for path in Path('{tmp_path}/home').rglob(lost): path.unlink()",
                      "print(load('acme/half').unet.dtype)")
    assert told == ["torch.float32"] * 4 and asked.count("diffusion_pytorch_model.fp16.safetensors") >= 4


def test_t5_is_not_fetched_if_it_is_not_wanted(hub, tiny_sd3, tmp_path):
    shutil.copytree(tiny_sd3, tmp_path / "hub" / "sd3")
    weights = tmp_path / "hub/sd3/text_encoder_3/model.safetensors"
    weights.rename(weights.with_name("t5.safetensors"))
    told, asked = hub("print(load('acme/sd3', t5=False).transformer.dtype)")
    assert told == ["torch.float32"] and "t5.safetensors" not in asked and "model.safetensors" in asked
