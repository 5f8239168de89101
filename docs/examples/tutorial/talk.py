"""Talk in the room of step 3: `python talk.py ann` sends each line that you type, and prints what it hears."""

import os
import sys
import time
from threading import Thread

import jwt
from websockets.sync.client import ClientConnection, connect


def listen(ws: ClientConnection) -> None:
    for message in ws:
        print(message, flush=True)


url = os.environ.get("ROOM_URL", "ws://127.0.0.1:8080")
token = jwt.encode({"sub": sys.argv[1], "exp": time.time() + 3600}, os.environ["ROOM_KEY"], algorithm="HS256")
with connect(url, additional_headers={"Authorization": f"Bearer {token}"}) as ws:
    Thread(target=listen, args=(ws,), daemon=True).start()
    for line in sys.stdin:
        ws.send(line.strip())
