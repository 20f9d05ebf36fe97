"""Arguments, streamers and outputs of model.generate."""
