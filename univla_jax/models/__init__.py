"""The decoder and its parts; nothing here knows of robots."""
