"""Answers robots over a network: the wire format, batching, and the websocket server."""
