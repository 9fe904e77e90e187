"""SPAN > STAGE EVENT, and back: what the server, the span processor and the transport to a Collector have in common."""
