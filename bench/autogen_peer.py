"""Runs the host of autogen-http-runtime 0.1.0 on 127.0.0.1, on the port given, until it is told to stop.

Its log is off below ERROR: it writes lines for each call, which would slow it down.
"""

import asyncio
import logging
import sys

import uvicorn
from autogen_http_runtime.runtimes.http import HttpAgentServer


async def main(port: int) -> None:
    logging.disable(logging.WARNING)
    host = HttpAgentServer("127.0.0.1", port)
    # Its own `start` leaves uvicorn's log of every request on; the rest is what it would set.
    config = uvicorn.Config(
        host._app, host="127.0.0.1", port=port, loop="asyncio", access_log=False, log_level="warning"
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
