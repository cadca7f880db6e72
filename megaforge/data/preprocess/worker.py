"""A worker process of preprocessing: shards arrive as JSON lines on stdin, what became of them leaves on stdout.

Tokens never cross the pipe. A worker whose parent is gone stops at its next report, because the pipe is broken.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from megaforge.data.preprocess.plan import Shard
from megaforge.data.preprocess.shard import ShardTokenizer, WorkerSpec
from megaforge.errors import UserError


def main() -> int:
    """Serves until stdin ends; a user's mistake is sent to the parent, which prints it."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        tokenizer = ShardTokenizer(WorkerSpec.from_json(json.loads(sys.stdin.readline())))
        for line in sys.stdin:
            shard = Shard.from_json(json.loads(line))
            manifest = tokenizer.run(shard, lambda size, tokens: reply(progress=[size, tokens]))
            reply(done=manifest["end"])
    except UserError as error:
        reply(error=str(error))
        return 2
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
