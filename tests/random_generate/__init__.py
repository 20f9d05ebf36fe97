"""Random calls of `generate`, held to `model.generate`; scripts/fuzz_generate.sh runs them."""
