"""Measurements and checks that run from a checkout: ``python -m benchmarks NAME``. No wheel holds them."""
