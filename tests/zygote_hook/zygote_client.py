"""Client of the zygote: requests a forked process."""

import json
import socket


def ask(zygote: str, request: dict[str, object], files: list[int]) -> socket.socket:
    """Have a zygote fork a process with these files; ``request["files"]`` says which numbers they have there, where
    they are not the standard files.

    Returns a connection that gives the process' id at once and its exit code at its end, four bytes each. The process
    is killed where the connection is closed.
    """
    data = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(zygote)
    socket.send_fds(connection, [len(data).to_bytes(4, "big")], files)
    connection.sendall(data)
    return connection
