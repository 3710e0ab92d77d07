"""Other packages that use torch.nn's recurrent modules, with fastbptt's in their place.

Each file is about one package, and does what its users do. `make clients` installs the packages and
runs the tests; where a package is absent its tests are skipped.
"""
