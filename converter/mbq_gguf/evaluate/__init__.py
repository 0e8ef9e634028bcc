"""How good a file still is: exact match through the server, and distributions through libllama."""
