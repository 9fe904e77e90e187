# `nostage.py` is compiled with its classes as they are: what they hold instead of the stage's fields is theirs alone.
