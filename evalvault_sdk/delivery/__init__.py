"""QUEUE > BATCH > TRANSPORT: what happens to an encoded event, in the worker's thread."""
