"""A server that `mmgrpo serve` starts, for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

START_S = 400


class Server:
    """Start ``mmgrpo serve CONFIG``; the port is free, and stays the same when it starts again."""

    def __init__(self, config, *overrides, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        options = "max_model_len: 160, max_num_seqs: 2000"
        self.engine = f"rollout.engine={{name: vllm, url: '{self.url}', options: {{{options}}}}}"
        self._command = [
            sys.executable, "-m", "mmgrpo", "serve", str(config), self.engine, *overrides,
        ]  # fmt: skip
        self._log = log
        self.start()

    def start(self):
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
        self.kill()
        raise AssertionError(f"vLLM did not start in {START_S} s")

    def kill(self):
        """End the server and its workers at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
