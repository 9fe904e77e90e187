"""The same data in our hands and in those of the real EvalVault 1.88: `make interop`."""
