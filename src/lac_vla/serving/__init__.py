"""One model behind openpi's websocket protocol, for any number of robots."""
