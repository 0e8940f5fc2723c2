"""A container for the simulator's tests: what it does is told by hyperparameters and by the model it serves."""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BASE = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))


def train() -> None:
    config = {file.stem: json.loads(file.read_text()) for file in (BASE / "input" / "config").iterdir()}
    do = config["hyperparameters"].get("do", "")
    print(f"training {do}", flush=True)
    if do == "fail":
        (BASE / "output" / "failure").write_text("the images are upside down\n" + "x" * 2000)
        (BASE / "output" / "data" / "partial.txt").write_text("half")
        sys.exit(3)
    if do == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"pids {os.getpid()} {child.pid}", flush=True)
        time.sleep(600)
    if do == "wait":

        def stopped(*_: object) -> None:
            (BASE / "model" / "stopped").write_text("at the signal")
            sys.exit(0)

        signal.signal(signal.SIGTERM, stopped)
        print("waiting", flush=True)
        time.sleep(600)
    if do == "checkpoint":
        checkpoints = sorted((BASE / "checkpoints").iterdir())
        epoch = len(checkpoints)
        print(f"resumed at {epoch}", flush=True)
        (BASE / "checkpoints" / f"{epoch}.ckpt").write_text(str(epoch))
        if epoch < 2:
            time.sleep(600)
    if do == "pipe":
        read = [(BASE / "input" / "data" / f"train_{epoch}").read_bytes().hex() for epoch in range(2)]
        (BASE / "model" / "read.json").write_text(json.dumps(read))
    for epoch in range(3):
        print(f"epoch={epoch}; score={float(config['hyperparameters'].get('rate', 1)) * (epoch + 1)};", flush=True)
    print("", file=sys.stderr, flush=True)
    seen = {
        "arguments": sys.argv[1:],
        "base": str(BASE),
        "config": config,
        "data": sorted(str(file.relative_to(BASE / "input/data")) for file in (BASE / "input/data").rglob("*.*")),
        "environment": {name: os.environ.get(name) for name in ("COLOUR", "TRAINING_JOB_NAME", "TRAINING_JOB_ARN")},
        "aws": sorted(name for name in os.environ if name.startswith("AWS_")),
        "master": os.environ.get("DETKIT_MASTER_ADDR"),
    }
    host = config["resourceconfig"]["current_host"]
    (BASE / "model" / f"{host}.json").write_text(json.dumps(seen))
    if do != "no output":
        (BASE / "output" / "data" / "log.txt").write_text("done")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/execution-parameters" and "PARALLEL" in os.environ:
            self.answer(200, json.dumps({"MaxConcurrentTransforms": 4, "MaxPayloadInMB": 1}).encode())
        else:
            self.answer(200 if self.path == "/ping" else 404, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body.startswith(b"bad"):
            self.answer(400, b"no picture")
        elif body.startswith(b"pid"):
            self.answer(200, str(os.getpid()).encode())
        elif body.startswith(b"environment"):
            self.answer(200, json.dumps(dict(os.environ)).encode())
        else:
            self.answer(200, (BASE / "model" / "name").read_bytes() + b":" + body[::-1])

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", self.headers.get("Accept") or "text/plain")
        if custom := self.headers.get("X-Amzn-SageMaker-Custom-Attributes"):
            self.send_header("X-Amzn-SageMaker-Custom-Attributes", custom + "!")
        self.send_header("X-Content-Was", self.headers.get("Content-Type") or "nothing")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        print("asked", self.path, flush=True)


def serve() -> None:
    if os.environ.get("BROKEN"):
        sys.exit("the model does not load")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["DETKIT_PORT"])), Handler)
    server.serve_forever()


if __name__ == "__main__":
    serve() if "serve" in sys.argv else train()
