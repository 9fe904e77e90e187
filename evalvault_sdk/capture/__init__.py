"""RECORD: what happens in the caller's thread, from a stage's start to its bytes."""
