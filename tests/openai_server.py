"""A stand-in for a server that has OpenAI's /v1/chat/completions."""

import collections
import contextlib
import http.server
import json
import threading

KEY = "sk-this-must-not-be-seen"
"""A key, which its errors repeat."""


class StandIn:
    """A server whose answers ``reply(text, tries)`` makes: a text, or a status and headers. It keeps what came."""

    def __init__(self, reply):
        self.reply, self.seen, self.tries, self.lock = reply, [], collections.Counter(), threading.Lock()
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                with stand_in.lock:
                    stand_in.seen.append((self.path, dict(self.headers), body))
                    stand_in.tries[text] += 1
                    tries = stand_in.tries[text]
                said = stand_in.reply(text, tries)
                status, headers = (200, {}) if isinstance(said, str) else said
                message = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                message["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
                error = {"error": {"message": f"wrong key {KEY}?\nmore"}}
                raw = json.dumps(message if status == 200 else error).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                with contextlib.suppress(OSError):  # who asked has gone
                    self.end_headers()
                    self.wfile.write(raw)

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 64  # a connection that finds no place waits for a second

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
