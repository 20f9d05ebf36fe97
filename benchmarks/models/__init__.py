"""Every model class of transformers that generates text, tiny and random, against `model.generate`."""
