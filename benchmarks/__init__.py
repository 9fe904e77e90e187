"""What the speed claims rest on: run by `make bench`."""
